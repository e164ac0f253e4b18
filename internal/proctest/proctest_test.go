//go:build linux

package proctest_test

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/onecopy/onecopy/internal/proctest"
	"golang.org/x/sys/unix"
)

func init() {
	proctest.Program("echo", echo)
	proctest.Program("fail", fail)
	proctest.Program("rounds", rounds)
	proctest.Program("parent", parent)
	proctest.Program("hold", hold)
	proctest.Program("stopself", stopself)
}

func TestMain(m *testing.M) { proctest.Main(m) }

// echo prints its arguments, then every line it gets.
func echo(args []string) int {
	fmt.Println(strings.Join(args, "|"))
	for sc := bufio.NewScanner(os.Stdin); sc.Scan(); {
		fmt.Println("got " + sc.Text())
	}
	return 7
}

func TestConversation(t *testing.T) {
	// Arguments that look like flags of a test binary are not for it.
	p := proctest.Start(t, "echo", "-test.run=x", "two words", "")
	if got, want := p.Line(t), "-test.run=x|two words|"; got != want {
		t.Errorf("arguments %q, want %q", got, want)
	}
	for i := range 3 {
		fmt.Fprintln(p.Stdin, i)
		if got, want := p.Line(t), fmt.Sprint("got ", i); got != want {
			t.Errorf("line %q, want %q", got, want)
		}
	}
	p.Stdin.Close()
	if code := p.Wait(); code != 7 {
		t.Errorf("exit code %d, want 7", code)
	}
	if code := p.Wait(); code != 7 {
		t.Errorf("exit code of the second Wait %d, want 7", code)
	}
	p.Kill() // of an ended process does nothing
}

func TestKill(t *testing.T) {
	p := proctest.Start(t, "echo")
	p.Line(t)
	p.Kill()
	if code, want := p.Wait(), 128+int(syscall.SIGKILL); code != want {
		t.Errorf("Wait() = %d, want %d", code, want)
	}
	if err := syscall.Kill(p.PID(), 0); err != syscall.ESRCH {
		t.Errorf("the process was not reaped: %v", err)
	}
}

func TestStopAndCont(t *testing.T) {
	p := proctest.Start(t, "echo")
	p.Line(t)
	for range 3 {
		p.Stop()
		if got := state(t, p.PID()); got != "T" {
			t.Fatalf("state %s after Stop, want T", got)
		}
		fmt.Fprintln(p.Stdin, "hello")
		p.Cont()
		p.Line(t)
	}
	p.Stop()
	p.Kill() // works on a stopped process
}

func stopself([]string) int {
	fmt.Println("ready")
	syscall.Tgkill(os.Getpid(), syscall.Gettid(), syscall.SIGSTOP)
	fmt.Println("continued")
	return 0
}

func TestAwaitStop(t *testing.T) {
	p := proctest.Start(t, "stopself")
	p.AwaitStop(t)
	p.Line(t)
	p.Cont()
	if got := p.Line(t); got != "continued" {
		t.Errorf("line %q", got)
	}
	if code := p.Wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// state returns the state letter of a process.
func state(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return rest[:1]
}

func fail(args []string) int {
	fmt.Fprintln(os.Stderr, "trouble with", os.Getenv("PROCTEST_FRUIT"))
	fmt.Print("no newline")
	return 3
}

// recorder is a test that ends when end is called and may fail without failing
// the test that uses it.
type recorder struct {
	testing.TB
	failed   bool
	log      []string
	cleanups []func()
}

func (r *recorder) Helper()                   {}
func (r *recorder) Failed() bool              { return r.failed }
func (r *recorder) Logf(f string, a ...any)   { r.log = append(r.log, fmt.Sprintf(f, a...)) }
func (r *recorder) Cleanup(f func())          { r.cleanups = append(r.cleanups, f) }
func (r *recorder) Fatalf(f string, a ...any) { panic(fatal(fmt.Sprintf(f, a...))) }

type fatal string

func (r *recorder) end() {
	for i := len(r.cleanups) - 1; i >= 0; i-- {
		r.cleanups[i]()
	}
}

func TestFailureShowsStderr(t *testing.T) {
	for _, failed := range []bool{true, false} {
		r := &recorder{TB: t}
		p := proctest.Env("PROCTEST_FRUIT=apples").Start(r, "fail")
		if code := p.Wait(); code != 3 {
			t.Errorf("exit code %d, want 3", code)
		}
		if got := p.Line(r); got != "no newline" {
			t.Errorf("last line %q", got)
		}
		r.failed = failed
		r.end()
		if shown := strings.Contains(strings.Join(r.log, "\n"), "trouble with apples"); shown != failed {
			t.Errorf("failed = %v: stderr shown = %v: %q", failed, shown, r.log)
		}
		if !strings.Contains(p.Stderr(), "apples") {
			t.Errorf("Stderr() = %q", p.Stderr())
		}
	}
}

func TestNoFurtherLine(t *testing.T) {
	r := &recorder{TB: t}
	p := proctest.Start(r, "fail")
	defer r.end()
	p.Line(r)
	defer func() {
		msg, ok := recover().(fatal)
		if !ok || !strings.Contains(string(msg), "without a further line") {
			t.Errorf("Line at the end of stdout: %q", msg)
		}
	}()
	p.Line(r)
}

func TestUnknownProgram(t *testing.T) {
	p := proctest.Start(t, "nosuchprogram")
	if code := p.Wait(); code != 125 {
		t.Errorf("exit code %d, want 125", code)
	}
}

// A child that outlives the process and keeps its streams open delays neither
// Wait nor Kill.
func TestOrphanKeepsStreams(t *testing.T) {
	p := proctest.StartCmd(t, "shell", exec.Command("sh", "-c", "cat </dev/zero >/dev/null & echo $!; exit 4"))
	child, err := strconv.Atoi(p.Line(t))
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Kill(child, syscall.SIGKILL)
	if code := p.Wait(); code != 4 {
		t.Errorf("exit code %d, want 4", code)
	}
}

func rounds(args []string) int {
	dir := args[0]
	n, _ := strconv.Atoi(args[1])
	id := args[2]
	for round := range 5 {
		mine := filepath.Join(dir, fmt.Sprintf("round-%d", round))
		os.MkdirAll(mine, 0o700)
		os.WriteFile(filepath.Join(mine, id), nil, 0o600)
		proctest.Barrier(dir, n)
		here, err := os.ReadDir(mine)
		if err != nil || len(here) != n {
			fmt.Printf("round %d: passed with %d of %d there (%v)\n", round, len(here), n, err)
			return 1
		}
	}
	return 0
}

func TestBarrier(t *testing.T) {
	const n = 16
	dir := t.TempDir()
	var ps []*proctest.Proc
	for id := range n {
		ps = append(ps, proctest.Start(t, "rounds", dir, strconv.Itoa(n), strconv.Itoa(id)))
	}
	for _, p := range ps {
		if code := p.Wait(); code != 0 {
			t.Error(p.Line(t))
		}
	}
	proctest.Barrier(t.TempDir(), 1) // waits for nobody
}

// parent starts a further process and waits.
func parent(args []string) int {
	p := proctest.Start(&recorder{}, "hold", args[0])
	fmt.Println(p.PID())
	select {}
}

// hold keeps a FIFO open for writing.
func hold(args []string) int {
	f, err := os.OpenFile(args[0], os.O_WRONLY, 0)
	if err != nil {
		return 1
	}
	f.WriteString("held\n")
	select {}
}

func TestChildrenDieWithTheTest(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	p := proctest.Start(t, "parent", fifo)
	p.Line(t)
	r, err := os.Open(fifo)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.ReadFull(r, make([]byte, len("held\n"))); err != nil {
		t.Fatal(err)
	}
	p.Kill()
	// The end of file comes when the last writer, the grandchild, is dead.
	if b, err := io.ReadAll(r); err != nil || len(b) != 0 {
		t.Errorf("read %q, %v", b, err)
	}
}

func TestAwaitBlocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	lock := func() *os.File {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			t.Error(err)
			return nil
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
			t.Error(err)
		}
		return f
	}
	held := lock()
	done := make(chan bool)
	const waiters = 3
	for range waiters {
		go func() { lock().Close(); done <- true }()
	}
	proctest.AwaitBlocked(t, path, waiters)
	held.Close()
	for range waiters {
		<-done
	}
}

func TestTmpRegistry(t *testing.T) {
	var dir string
	t.Run("use", func(t *testing.T) {
		dir = proctest.TmpRegistry(t)
		if _, err := os.Lstat(dir); !os.IsNotExist(err) {
			t.Errorf("%s exists: %v", dir, err)
		}
		sub := filepath.Join(dir, "a", "b")
		if err := os.MkdirAll(sub, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(sub, "f"), nil, 0o444); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(sub, 0o500); err != nil {
			t.Fatal(err)
		}
	})
	if _, err := os.Lstat(dir); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", dir, err)
	}
}

func TestOpenFDs(t *testing.T) {
	before := proctest.OpenFDs(t)
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	if got := proctest.OpenFDs(t); got != before+1 {
		t.Errorf("%d descriptors, want %d", got, before+1)
	}
	f.Close()
}
