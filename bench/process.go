//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
)

// command says how to start a worker; extra files become its descriptors 3, 4, ...
type command struct {
	argv  []string
	extra []*os.File
	env   []string // besides this program's own
}

// process is a running worker.
type process struct {
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	lines  *bufio.Scanner
	stderr bytes.Buffer
	waited bool
}

// startProcess starts a worker that dies with ctx.
func startProcess(ctx context.Context, c command) (*process, error) {
	p := &process{cmd: exec.CommandContext(ctx, c.argv[0], c.argv[1:]...)}
	p.cmd.ExtraFiles, p.cmd.Env = c.extra, append(os.Environ(), c.env...)
	p.cmd.Stderr = &p.stderr
	stdin, err := p.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.stdin, p.lines = stdin, bufio.NewScanner(stdout)
	return p, p.cmd.Start()
}

// next waits for the worker's next line.
func (p *process) next(answer any) error {
	if !p.lines.Scan() {
		err := p.lines.Err()
		if err == nil {
			err = errors.New("it ended without an answer")
		}
		p.wait()
		return p.failed(err)
	}
	if err := json.Unmarshal(p.lines.Bytes(), answer); err != nil {
		return p.failed(err)
	}
	return nil
}

// report waits for the report of a worker.
func (p *process) report() (report, error) {
	var rep report
	err := p.next(&rep)
	if err == nil && rep.Error != "" {
		err = p.failed(errors.New(rep.Error))
	}
	return rep, err
}

func (p *process) failed(err error) error {
	text := strings.TrimSpace(p.stderr.String())
	if text != "" {
		text = ": " + text
	}
	return fmt.Errorf("worker %d: %w%s", p.cmd.Process.Pid, err, text)
}

// tell sends a command; the worker answers with a report.
func (p *process) tell(command string) error {
	_, err := io.WriteString(p.stdin, command+"\n")
	return err
}

// wait waits for the worker's death, however it died, and returns the processor time of its life.
func (p *process) wait() time.Duration {
	if !p.waited {
		p.waited = true
		// The way it died is known by whoever waits: it was told to end, was killed or gave no answer.
		_ = p.cmd.Wait()
	}
	if p.cmd.ProcessState == nil {
		return 0
	}
	return p.cmd.ProcessState.UserTime() + p.cmd.ProcessState.SystemTime()
}

// fleet is all workers of a trial. Its methods act on all of them before they wait for any.
type fleet []*process

// startFleet starts n workers as fast as it can; next is called right before each start.
func startFleet(ctx context.Context, n int, next func() (command, error)) (fleet, error) {
	var f fleet
	for range n {
		c, err := next()
		if err == nil {
			var p *process
			p, err = startProcess(ctx, c)
			for _, file := range c.extra {
				file.Close() // the child has its own
			}
			if err == nil {
				f = append(f, p)
				continue
			}
		}
		f.kill()
		return nil, err
	}
	return f, nil
}

// reports is the barrier: it returns when all workers have answered.
func (f fleet) reports(check uint64) ([]report, error) {
	all := make([]report, 0, len(f))
	for _, p := range f {
		rep, err := p.report()
		if err != nil {
			return nil, err
		}
		if rep.Check != check {
			return nil, p.failed(fmt.Errorf("it read other bytes than the model's: check %#x, want %#x", rep.Check, check))
		}
		all = append(all, rep)
	}
	return all, nil
}

func (f fleet) tell(command string) error {
	for _, p := range f {
		if err := p.tell(command); err != nil {
			return p.failed(err)
		}
	}
	return nil
}

// kill sends SIGKILL to all workers, waits for their deaths and returns the processor time of their lives.
func (f fleet) kill() time.Duration {
	for _, p := range f {
		if !p.waited {
			_ = p.cmd.Process.Kill() // it can only fail because the worker is dead already
		}
	}
	var cpu time.Duration
	for _, p := range f {
		cpu += p.wait()
	}
	return cpu
}
