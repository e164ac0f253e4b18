//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"golang.org/x/sys/unix"
)

// taskCommand is the hidden subcommand under which this program starts itself for one trial:
//
//	bench task NAME ARGUMENTS...
//
// A task answers with lines of JSON, numbers by name; some wait for a line on their standard input first.
const taskCommand = "task"

// values is one answer of a task.
type values = map[string]float64

// terminal is what a task talks to.
type terminal struct {
	in  *bufio.Scanner
	out *json.Encoder
}

// wait waits for the next command; false is the end.
func (t terminal) wait() bool { return t.in.Scan() }

func (t terminal) answer(v values) error { return t.out.Encode(v) }

var tasks map[string]func(t terminal, args []string) error

func init() { // a map literal would refer to itself by way of the tasks
	tasks = map[string]func(t terminal, args []string) error{
		"empty":     func(terminal, []string) error { return nil },
		"load":      taskLoad,
		"readwrite": taskReadWrite,
		"direct":    taskDirect,
		"attach":    taskAttach,
		"scan":      taskScan,
		"loader":    taskLoader,
		"waiter":    taskWaiter,
		"hog":       taskHog,
		"holder":    taskHolder,
		"copy":      taskCopy,
	}
}

// taskMain is the whole life of a task's process.
func taskMain(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	t := terminal{bufio.NewScanner(stdin), json.NewEncoder(stdout)}
	err := errors.New("no task")
	if len(args) > 0 {
		err = fmt.Errorf("no task %q", args[0])
		if run := tasks[args[0]]; run != nil {
			err = run(t, args[1:])
		}
	}
	if err != nil {
		fmt.Fprintln(stderr, "bench task:", err)
		return 1
	}
	return 0
}

// need fails unless a task has its arguments.
func need(args []string, names string) error {
	if n := len(strings.Fields(names)); len(args) != n {
		return fmt.Errorf("takes %s", names)
	}
	return nil
}

// task starts a task; the caller kills or waits for it.
func (b *bench) task(ctx context.Context, args ...string) (*process, error) {
	return startProcess(ctx, command{argv: append([]string{b.self, taskCommand}, args...)})
}

// ask runs a task that gives one answer.
func (b *bench) ask(ctx context.Context, args ...string) (values, error) {
	p, err := b.task(ctx, args...)
	if err != nil {
		return nil, err
	}
	defer fleet{p}.kill()
	v := values{}
	return v, p.next(&v)
}

// metered measures the time and the processor time of this whole process while fn runs.
func metered(fn func() error) (values, error) {
	before, begin := processorTime(), monotonic()
	err := fn()
	wall, after := monotonic()-begin, processorTime()
	return values{"wall_ms": milliseconds(wall), "cpu_ms": milliseconds(after - before)}, err
}

func processorTime() int64 {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u) // cannot fail for this process
	return u.Utime.Nano() + u.Stime.Nano()
}
