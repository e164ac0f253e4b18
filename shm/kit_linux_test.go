//go:build amd64 || arm64

package shm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/digest"
	"github.com/onecopy/onecopy/internal/proctest"
)

var ctxb = context.Background()

// newDir is a directory on /dev/shm.
func newDir(t testing.TB) *Dir {
	t.Helper()
	d, err := OpenDir(proctest.TmpRegistry(t), DirOptions{Create: true, Perm: 0o700})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func newPending(t testing.TB, d *Dir) *Pending {
	t.Helper()
	p, err := d.NewPending("segment")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Abort)
	return p
}

func noErr(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantErr fails the test unless err is each of the targets, and names a path.
func wantErr(t testing.TB, err error, targets ...error) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want %v", targets)
	}
	for _, target := range targets {
		if !errors.Is(err, target) {
			t.Fatalf("error %q, want %v", err, target)
		}
	}
	var pe *fs.PathError
	if !errors.As(err, &pe) || pe.Path == "" || pe.Op == "" {
		t.Errorf("error %q names no operation and path", err)
	}
}

func wantText(t testing.TB, err error, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if err == nil || !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not say %q", err, p)
		}
	}
}

func randomBytes(seed byte, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// sourceFile is an open file with the given contents, in the page cache.
func sourceFile(t testing.TB, b []byte) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "source")
	noErr(t, os.WriteFile(path, b, 0o644))
	f, err := os.Open(path)
	noErr(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// wantSegment seals p and compares it with what it has to hold.
func wantSegment(t testing.TB, p *Pending, want []byte) *Sealed {
	t.Helper()
	s, err := p.Seal(ctxb)
	noErr(t, err)
	t.Cleanup(func() { s.Close() })
	fi, err := s.File().Stat()
	noErr(t, err)
	if fi.Size() != int64(len(want)) || fi.Mode() != 0o444 {
		t.Errorf("%d bytes, mode %v; want %d bytes, 0444", fi.Size(), fi.Mode(), len(want))
	}
	m, err := Map(int(s.File().Fd()), int64(len(want)), false)
	noErr(t, err)
	defer m.Unmap()
	if !bytes.Equal(m.Bytes, want) {
		t.Error("other bytes than were written")
	}
	if hole, err := unix.Seek(int(s.File().Fd()), 0, unix.SEEK_HOLE); len(want) > 0 && (err != nil || hole != int64(len(want))) {
		t.Errorf("a hole at %d of %d, %v", hole, len(want), err)
	}
	return s
}

// sumsOf are the digests of the chunks of b.
func sumsOf(b []byte) (sums []byte) {
	for len(b) > 0 {
		n := min(len(b), digest.ChunkBytes)
		s := digest.Sum(b[:n])
		sums, b = append(sums, s[:]...), b[n:]
	}
	return sums
}

// child registers a program that fails with what fn returns.
func child(name string, fn func(args []string) error) string {
	proctest.Program(name, func(args []string) int {
		if err := fn(args); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return 0
	})
	return name
}

// procFD is the path by which another process reaches a descriptor of this one.
func procFD(f *os.File) string {
	return "/proc/" + strconv.Itoa(os.Getpid()) + "/fd/" + strconv.Itoa(int(f.Fd()))
}

// wantFault waits for the end of a process that a bad memory access has to kill.
// Its last words may take a moment longer than itself.
func wantFault(t testing.TB, p *proctest.Proc) {
	t.Helper()
	code := p.Wait()
	for range 5000 {
		if strings.Contains(p.Stderr(), "fault address") {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Errorf("code %d, want a fault\n%s", code, p.Stderr())
}
