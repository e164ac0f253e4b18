//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/audit"
	"github.com/onecopy/onecopy/internal/faultinject"
	"github.com/onecopy/onecopy/internal/invariants"
	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
	"github.com/onecopy/onecopy/lockfile"
)

// faultsEnv chooses how many of the faults are tried: N takes every N-th, 1 all of
// them. N/K takes another part than N, so that several runs can share the work.
// "calls" takes one errno for each call, which is what make cover asks for.
const faultsEnv = "ONECOPY_FAULTS"

// TestFaults lets every system call of every scenario fail with every errno that
// it can have, once, and then from some call on for ever. Whatever fails: the
// program does not crash or hang, what it returns is right or a typed error,
// nothing of the registry stays open in it, models that it did not touch stay as
// they are, one collector run leaves no trace of it, and the same calls succeed
// afterwards. make faults tries all of them, go test a part.
func TestFaults(t *testing.T) { tryFaults(t, faultScenarios, "") }

// TestPythonFaults does the same with the client in Python, which the interpreter of
// ONECOPY_PYTHON runs.
func TestPythonFaults(t *testing.T) {
	python := os.Getenv("ONECOPY_PYTHON")
	if python == "" {
		t.Skip("ONECOPY_PYTHON names no interpreter that has what the client needs")
	}
	tryFaults(t, pythonScenarios, python)
}

func tryFaults(t *testing.T, scenarios []faultScenario, python string) {
	t.Helper()
	if err := faultinject.Supported(); err != nil {
		t.Skipf("no process can be traced here: %v", err)
	}
	every, part := uint32(40), uint32(0)
	if python != "" {
		every = 100
	}
	if invariants.Enabled || testing.Short() {
		every = 400
	}
	calls := os.Getenv(faultsEnv) == "calls"
	if v := os.Getenv(faultsEnv); v != "" && !calls {
		if !strings.Contains(v, "/") {
			v += "/0"
		}
		if _, err := fmt.Sscanf(v, "%d/%d", &every, &part); err != nil || part >= every {
			t.Fatalf("%s=%q: want N or N/K, K below N", faultsEnv, v)
		}
	}
	for i := range scenarios {
		s := &scenarios[i]
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			b := newFaultBench(t, s)
			b.python = python
			list := b.run(t)
			if t.Failed() || len(list.Calls) == 0 {
				t.Fatalf("without any fault: %d calls", len(list.Calls))
			}
			tried := 0
			all := faultRules(list.Calls)
			if python != "" {
				// Python raises what close returns, where a wrapper would be one more place
				// for an interrupt. The kernel returns errors of file systems that flush:
				// a tmpfs does not.
				all = slices.DeleteFunc(all, func(r faultinject.Rule) bool {
					return r.Call.Name == "close" && !strings.Contains(r.Call.Target, "source")
				})
			}
			least := leastFaults(s.name, all)
			for _, r := range all {
				h := faultHash(s.name, r)
				if calls && h == least[callOf(r)] || !calls && h%every == part {
					b.run(t, r)
					tried++
				}
			}
			t.Logf("%d calls, %d of %d faults", len(list.Calls), tried, len(all))
		})
	}
}

func faultHash(scenario string, r faultinject.Rule) uint32 {
	h := fnv.New32()
	fmt.Fprint(h, scenario, r)
	return h.Sum32()
}

// callOf is a rule without its errno.
func callOf(r faultinject.Rule) faultinject.Rule { r.Errno = 0; return r }

// leastFaults chooses one rule for each call, and one for each kind of call from its
// first one on: that of the least hash.
func leastFaults(scenario string, rules []faultinject.Rule) map[faultinject.Rule]uint32 {
	least := map[faultinject.Rule]uint32{}
	for _, r := range rules {
		if r.Errno == syscall.EINTR || r.Call.Name == "flock" && r.Errno == syscall.EWOULDBLOCK {
			continue // is repeated, or waited for, or means that somebody has the lock
		}
		h := faultHash(scenario, r)
		if was, is := least[callOf(r)]; !is || h < was {
			least[callOf(r)] = h
		}
	}
	return least
}

// faultRules are the faults for a list of calls: each call with each errno, and
// each kind of call with each errno from its first one on.
func faultRules(calls []faultinject.Call) (rules []faultinject.Rule) {
	for _, c := range calls {
		if c.N > 1 && (strings.HasPrefix(c.Target, "process:") || c.Target == "kernel:locks") {
			continue // processes and their locks come and go: who knows how many there are
		}
		for _, errno := range faultinject.Errnos(c) {
			rules = append(rules, faultinject.Rule{Call: c, Errno: errno})
			// A call that is interrupted for ever is repeated for ever, and a lock
			// that somebody holds for ever is waited for: the callers here set no
			// deadline.
			if c.N == 1 && errno != syscall.EINTR && !(c.Name == "flock" && errno == syscall.EWOULDBLOCK) {
				rules = append(rules, faultinject.Rule{Call: c, Errno: errno, Always: true})
			}
		}
		if faultinject.Partial(c) {
			rules = append(rules, faultinject.Rule{Call: c, Short: true})
		}
	}
	return rules
}

// faultBench is where a scenario runs: a tmpfs of its own where one can be
// mounted, so that every byte of it can be counted.
type faultBench struct {
	s       *faultScenario
	python  string // the interpreter of the program, if it is not this one
	root    string // as other processes reach it
	src     string
	files   map[string][]byte // of src
	counted bool
	base    int64 // bytes used by an empty one
	n       int
}

func newFaultBench(t *testing.T, s *faultScenario) *faultBench {
	t.Helper()
	b := &faultBench{s: s, src: t.TempDir()}
	if s.source != nil {
		b.files = s.source()
	}
	for name, data := range b.files {
		writeFile(t, filepath.Join(b.src, name), data)
	}
	if os.Geteuid() == 0 {
		root := smallTmpfs(t, 256*mib)
		b.root = strings.Replace(root, "self", fmt.Sprint(os.Getpid()), 1)
		b.counted, b.base = true, usedBytes(t, b.root)
		return b
	}
	b.root = proctest.TmpRegistry(t)
	if err := os.Mkdir(b.root, 0o700); err != nil {
		t.Fatal(err)
	}
	return b
}

// run runs the scenario with the rules and looks at what is left.
func (b *faultBench) run(t *testing.T, rules ...faultinject.Rule) *faultinject.Result {
	t.Helper()
	var wrong []string
	bad := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	b.n++
	dir := fmt.Sprintf("%s/reg-%d", b.root, b.n)
	defer os.RemoveAll(dir)
	quiet(func() { b.prepare(t, dir) })

	// What cannot be unmapped, or under the invariants tag not be fenced off, stays
	// mapped.
	leaky := ""
	for _, r := range rules {
		if c := r.Call; c.Name == "munmap" || invariants.Enabled && c.Name == "mmap" && c.Target == "[reserved]" {
			leaky = "leaky"
		}
	}
	release := b.holdKey(t, dir)
	cmd := proctest.Env("GOMAXPROCS=2").Command(t, runFaulted, b.s.name, dir, b.src, leaky)
	if b.python != "" {
		cmd = exec.Command(b.python, "testdata/faults.py", b.s.name, dir, b.src)
		cmd.Env = append(os.Environ(), "PYTHONPATH=../python/src")
	}
	res, err := faultinject.Run(cmd, faultinject.Options{Classify: b.classify, Rules: rules, Limit: time.Minute})
	release()
	if err != nil {
		t.Fatal(err)
	}
	var a faultAnswer
	switch {
	case res.Hung:
		bad("it hung")
	case res.Code != 0:
		bad("it ended with code %d", res.Code)
	default:
		if err := json.Unmarshal([]byte(res.Stdout), &a); err != nil {
			bad("%v: %s", err, res.Stdout)
		}
	}
	if len(rules) > 0 && res.Hits == 0 {
		bad("the call was not made")
	}
	for _, w := range a.Wrong {
		bad("%s", w)
	}
	for _, s := range a.Steps {
		if !s.Typed || len(rules) == 0 {
			bad("%s: %s", s.Call, s.Err.Text)
		}
	}
	if leaky == "" {
		for _, o := range a.Open {
			bad("still open: %s", o)
		}
	}
	quiet(func() { wrong = append(wrong, b.aftermath(dir)...) })
	if len(wrong) > 0 {
		t.Errorf("%s, %v:\n\t%s\nsteps: %+v\n%s", b.s.name, rules, strings.Join(wrong, "\n\t"), a.Steps, clip(res.Stderr, 6000))
	}
	return res
}

// quiet runs fn while no other goroutine starts a process: a child between fork and
// exec has a copy of every descriptor, and for that moment of every lease.
func quiet(fn func()) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	fn()
}

func (b *faultBench) prepare(t *testing.T, dir string) {
	t.Helper()
	if !b.s.fresh {
		r, err := Open(dir, &Options{Budget: b.s.budget})
		if err != nil {
			t.Fatal(err)
		}
		loaded(t, r, "keep", keep)
		if b.s.loaded {
			loaded(t, r, "k", Source{Path: b.src})
		}
		if b.s.prepare != nil {
			b.s.prepare(t, r)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if b.s.cold {
		for name := range b.files {
			dropFromCache(t, filepath.Join(b.src, name))
		}
	}
}

// dropFromCache lets the kernel forget a file, so that it has to be read from the
// disk, and reports whether that is so: some file systems have no disk.
func dropFromCache(t *testing.T, path string) bool {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)); err != nil {
		t.Fatal(err)
	}
	_, err = unix.Preadv2(int(f.Fd()), [][]byte{make([]byte, 1)}, 0, unix.RWF_NOWAIT)
	return errors.Is(err, unix.EAGAIN)
}

// holdKey holds the load lock of "k" in the scenario of a waiter, until somebody
// blocks for it.
func (b *faultBench) holdKey(t *testing.T, dir string) (release func()) {
	t.Helper()
	if b.s.name != "load-wait" {
		return func() {}
	}
	path := keyLockPath(dir, "k")
	held, err := lockfile.At(path).TryLock()
	if err != nil {
		t.Fatal(err)
	}
	done, over := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(over)
		for !blockedOn(path) {
			select {
			case <-done:
				_ = held.Unlock()
				return
			default:
			}
		}
		_ = held.Unlock()
	}()
	return func() { close(done); <-over }
}

// blockedOn reports whether a process blocks in the kernel for the lock of a file.
func blockedOn(path string) bool {
	var st unix.Stat_t
	locks, err := os.ReadFile("/proc/locks")
	if err != nil || unix.Stat(path, &st) != nil {
		return false
	}
	for line := range strings.Lines(string(locks)) {
		if strings.Contains(line, "-> FLOCK") && strings.Contains(line, fmt.Sprintf(":%d ", st.Ino)) {
			return true
		}
	}
	return false
}

// aftermath looks at the registry of a program that is dead, and then does
// without faults what that program tried.
func (b *faultBench) aftermath(dir string) (wrong []string) {
	bad := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	r, err := Open(dir, nil)
	if err != nil {
		return []string{fmt.Sprintf("afterwards: %v", err)}
	}
	defer r.Close()
	look := func(when string) {
		if _, err := r.GC(ctxb); err != nil {
			bad("%s: GC: %v", when, err)
		}
		problems, err := r.Check(ctxb, CheckOptions{Data: true})
		if err != nil {
			bad("%s: Check: %v", when, err)
		}
		for _, p := range problems {
			bad("%s: Check: %+v", when, p)
		}
		_, audited := audit.New(dir).Look(nil)
		for _, p := range audited {
			bad("%s: audit: %s", when, p)
		}
		if b.counted {
			var st unix.Statfs_t
			if err := unix.Statfs(b.root, &st); err != nil {
				bad("%s: %v", when, err)
			}
			// The auditor has compared the files' memory with what the models need.
			if used, files := int64(st.Blocks-st.Bfree)*st.Bsize-b.base, treeBytes(dir); used != files {
				bad("%s: the tmpfs has %d bytes used, its files take %d", when, used, files)
			}
		}
	}
	if !b.s.fresh {
		m, err := r.Get("keep")
		if err != nil {
			bad("the model of others: %v", err)
		} else {
			if err := m.Verify(ctxb); err != nil {
				bad("the model of others: %v", err)
			}
			m.Close()
		}
	}
	look("afterwards")
	f := &faulted{r: r, dir: dir, src: b.src, want: b.files, again: true}
	b.s.act(f)
	for _, check := range f.later {
		if err := check(); err != nil {
			bad("again: %v", err)
		}
	}
	for _, s := range f.steps {
		bad("again: %s: %s", s.Call, s.Err.Text)
	}
	if r, err = Open(dir, nil); err != nil { // the scenario may have closed it
		return append(wrong, fmt.Sprintf("again: %v", err))
	}
	defer r.Close()
	look("again")
	return wrong
}

// treeBytes is the memory of the files below dir.
func treeBytes(dir string) (sum int64) {
	_ = filepath.Walk(dir, func(path string, fi os.FileInfo, err error) error {
		if err == nil && fi.Mode().IsRegular() {
			sum += fi.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return nil
	})
	return sum
}

// registryFile reports whether a path, as the kernel names it, is within one of
// the registries of these tests.
func registryFile(path string) bool { return strings.Contains(path, "/reg-") }

// ofProcess matches what is read of every process of the machine.
var ofProcess = regexp.MustCompile(`^/proc/[0-9]+(|/maps|/fd|/fd/[0-9]+|/stat|/statm|/status|/comm|/cmdline|/smaps)$`)

// aNumber is the number of a descriptor or a process, which is another each time.
var aNumber = regexp.MustCompile(`[0-9]+$`)

// classify names what a path leads to.
func (b *faultBench) classify(path string) string {
	path = strings.TrimSuffix(path, " (deleted)")
	switch {
	case path == b.src:
		return "source-folder"
	case strings.HasPrefix(path, b.src+"/"):
		if b.files[strings.TrimPrefix(path, b.src+"/")] == nil {
			return "source-folder"
		}
		return "source"
	case strings.HasPrefix(path, "["):
		return path
	case !registryFile(path):
		if ofProcess.MatchString(path) {
			return aNumber.ReplaceAllString(ofProcess.ReplaceAllString(path, "process:$1"), "N")
		}
		if strings.HasPrefix(path, "/proc/") || strings.HasPrefix(path, "/sys/") {
			return "kernel:" + filepath.Base(path)
		}
		if path == "/dev/null" {
			return "" // the program's own streams
		}
		if rel, err := filepath.Rel(path, b.src); err == nil && !strings.HasPrefix(rel, "..") {
			return "above-source" // on the way to it
		}
		return "other:" + path
	}
	_, rest, _ := strings.Cut(path[strings.Index(path, "/reg-")+1:], "/")
	switch base := filepath.Base(rest); {
	case rest == "":
		return "top"
	case rest == layout.Folder:
		return "v1"
	case base == layout.TableFile:
		return "table"
	case base == layout.ModelsDir || base == layout.LocksDir:
		return base + "/"
	case strings.HasPrefix(rest, layout.Folder+"/"+layout.LocksDir+"/#"):
		return "lock-to-be"
	case strings.HasPrefix(rest, layout.Folder+"/"+layout.LocksDir+"/k-"):
		return "key-lock"
	case strings.HasPrefix(rest, layout.Folder+"/"+layout.LocksDir+"/"):
		return "table-lock"
	case strings.HasPrefix(base, "#"):
		return "unnamed"
	case strings.HasSuffix(base, layout.ManifestExt):
		return "manifest"
	case strings.HasSuffix(base, layout.DigestsExt):
		return "digests"
	default:
		return "payload"
	}
}
