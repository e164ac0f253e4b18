//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/proctest"
)

// A soak: one process replaces its model again and again, others come, read and
// leave, and nothing in it may grow.

const (
	soakKey     = "org/soak"
	soakBytes   = 3 * mib / 2 // of a generation
	soakReaders = 15
)

// soakSource is version n of the model: every word of the weights is n.
func soakSource(n uint64) Source {
	return Source{Version: fmt.Sprint(n), Replace: true, Load: func(_ context.Context, w *Writer) error {
		version, err := w.Create("version", -1)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprint(version, n); err != nil {
			return err
		}
		weights, err := w.Create("weights.bin", soakBytes)
		if err != nil {
			return err
		}
		piece := bytes.Repeat(binary.LittleEndian.AppendUint64(nil, n), 4096/8)
		for range soakBytes / len(piece) {
			if _, err := weights.Write(piece); err != nil {
				return err
			}
		}
		return nil
	}}
}

// soakRead reads all of a model and returns its version.
func soakRead(m *Model) (uint64, error) {
	v, err := m.Bytes("version")
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(string(v), 10, 64)
	if err != nil {
		return 0, err
	}
	w, err := m.Bytes("weights.bin")
	if err != nil {
		return 0, err
	}
	if len(w) != soakBytes {
		return 0, fmt.Errorf("version %d has %d bytes", n, len(w))
	}
	for i := 0; i < len(w); i += 8 {
		if got := binary.LittleEndian.Uint64(w[i:]); got != n {
			return 0, fmt.Errorf("version %d has %d at byte %d", n, got, i)
		}
	}
	return n, nil
}

// footprint is what a process takes, beside its share of the processor.
type footprint struct {
	Descriptors, Threads, Goroutines int64
	Mappings, Others                 int64 // of files, and all others
	Anonymous, Shared                int64 // resident bytes
	Heap                             int64 // bytes in use after a collection
	Tmpfs                            int64 // bytes, of all processes
}

func takeFootprint() (f footprint, err error) {
	runtime.GC()
	debug.FreeOSMemory()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return f, err
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return f, err
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return f, err
	}
	value := func(name string) (n int64) {
		for line := range strings.Lines(string(status)) {
			if rest, ok := strings.CutPrefix(line, name+":"); ok {
				_, _ = fmt.Sscan(rest, &n)
			}
		}
		return n
	}
	files := int64(bytes.Count(maps, []byte(" /")))
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	return footprint{
		Descriptors: int64(len(fds)), Threads: value("Threads"), Goroutines: int64(runtime.NumGoroutine()),
		Mappings: files, Others: int64(bytes.Count(maps, []byte("\n"))) - files,
		Anonymous: value("RssAnon") << 10, Shared: (value("RssShmem") + value("RssFile")) << 10,
		Heap: int64(mem.HeapAlloc),
	}, nil
}

// soakOwner does what it is told by lines on stdin: "replace N", "measure".
var soakOwner = child("soak-owner", func(args []string) error {
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	var held *Model
	version := uint64(0)
	replace := func() error {
		version++
		m, err := r.GetOrLoad(ctxb, soakKey, soakSource(version))
		if err != nil {
			return err
		}
		if held != nil {
			if err := held.Close(); err != nil {
				return err
			}
		}
		held = m
		return r.Use(soakKey, func(m *Model) error {
			n, err := soakRead(m)
			if err == nil && n != version {
				err = fmt.Errorf("version %d was published, Use gives %d", version, n)
			}
			return err
		})
	}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var n int
		if _, err := fmt.Sscanf(in.Text(), "replace %d", &n); err == nil {
			for range n {
				if err := replace(); err != nil {
					return err
				}
			}
			if err := say(version); err != nil {
				return err
			}
			continue
		}
		f, err := takeFootprint()
		if err != nil {
			return err
		}
		s, err := r.Stats()
		if err != nil {
			return err
		}
		f.Tmpfs = s.Used + s.Overhead
		if err := say(f); err != nil {
			return err
		}
	}
	r.Release(soakKey)
	return errors.Join(held.Close(), r.Close())
})

// soakReader attaches, reads and leaves as often as each line on stdin says.
var soakReader = child("soak-reader", func(args []string) error {
	newest := uint64(0)
	visit := func() error {
		r, err := Open(args[0], nil)
		if err != nil {
			return err
		}
		m, err := r.Get(soakKey)
		if err != nil {
			return err
		}
		n, err := soakRead(m)
		if err == nil && n < newest {
			err = fmt.Errorf("version %d after %d", n, newest)
		}
		newest = n
		return errors.Join(err, m.Close(), r.Close())
	}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		n, err := strconv.Atoi(in.Text())
		if err != nil {
			return err
		}
		for range n {
			if err := visit(); err != nil {
				return err
			}
		}
		if err := say(newest); err != nil {
			return err
		}
	}
	return nil
})

// countedTmpfs is a path on a tmpfs for other processes, and how much of it is in
// use; nil where no tmpfs of its own can be mounted.
func countedTmpfs(t *testing.T, size int64) (dir string, used func() int64) {
	t.Helper()
	at := t.TempDir()
	if err := unix.Mount("tmpfs", at, "tmpfs", 0, fmt.Sprintf("size=%d,mode=0755", size)); err != nil {
		return proctest.TmpRegistry(t), nil
	}
	fd, err := unix.Open(at, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if e := unix.Unmount(at, unix.MNT_DETACH); err == nil {
		err = e
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	root := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)
	return filepath.Join(root, "registry"), func() int64 { return usedBytes(t, root) }
}

// TestSoak replaces a model (ONECOPY_SOAK: how often) while 15 processes attach,
// read and leave, and one more is killed in each round. A leak of one in 50
// replaces breaks it: the bounds are half of what that would make between the
// times that are compared.
func TestSoak(t *testing.T) {
	replaces, perRound := 600, 20
	if raceEnabled {
		t.Skip("the race detector has threads and memory of its own")
	}
	if s := os.Getenv("ONECOPY_SOAK"); s != "" {
		var err error
		if replaces, err = strconv.Atoi(s); err != nil || replaces < 600 {
			t.Fatalf("ONECOPY_SOAK=%s: want a number of replaces, at least 600", s)
		}
		perRound = max(perRound, replaces/200)
	}
	dir, used := countedTmpfs(t, 256*mib)
	openRegistry(t, dir, nil) // for the checks at the end

	owner := proctest.Start(t, soakOwner, dir)
	tell := func(p *proctest.Proc, text string, args ...any) {
		if _, err := fmt.Fprintf(p.Stdin, text+"\n", args...); err != nil {
			t.Fatalf("%v\n%s", err, p.Stderr())
		}
	}
	tell(owner, "replace 1")
	owner.Line(t)
	var readers []*proctest.Proc
	for range soakReaders {
		readers = append(readers, proctest.Start(t, soakReader, dir))
	}
	var samples []footprint
	for done := 1; done < replaces; done += perRound {
		leaver := proctest.Start(t, soakReader, dir)
		tell(leaver, "1000000")
		tell(owner, "replace %d", perRound)
		for _, r := range readers {
			tell(r, "5")
		}
		for _, p := range append(readers, owner) {
			p.Line(t)
		}
		leaver.Kill()
		tell(owner, "measure")
		f := nextWord[footprint](t, owner)
		if used != nil {
			f.Tmpfs = used()
		}
		samples = append(samples, f)
	}
	for _, p := range append(readers, owner) {
		p.Stdin.Close()
		if code := p.Wait(); code != 0 {
			t.Errorf("a process ended with code %d\n%s", code, p.Stderr())
		}
	}

	// Not the first ones: threads and caches come with the first rounds.
	n := len(samples)
	early, late := samples[n/6:n/2], samples[2*n/3:]
	between := (2*n/3 + (n-2*n/3)/2 - (n/6 + (n/2-n/6)/2)) * perRound
	items := int64(between / 50 / 2)
	for _, c := range []struct {
		what  string
		of    func(footprint) int64
		bound int64
	}{
		{"descriptors", func(f footprint) int64 { return f.Descriptors }, items},
		{"mappings of files", func(f footprint) int64 { return f.Mappings }, items},
		{"other mappings", func(f footprint) int64 { return f.Others }, items + 16}, // the Go heap cuts its own to pieces
		{"threads", func(f footprint) int64 { return f.Threads }, items},
		{"goroutines", func(f footprint) int64 { return f.Goroutines }, items},
		{"resident shared bytes", func(f footprint) int64 { return f.Shared }, items * soakBytes},
		{"resident bytes of its own", func(f footprint) int64 { return f.Anonymous }, items * soakBytes},
		{"heap", func(f footprint) int64 { return f.Heap }, 64<<10 + items*1024},
		{"bytes on the tmpfs", func(f footprint) int64 { return f.Tmpfs }, items * soakBytes},
	} {
		a, b := median(early, c.of), median(late, c.of)
		t.Logf("%s: %d after %d replaces, %d after %d more (bound +%d)", c.what, a, (n/3)*perRound, b, between, c.bound)
		if b-a > c.bound {
			t.Errorf("%s grew from %d to %d within %d replaces", c.what, a, b, between)
		}
	}
}

func median(fs []footprint, of func(footprint) int64) int64 {
	var all []int64
	for _, f := range fs {
		all = append(all, of(f))
	}
	slices.Sort(all)
	return all[len(all)/2]
}
