//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// Memory that is short: slots, budget, the tmpfs, the cgroup.

const mib = 1 << 20

// sized is a load function for one file of n bytes that says so beforehand.
func sized(n int64) Source {
	s := one("w.bin", n, func(f *FileWriter) error { return fillUp(f, n) })
	s.Size = n
	return s
}

// fillUp writes n bytes that are not zero.
func fillUp(f *FileWriter, n int64) error {
	b := randomBytes(1, mib)
	for n > 0 {
		k, err := f.Write(b[:min(n, mib)])
		if err != nil {
			return err
		}
		n -= int64(k)
	}
	return nil
}

func keysOf(t *testing.T, r *Registry) string {
	t.Helper()
	entries, err := r.Entries()
	if err != nil {
		t.Fatal(err)
	}
	var keys []string
	for _, e := range entries {
		keys = append(keys, e.Key)
	}
	return strings.Join(keys, " ")
}

func loadIdle(t *testing.T, r *Registry, key string, src Source) {
	t.Helper()
	mustLoad(t, r, key, src).Close()
}

func TestFullTableEvictsTheLeastRecentlyUsed(t *testing.T) {
	r := newRegistry(t, &Options{Slots: 8})
	for i := range 8 {
		loadIdle(t, r, fmt.Sprint(i), small("1"))
	}
	mustGet(t, r, "0").Close() // used again: 1 is the oldest now
	held := mustGet(t, r, "1") // and in use: 2
	loadIdle(t, r, "new", small("1"))
	if got := keysOf(t, r); got != "0 1 3 4 5 6 7 new" {
		t.Errorf("left are %s", got)
	}
	held.Close()
	loadIdle(t, r, "newer", small("1"))
	if got := keysOf(t, r); got != "0 1 4 5 6 7 new newer" {
		t.Errorf("left are %s", got)
	}
}

func TestFullTableOfLeasedModels(t *testing.T) {
	r := newRegistry(t, &Options{Slots: 8})
	var held []*Model
	for i := range 8 {
		held = append(held, mustLoad(t, r, fmt.Sprint(i), small("1")))
	}
	called := false
	_, err := r.GetOrLoad(ctxb, "new", one("w", 1, func(*FileWriter) error { called = true; return nil }))
	wantErr(t, err, ErrTableFull)
	if called || Hint(err) == "" {
		t.Errorf("called %v, hint %q", called, Hint(err))
	}
	for i, m := range held {
		wantBytes(t, m, "w.bin", []byte("weights 1"))
		mustGet(t, r, fmt.Sprint(i)).Close()
	}
	held[5].Close()
	loadIdle(t, r, "new", small("1"))
	if got := keysOf(t, r); got != "0 1 2 3 4 6 7 new" {
		t.Errorf("left are %s", got)
	}
}

func TestPinnedModelsStayInAFullTable(t *testing.T) {
	r := newRegistry(t, &Options{Slots: 8})
	for i := range 8 {
		loadIdle(t, r, fmt.Sprint(i), small("1"))
		if i < 7 {
			if err := r.Pin(ctxb, fmt.Sprint(i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	loadIdle(t, r, "new", small("1"))
	if got := keysOf(t, r); got != "0 1 2 3 4 5 6 new" {
		t.Errorf("left are %s", got)
	}
}

func TestSlotsOutOfRange(t *testing.T) {
	for _, n := range []int{-1, 1, layout.MinSlots - 1, layout.MaxSlots + 1} {
		dir := proctest.TmpRegistry(t)
		if r, err := Open(dir, &Options{Slots: n}); err == nil {
			r.Close()
			t.Errorf("%d slots accepted", n)
		}
	}
}

func TestBudgetEvictsTheLeastRecentlyUsed(t *testing.T) {
	r := newRegistry(t, &Options{Budget: 10*mib + 500<<10})
	for _, key := range []string{"a", "b", "c"} {
		loadIdle(t, r, key, sized(3*mib))
	}
	mustGet(t, r, "a").Close()
	loadIdle(t, r, "d", sized(3*mib))
	if got := keysOf(t, r); got != "a c d" {
		t.Errorf("left are %s", got)
	}
	// As many as needed, no more.
	loadIdle(t, r, "e", sized(5*mib))
	if got := keysOf(t, r); got != "d e" {
		t.Errorf("left are %s", got)
	}
	if s := stats(t, r); s.Used > s.Budget {
		t.Errorf("%+v", s)
	}
}

func TestBudgetThatEvictingCannotMeet(t *testing.T) {
	r := newRegistry(t, &Options{Budget: 10 * mib})
	held := mustLoad(t, r, "held", sized(4*mib))
	loadIdle(t, r, "idle", sized(3*mib))
	called := false
	src := one("w.bin", 8*mib, func(*FileWriter) error { called = true; return nil })
	src.Size = 8 * mib
	_, err := r.GetOrLoad(ctxb, "new", src)
	wantErr(t, err, ErrNoSpace)
	var no *NoSpaceError
	if !errors.As(err, &no) {
		t.Fatalf("%T", err)
	}
	if no.Need < 8*mib || no.Need > 8*mib+64<<10 || no.Budget != 10*mib || no.Used < 7*mib || no.Used > 8*mib ||
		no.Evictable < 3*mib || no.Evictable > 4*mib || no.Leased < 4*mib || no.Leased > 5*mib || no.Free <= 0 {
		t.Errorf("%+v", no)
	}
	wantText(t, err, "8.0 MiB", "10.0 MiB", "idle and can be evicted", r.Dir())
	if called {
		t.Error("the load function ran")
	}
	if got := keysOf(t, r); got != "held idle" {
		t.Errorf("left are %s: something was evicted for nothing", got)
	}
	held.Close()
	loadIdle(t, r, "new", sized(8*mib))
	if got := keysOf(t, r); got != "new" {
		t.Errorf("left are %s", got)
	}
}

func TestModelLargerThanTheBudget(t *testing.T) {
	r := newRegistry(t, &Options{Budget: 2 * mib})
	_, err := r.GetOrLoad(ctxb, "k", fileSource(t, "w.bin", make([]byte, 3*mib)))
	wantErr(t, err, ErrNoSpace)
	loadIdle(t, r, "k", fileSource(t, "w.bin", make([]byte, mib)))
}

func TestPinnedModelsStayWithinTheBudget(t *testing.T) {
	r := newRegistry(t, &Options{Budget: 10 * mib})
	loadIdle(t, r, "pinned", sized(4*mib))
	loadIdle(t, r, "idle", sized(4*mib))
	if err := r.Pin(ctxb, "pinned"); err != nil {
		t.Fatal(err)
	}
	_, err := r.GetOrLoad(ctxb, "new", sized(7*mib))
	wantErr(t, err, ErrNoSpace)
	loadIdle(t, r, "new", sized(5*mib))
	if got := keysOf(t, r); got != "new pinned" {
		t.Errorf("left are %s", got)
	}
}

// A load that replaces its own key needs room for both generations, and does not
// evict the one that everybody uses meanwhile.
func TestReplaceDoesNotEvictItsOwnKey(t *testing.T) {
	r := newRegistry(t, &Options{Budget: 10 * mib})
	loadIdle(t, r, "k", sized(6*mib))
	src := sized(6 * mib)
	src.Replace = true
	_, err := r.GetOrLoad(ctxb, "k", src)
	wantErr(t, err, ErrNoSpace)
	mustGet(t, r, "k").Close()
	src = sized(3 * mib)
	src.Replace = true
	loadIdle(t, r, "k", src)
}

func TestFuncBeyondItsAnnouncedSizeIsAdmittedStepByStep(t *testing.T) {
	r := newRegistry(t, &Options{Budget: 20 * mib})
	loadIdle(t, r, "idle", sized(4*mib))
	// Nothing announced, but it fits when the idle one goes.
	loadIdle(t, r, "k", one("w.bin", -1, func(f *FileWriter) error { return fillUp(f, 17*mib) }))
	if got := keysOf(t, r); got != "k" {
		t.Errorf("left are %s", got)
	}
	_, err := r.GetOrLoad(ctxb, "big", one("w.bin", -1, func(f *FileWriter) error { return fillUp(f, 21*mib) }))
	wantErr(t, err, ErrNoSpace)
	if _, err := r.Get("big"); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v", err)
	}
}

// A small model of unknown size is no reason to evict others.
func TestSmallFuncOfUnknownSizeEvictsNothing(t *testing.T) {
	r := newRegistry(t, &Options{Budget: 20 * mib})
	for i := range 4 {
		loadIdle(t, r, fmt.Sprint("idle/", i), sized(4*mib))
	}
	loadIdle(t, r, "k", one("w.bin", -1, func(f *FileWriter) error { return fillUp(f, 1*mib) }))
	if got := keysOf(t, r); got != "idle/0 idle/1 idle/2 idle/3 k" {
		t.Errorf("left are %s", got)
	}
}

// Bytes that a load function declares and never writes cost as much as others.
func TestUnwrittenBytesAreWithinTheBudget(t *testing.T) {
	r := newRegistry(t, &Options{Budget: 20 * mib})
	loadIdle(t, r, "idle", sized(10*mib))
	_, err := r.GetOrLoad(ctxb, "big", one("w.bin", 100*mib, func(*FileWriter) error { return nil }))
	wantErr(t, err, ErrNoSpace)
	if got := keysOf(t, r); got != "idle" {
		t.Errorf("left are %s", got)
	}
	loadIdle(t, r, "k", one("w.bin", 15*mib, func(*FileWriter) error { return nil }))
	if s := stats(t, r); s.Used > s.Budget || s.Models != 1 {
		t.Errorf("%+v", s)
	}
}

// A write without memory ends the load, also if the function goes on, tries again
// when there is room, or forgets the error: what such a write left, zeros or some
// of its bytes, is not what the function meant to write.
func TestFailedWriteEndsTheLoad(t *testing.T) {
	r := newRegistry(t, &Options{Budget: 6 * mib})
	used := mustLoad(t, r, "used", sized(4*mib))
	for _, c := range []struct {
		name string
		size int64
		fn   func(*FileWriter) error
	}{
		{"the same again", -1, func(f *FileWriter) error {
			_, err := f.WriteAt(make([]byte, 3*mib), 0)
			for range 3 {
				_, again := f.WriteAt(make([]byte, 3*mib), 0)
				if err == nil || again == nil {
					t.Errorf("beyond the budget: %v, then %v", err, again)
				}
			}
			return nil
		}},
		{"the rest is optional", -1, func(f *FileWriter) error {
			err := fillUp(f, 100_000)
			_, _ = f.Write(make([]byte, 3*mib))
			return err
		}},
		{"forgotten", 32 * mib, func(f *FileWriter) error {
			_ = fillUp(f, 32*mib)
			return nil
		}},
		{"room is made", -1, func(f *FileWriter) error { // the last one: nothing is in the way any more
			for range 3 {
				if _, err := f.Write(make([]byte, mib)); errors.Is(err, ErrNoSpace) {
					must(t, used.Close())
				}
			}
			return nil
		}},
	} {
		m, err := r.GetOrLoad(ctxb, c.name, one("w.bin", c.size, c.fn))
		if err == nil {
			t.Errorf("%s: published %d bytes", c.name, m.Info().Bytes)
			must(t, m.Close())
			must(t, r.Remove(ctxb, c.name))
			continue
		}
		wantErr(t, err, ErrNoSpace)
	}
	if s := stats(t, r); s.Used > s.Budget || s.Reserved != 0 {
		t.Errorf("%+v", s)
	}
}

// smallTmpfs mounts a tmpfs of its own for the test and returns a path in it. It
// is detached at once, so that nothing stays mounted whatever happens; only this
// process reaches it.
func smallTmpfs(t *testing.T, size int64) string {
	t.Helper()
	needRoot(t)
	at := t.TempDir()
	if err := unix.Mount("tmpfs", at, "tmpfs", 0, fmt.Sprintf("size=%d,mode=0755", size)); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	return detached(t, at)
}

// detached takes a mount out of everybody's sight and returns the way that is left to it.
func detached(t *testing.T, at string) string {
	t.Helper()
	fd, err := unix.Open(at, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if e := unix.Unmount(at, unix.MNT_DETACH); e != nil {
		t.Errorf("unmount: %v", e)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return "/proc/self/fd/" + strconv.Itoa(fd)
}

// usedBytes of the file system that path lies on.
func usedBytes(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize
}

func TestSmallTmpfs(t *testing.T) {
	for _, size := range []int64{8 * mib, 64 * mib} {
		root := smallTmpfs(t, size)
		r := openRegistry(t, root+"/reg", nil)
		before := usedBytes(t, root)
		_, err := r.GetOrLoad(ctxb, "k", fileSource(t, "w.bin", make([]byte, size)))
		wantErr(t, err, ErrNoSpace)
		if after := usedBytes(t, root); after != before {
			t.Errorf("%d bytes used before, %d after", before, after)
		}
		want := randomBytes(1, int(size/2))
		m := mustLoad(t, r, "k", fileSource(t, "w.bin", want))
		wantFiles(t, m, map[string][]byte{"w.bin": want})
		m.Close()
		if err := r.Remove(ctxb, "k"); err != nil {
			t.Fatal(err)
		}
		if after := usedBytes(t, root); after != before {
			t.Errorf("%d bytes used before, %d after the removal", before, after)
		}
	}
}

// The default budget is a share of the tmpfs.
func TestDefaultBudget(t *testing.T) {
	root := smallTmpfs(t, 10*mib)
	r := openRegistry(t, root+"/reg", nil)
	if s := stats(t, r); s.Budget < 7*mib || s.Budget > 8*mib || s.Size != 10*mib {
		t.Errorf("%+v", s)
	}
	_, err := r.GetOrLoad(ctxb, "k", sized(9*mib))
	wantErr(t, err, ErrNoSpace)
}

// Somebody else fills the tmpfs while a load runs: at every point the end is
// ErrNoSpace, and nothing is left.
func TestTmpfsThatFillsDuringALoad(t *testing.T) {
	const size = 24 * mib
	root := smallTmpfs(t, size)
	dir := root + "/reg"
	r := openRegistry(t, dir, &Options{Budget: size})
	before := usedBytes(t, root)
	filler := root + "/filler"
	stuff := func() {
		f, err := os.Create(filler)
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		b := make([]byte, 64<<10)
		for {
			if _, err := f.Write(b); err != nil {
				return // full
			}
		}
	}
	after := func(what string, err error) {
		t.Helper()
		if err == nil {
			t.Fatalf("%s: loaded into a full tmpfs", what)
		}
		wantErr(t, err, ErrNoSpace)
		if err := os.Remove(filler); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if used := usedBytes(t, root); used != before {
			t.Fatalf("%s: %d bytes used before, %d after: %v", what, before, used, err)
		}
	}
	for _, declared := range []int64{-1, 20 * mib} {
		for _, at := range []int64{0, 1, 64 << 10, 2*mib - 1, 3 * mib, 4 * mib, 9 * mib} {
			_, err := r.GetOrLoad(ctxb, "k", one("w.bin", declared, func(f *FileWriter) error {
				if err := fillUp(f, at); err != nil {
					return err
				}
				stuff()
				return fillUp(f, 20*mib-at)
			}))
			if declared > 0 && at > 0 {
				// The window was allocated before the tmpfs was full.
				if err == nil {
					_ = os.Remove(filler)
					if err := r.Remove(ctxb, "k"); err != nil {
						t.Fatal(err)
					}
					continue
				}
			}
			after(fmt.Sprintf("function, size %d, full at %d", declared, at), err)
		}
	}
	// Many files, of which some are there already.
	files := map[string][]byte{}
	for i := range 40 {
		files[fmt.Sprintf("f-%02d", i)] = randomBytes(1, 400<<10)
	}
	src := folderSource(t, files)
	for _, at := range []int64{1, 2 * mib, 8 * mib} {
		var once atomic.Bool
		src.Progress = func(done, total int64) {
			if done >= at && once.CompareAndSwap(false, true) {
				stuff()
			}
		}
		_, err := r.GetOrLoad(ctxb, "k", src)
		after(fmt.Sprintf("folder, full at %d", at), err)
	}
	src.Progress = nil
	wantFiles(t, mustLoad(t, r, "k", src), files)
}

// A full tmpfs has no room for a table, or for a lock's file; what is loaded can
// be used.
func TestFullTmpfs(t *testing.T) {
	root := smallTmpfs(t, 8*mib)
	r := openRegistry(t, root+"/reg", nil)
	m := mustLoad(t, r, "k", sized(2*mib))
	f, err := os.Create(root + "/filler")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, n := range []int{mib, 4096} {
		for err = nil; err == nil; _, err = f.Write(make([]byte, n)) {
		}
	}
	if _, err := Open(root+"/another", nil); !errors.Is(err, ErrNoSpace) {
		t.Errorf("a new registry: %v, want ErrNoSpace", err)
	}
	again, err := Open(root+"/reg", nil)
	if err != nil {
		t.Fatalf("the registry that is there: %v", err)
	}
	defer again.Close()
	got, err := again.Get("k")
	if err != nil {
		t.Fatal(err)
	}
	if err := got.Verify(ctxb); err != nil {
		t.Error(err)
	}
	got.Close()
	_, err = again.GetOrLoad(ctxb, "other", small("1"))
	wantErr(t, err, ErrNoSpace)
	m.Close()
	if err := again.Remove(ctxb, "k"); err != nil {
		t.Errorf("room cannot even be made: %v", err)
	}
	loadIdle(t, r, "other", small("1"))
}

// racer: dir, key, barrier dir. It loads 6 MiB together with another one.
var racer = child("space-racer", func(args []string) error {
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	proctest.Barrier(args[2], 2)
	m, err := r.GetOrLoad(ctxb, args[1], sized(6*mib))
	if e := say(reportOf(err)); e != nil {
		return e
	}
	if err == nil {
		// Held until the other one has tried.
		proctest.Barrier(args[2], 2)
		return errors.Join(m.Close(), r.Close())
	}
	proctest.Barrier(args[2], 2)
	return r.Close()
})

// Two loaders, room for one: never both, and the other one is told so.
func TestTwoLoadersRaceForTheLastBytes(t *testing.T) {
	rounds := 5
	if testing.Short() {
		rounds = 1
	}
	for range rounds {
		dir := proctest.TmpRegistry(t)
		r := openRegistry(t, dir, &Options{Budget: 10 * mib})
		tmp := t.TempDir()
		a, b := proctest.Start(t, racer, dir, "a", tmp), proctest.Start(t, racer, dir, "b", tmp)
		won := 0
		for _, p := range []*proctest.Proc{a, b} {
			switch rep := lastWord[report](t, p); {
			case rep.Text == "":
				won++
			case !rep.is("ErrNoSpace"):
				t.Errorf("%+v", rep)
			}
		}
		if won != 1 {
			t.Errorf("%d of 2 loaders got the memory of one", won)
		}
		if s := stats(t, r); s.Reserved != 0 || s.Used > s.Budget {
			t.Errorf("%+v", s)
		}
	}
}

// What a running load has still to allocate is taken into account.
func TestReservationOfARunningLoad(t *testing.T) {
	r := newRegistry(t, &Options{Budget: 10 * mib})
	running, goOn, done := make(chan struct{}), make(chan struct{}), make(chan error)
	src := one("w.bin", 6*mib, func(f *FileWriter) error {
		close(running)
		<-goOn
		return fillUp(f, 6*mib)
	})
	src.Size = 6 * mib
	go func() {
		m, err := r.GetOrLoad(ctxb, "running", src)
		if err == nil {
			m.Close()
		}
		done <- err
	}()
	<-running
	if s := stats(t, r); s.Reserved < 6*mib {
		t.Errorf("%+v", s)
	}
	_, err := r.GetOrLoad(ctxb, "other", sized(6*mib))
	wantErr(t, err, ErrNoSpace)
	wantText(t, err, "running loads still need 6.")
	close(goOn)
	if err := <-done; err != nil {
		t.Errorf("the load that was first: %v", err)
	}
	if s := stats(t, r); s.Reserved != 0 {
		t.Errorf("%+v", s)
	}
	loadIdle(t, r, "other", sized(6*mib))
}

func TestReservationOfAKilledLoaderIsGivenBack(t *testing.T) {
	dir := proctest.TmpRegistry(t)
	r := openRegistry(t, dir, &Options{Budget: 10 * mib})
	startStuck(t, dir, "k", "").Kill()
	editTable(t, dir, func(e layout.Editor) {
		f, _ := e.Lookup("k")
		e.SetHint(f.Slot, layout.HintReserved, 9*mib)
	})
	loadIdle(t, r, "other", sized(6*mib))
	if s := stats(t, r); s.Reserved != 0 {
		t.Errorf("%+v", s)
	}
}

// cgroupLoader: group, dir, bytes of a source file. It joins the group first.
var cgroupLoader = child("cgroup-loader", func(args []string) error {
	if err := os.WriteFile(args[0]+"/cgroup.procs", []byte("0"), 0); err != nil {
		return err
	}
	r, err := Open(args[1], nil)
	if err != nil {
		return err
	}
	m, err := r.GetOrLoad(ctxb, "k", Source{Path: args[2]})
	if e := say(reportOf(err)); e != nil {
		return e
	}
	if err == nil {
		err = m.Close()
	} else {
		err = nil
	}
	return errors.Join(err, r.Close())
})

// memoryGroup makes a control group with a limit.
func memoryGroup(t *testing.T, limit int64) string {
	t.Helper()
	needRoot(t)
	for _, g := range []struct{ root, file string }{
		{"/sys/fs/cgroup", "memory.max"}, {"/sys/fs/cgroup/memory", "memory.limit_in_bytes"},
	} {
		group := filepath.Join(g.root, fmt.Sprintf("onecopy-test-registry-%d", os.Getpid()))
		if err := os.Mkdir(group, 0o755); err != nil {
			continue
		}
		t.Cleanup(func() {
			for range 100 {
				if err := os.Remove(group); err == nil || !errors.Is(err, unix.EBUSY) {
					return
				}
				time.Sleep(time.Millisecond)
			}
		})
		f, err := os.OpenFile(filepath.Join(group, g.file), os.O_WRONLY, 0)
		if err != nil {
			continue // not a control group with a memory controller
		}
		_, err = fmt.Fprint(f, limit)
		f.Close()
		if err == nil {
			return group
		}
	}
	t.Skip("cannot make a control group with a memory limit")
	return ""
}

// A model larger than the limit of the loader's control group is an error, not a
// signal.
func TestCgroupSmallerThanTheModel(t *testing.T) {
	group := memoryGroup(t, 96*mib)
	dir := proctest.TmpRegistry(t)
	r := openRegistry(t, dir, nil)
	big := filepath.Join(t.TempDir(), "big")
	writeFile(t, big, make([]byte, 160*mib))
	rep := runChild[report](t, cgroupLoader, group, dir, big)
	if !rep.is("ErrNoSpace") || !strings.Contains(rep.Text, "cgroup of this process") {
		t.Errorf("%+v", rep)
	}
	if s := stats(t, r); s.Used != 0 || s.Reserved != 0 {
		t.Errorf("left: %+v", s)
	}
	less := filepath.Join(t.TempDir(), "less")
	writeFile(t, less, make([]byte, 16*mib))
	if rep := runChild[report](t, cgroupLoader, group, dir, less); rep.Text != "" {
		t.Errorf("one that fits: %+v", rep)
	}
}

// A load that fails in the middle gives everything back at once.
func TestFailedLoadGivesItsMemoryBack(t *testing.T) {
	root := smallTmpfs(t, 64*mib)
	r := openRegistry(t, root+"/reg", nil)
	before := usedBytes(t, root)
	failed := errors.New("as told")
	for name, src := range map[string]Source{
		"error": one("w.bin", 40*mib, func(f *FileWriter) error { return errors.Join(fillUp(f, 30*mib), failed) }),
		"cancelled": {Load: func(ctx context.Context, w *Writer) error {
			f, err := w.Create("w.bin", -1)
			return errors.Join(err, fillUp(f, 30*mib), context.Canceled)
		}},
	} {
		if _, err := r.GetOrLoad(ctxb, "k", src); err == nil {
			t.Fatalf("%s: no error", name)
		}
		if after := usedBytes(t, root); after != before {
			t.Errorf("%s: %d bytes used before, %d after", name, before, after)
		}
	}
}

// twoMounts are a tmpfs and a second, read-only mount of it, as a container has it.
func twoMounts(t *testing.T) (root, readOnly string) {
	t.Helper()
	needRoot(t)
	at, again := t.TempDir(), t.TempDir()
	if err := unix.Mount("tmpfs", at, "tmpfs", 0, "size=16m,mode=0755"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	err := unix.Mount(at, again, "", unix.MS_BIND, "")
	root = detached(t, at)
	must(t, err)
	err = unix.Mount("", again, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
	readOnly = detached(t, again)
	must(t, err)
	return root, readOnly
}

// Who sees the registry on a read-only mount gets the models that are there, and the
// one that is being loaded, and is told why he can do no more.
func TestReadOnlyMount(t *testing.T) {
	root, view := twoMounts(t)
	writer := openRegistry(t, root+"/reg", nil)
	files := map[string][]byte{"w.bin": randomBytes(1, 5000)}
	must(t, mustLoad(t, writer, "k", madeSource("1", files)).Close())
	r, err := Open(view+"/reg", nil)
	must(t, err)
	m := mustGet(t, r, "k")
	wantFiles(t, m, files)
	wantErr(t, writer.Remove(ctxb, "k"), ErrInUse)
	must(t, m.Close())
	must(t, mustLoad(t, r, "k", madeSource("1", files)).Close())
	for name, call := range map[string]func() error{
		"GetOrLoad": func() error { _, err := r.GetOrLoad(ctxb, "new", madeSource("1", files)); return err },
		"Remove":    func() error { return r.Remove(ctxb, "k") },
		"GC":        func() error { _, err := r.GC(ctxb); return err },
		"Pin":       func() error { return r.Pin(ctxb, "k") },
	} {
		err := call()
		wantErr(t, err, ErrReadOnly)
		if text := err.Error(); !strings.Contains(text, "mounted") || !strings.Contains(Hint(err), "mounted writable") {
			t.Errorf("%s: %s; %s", name, text, Hint(err))
		}
	}
	ps, err := r.Check(ctxb, CheckOptions{Data: true})
	must(t, err)
	if len(ps) > 0 {
		t.Errorf("%+v", ps)
	}
	begun, goOn := make(chan struct{}), make(chan struct{})
	go func() {
		src := madeSource("1", files)
		load := src.Load
		src.Load = func(ctx context.Context, w *Writer) error {
			close(begun)
			<-goOn
			return load(ctx, w)
		}
		m, err := writer.GetOrLoad(ctxb, "slow", src)
		if err == nil {
			err = m.Close()
		}
		if err != nil {
			t.Error(err)
		}
	}()
	<-begun
	time.AfterFunc(20*time.Millisecond, func() { close(goOn) }) // either way it is right
	must(t, mustLoad(t, r, "slow", madeSource("1", files)).Close())
	must(t, r.Close())
}
