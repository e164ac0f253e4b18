//go:build amd64 || arm64

package shm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/procfs"
	"github.com/onecopy/onecopy/internal/proctest"
)

func TestPendingSealLink(t *testing.T) {
	d := newDir(t)
	p := newPending(t, d)
	_, err := p.WriteAt([]byte("contents"), 0)
	noErr(t, err)
	if names, err := d.Names(); err != nil || len(names) > 0 {
		t.Errorf("a pending segment has a name: %v, %v", names, err)
	}
	s := wantSegment(t, p, []byte("contents"))
	p.Abort() // nothing
	if _, err := s.File().Write([]byte("x")); err == nil {
		t.Error("the descriptor of a sealed segment writes")
	}
	noErr(t, s.Link(d, "name"))
	if b, err := os.ReadFile(d.Path() + "/name"); err != nil || string(b) != "contents" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestLinkNeverReplaces(t *testing.T) {
	d := newDir(t)
	noErr(t, d.Create("name", []byte("old"), 0o600))
	s := wantSegment(t, newPending(t, d), nil)
	wantErr(t, s.Link(d, "name"), fs.ErrExist)
	if b, err := os.ReadFile(d.Path() + "/name"); err != nil || string(b) != "old" {
		t.Errorf("%q, %v", b, err)
	}
	noErr(t, s.Link(d, "another"))
}

func TestLinkIntoARemovedDirectory(t *testing.T) {
	d := newDir(t)
	sub, err := d.Sub("s", 0o700, true)
	noErr(t, err)
	defer sub.Close()
	s := wantSegment(t, newPending(t, d), nil)
	noErr(t, os.Remove(sub.Path()))
	wantErr(t, s.Link(sub, "name"), fs.ErrNotExist)
}

func TestAbortGivesTheMemoryBack(t *testing.T) {
	d := newDir(t)
	p := newPending(t, d)
	_, err := p.WriteAt(make([]byte, 1<<20), 0)
	noErr(t, err)
	p.Abort()
	p.Abort()
	if _, err := p.WriteAt([]byte("x"), 0); err == nil {
		t.Error("an aborted segment can be written")
	}
}

// otherWriter opens a segment in the making, path, for writing, and keeps it open
// or mapped (args[1]) until stdin ends.
var otherWriter = child("other-writer", func(args []string) error {
	f, err := os.OpenFile(args[0], os.O_RDWR, 0)
	if err != nil {
		return err
	}
	if args[1] == "mapping" {
		if _, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
			return err
		}
		f.Close()
	}
	fmt.Println("open")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
})

// Mode 0444 takes nothing away from those who have the file open; only the kernel
// knows whether there are any.
func TestSealRefusesWhileAnybodyCanWrite(t *testing.T) {
	d := newDir(t)
	for _, how := range []string{"descriptor", "mapping"} {
		p := newPending(t, d)
		_, err := p.WriteAt(make([]byte, 8192), 0)
		noErr(t, err)
		other := proctest.Start(t, otherWriter, procFD(p.f), how)
		other.Line(t)
		_, err = p.Seal(ctxb)
		wantErr(t, err, ErrWriter)

		// When the writer is gone, a fresh copy can be sealed.
		p = newPending(t, d)
		_, err = p.WriteAt(make([]byte, 8192), 0)
		noErr(t, err)
		wantSegment(t, p, make([]byte, 8192))
		other.Kill()
	}
}

func TestSealWaitsForAWriterThatGoes(t *testing.T) {
	d := newDir(t)
	p := newPending(t, d)
	other := proctest.Start(t, otherWriter, procFD(p.f), "descriptor")
	other.Line(t)
	other.Stdin.Close() // it ends, in its own time
	s, err := p.Seal(ctxb)
	if err != nil {
		wantErr(t, err, ErrWriter) // it was slow
		return
	}
	s.Close()
}

func TestSealEndsWithItsContext(t *testing.T) {
	d := newDir(t)
	p := newPending(t, d)
	other := proctest.Start(t, otherWriter, procFD(p.f), "descriptor")
	other.Line(t)
	ctx, cancel := context.WithCancel(ctxb)
	cancel()
	_, err := p.Seal(ctx)
	wantErr(t, err, context.Canceled)
}

// Readers are no writers.
func TestSealWithReaders(t *testing.T) {
	d := newDir(t)
	p := newPending(t, d)
	_, err := p.WriteAt([]byte("x"), 0)
	noErr(t, err)
	r, err := os.Open(procFD(p.f))
	noErr(t, err)
	defer r.Close()
	m, err := Map(int(r.Fd()), 1, false)
	noErr(t, err)
	defer m.Unmap()
	wantSegment(t, p, []byte("x"))
}

func TestMapIsAligned(t *testing.T) {
	d := newDir(t)
	for _, size := range []int64{HugePage, HugePage + 1, 5*HugePage - 1, 64 << 20} {
		p := newPending(t, d)
		noErr(t, unix.Ftruncate(int(p.f.Fd()), size))
		for range 3 {
			m, err := Map(int(p.f.Fd()), size, false)
			noErr(t, err)
			if at := reflect.ValueOf(m.Bytes).Pointer(); at%HugePage != 0 || int64(len(m.Bytes)) != size {
				t.Errorf("%d bytes at %#x, want %d at a multiple of 2 MiB", len(m.Bytes), at, size)
			}
			noErr(t, m.Unmap())
			noErr(t, m.Unmap()) // once is enough
		}
	}
}

func TestMapSizes(t *testing.T) {
	d := newDir(t)
	want := randomBytes(1, HugePage+5)
	for _, n := range []int{0, 1, 4096, HugePage - 1, HugePage, HugePage + 5} {
		p := newPending(t, d)
		_, err := p.WriteAt(want[:n], 0)
		noErr(t, err)
		for _, populate := range []bool{false, true} {
			m, err := Map(int(p.f.Fd()), int64(n), populate)
			noErr(t, err)
			if string(m.Bytes) != string(want[:n]) {
				t.Errorf("%d bytes differ", n)
			}
			noErr(t, m.Unmap())
		}
	}
	if _, err := Map(0, -1, false); !errors.Is(err, ErrLimit) {
		t.Errorf("%v", err)
	}
	if _, err := Map(0, 1<<62, false); !errors.Is(err, ErrLimit) {
		t.Errorf("%v", err)
	}
}

// storer stores into a read-only mapping and is expected to die of it.
var storer = child("storer", func(args []string) error {
	f, err := os.Open(args[0])
	if err != nil {
		return err
	}
	m, err := Map(int(f.Fd()), 4096, false)
	if err != nil {
		return err
	}
	m.Bytes[0] = 1
	return nil
})

func TestMapIsReadOnly(t *testing.T) {
	d := newDir(t)
	noErr(t, d.Create("f", make([]byte, 4096), 0o600))
	p := proctest.Start(t, storer, d.Path()+"/f")
	wantFault(t, p)
	// From a read-only descriptor it cannot be made writable later either.
	f, _, err := d.Open("f")
	noErr(t, err)
	defer f.Close()
	m, err := Map(int(f.Fd()), 4096, false)
	noErr(t, err)
	defer m.Unmap()
	if err := unix.Mprotect(m.Bytes, unix.PROT_READ|unix.PROT_WRITE); err == nil {
		t.Error("mprotect made it writable")
	}
}

// Weights do not belong into core dumps.
func TestMapIsNotDumped(t *testing.T) {
	d := newDir(t)
	noErr(t, d.Create("f", make([]byte, 4096), 0o600))
	f, _, err := d.Open("f")
	noErr(t, err)
	defer f.Close()
	m, err := Map(int(f.Fd()), 4096, false)
	noErr(t, err)
	defer m.Unmap()
	smaps, err := os.ReadFile("/proc/self/smaps")
	noErr(t, err)
	_, after, ok := strings.Cut(string(smaps), d.Path()+"/f\n")
	if !ok {
		t.Fatal("the mapping is not in smaps")
	}
	_, flags, _ := strings.Cut(after, "VmFlags:")
	flags, _, _ = strings.Cut(flags, "\n")
	if !strings.Contains(flags, " dd") {
		t.Errorf("flags %s, want dd", flags)
	}
}

// pmdMapped is how much of our mappings of f lies in 2 MiB pages.
func pmdMapped(t *testing.T, f *os.File) int64 {
	t.Helper()
	var st unix.Stat_t
	noErr(t, unix.Fstat(int(f.Fd()), &st))
	id := procfs.FileID{Dev: st.Dev, Inode: st.Ino}
	res, err := procfs.Resident(os.Getpid(), map[procfs.FileID]struct{}{id: {}})
	noErr(t, err)
	return res[id].ShmemPMDMapped
}

func TestSegmentsLieInHugePages(t *testing.T) {
	d := newDir(t)
	const size = 9<<20 + 5 // 4 huge pages, and a rest
	want := randomBytes(1, size)
	for _, how := range []string{"copied", "written"} {
		p := newPending(t, d)
		f := &Fill{Threads: 2}
		if how == "copied" {
			_, err := p.Copy(ctxb, sourceFile(t, want), size, f)
			noErr(t, err)
		} else {
			w, err := p.NewWriter(size, f)
			noErr(t, err)
			_, err = w.Write(want)
			noErr(t, err)
			_, err = w.Finish(ctxb)
			noErr(t, err)
		}
		if f.Stats().Fallbacks > 0 {
			t.Skipf("the kernel grants no 2 MiB pages here: %+v", f.Stats())
		}
		s, err := p.Seal(ctxb)
		noErr(t, err)
		m, err := Map(int(s.File().Fd()), size, false)
		noErr(t, err)
		sum := byte(0)
		for i := 0; i < size; i += 4096 {
			sum ^= m.Bytes[i]
		}
		if got := pmdMapped(t, s.File()); got != 8<<20 {
			t.Errorf("%s: %d bytes in 2 MiB pages, want %d (%d)", how, got, 8<<20, sum)
		}
		noErr(t, m.Unmap())
		s.Close()
	}
}
