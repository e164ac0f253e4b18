//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/invariants"
	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// What a process or a group of them may have is less than what they want.

// sixtyFour: dir, folder of few files, folder of many. It may have 64 descriptors.
var sixtyFour = child("sixty-four-descriptors", func(args []string) error {
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 64, Max: 64}); err != nil {
		return err
	}
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	var a sixtyFourAnswer
	var held []*Model
	for i := range 300 {
		m, err := r.GetOrLoad(ctxb, fmt.Sprint("k/", i), small(fmt.Sprint(i)))
		if err != nil {
			return fmt.Errorf("model %d: %w", i, err)
		}
		held = append(held, m)
	}
	for i, m := range held {
		b, err := m.Bytes("w.bin")
		if err != nil || string(b) != fmt.Sprint("weights ", i) {
			return fmt.Errorf("model %d: %q, %w", i, b, err)
		}
	}
	for i, folder := range args[1:] {
		m, err := r.GetOrLoad(ctxb, fmt.Sprint("folder/", i), Source{Path: folder})
		a.Folders = append(a.Folders, reportOf(err))
		if err != nil {
			continue
		}
		for _, f := range m.Files() {
			if _, err := m.Bytes(f.Path); err != nil {
				return err
			}
		}
		held = append(held, m)
	}
	for _, m := range held {
		if err := m.Close(); err != nil {
			return err
		}
	}
	return errors.Join(say(a), r.Close())
})

type sixtyFourAnswer struct{ Folders []report }

// With 64 descriptors a process leases as many models as it likes, because a lease
// is a mapping. A load takes one for each file, and says so if there are none.
func TestSixtyFourDescriptors(t *testing.T) {
	r := newRegistry(t, nil)
	var folders []string
	for _, n := range []int{30, 100} {
		files := map[string][]byte{}
		for i := range n {
			files[fmt.Sprintf("f-%03d", i)] = []byte("x")
		}
		folders = append(folders, folderSource(t, files).Path)
	}
	a := runChild[sixtyFourAnswer](t, sixtyFour, r.Dir(), folders[0], folders[1])
	if few, many := a.Folders[0], a.Folders[1]; few.Text != "" || !many.is("ErrLimit") || !strings.Contains(many.Text, "ulimit -n") {
		t.Errorf("%+v", a.Folders)
	}
	if s := stats(t, r); s.Models != 301 || s.Reserved != 0 {
		t.Errorf("%+v", s)
	}
	mustLoad(t, r, "folder/1", Source{Path: folders[1]})
}

// fewMappings: dir, source. It leaves itself no mapping more, one by one.
var fewMappings = child("few-mappings", func(args []string) error {
	most, err := strconv.Atoi(strings.TrimSpace(string(mustRead("/proc/sys/vm/max_map_count"))))
	if err != nil {
		return err
	}
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	calls := func(note func(string, error)) {
		m, err := r.Get("k")
		note("Get", err)
		if m != nil {
			_, err = m.Bytes("w.bin")
			note("Bytes", err)
			m.Close()
		}
		made := small("1")
		made.OnChange = ChangeIgnore // it could not be removed
		for _, src := range []Source{made, {Path: args[1], OnChange: ChangeIgnore}} {
			m, err := r.GetOrLoad(ctxb, "other", src)
			note("GetOrLoad", err)
			if m != nil {
				m.Close()
				err = r.Remove(ctxb, "other")
				for n := 0; errors.Is(err, ErrLimit) && n < 1; n++ {
					note("Remove", err)
					err = r.Remove(ctxb, "other")
				}
				note("Remove", err)
			}
		}
		note("Pin", r.Pin(ctxb, "k"))
		_, err = r.GC(ctxb)
		note("GC", err)
		again, err := Open(args[0], nil)
		note("Open", err)
		if again != nil {
			again.Close()
		}
	}
	// The Go runtime ends the process when it gets no mapping for itself: it is
	// given beforehand what it may want, heap and threads.
	warm := make([]byte, 64<<20)
	for i := 0; i < len(warm); i += 4096 {
		warm[i] = 1
	}
	runtime.KeepAlive(warm)
	warm = nil
	runtime.GC()
	debug.SetGCPercent(-1)
	var wg sync.WaitGroup
	gate := make(chan struct{})
	for range 24 {
		wg.Go(func() { runtime.LockOSThread(); <-gate; runtime.UnlockOSThread() })
	}
	close(gate)
	wg.Wait()
	calls(func(string, error) {})

	// Pages of one mapping with other rights than their neighbours are mappings of
	// their own.
	field, err := unix.Mmap(-1, 0, (most+64)*4096, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return err
	}
	page := func(i int) []byte { return field[2*i*4096:][:4096] }
	used := 0
	for ; 2*used+1 < most+64; used++ {
		if err := unix.Mprotect(page(used), unix.PROT_NONE); err != nil {
			break
		}
	}
	var extra [][]byte // shared memory of its own is never one mapping with its neighbour
	for {
		b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
		if err != nil {
			break
		}
		extra = append(extra, b)
	}
	var a fewMappingsAnswer
	for spare := range 16 {
		calls(func(what string, err error) {
			switch {
			case err == nil:
				a.Fine++
			case errors.Is(err, ErrLimit) && strings.Contains(err.Error(), "vm.max_map_count"):
				a.Limited++
			case errors.Is(err, ErrNotFound): // a load before was refused, or its remains are gone
			default:
				a.Wrong = append(a.Wrong, fmt.Sprintf("step %d, %s: %v", spare, what, err))
			}
		})
		if len(extra) > 0 {
			err = unix.Munmap(extra[0])
			extra = extra[1:]
		} else {
			used--
			err = unix.Mprotect(page(used), unix.PROT_READ)
		}
		if err != nil {
			return err
		}
	}
	if err := unix.Munmap(field); err != nil {
		return err
	}
	calls(func(what string, err error) {
		if err != nil {
			a.Wrong = append(a.Wrong, fmt.Sprintf("with mappings again, %s: %v", what, err))
		}
	})
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(maps)) {
		if strings.Contains(line, args[0]) && !strings.Contains(line, layout.TableFile) {
			a.Wrong = append(a.Wrong, "left: "+line)
		}
	}
	return errors.Join(say(a), r.Close())
})

type fewMappingsAnswer struct {
	Wrong         []string
	Limited, Fine int
}

func mustRead(path string) []byte {
	b, err := os.ReadFile(path)
	if err != nil {
		panic(err)
	}
	return b
}

// vm.max_map_count is the machine's; a process comes to it all the same.
func TestTooFewMappingsAreATypedError(t *testing.T) {
	if raceEnabled || invariants.Enabled {
		t.Skip("the race detector wants mappings of its own, and with invariants none is ever given back")
	}
	if most, err := strconv.Atoi(strings.TrimSpace(string(mustRead("/proc/sys/vm/max_map_count")))); err != nil || most > 2<<20 {
		t.Skipf("vm.max_map_count is %d, %v", most, err)
	}
	r := newRegistry(t, nil)
	loadIdle(t, r, "k", small("1"))
	source := fileSource(t, "w.bin", randomBytes(1, 5<<20)).Path
	p := proctest.Start(t, fewMappings, r.Dir(), source)
	for range 9 {
		// The Go runtime may want a mapping for its own books all the same.
		if p.Wait() == 0 || !strings.HasPrefix(p.Stderr(), "fatal error: runtime: cannot allocate memory") {
			break
		}
		p = proctest.Start(t, fewMappings, r.Dir(), source)
	}
	a := lastWord[fewMappingsAnswer](t, p)
	for _, w := range a.Wrong {
		t.Error(w)
	}
	if a.Limited < 5 || a.Fine < 5 {
		t.Errorf("%d calls met the limit, %d did not: the test tests nothing", a.Limited, a.Fine)
	}
}

// With vm.overcommit_memory=2 the kernel counts mappings that could want memory, of
// which none of ours is one: they are shared. (The pages of
// the tmpfs it counts when they are written: then it says ENOSPC, as if it were
// full.)
func TestNoMappingIsAccounted(t *testing.T) {
	r := newRegistry(t, &Options{Populate: true})
	look := func(what string, atLeast int) {
		t.Helper()
		n, ours := 0, false
		for line := range strings.Lines(string(mustRead("/proc/self/smaps"))) {
			w := strings.Fields(line)
			switch {
			case len(w) >= 5 && strings.Contains(w[0], "-") && !strings.HasSuffix(w[0], ":"):
				ours = strings.Contains(line, r.Dir())
				if ours {
					n++
				}
			case w[0] == "VmFlags:" && ours:
				for _, flag := range w[1:] {
					if flag == "ac" {
						t.Errorf("%s: a mapping is accounted: %s", what, line)
					}
				}
			}
		}
		if n < atLeast {
			t.Errorf("%s: only %d mappings of the registry", what, n)
		}
	}
	m := mustLoad(t, r, "k", one("w.bin", 9*mib, func(f *FileWriter) error {
		if err := fillUp(f, 5*mib); err != nil {
			return err
		}
		look("while it is written", 1)
		return fillUpAt(f, 5*mib, 4*mib)
	}))
	if _, err := m.Bytes("w.bin"); err != nil {
		t.Fatal(err)
	}
	look("in use", 3)
}

// A tmpfs of the size that containers have by default. A model that is larger than
// what can be freed there says so before anything is read or evicted; otherwise
// what was used longest ago goes first, and no more than needed.
func TestDefaultTmpfsOfAContainer(t *testing.T) {
	root := smallTmpfs(t, 64*mib)
	r := openRegistry(t, root+"/reg", nil) // its budget is 51 MiB
	for _, key := range []string{"a", "b", "c", "used"} {
		loadIdle(t, r, key, sized(10*mib))
	}
	held := mustGet(t, r, "used")
	mustGet(t, r, "a").Close()
	path := filepath.Join(t.TempDir(), "w.bin")
	writeFile(t, path, nil)
	must(t, os.Truncate(path, 45*mib))
	for name, src := range map[string]Source{
		"path":     {Path: path, Progress: func(done, _ int64) { t.Errorf("%d bytes were loaded", done) }},
		"function": one("w.bin", 45*mib, func(*FileWriter) error { return nil }),
		"announced": {Size: 45 * mib, Version: "1", Load: func(context.Context, *Writer) error {
			t.Error("the load function was called")
			return nil
		}},
	} {
		before := usedBytes(t, root)
		_, err := r.GetOrLoad(ctxb, "big", src)
		wantErr(t, err, ErrNoSpace)
		wantText(t, err, "45.0 MiB", "idle and can be evicted", "in use by pid "+fmt.Sprint(os.Getpid()))
		if Hint(err) == "" {
			t.Error("no hint")
		}
		if after := usedBytes(t, root); after != before {
			t.Errorf("%s: %d bytes used before, %d after", name, before, after)
		}
		wantKeys(t, r, "a", "b", "c", "used")
	}
	must(t, os.Truncate(path, 20*mib))
	loadIdle(t, r, "d", Source{Path: path}) // 60 of 51
	wantKeys(t, r, "a", "c", "d", "used")
	loadIdle(t, r, "e", sized(15*mib)) // 55
	wantKeys(t, r, "d", "e", "used")
	held.Close()
}

// lastBytes: dir, key, barrier dir. Two of them have loaded a part each, without
// having said how much it will be, and want more than there is.
var lastBytes = child("last-bytes", func(args []string) error {
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	met := false
	m, err := r.GetOrLoad(ctxb, args[1], one("w.bin", -1, func(f *FileWriter) error {
		if err := fillUp(f, 6*mib); err != nil {
			return err
		}
		met = true
		proctest.Barrier(args[2], 2)
		return fillUpAt(f, 6*mib, 10*mib)
	}))
	if !met { // it was refused even that: the other one need not wait for it
		proctest.Barrier(args[2], 2)
	}
	if err := say(reportOf(err)); err != nil {
		return err
	}
	proctest.Barrier(args[2], 2) // or the other one would evict it
	if m != nil {
		m.Close()
	}
	return r.Close()
})

// The tmpfs itself, not the budget, is too small for both.
func TestTwoLoadersRaceForTheLastPages(t *testing.T) {
	root := strings.Replace(smallTmpfs(t, 24*mib), "self", fmt.Sprint(os.Getpid()), 1)
	dir := root + "/reg"
	r := openRegistry(t, dir, &Options{Budget: 1 << 40})
	before := usedBytes(t, root)
	for range 3 {
		tmp := t.TempDir()
		ps := []*proctest.Proc{proctest.Start(t, lastBytes, dir, "a", tmp), proctest.Start(t, lastBytes, dir, "b", tmp)}
		won := 0
		for _, p := range ps {
			switch rep := lastWord[report](t, p); {
			case rep.Text == "":
				won++
			case !rep.is("ErrNoSpace") || !strings.Contains(rep.Text, "MiB"):
				t.Errorf("%+v", rep)
			}
		}
		if won > 1 {
			t.Error("both got the memory of one")
		}
		loadIdle(t, r, "alone", sized(16*mib))
		for _, key := range []string{"a", "b", "alone"} {
			if err := r.Remove(ctxb, key); err != nil && !errors.Is(err, ErrNotFound) {
				t.Error(err)
			}
		}
		if used := usedBytes(t, root); used != before {
			t.Errorf("%d bytes used before, %d after", before, used)
		}
	}
}

// groupRacer: group, dir, key, source, barrier dir. Two of them in one control
// group.
var groupRacer = child("group-racer", func(args []string) error {
	if err := os.WriteFile(args[0]+"/cgroup.procs", []byte("0"), 0); err != nil {
		return err
	}
	r, err := Open(args[1], nil)
	if err != nil {
		return err
	}
	proctest.Barrier(args[4], 2)
	m, err := r.GetOrLoad(ctxb, args[2], Source{Path: args[3]})
	if err := say(reportOf(err)); err != nil {
		return err
	}
	proctest.Barrier(args[4], 2) // or the other one would evict it
	if m != nil {
		m.Close()
	}
	return r.Close()
})

// Two loaders in one control group, which has room for one model: the one that
// comes to its end is told so, and nobody is killed.
func TestTwoLoadersRaceInACgroup(t *testing.T) {
	needLittleMemory(t)
	group := memoryGroup(t, 144*mib)
	dir := proctest.TmpRegistry(t)
	r := openRegistry(t, dir, nil)
	path := filepath.Join(t.TempDir(), "w.bin")
	writeFile(t, path, randomBytes(1, 80*mib))
	tmp := t.TempDir()
	ps := []*proctest.Proc{
		proctest.Start(t, groupRacer, group, dir, "a", path, tmp),
		proctest.Start(t, groupRacer, group, dir, "b", path, tmp),
	}
	won := 0
	for _, p := range ps {
		switch rep := lastWord[report](t, p); {
		case rep.Text == "":
			won++
		case !rep.is("ErrNoSpace") || !strings.Contains(rep.Text, "cgroup of this process"):
			t.Errorf("%+v", rep)
		}
	}
	if won > 1 {
		t.Error("both got the memory of one")
	}
	if s := stats(t, r); s.Models != won || s.Reserved != 0 || s.Used > int64(won)*81*mib {
		t.Errorf("left: %+v", s)
	}
	for _, key := range []string{"a", "b"} {
		if err := r.Remove(ctxb, key); err != nil && !errors.Is(err, ErrNotFound) {
			t.Error(err)
		}
	}
	if rep := runChild[report](t, cgroupLoader, group, dir, path); rep.Text != "" {
		t.Errorf("alone: %+v", rep)
	}
}

// needLittleMemory skips tests whose processes have to be much smaller than their
// control group.
func needLittleMemory(t *testing.T) {
	t.Helper()
	if raceEnabled {
		t.Skip("the race detector takes more memory than the model")
	}
}

// glutton: group, dir, barrier dir, size of the herd. Its load function takes more
// memory for itself than the control group has.
var glutton = child("glutton", func(args []string) error {
	if err := os.WriteFile(args[0]+"/cgroup.procs", []byte("0"), 0); err != nil {
		return err
	}
	n, err := strconv.Atoi(args[3])
	if err != nil {
		return err
	}
	r, err := Open(args[1], nil)
	if err != nil {
		return err
	}
	proctest.Barrier(args[2], n)
	_, err = r.GetOrLoad(ctxb, "k", one("w.bin", -1, func(f *FileWriter) error {
		b := make([]byte, 300*mib)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		runtime.KeepAlive(b)
		return errors.New("survived")
	}))
	var failed *LoadFailedError
	a := gluttonAnswer{Err: reportOf(err)}
	if errors.As(err, &failed) {
		a.Deaths = failed.Deaths
	}
	return errors.Join(say(a), r.Close())
})

type gluttonAnswer struct {
	Err    report
	Deaths int
}

// A loader that dies of memory again and again does not take all workers with it:
// the kernel kills three, the others get an error and go on.
func TestThreeDeathsByMemory(t *testing.T) {
	needLittleMemory(t)
	const n = 6
	group := memoryGroup(t, 128*mib)
	for _, file := range []string{"memory.swap.max", "memory.swappiness"} {
		_ = os.WriteFile(filepath.Join(group, file), []byte("0"), 0) // one of them is there
	}
	dir := proctest.TmpRegistry(t)
	r := openRegistry(t, dir, nil)
	tmp := t.TempDir()
	var ps []*proctest.Proc
	for range n {
		ps = append(ps, proctest.Start(t, glutton, group, dir, tmp, fmt.Sprint(n)))
	}
	killed := 0
	for _, p := range ps {
		if code := p.Wait(); code == 128+9 {
			killed++
			continue
		}
		a := lastWord[gluttonAnswer](t, p)
		if strings.Contains(a.Err.Text, "survived") {
			t.Skip("the limit of a control group kills nobody here: there is swap")
		}
		if !a.Err.is("ErrLoadFailed") || a.Deaths != 3 || !strings.Contains(a.Err.Text, "out of memory?") {
			t.Errorf("a survivor: %+v", a)
		}
	}
	if killed != 3 {
		t.Errorf("%d were killed, want 3", killed)
	}
	e, err := r.Entry("k")
	if err == nil {
		t.Errorf("%+v", e)
	}
	_, err = r.GetOrLoad(ctxb, "k", small("1"))
	wantErr(t, err, ErrLoadFailed)
	if Hint(err) == "" {
		t.Error("no hint")
	}
	mustLoad(t, r, "other", small("1"))
	passPause(t, dir, "k")
	mustLoad(t, r, "k", small("1"))
}

// quotaLoader: dir, below a tmpfs with a quota of 8 MiB for its user.
var quotaLoader = child("quota-loader", func(args []string) error {
	if err := become(foreignUID); err != nil {
		return err
	}
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	var a []report
	for _, src := range []Source{
		sized(16 * mib),
		one("w.bin", -1, func(f *FileWriter) error { return fillUp(f, 16*mib) }),
		sized(4 * mib),
	} {
		m, err := r.GetOrLoad(ctxb, "k", src)
		a = append(a, reportOf(err))
		if m != nil {
			m.Close()
		}
	}
	return errors.Join(say(a), r.Close())
})

// A quota of the tmpfs is like a full one, but nothing tells of it beforehand.
func TestQuota(t *testing.T) {
	needRoot(t)
	if !tmpfsHasQuota() {
		t.Skip("the tmpfs of this kernel has no quotas (CONFIG_TMPFS_QUOTA, Linux 6.6)")
	}
	at := t.TempDir()
	for dir := at; dir != filepath.Clean(os.TempDir()); dir = filepath.Dir(dir) {
		must(t, os.Chmod(dir, 0o755)) // so that the user comes there
	}
	mount := "tmpfs:" + at + ":size=64m,mode=1777,usrquota,usrquota_block_hardlimit=8m"
	a := lastWord[[]report](t, inContainer(t, unix.CLONE_NEWNS, mount, quotaLoader, at+"/reg"))
	for _, rep := range a[:2] {
		if !rep.is("ErrNoSpace") || !strings.Contains(rep.Text, "quota") {
			t.Errorf("%+v", rep)
		}
	}
	if a[2].Text != "" {
		t.Errorf("what is within the quota: %+v", a[2])
	}
}

// tmpfsHasQuota asks the kernel whether it knows the option.
func tmpfsHasQuota() bool {
	fd, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return unix.FsconfigSetFlag(fd, "usrquota") == nil
}

// smallFiles: source, and a directory for each of fileSizes.
var smallFiles = child("small-files", func(args []string) error {
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &was); err != nil {
		return err
	}
	var a smallFilesAnswer
	for i, dir := range args[1:] {
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: fileSizes[i], Max: was.Max}); err != nil {
			return err
		}
		r, err := Open(dir, nil)
		if err == nil {
			_, err = r.GetOrLoad(ctxb, "k", Source{Path: args[0]})
			err = errors.Join(err, r.Close())
		}
		a.Loads = append(a.Loads, reportOf(err))
	}
	return errors.Join(unix.Setrlimit(unix.RLIMIT_FSIZE, &was), say(a))
})

type smallFilesAnswer struct{ Loads []report }

// fileSizes are less than a manifest, a table and the model.
var fileSizes = []uint64{0, 100, 100_000, 2 * mib}

// ulimit -f cuts a write short before it refuses the rest: what is written in part
// must not get a name.
func TestSmallFilesAreATypedError(t *testing.T) {
	src := folderSource(t, map[string][]byte{"w.bin": randomBytes(1, 3*mib)})
	var dirs []string
	for range fileSizes {
		dirs = append(dirs, proctest.TmpRegistry(t))
	}
	for _, dir := range dirs[:2] { // the others are made by the child
		must(t, openRegistry(t, dir, nil).Close())
	}
	a := runChild[smallFilesAnswer](t, smallFiles, append([]string{src.Path}, dirs...)...)
	for i, l := range a.Loads {
		if !l.is("ErrLimit") || !strings.Contains(l.Text, "ulimit -f") {
			t.Errorf("%d bytes: %+v", fileSizes[i], l)
		}
	}
	for _, dir := range dirs {
		m := mustLoad(t, openRegistry(t, dir, nil), "k", src)
		must(t, m.Verify(ctxb))
		must(t, m.Close())
	}
}

// closedStreams: dir, a source, and what it does. It closes its standard streams once the
// registry is open, and writes there all the same; or it closes them before, and opens
// them again afterwards.
var closedStreams = child("closed-streams", func(args []string) error {
	closeThem := func() {
		for fd := range 3 {
			_ = unix.Close(fd)
		}
	}
	if args[2] == "before" {
		closeThem()
	}
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	if args[2] == "before" {
		null, err := unix.Open("/dev/null", unix.O_RDWR, 0)
		for fd := range 3 {
			if fd != null {
				err = errors.Join(err, unix.Dup3(null, fd, 0))
			}
		}
		if err != nil {
			os.Exit(3)
		}
	} else {
		closeThem()
	}
	go func() {
		for noise := []byte(strings.Repeat("noise", 100)); ; {
			for fd := range 3 {
				_, _ = unix.Write(fd, noise)
			}
		}
	}()
	for i := range 10 {
		m, err := r.GetOrLoad(ctxb, fmt.Sprint("k", i), Source{Path: args[1]})
		if err != nil {
			os.Exit(1)
		}
		if err := m.Close(); err != nil {
			os.Exit(2)
		}
	}
	os.Exit(7)
	return nil
})

func TestClosedStandardStreams(t *testing.T) {
	for _, when := range []string{"before", "after"} {
		t.Run(when, func(t *testing.T) {
			r := newRegistry(t, nil)
			files := map[string][]byte{"w.bin": randomBytes(1, 5*mib+7)}
			p := proctest.Start(t, closedStreams, r.Dir(), folderSource(t, files).Path, when)
			if code := p.Wait(); code != 7 {
				t.Errorf("the program ended with %d", code)
			}
			for i := range 10 {
				m := mustGet(t, r, fmt.Sprint("k", i))
				wantFiles(t, m, files)
				must(t, m.Verify(ctxb))
				must(t, m.Close())
			}
		})
	}
}
