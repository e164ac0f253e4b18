//go:build amd64 || arm64

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// roleVar tells this program, or its test, started again, that it is a child and
// which one. Its argument comes as JSON on standard input's first line.
const roleVar = "ONECOPY_CAMPAIGN_ROLE"

var roles = map[string]func(json.RawMessage) error{
	"load":    loadWorker,
	"observe": observe,
	"serve":   serve,
	"canary":  canary,
}

// childMain does not return in a child.
func childMain() {
	role := os.Getenv(roleVar)
	if role == "" {
		return
	}
	err := fmt.Errorf("no role %q", role)
	if f := roles[role]; f != nil {
		err = f(json.RawMessage(os.Getenv(roleVar + "_ARG")))
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "campaign: %s: %v\n", role, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// child is a running process of the trial. It ends with its standard input, with
// a kill, or with this process.
type child struct {
	cmd   *exec.Cmd
	stdin io.Closer
	done  chan struct{} // closed when it was reaped
	ended int64         // clock after that
	err   error
}

// starter is a thread that never ends: the kernel sends the parent-death signal
// when the thread ends that started a process.
var starter = sync.OnceValue(func() chan<- func() {
	work := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range work {
			f()
		}
	}()
	return work
})

// startCommand starts a command whose stdout and stderr are set or not wanted.
func startCommand(cmd *exec.Cmd) (*child, error) {
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	result := make(chan error)
	starter() <- func() { result <- cmd.Start() }
	if err := <-result; err != nil {
		return nil, err
	}
	c := &child{cmd: cmd, stdin: in, done: make(chan struct{})}
	go func() {
		c.err = cmd.Wait()
		c.ended = clock()
		close(c.done)
	}()
	return c, nil
}

// roleCommand is this program in another role.
func roleCommand(role string, arg any) (*exec.Cmd, error) {
	b, err := json.Marshal(arg)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleVar+"="+role, roleVar+"_ARG="+string(b))
	cmd.Stderr = os.Stderr
	return cmd, nil
}

func startRole(role string, arg any, stdout io.Writer) (*child, error) {
	cmd, err := roleCommand(role, arg)
	if err != nil {
		return nil, err
	}
	cmd.Stdout = stdout
	return startCommand(cmd)
}

// kill ends the process with SIGKILL; its locks and mappings are gone afterwards.
func (c *child) kill() {
	_ = c.cmd.Process.Kill() // fails only when it has been reaped
	<-c.done
}

// finish closes the process's standard input and waits for it.
func (c *child) finish() error {
	_ = c.stdin.Close()
	<-c.done
	return c.err
}

// killed reports whether SIGKILL ended the process.
func (c *child) killed() bool {
	var e *exec.ExitError
	if !errors.As(c.err, &e) {
		return false
	}
	ws, ok := e.Sys().(syscall.WaitStatus)
	return ok && ws.Signaled() && ws.Signal() == syscall.SIGKILL
}

// untilEnd returns a channel that is closed when standard input ends: the trial is
// over, or its coordinator is dead.
func untilEnd() <-chan struct{} {
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	return ended
}

// clock is CLOCK_MONOTONIC, which all processes of a machine share.
func clock() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // cannot fail with this clock
	return ts.Nano()
}
