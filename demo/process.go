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
	"os/exec"
	"strings"
)

// worker is a running worker process.
type worker struct {
	name    string
	cmd     *exec.Cmd
	stdin   io.WriteCloser
	lines   *bufio.Scanner
	stderr  bytes.Buffer
	started int64
	waited  bool
	err     error // of its end
}

// startWorker starts a worker that dies with ctx.
func startWorker(ctx context.Context, name string, argv, env []string) (*worker, error) {
	w := &worker{name: name, cmd: exec.CommandContext(ctx, argv[0], argv[1:]...)}
	w.cmd.Env = env
	if w.cmd.Args[1] == workerCommand {
		w.cmd.Args[0] = "onecopy-demo" // its folder only makes the list of holders wide
	}
	w.cmd.Stderr = &w.stderr
	stdin, err := w.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := w.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	w.stdin, w.lines, w.started = stdin, bufio.NewScanner(stdout), monotonic()
	return w, w.cmd.Start()
}

func (w *worker) pid() int { return w.cmd.Process.Pid }

// answer waits for the worker's next line: it has then read every byte.
func (w *worker) answer() (answer, error) {
	var a answer
	if !w.lines.Scan() {
		err := w.lines.Err()
		if err == nil {
			err = errors.New("it ended without an answer")
		}
		w.wait()
		return a, w.failed(err)
	}
	if err := json.Unmarshal(w.lines.Bytes(), &a); err != nil {
		return a, w.failed(err)
	}
	return a, nil
}

// again makes the worker read every byte again.
func (w *worker) again() (answer, error) {
	if _, err := io.WriteString(w.stdin, "again\n"); err != nil {
		return answer{}, w.failed(err)
	}
	return w.answer()
}

func (w *worker) failed(err error) error {
	text := strings.TrimSpace(w.stderr.String())
	if text != "" {
		text = "\n" + text
	}
	return fmt.Errorf("%s (pid %d): %w%s", w.name, w.pid(), err, text)
}

// wait waits for the worker's death and returns what its end was, as often as it is asked.
func (w *worker) wait() error {
	if !w.waited {
		w.waited, w.err = true, w.cmd.Wait()
	}
	return w.err
}

// kill is kill -9.
func (w *worker) kill() {
	if !w.waited {
		_ = w.cmd.Process.Kill() // it can only fail because the worker is dead already
		_ = w.wait()
	}
}

// end lets the worker end by itself.
func (w *worker) end() error {
	w.stdin.Close()
	if err := w.wait(); err != nil {
		return w.failed(err)
	}
	return nil
}
