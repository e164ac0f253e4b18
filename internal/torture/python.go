//go:build linux

package main

import (
	"bufio"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

//go:embed worker.py
var workerPy string

// pythonNursery is a Python process that has imported everything and forks workers.
type pythonNursery struct {
	place
	mu    sync.Mutex
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Reader
	steps map[string]bool // that the Python client has
}

func startNursery(python string, p place) (n *pythonNursery, err error) {
	src, err := filepath.Abs("python/src")
	if err != nil {
		return nil, err
	}
	script := filepath.Join(p.Base, "worker.py")
	if err := os.WriteFile(script, []byte(workerPy), 0o600); err != nil {
		return nil, err
	}
	text, err := json.Marshal(map[string]any{"base": p.Base, "steady": p.steady(), "doomed": p.doomed(), "slots": p.Slots,
		"keys": keys, "versions": versions})
	if err != nil {
		return nil, err
	}
	n = &pythonNursery{place: p, cmd: exec.Command(python, script, string(text)), steps: map[string]bool{}}
	n.cmd.Env = append(os.Environ(), "PYTHONPATH="+src)
	n.cmd.Stderr = os.Stderr
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if n.in, err = n.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := n.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	n.out = bufio.NewReader(out)
	if err := n.cmd.Start(); err != nil {
		return nil, err
	}
	line, err := n.out.ReadString('\n')
	if err != nil {
		return nil, fmt.Errorf("the Python workers need the package xxhash: %w", err)
	}
	for _, step := range strings.Fields(line) {
		n.steps[step] = true
	}
	return n, nil
}

func (n *pythonNursery) ask(order string, answer ...any) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, err := fmt.Fprintln(n.in, order); err != nil {
		return err
	}
	line, err := n.out.ReadString('\n')
	if err != nil {
		return fmt.Errorf("the Python nursery: %w", err)
	}
	_, err = fmt.Sscan(line, answer...)
	return err
}

func (n *pythonNursery) close() {
	n.in.Close()
	_ = n.cmd.Wait()
}

type pythonVictim struct {
	n    *pythonNursery
	id   int
	fd   int
	slot int
}

func (n *pythonNursery) start(j job) (victim, error) {
	v := &pythonVictim{n: n, slot: j.Slot}
	if err := n.ask(fmt.Sprintf("start %d %d %s %d", j.Slot, j.Seed, step(j.Step), skip(j)), &v.id); err != nil {
		return nil, err
	}
	var err error
	v.fd, err = unix.PidfdOpen(v.id, 0) // it is not reaped before we say so
	return v, err
}

func (v *pythonVictim) pid() int { return v.id }

func (v *pythonVictim) await(func()) error {
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(v.fd), Events: unix.POLLIN}}, -1)
		if err != unix.EINTR {
			unix.Close(v.fd)
			return err
		}
	}
}

func (v *pythonVictim) reap() (syscall.WaitStatus, string, error) {
	var status uint32
	if err := v.n.ask(fmt.Sprintf("reap %d", v.id), &status); err != nil {
		return 0, "", err
	}
	out, err := os.ReadFile(filepath.Join(v.n.Base, fmt.Sprintf("python-%d.err", v.slot)))
	if errors.Is(err, os.ErrNotExist) { // killed before it had one
		err = nil
	}
	return syscall.WaitStatus(status), string(out), err
}

// step is how a step is told to Python.
func step(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
