//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/onecopy/onecopy/registry"
)

const (
	wayPublish = "after the load"
	wayKill    = "after kill -9 of the loader"
)

func waitCase(n int) string {
	if n == 1 {
		return "one process waits for a load"
	}
	return fmt.Sprintf("%d processes wait for a load", n)
}

// microWait lets n processes wait for one that loads.
//
//   - after the load: from the last byte that the loader wrote until the first and the last have it mapped.
//   - after kill -9: from the signal until one of them is the loader ("first"), and from there, the load of a
//     small file included, until the last one has the model mapped ("last").
func (s *session) microWait(ctx context.Context, n int) error {
	return s.alternate(ctx, "micro", waitCase(n), s.roundsOr(7), []string{wayPublish, wayKill}, func(way string) (values, error) {
		return s.waitOnce(ctx, n, way == wayKill)
	})
}

func (s *session) waitOnce(ctx context.Context, n int, kill bool) (v values, err error) {
	dir, err := os.MkdirTemp(s.shm, "registry-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	loader, err := s.task(ctx, "loader", dir)
	if err != nil {
		return nil, err
	}
	defer func() { fleet{loader}.kill() }()
	if err := loader.next(&values{}); err != nil { // it is loading now
		return nil, err
	}
	waiters, err := startFleet(ctx, n, func() (command, error) {
		return command{argv: []string{s.self, taskCommand, "waiter", dir}}, nil
	})
	if err != nil {
		return nil, err
	}
	defer func() { waiters.kill() }()
	for _, w := range waiters {
		if err := w.next(&values{}); err != nil {
			return nil, err
		}
	}
	if err := asleep(ctx, waiters); err != nil {
		return nil, err
	}
	cpu, err := idleTime(waiters)
	if err != nil {
		return nil, err
	}

	v = values{"cpu_ms_per_s": cpu}
	from := monotonic()
	if kill {
		err = loader.cmd.Process.Kill()
	} else {
		err = loader.tell("go")
	}
	if err != nil {
		return nil, err
	}
	// They stamp the clock themselves. Nobody is asked before all are through: the answers need the
	// processor, too.
	time.Sleep(100*time.Millisecond + time.Duration(n)*time.Millisecond)
	var owned, first, last int64
	for _, w := range waiters {
		if err := w.tell("report"); err != nil {
			return nil, err
		}
		var got stamps
		if err := w.next(&got); err != nil {
			return nil, err
		}
		owned = max(owned, got.Owned)
		last = max(last, got.Done)
		if first == 0 || got.Done < first {
			first = got.Done
		}
	}
	switch {
	case kill && owned == 0:
		return nil, errors.New("nobody took over the load")
	case kill:
		v["first_ms"], v["last_ms"] = milliseconds(owned-from), milliseconds(last-owned)
	default:
		var got stamps
		if err := loader.next(&got); err != nil {
			return nil, err
		}
		v["first_ms"], v["last_ms"] = milliseconds(first-got.Written), milliseconds(last-got.Written)
	}
	return v, nil
}

// stamps are the answer of a loader and of a waiter.
type stamps struct {
	Owned   int64 `json:"owned,omitempty"` // this process began to load
	Written int64 `json:"written,omitempty"`
	Done    int64 `json:"done,omitempty"` // it has the model mapped
}

// taskLoader loads until it is told to go on, or killed.
func taskLoader(t terminal, args []string) error {
	if err := need(args, "REGISTRY"); err != nil {
		return err
	}
	var got stamps
	src := small("1", nil)
	write := src.Load
	src.Load = func(ctx context.Context, w *registry.Writer) error {
		if err := t.answer(values{"loading": 1}); err != nil {
			return err
		}
		if !t.wait() {
			return errors.New("nobody told it to go on")
		}
		defer func() { got.Written = monotonic() }()
		return write(ctx, w)
	}
	return loadStamped(t, args[0], src, &got)
}

// taskWaiter wants the same model at the same time.
func taskWaiter(t terminal, args []string) error {
	if err := need(args, "REGISTRY"); err != nil {
		return err
	}
	if err := t.answer(values{"ready": 1}); err != nil {
		return err
	}
	var got stamps
	return loadStamped(t, args[0], small("1", func() { got.Owned = monotonic() }), &got)
}

func loadStamped(t terminal, dir string, src registry.Source, got *stamps) error {
	reg, err := registry.Open(dir, nil)
	if err != nil {
		return err
	}
	m, err := reg.GetOrLoad(context.Background(), modelKey, src)
	if err != nil {
		return err
	}
	got.Done = monotonic()
	if got.Written == 0 {
		t.wait() // a waiter answers when it is asked
	}
	return errors.Join(t.out.Encode(got), m.Close(), reg.Close())
}

// asleep returns when the kernel lists all processes as waiting for a lock.
func asleep(ctx context.Context, f fleet) error {
	for {
		text, err := os.ReadFile("/proc/locks")
		if err != nil {
			return err
		}
		waiting := map[string]bool{}
		for line := range strings.Lines(string(text)) {
			// "3: -> FLOCK  ADVISORY  WRITE 4711 00:1b:42 0 EOF"
			if fields := strings.Fields(line); len(fields) > 5 && fields[1] == "->" {
				waiting[fields[5]] = true
			}
		}
		missing := 0
		for _, p := range f {
			if !waiting[strconv.Itoa(p.cmd.Process.Pid)] {
				missing++
			}
		}
		if missing == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// idleTime is the processor time, in ms per second, that all threads of some processes use in one second.
func idleTime(f fleet) (float64, error) {
	sum := func() (int64, error) {
		var total int64
		for _, p := range f {
			threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", p.cmd.Process.Pid))
			if err != nil {
				return 0, err
			}
			for _, path := range threads {
				text, err := os.ReadFile(path)
				if err != nil {
					continue // the thread has ended
				}
				var ns int64
				if _, err := fmt.Sscan(string(text), &ns); err != nil {
					return 0, fmt.Errorf("%s: %w", path, err)
				}
				total += ns
			}
		}
		return total, nil
	}
	before, err := sum()
	if err != nil {
		return 0, err
	}
	begin := monotonic()
	time.Sleep(time.Second)
	after, err := sum()
	return 1e3 * float64(after-before) / float64(monotonic()-begin), err
}

// The packages' own benchmarks that this part repeats, by package.
var callBenchmarks = []struct{ pkg, pattern string }{
	{"./registry", "Lookup|UseCached|GetCloseCached|GetOrLoadCached|Attach|Stale|Flock|RemoveIdle|LoadSmall"},
	{"./internal/layout", "Lookup|Word"},
}

// microCalls runs them where this program was built from a checkout.
func (s *session) microCalls(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Path}} {{.Dir}}").Output()
	path, dir, _ := strings.Cut(strings.TrimSpace(string(out)), " ")
	if err != nil || path != modulePath {
		s.note("micro: single calls were not measured: this is no checkout of the module, or go is not installed")
		return nil
	}
	for _, b := range callBenchmarks {
		s.say("micro: go test -bench in %s", b.pkg)
		cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^Benchmark("+b.pattern+")$", "-benchmem",
			"-benchtime", "100ms", "-count", strconv.Itoa(s.roundsOr(5)), b.pkg)
		cmd.Dir = dir
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			s.note("micro: go test -bench in %s failed: %v", b.pkg, err)
		}
		rounds := map[string]int{}
		for _, line := range parseBenchmarks(string(out)) {
			name := strings.TrimPrefix(b.pkg, "./") + ": " + line.name
			s.add("micro", "single calls", name, rounds[name], line.values)
			rounds[name]++
		}
	}
	return nil
}
