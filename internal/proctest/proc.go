package proctest

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"time"
)

// drainTime is how long the end of a test waits for output that a descendant of
// the process may still hold open.
const drainTime = 2 * time.Second

// Proc is a running process.
type Proc struct {
	// Stdin is the process's standard input. Closing it is how a test usually
	// tells a program to go on or to end.
	Stdin io.WriteCloser

	t      TB
	name   string
	cmd    *exec.Cmd
	exited chan struct{} // closed when the process has been reaped
	stdout lines
	stderr output
}

// StartCmd starts any command as a [Proc], under a name for messages. The
// command's standard streams must not be set.
func StartCmd(t TB, name string, cmd *exec.Cmd) *Proc {
	t.Helper()
	p := &Proc{t: t, name: name, cmd: cmd, exited: make(chan struct{})}
	p.stdout.mu.changed = make(chan struct{})

	// Pipes of our own, because those of os/exec tie Wait to the closing of
	// stdout: a process that leaves a child behind would never be done.
	var files []*os.File
	pipe := func() (r, w *os.File) {
		r, w, err := os.Pipe()
		if err != nil {
			closeAll(files)
			t.Fatalf("proctest: start %s: %v", name, err)
		}
		files = append(files, r, w)
		return r, w
	}
	stdinR, stdinW := pipe()
	stdoutR, stdoutW := pipe()
	stderrR, stderrW := pipe()
	p.Stdin = stdinW
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdinR, stdoutW, stderrW
	dieWithParent(cmd)
	if err := onSpawnThread(cmd.Start); err != nil {
		closeAll(files)
		t.Fatalf("proctest: start %s: %v", name, err)
	}
	closeAll([]*os.File{stdinR, stdoutW, stderrW})

	var readers sync.WaitGroup
	readers.Go(func() { p.stdout.readFrom(stdoutR) })
	readers.Go(func() { p.stderr.readFrom(stderrR) })
	go func() {
		_ = cmd.Wait() // the result is in cmd.ProcessState
		close(p.exited)
	}()

	t.Cleanup(func() {
		p.Kill()
		_ = stdinW.Close() // the test may have done so
		end := time.Now().Add(drainTime)
		_ = stdoutR.SetReadDeadline(end)
		_ = stderrR.SetReadDeadline(end)
		readers.Wait()
		closeAll([]*os.File{stdoutR, stderrR})
		if s := p.stderr.String(); t.Failed() && s != "" {
			t.Logf("%s (pid %d) wrote to stderr:\n%s", name, p.PID(), s)
		}
	})
	return p
}

// PID returns the process's number.
func (p *Proc) PID() int { return p.cmd.Process.Pid }

// Line returns the next line of stdout. It waits for it until the test's
// deadline, and fails the test if there will be no further line.
func (p *Proc) Line(t TB) string {
	t.Helper()
	deadline := deadlineOf(t)
	for {
		line, ok, changed := p.stdout.next()
		if ok {
			return line
		}
		if changed == nil {
			t.Fatalf("%s (pid %d) closed stdout without a further line", p.name, p.PID())
		}
		select {
		case <-changed:
		case <-deadline:
			p.hung(t, "a line on stdout")
		}
	}
}

// Wait waits until the process has ended and returns its exit code, or as a
// shell does 128 plus the signal that killed it. It fails the test at the test's
// deadline.
func (p *Proc) Wait() int {
	p.t.Helper()
	select {
	case <-p.exited:
	case <-deadlineOf(p.t):
		p.hung(p.t, "its end")
	}
	if n := signalOf(p.cmd.ProcessState); n > 0 {
		return 128 + n
	}
	return p.cmd.ProcessState.ExitCode()
}

// Kill kills the process with SIGKILL and waits until it is gone: its locks,
// mappings and descriptors are released when Kill returns. A process that has
// ended already is left as it is.
func (p *Proc) Kill() {
	_ = p.cmd.Process.Kill() // fails only if the process has been reaped
	<-p.exited
}

// Signal sends a signal.
func (p *Proc) Signal(sig os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.t.Fatalf("proctest: signal %s (pid %d): %v", p.name, p.PID(), err)
	}
}

// Exited returns a channel that is closed when the process has ended.
func (p *Proc) Exited() <-chan struct{} { return p.exited }

// Stderr returns what the process has written to stderr so far.
func (p *Proc) Stderr() string { return p.stderr.String() }

// hung fails the test, with the stacks of a Go process in its stderr.
func (p *Proc) hung(t TB, what string) {
	t.Helper()
	dumpStacks(p)
	t.Fatalf("%s (pid %d): the test's time is over while waiting for %s", p.name, p.PID(), what)
}

// deadlineOf returns a channel that fires a little before t's deadline, early
// enough to say what was waited for; nil if t has none.
func deadlineOf(t TB) <-chan time.Time {
	d, ok := t.(interface{ Deadline() (time.Time, bool) })
	if !ok {
		return nil
	}
	end, ok := d.Deadline()
	if !ok {
		return nil
	}
	left := time.Until(end)
	return time.After(left - min(left/10, 10*time.Second))
}

// spawn is the thread on which processes are started. The kernel sends the
// parent-death signal when the *thread* that started a process ends, and Go ends
// a thread whenever a goroutine exits that was locked to it. This goroutine is
// locked and never exits.
var spawn = sync.OnceValue(func() chan<- func() {
	work := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range work {
			f()
		}
	}()
	return work
})

func onSpawnThread(start func() error) error {
	result := make(chan error)
	spawn() <- func() { result <- start() }
	return <-result
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// lines is the stdout of a process. It is read as it comes, so that a process
// never waits for its test to look.
type lines struct {
	mu struct {
		sync.Mutex
		waiting []string
		ended   bool
		changed chan struct{} // closed and replaced at each change
	}
}

func (l *lines) readFrom(r io.Reader) {
	br := bufio.NewReader(r)
	for {
		s, err := br.ReadString('\n')
		l.mu.Lock()
		if s != "" {
			l.mu.waiting = append(l.mu.waiting, strings.TrimSuffix(s, "\n"))
		}
		l.mu.ended = err != nil
		close(l.mu.changed)
		l.mu.changed = make(chan struct{})
		l.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// next returns the next line, or a channel that is closed when it is worth
// asking again, or nil when there will be no further line.
func (l *lines) next() (line string, ok bool, changed <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.mu.waiting) > 0 {
		line, l.mu.waiting = l.mu.waiting[0], l.mu.waiting[1:]
		return line, true, nil
	}
	if l.mu.ended {
		return "", false, nil
	}
	return "", false, l.mu.changed
}

// output is the stderr of a process.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) readFrom(r io.Reader) { _, _ = io.Copy(o, r) }

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}
