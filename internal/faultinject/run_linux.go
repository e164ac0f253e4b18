//go:build amd64 || arm64

package faultinject

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Rule lets one call fail.
type Rule struct {
	Call   Call          // with a number: this one; with Always: it and all later ones of its kind
	Errno  syscall.Errno // what it returns without being executed (close is executed)
	Short  bool          // instead of failing it is asked for half of the bytes
	Always bool
}

func (r Rule) String() string {
	s := r.Call.String() + " = "
	if r.Short {
		s += "short"
	} else {
		s += unix.ErrnoName(r.Errno)
	}
	if r.Always {
		s += " from then on"
	}
	return s
}

func (r Rule) meets(c Call) bool {
	return r.Call.Kind() == c.Kind() && (c.N == r.Call.N || r.Always && c.N > r.Call.N)
}

// Options of Run.
type Options struct {
	// Classify names the kind of file that a path leads to; "" leaves the calls
	// about it alone and out of the list. Files without a name have the kernel's:
	// "/dev/shm/x/#123 (deleted)". Memory that is reserved, without a file, is
	// "[reserved]".
	Classify func(path string) string
	Rules    []Rule
	// Limit is the time after which the program is believed to hang; 0: 2 minutes.
	// It is then asked for its stacks (SIGQUIT).
	Limit time.Duration
}

// Result of a run.
type Result struct {
	Calls  []Call // between Begin and End, by name, detail, target and number
	Hits   int    // how many calls a rule changed
	Ended  bool   // the program has reached End
	Code   int    // exit code, or 128 plus the signal
	Hung   bool   // it did not end within the limit
	Stdout string
	Stderr string
}

// traceEnv tells a program that it is traced, and, for those that are not written in
// Go, the numbers of the calls that its filter has to stop (registry/testdata/faults.py).
const traceEnv = "ONECOPY_FAULTINJECT"

// Run runs cmd, whose streams must not be set, to its end. Its error is about
// the tracing; how the program ended is in the result.
func Run(cmd *exec.Cmd, o Options) (*Result, error) {
	if o.Limit == 0 {
		o.Limit = 2 * time.Minute
	}
	t := &tracer{o: o, seen: map[int]bool{}, count: map[Call]int{}}
	var out, diag bytes.Buffer
	var copies sync.WaitGroup
	var ours, theirs []*os.File
	defer func() {
		for _, f := range append(ours, theirs...) {
			_ = f.Close()
		}
	}()
	for _, b := range []*bytes.Buffer{&out, &diag} {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		ours, theirs = append(ours, r), append(theirs, w)
		copies.Go(func() { _, _ = io.Copy(b, r) })
	}
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	var numbers []string
	for nr := range calls {
		numbers = append(numbers, strconv.FormatUint(nr, 10))
	}
	cmd.Env = append(cmd.Env, traceEnv+"="+strings.Join(numbers, ","))
	cmd.Stdout, cmd.Stderr = theirs[0], theirs[1]
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true, Pdeathsig: syscall.SIGKILL}

	failed := make(chan error)
	go func() {
		// Every ptrace call has to come from one thread; it ends with this
		// goroutine, and should that be early, the kernel kills the program.
		runtime.LockOSThread()
		failed <- t.run(cmd, theirs)
	}()
	err := <-failed
	for _, w := range theirs { // closed by run already, unless it failed
		_ = w.Close()
	}
	copies.Wait()
	t.result.Calls = sorted(t.result.Calls)
	t.result.Stdout, t.result.Stderr = out.String(), diag.String()
	if err != nil {
		return &t.result, fmt.Errorf("faultinject: %w", err)
	}
	return &t.result, nil
}

// Supported reports whether programs can be traced here.
var Supported = sync.OnceValue(func() error {
	if raceEnabled {
		return errors.New("faultinject: the race detector makes system calls of its own, which must not fail")
	}
	exe, err := os.Executable()
	if err == nil {
		err = canFilter()
	}
	if err != nil {
		return err
	}
	// The program that prints nothing and ends at once: a test binary that lists
	// no tests.
	r, err := Run(exec.Command(exe, "-test.list=^$"), Options{Limit: 30 * time.Second})
	if err == nil && r.Code != 0 {
		err = fmt.Errorf("faultinject: a traced process ended with code %d: %s", r.Code, r.Stderr)
	}
	return err
})

// tracer is one Run. All its methods run on one thread.
type tracer struct {
	o      Options
	pid    int
	seen   map[int]bool // threads whose first stop has come
	count  map[Call]int // calls so far, by kind
	active bool         // between Begin and End
	after  map[int]syscall.Errno
	result Result
}

const (
	wallNoThread = unix.WALL | unix.WNOTHREAD // only what this thread traces
	syscallStop  = unix.SIGTRAP | 0x80
)

func (t *tracer) run(cmd *exec.Cmd, theirs []*os.File) error {
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start under ptrace: %w", err)
	}
	for _, w := range theirs {
		_ = w.Close()
	}
	t.pid = cmd.Process.Pid
	_ = cmd.Process.Release() // waited for here, not by os/exec
	var ws unix.WaitStatus
	if _, err := wait(t.pid, &ws); err != nil || !ws.Stopped() {
		return fmt.Errorf("wait for the first stop: %v, status %#x", err, uint32(ws))
	}
	t.seen[t.pid] = true
	const options = unix.PTRACE_O_EXITKILL | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACESECCOMP | unix.PTRACE_O_TRACESYSGOOD
	if err := unix.PtraceSetOptions(t.pid, options); err != nil {
		return fmt.Errorf("ptrace options: %w", err)
	}
	if err := unix.PtraceCont(t.pid, 0); err != nil {
		return fmt.Errorf("ptrace continue: %w", err)
	}
	stop := t.watch()
	defer stop()
	t.after = map[int]syscall.Errno{}
	for {
		tid, err := wait(-1, &ws)
		if err != nil {
			return fmt.Errorf("wait: %w", err)
		}
		switch {
		case ws.Exited() || ws.Signaled():
			if tid != t.pid {
				continue
			}
			if t.result.Code = ws.ExitStatus(); ws.Signaled() {
				t.result.Code = 128 + int(ws.Signal())
			}
			return nil
		case ws.Stopped():
			// A thread may be killed while it is stopped: then it is gone.
			if err := t.resume(tid, ws); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
		}
	}
}

// watch asks a program that hangs for its stacks, and then kills it.
func (t *tracer) watch() (stop func()) {
	pid, done, over := t.pid, make(chan struct{}), make(chan struct{})
	go func() {
		defer close(over)
		for _, sig := range []unix.Signal{unix.SIGQUIT, unix.SIGKILL} {
			select {
			case <-done:
				return
			case <-time.After(t.o.Limit):
				t.result.Hung = true // read after over
				_ = unix.Kill(pid, sig)
			}
		}
	}()
	return func() { close(done); <-over }
}

func wait(pid int, ws *unix.WaitStatus) (int, error) {
	for {
		got, err := unix.Wait4(pid, ws, wallNoThread, nil)
		if !errors.Is(err, unix.EINTR) {
			return got, err
		}
	}
}

// resume lets a stopped thread go on.
func (t *tracer) resume(tid int, ws unix.WaitStatus) error {
	switch sig := ws.StopSignal(); {
	case sig == syscallStop: // the end of a call whose result is to be changed
		errno, ok := t.after[tid]
		delete(t.after, tid)
		if ok {
			var regs unix.PtraceRegs
			if err := unix.PtraceGetRegs(tid, &regs); err != nil {
				return err
			}
			setResult(&regs, errno)
			if err := unix.PtraceSetRegs(tid, &regs); err != nil {
				return err
			}
		}
		return unix.PtraceCont(tid, 0)
	case sig == unix.SIGTRAP && ws.TrapCause() == unix.PTRACE_EVENT_SECCOMP:
		return t.call(tid)
	case sig == unix.SIGTRAP && ws.TrapCause() > 0: // a new thread
		return unix.PtraceCont(tid, 0)
	case sig == unix.SIGSTOP && !t.seen[tid]: // how a new thread begins
		t.seen[tid] = true
		return unix.PtraceCont(tid, 0)
	default:
		return unix.PtraceCont(tid, int(sig))
	}
}

// call decides about a call that has not begun.
func (t *tracer) call(tid int) error {
	var regs unix.PtraceRegs
	if err := unix.PtraceGetRegs(tid, &regs); err != nil {
		return err
	}
	nr, args := callOf(&regs)
	if nr == unix.SYS_CLOSE {
		switch int32(args[0]) {
		case markBegin:
			t.active = true
			return unix.PtraceCont(tid, 0)
		case markEnd:
			t.active, t.result.Ended = false, true
			return unix.PtraceCont(tid, 0)
		}
	}
	if !t.active {
		return unix.PtraceCont(tid, 0)
	}
	c, ok := t.describe(nr, args)
	if !ok {
		return unix.PtraceCont(tid, 0)
	}
	t.count[c]++
	c.N = t.count[c]
	t.result.Calls = append(t.result.Calls, c)
	for _, r := range t.o.Rules {
		if !r.meets(c) {
			continue
		}
		t.result.Hits++
		switch {
		case r.Short:
			shorten(&regs)
			if err := unix.PtraceSetRegs(tid, &regs); err != nil {
				return err
			}
		case nr == unix.SYS_CLOSE:
			// Linux closes the descriptor whatever it returns.
			t.after[tid] = r.Errno
			return unix.PtraceSyscall(tid, 0)
		default:
			if err := skip(tid, &regs, r.Errno); err != nil {
				return err
			}
		}
		break
	}
	return unix.PtraceCont(tid, 0)
}
