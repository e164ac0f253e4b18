//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// newRegistry makes a registry on /dev/shm. At the end of the test it must be
// sound: see openRegistry.
func newRegistry(t testing.TB, opts *Options) *Registry {
	t.Helper()
	return openRegistry(t, proctest.TmpRegistry(t), opts)
}

// openRegistry opens dir. When the test is over, and its models are closed,
// nothing may be left open, one collector run must leave a registry in which
// Check finds nothing, and no descriptor or mapping of it may be left in this
// process.
func openRegistry(t testing.TB, dir string, opts *Options) *Registry {
	t.Helper()
	r, err := Open(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		wantNothingOpen(t, dir) // the collector passes over a load lock that is being let go
		wantSound(t, dir)
		wantNothingOpen(t, dir)
	})
	return r
}

// openOnly opens dir for tests that leave it broken on purpose.
func openOnly(t testing.TB, dir string, opts *Options) *Registry {
	t.Helper()
	r, err := Open(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		wantNothingOpen(t, dir)
	})
	return r
}

// wantSound runs the collector and then Check, with all digests.
func wantSound(t testing.TB, dir string) {
	t.Helper()
	r, err := Open(dir, &Options{MustExist: true})
	if errors.Is(err, ErrNoRegistry) {
		return // the test deleted it
	}
	if err != nil {
		t.Errorf("at the end: %v", err)
		return
	}
	defer r.Close()
	if _, err := r.GC(ctxb); err != nil {
		t.Errorf("at the end: %v", err)
	}
	problems, err := r.Check(ctxb, CheckOptions{Data: true})
	if err != nil {
		t.Errorf("at the end: %v", err)
	}
	for _, p := range problems {
		t.Errorf("at the end: %+v", p)
	}
}

// wantNothingOpen looks for descriptors and mappings of the registry. A
// goroutine that still waits for a load lock has some, until it is granted: that
// may take a moment longer than the test.
func wantNothingOpen(t testing.TB, dir string) {
	t.Helper()
	var open []string
	for range 5000 {
		if open = openFiles(t, dir); len(open) == 0 {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Errorf("still open:\n%s", strings.Join(open, "\n"))
}

func openFiles(t testing.TB, dir string) (open []string) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, dir) {
			open = append(open, "fd "+fd.Name()+" -> "+to)
		}
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		if strings.Contains(line, " "+dir) {
			open = append(open, strings.TrimSpace(line))
		}
	}
	return open
}

// child registers a program that is its own error handling, and fails with what
// fn returns.
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

// runChild runs a program to its end and returns the JSON of its last line.
func runChild[T any](t testing.TB, program string, args ...string) (answer T) {
	t.Helper()
	p := proctest.Start(t, program, args...)
	return lastWord[T](t, p)
}

// lastWord waits for a line of JSON and for the good end of a process.
func lastWord[T any](t testing.TB, p *proctest.Proc) (answer T) {
	t.Helper()
	line := p.Line(t)
	if code := p.Wait(); code != 0 {
		t.Fatalf("the child ended with code %d: %s\n%s", code, line, p.Stderr())
	}
	if err := json.Unmarshal([]byte(line), &answer); err != nil {
		t.Fatalf("%v: %s", err, line)
	}
	return answer
}

// nextWord returns the JSON of a process's next line.
func nextWord[T any](t testing.TB, p *proctest.Proc) (answer T) {
	t.Helper()
	line := p.Line(t)
	if err := json.Unmarshal([]byte(line), &answer); err != nil {
		t.Fatalf("%v: %s", err, line)
	}
	return answer
}

// say prints one line of JSON for the test.
func say(v any) error {
	b, err := json.Marshal(v)
	if err == nil {
		_, err = fmt.Printf("%s\n", b)
	}
	return err
}

// report is an error as a child tells it: the names of the sentinels that it is,
// and its text.
type report struct {
	Is   []string
	Text string
}

func reportOf(err error) (r report) {
	if err == nil {
		return r
	}
	r.Text = err.Error()
	for name, sentinel := range sentinels {
		if errors.Is(err, sentinel) {
			r.Is = append(r.Is, name)
		}
	}
	return r
}

var sentinels = map[string]error{
	"ErrNoRegistry": ErrNoRegistry, "ErrUntrusted": ErrUntrusted, "ErrVersion": ErrVersion, "ErrCorrupt": ErrCorrupt,
	"ErrClosed": ErrClosed, "ErrKey": ErrKey, "ErrPath": ErrPath, "ErrLimit": ErrLimit, "ErrReadOnly": ErrReadOnly,
	"ErrNotFound": ErrNotFound, "ErrBusy": ErrBusy, "ErrGone": ErrGone, "ErrTimeout": ErrTimeout,
	"ErrSource": ErrSource, "ErrSourceChanged": ErrSourceChanged, "ErrLoadFailed": ErrLoadFailed,
	"ErrNoSpace": ErrNoSpace, "ErrTableFull": ErrTableFull, "ErrNestedLoad": ErrNestedLoad, "ErrInUse": ErrInUse,
	"ErrProof": ErrProof, "ErrNoPrevious": ErrNoPrevious, "ErrConfig": ErrConfig,
	"Unsupported": errors.ErrUnsupported,
}

func (r report) is(name string) bool {
	for _, n := range r.Is {
		if n == name {
			return true
		}
	}
	return false
}

// become gives up root for good, in all threads.
func become(uid int) error {
	if err := syscall.Setgroups(nil); err != nil {
		return err
	}
	if err := syscall.Setresgid(uid, uid, uid); err != nil {
		return err
	}
	return syscall.Setresuid(uid, uid, uid)
}

// foreignUID is somebody else: not root, and not what the kernel shows for
// users without a place in a namespace.
const foreignUID = 12345

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

// The places of a registry's files.

func v1(dir string, parts ...string) string {
	return filepath.Join(append([]string{dir, layout.Folder}, parts...)...)
}

func tablePath(dir string) string { return v1(dir, layout.TableFile) }

func keyLockPath(dir, key string) string {
	return v1(dir, layout.LocksDir, layout.StripeLock(layout.Stripe(key)))
}

func genPath(dir string, m Info, ext string) string {
	return v1(dir, layout.ModelsDir, layout.GenName(m.Epoch, m.Generation)+ext)
}

// editTable changes a table behind the library's back.
func editTable(t testing.TB, dir string, fn func(layout.Editor)) {
	t.Helper()
	b, err := os.ReadFile(tablePath(dir))
	if err != nil {
		t.Fatal(err)
	}
	e, err := layout.NewEditor(b)
	if err != nil {
		t.Fatal(err)
	}
	fn(e)
	f, err := os.OpenFile(tablePath(dir), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
}

func readTable(t testing.TB, dir string) *layout.Table {
	t.Helper()
	b, err := os.ReadFile(tablePath(dir))
	if err != nil {
		t.Fatal(err)
	}
	table, err := layout.NewTable(b)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

// goroutines returns the stacks of this package's goroutines but the caller's.
func goroutines() (stacks []string) {
	buf := make([]byte, 1<<20)
	buf = buf[:runtime.Stack(buf, true)]
	for i, s := range strings.Split(string(buf), "\n\n") {
		if i > 0 && strings.Contains(s, "onecopy/registry.(") {
			stacks = append(stacks, s)
		}
	}
	return stacks
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
