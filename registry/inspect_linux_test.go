//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/invariants"
	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// What is shown, and what is mapped.

func TestEntries(t *testing.T) {
	r := newRegistry(t, nil)
	if got := keysOf(t, r); got != "" {
		t.Errorf("of a fresh registry: %s", got)
	}
	held := mustLoad(t, r, "b/held", fileSource(t, "w.bin", randomBytes(1, 5000)))
	loadIdle(t, r, "a/idle", small("1"))
	entries, err := r.Entries()
	if err != nil || len(entries) != 2 || entries[0].Key != "a/idle" || entries[1].Key != "b/held" {
		t.Fatalf("%+v, %v", entries, err)
	}
	if e := entries[0]; e.Leased || e.State != "ready" || e.LastRelease.IsZero() || e.LastAttach.IsZero() || e.Pinned {
		t.Errorf("idle: %+v", e)
	}
	e := entries[1]
	if !e.Leased || e.Bytes != 5000 || e.Generation != held.Generation() || e.Reserved != 0 || e.Deaths != 0 {
		t.Errorf("held: %+v", e)
	}
	want := held.Info()
	want.AlreadyPresent = true
	if diff := cmp.Diff(&want, e.Info); diff != "" {
		t.Errorf("Info of the entry: -model +entry\n%s", diff)
	}
	one, err := r.Entry("b/held")
	if err != nil || one.Key != "b/held" || one.Generation != e.Generation {
		t.Errorf("%+v, %v", one, err)
	}
}

func TestHolders(t *testing.T) {
	r := newRegistry(t, nil)
	if hs, err := r.Holders(""); err != nil || len(hs) != 0 {
		t.Errorf("of nothing: %+v, %v", hs, err)
	}
	mustLoad(t, r, "k", fileSource(t, "w.bin", randomBytes(1, 3<<20))).Close()
	loadIdle(t, r, "other", small("1"))
	p := proctest.Start(t, holder, r.Dir(), "k")
	p.Line(t)
	for _, key := range []string{"k", ""} {
		hs, err := r.Holders(key)
		if err != nil || len(hs) != 1 {
			t.Fatalf("%+v, %v", hs, err)
		}
		h := hs[0]
		if h.Key != "k" || h.PID != p.PID() || h.UID != os.Geteuid() || h.Via != "mapping" || !h.Visible || h.Command == "" {
			t.Errorf("%+v", h)
		}
		if h.Since.IsZero() || h.Since.After(time.Now().Add(time.Minute)) {
			t.Errorf("since %v", h.Since)
		}
	}
	if hs, err := r.Holders("other"); err != nil || len(hs) != 0 {
		t.Errorf("%+v, %v", hs, err)
	}
	_, err := r.Holders("")
	if err != nil {
		t.Error(err)
	}
	_, err = r.Holders(strings.Repeat("x", 300))
	wantErr(t, err, ErrKey)
	p.Kill()
	if hs, err := r.Holders("k"); err != nil || len(hs) != 0 {
		t.Errorf("a dead one: %+v, %v", hs, err)
	}
}

func TestResidentBytesOfAHolder(t *testing.T) {
	r := newRegistry(t, nil)
	m := mustLoad(t, r, "k", fileSource(t, "w.bin", randomBytes(1, 8<<20)))
	if err := m.Verify(ctxb); err != nil { // touches every page
		t.Fatal(err)
	}
	hs, err := r.Holders("k")
	if err != nil || len(hs) != 1 {
		t.Fatalf("%+v, %v", hs, err)
	}
	if h := hs[0]; h.Resident != 8<<20 || h.Proportional != 8<<20 || h.PID != os.Getpid() {
		t.Errorf("%+v", h)
	}
}

func TestStatsOfTheRegistry(t *testing.T) {
	r := newRegistry(t, &Options{Slots: 16, Budget: 100 * mib})
	s := stats(t, r)
	if s.Models != 0 || s.Slots != 16 || s.Used != 0 || s.Reserved != 0 || s.Budget != 100*mib || s.LayoutVersion != layout.Version || s.Epoch == 0 {
		t.Errorf("fresh: %+v", s)
	}
	loadIdle(t, r, "a", sized(3*mib))
	loadIdle(t, r, "b", sized(5*mib))
	s = stats(t, r)
	if s.Models != 2 || s.Used < 8*mib || s.Used > 8*mib+64<<10 || s.Superseded != 0 {
		t.Errorf("%+v", s)
	}
	if s.Free <= 0 || s.Size <= s.Free {
		t.Errorf("tmpfs: %+v", s)
	}
	if s.Loads != 2 || s.BytesLoaded != 8*mib {
		t.Errorf("%+v", s)
	}
}

func TestCheckOfOneKey(t *testing.T) {
	r := newRegistry(t, nil)
	loadIdle(t, r, "a", small("1"))
	loadIdle(t, r, "b", small("1"))
	e, err := r.Entry("a")
	if err != nil {
		t.Fatal(err)
	}
	removeFile(t, genPath(r.Dir(), *e.Info, layout.DigestsExt))
	if ps, err := r.Check(ctxb, CheckOptions{Key: "b", Data: true}); err != nil || len(ps) != 0 {
		t.Errorf("%+v, %v", ps, err)
	}
	ps, err := r.Check(ctxb, CheckOptions{Key: "a", Data: true})
	if err != nil || len(ps) == 0 {
		t.Errorf("%+v, %v", ps, err)
	}
	for _, p := range ps {
		if p.Key != "a" || p.Text == "" || p.Repair == "" {
			t.Errorf("%+v", p)
		}
	}
	_, err = r.Check(ctxb, CheckOptions{Key: "c"})
	wantErr(t, err, ErrNotFound)
	if err := r.Remove(ctxb, "a"); err != nil {
		t.Fatal(err)
	}
}

func TestSharing(t *testing.T) {
	if err := newRegistry(t, nil).Sharing(); err != nil {
		t.Error(err)
	}
}

// The bytes that a load function did not write are memory, not a hole: a hole
// would be allocated by the first reader, who gets SIGBUS when there is none.
func TestSegmentsHaveNoHoles(t *testing.T) {
	r := newRegistry(t, nil)
	for name, src := range map[string]Source{
		"nothing written":       one("w.bin", 5*mib+1, func(*FileWriter) error { return nil }),
		"little written":        one("w.bin", 130*mib, func(f *FileWriter) error { _, err := f.WriteAt([]byte("x"), 70*mib); return err }),
		"gap of unknown size":   one("w.bin", -1, func(f *FileWriter) error { _, err := f.WriteAt([]byte("x"), 70*mib); return err }),
		"a small gap":           one("w.bin", -1, func(f *FileWriter) error { _, err := f.WriteAt([]byte("x"), 3*mib); return err }),
		"sparse file":           {Path: sparseFile(t, 9*mib+1)},
		"sparse file, 2 blocks": {Path: sparseFile(t, 4*mib)},
	} {
		m := mustLoad(t, r, name, src)
		f, err := os.Open(filepath.Join(m.Path(), m.Files()[0].Path))
		if err != nil {
			t.Fatal(err)
		}
		size := m.Files()[0].Size
		hole, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_HOLE)
		f.Close()
		if err != nil || hole != size {
			t.Errorf("%s: a hole at %d of %d, %v", name, hole, size, err)
		}
		m.Close()
		if err := r.Remove(ctxb, name); err != nil {
			t.Fatal(err)
		}
	}
}

func sparseFile(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "w.bin")
	writeFile(t, path, nil)
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

// Once published nobody holds a segment writable, neither a descriptor nor a
// mapping.
func TestNothingWritableIsLeft(t *testing.T) {
	r := newRegistry(t, nil)
	m := mustLoad(t, r, "k", fileSource(t, "w.bin", randomBytes(1, 9<<20)))
	f := mustLoad(t, r, "f", sized(9*mib))
	for _, m := range []*Model{m, f} {
		if _, err := m.Bytes("w.bin"); err != nil {
			t.Fatal(err)
		}
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for line := range strings.Lines(string(maps)) {
		if !strings.Contains(line, r.Dir()) {
			continue
		}
		seen++
		if perms := strings.Fields(line)[1]; perms != "r--s" {
			t.Errorf("mapped %s: %s", perms, line)
		}
	}
	if seen < 5 {
		t.Errorf("only %d mappings seen", seen)
	}
	fds, err := os.ReadDir("/proc/self/fdinfo")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		to, err := os.Readlink("/proc/self/fd/" + fd.Name())
		if err != nil || !strings.HasPrefix(to, r.Dir()) {
			continue
		}
		info, err := os.ReadFile("/proc/self/fdinfo/" + fd.Name())
		if err != nil {
			continue
		}
		var flags int
		for line := range strings.Lines(string(info)) {
			if s, ok := strings.CutPrefix(line, "flags:"); ok {
				_, _ = fmt.Sscanf(strings.TrimSpace(s), "%o", &flags)
			}
		}
		if flags&unix.O_ACCMODE != unix.O_RDONLY {
			t.Errorf("fd %s, flags %#o: %s", fd.Name(), flags, to)
		}
	}
	for _, m := range []*Model{m, f} {
		if f, err := os.OpenFile(filepath.Join(m.Path(), "w.bin"), os.O_WRONLY, 0); err == nil {
			f.Close()
			if os.Geteuid() != 0 {
				t.Error("the file can be opened for writing")
			}
		}
	}
}

// A model attached costs no descriptor.
func TestModelsCostNoDescriptors(t *testing.T) {
	r := newRegistry(t, nil)
	mustLoad(t, r, "first", small("1"))
	before := proctest.OpenFDs(t)
	for i := range 20 {
		mustLoad(t, r, fmt.Sprint("k/", i), small("1"))
	}
	if after := proctest.OpenFDs(t); after != before {
		t.Errorf("%d descriptors before, %d after 20 models", before, after)
	}
}

func TestPopulate(t *testing.T) {
	dir := proctest.TmpRegistry(t)
	r := openRegistry(t, dir, &Options{Populate: true})
	want := randomBytes(1, 5<<20+7)
	wantFiles(t, mustLoad(t, r, "k", fileSource(t, "w.bin", want)), map[string][]byte{"w.bin": want})
}

func TestThreads(t *testing.T) {
	for _, n := range []int{1, 3, 16} {
		r := newRegistry(t, &Options{Threads: n})
		want := randomBytes(1, 66<<20+3)
		m := mustLoad(t, r, "k", fileSource(t, "w.bin", want))
		wantFiles(t, m, map[string][]byte{"w.bin": want})
	}
}

// misuser does with a model's bytes what the documentation forbids: dir, what. It
// is expected to die.
var misuser = child("misuser", func(args []string) error {
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	m, err := r.GetOrLoad(ctxb, "k", sized(3*mib))
	if err != nil {
		return err
	}
	b, err := m.Bytes("w.bin")
	if err != nil {
		return err
	}
	fmt.Println("ready")
	switch args[1] {
	case "write":
		b[0] = 1
	case "late read":
		m.Close()
		fmt.Println(b[0], b[2*mib], b[len(b)-1])
	case "late read of the last of two":
		other, err := r.Get("k")
		if err != nil {
			return err
		}
		m.Close()
		fmt.Println("still valid", b[0])
		other.Close()
		fmt.Println(b[0])
	}
	_, _ = io.WriteString(os.Stdout, "survived\n")
	return nil
})

func TestWritingToAModelFaults(t *testing.T) {
	dir := proctest.TmpRegistry(t)
	p := proctest.Start(t, misuser, dir, "write")
	p.Line(t)
	wantFault(t, p)
	r := openRegistry(t, dir, nil)
	m := mustGet(t, r, "k")
	if err := m.Verify(ctxb); err != nil {
		t.Error(err)
	}
}

func TestReadingAfterCloseFaults(t *testing.T) {
	if !invariants.Enabled {
		t.Skip("only builds with the invariants tag make sure of it")
	}
	for _, what := range []string{"late read", "late read of the last of two"} {
		dir := proctest.TmpRegistry(t)
		p := proctest.Start(t, misuser, dir, what)
		p.Line(t)
		if what != "late read" {
			if line := p.Line(t); !strings.HasPrefix(line, "still valid") {
				t.Errorf("%s", line)
			}
		}
		wantFault(t, p)
	}
}
