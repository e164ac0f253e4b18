//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/onecopy/onecopy/registry"
)

// The groups of the part micro, as in its flag.
const (
	microCalls  = "calls"
	microAttach = "attach"
	microScan   = "scan"
	microWait   = "wait"
	microRemove = "remove"
	microCheck  = "check"
)

var allMicro = []string{microCalls, microAttach, microScan, microWait, microRemove, microCheck}

// The cases that the targets look for.
const (
	caseAttach  = "attach in a process that runs"
	caseFresh   = "a fresh process"
	caseScan    = "read all of it, one process"
	wayFile     = "mmap of the disk file, warm"
	wayTmpfs    = "mmap of a tmpfs file, 4 KiB pages"
	wayModel    = "onecopy"
	wayEmptyRun = "does nothing"
	wayAttaches = "attaches and reads a byte"
	checkTable  = "all but the data"
	checkData   = "with the data"
)

var microView = view{
	part: "micro", title: "Single steps",
	about: "Medians over rounds. Attach, scan and removal are those of a real model of the size of `--micro-size`; a scan counts the zero bytes,\n" +
		"which reads as fast as the memory can. A fresh process is timed from outside, from its start to its end. Waiting is done by real\n" +
		"processes, all of which sleep in the kernel when the clock starts; with 200 of them on few cores most of the time is that of\n" +
		"the processes themselves. Single calls come from the packages' own benchmarks (`go test -bench`).",
	columns: []sampleColumn{
		{head: "time", metric: "ns", text: nanoseconds},
		{head: "with the first byte", metric: "touched_ns", text: nanoseconds},
		{head: "with letting go", metric: "cycle_ns", text: nanoseconds},
		{head: "allocations", metric: "allocs", text: short},
		{head: "over an empty one, µs", metric: "over_us", text: short},
		{head: "attach", metric: "attach_ns", text: nanoseconds},
		{head: "first scan, ms", metric: "scan1_ms", text: short},
		{head: "second scan, ms", metric: "scan2_ms", text: short},
		{head: "page tables, kB", metric: "tables_bytes", text: kiloText},
		{head: "first scan / mmap", metric: "scan1_ms", text: times, base: wayFile},
		{head: "first, ms", metric: "first_ms", text: short},
		{head: "last, ms", metric: "last_ms", text: short},
		{head: "CPU while waiting, ms/s, all", metric: "cpu_ms_per_s", text: short},
	},
}

func (s *session) runMicro(ctx context.Context) error {
	want := func(name string) bool { return slices.Contains(s.o.micro, name) }
	if want(microCalls) {
		if err := s.microCalls(ctx); err != nil {
			return err
		}
	}
	if want(microAttach) || want(microScan) || want(microRemove) {
		if why := s.loadRoom(2 * s.o.microSize); why != "" {
			s.note("micro: no model of %s: %s", gibi(s.o.microSize), why)
		} else if err := s.microModel(ctx, want); err != nil {
			return err
		}
	}
	if want(microWait) {
		for _, n := range s.o.waiters {
			if err := s.microWait(ctx, n); err != nil {
				return err
			}
		}
	}
	if want(microCheck) {
		return s.microCheck(ctx)
	}
	return nil
}

// microModel is all that needs a model of real size.
func (s *session) microModel(ctx context.Context, want func(string) bool) (err error) {
	m, err := generate(s.work, s.o.microSize, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(m.path)) }()
	reg, _, err := s.bench.load(ctx, m, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, reg.remove()) }()
	if want(microAttach) {
		if err := s.microAttach(ctx, reg); err != nil {
			return err
		}
		if err := s.microFresh(ctx, reg); err != nil {
			return err
		}
	}
	if want(microScan) {
		if err := s.microScan(ctx, m, reg); err != nil {
			return err
		}
	}
	if want(microRemove) {
		return s.microRemove(ctx, m, reg)
	}
	return nil
}

// microAttach attaches a model that this process does not use, again and again.
func (s *session) microAttach(ctx context.Context, l *loaded) error {
	const calls = 200
	name := fmt.Sprintf("%s, %s", caseAttach, gibi(s.o.microSize))
	return s.alternate(ctx, "micro", name, s.roundsOr(15), []string{wayModel}, func(string) (values, error) {
		var opened, touched, cycle []float64
		sum := 0
		for range calls {
			begin := monotonic()
			m, err := l.reg.Get(modelKey)
			if err != nil {
				return nil, err
			}
			got := monotonic()
			data, err := m.Bytes(m.Files()[0].Path)
			if err != nil {
				return nil, err
			}
			sum += int(data[0])
			read := monotonic()
			if err := m.Close(); err != nil {
				return nil, err
			}
			opened = append(opened, float64(got-begin))
			touched = append(touched, float64(read-begin))
			cycle = append(cycle, float64(monotonic()-begin))
		}
		return values{"ns": median(sorted(opened)), "touched_ns": median(sorted(touched)), "cycle_ns": median(sorted(cycle))}, nil
	})
}

// microFresh starts processes that attach and processes that do nothing.
func (s *session) microFresh(ctx context.Context, l *loaded) error {
	argv := map[string][]string{
		wayEmptyRun: {s.self, taskCommand, "empty"},
		wayAttaches: {s.self, taskCommand, "attach", l.dir},
	}
	rounds := s.roundsOr(100)
	s.say("micro: %s, %d rounds", caseFresh, rounds)
	for round := range rounds {
		took := values{}
		for _, way := range rotated([]string{wayEmptyRun, wayAttaches}, round) {
			v, err := timed(ctx, argv[way]...)
			if err != nil {
				return err
			}
			took[way] = v["wall_ms"]
		}
		s.add("micro", caseFresh, wayEmptyRun, round, values{"ns": 1e6 * took[wayEmptyRun]})
		s.add("micro", caseFresh, wayAttaches, round, values{"ns": 1e6 * took[wayAttaches], "over_us": 1e3 * (took[wayAttaches] - took[wayEmptyRun])})
	}
	return nil
}

// microScan reads the whole model twice, in a new process each time.
func (s *session) microScan(ctx context.Context, m modelFile, l *loaded) error {
	copied := filepath.Join(s.shm, "plain")
	if _, err := timed(ctx, "cp", m.path, copied); err != nil {
		return err
	}
	args := map[string][]string{wayFile: {"scan", m.path, ""}, wayTmpfs: {"scan", copied, ""}, wayModel: {"scan", "", l.dir}}
	err := s.alternate(ctx, "micro", fmt.Sprintf("%s, %s", caseScan, gibi(m.size)), s.roundsOr(15), []string{wayFile, wayTmpfs, wayModel}, func(way string) (values, error) {
		if err := m.warm(); err != nil {
			return nil, err
		}
		return s.ask(ctx, args[way]...)
	})
	return errors.Join(err, os.Remove(copied))
}

// microRemove removes an idle model of real size.
func (s *session) microRemove(ctx context.Context, m modelFile, l *loaded) error {
	return s.alternate(ctx, "micro", "remove an idle model of "+gibi(m.size), s.roundsOr(5), []string{wayModel}, func(string) (values, error) {
		if err := prewarm(m.size); err != nil {
			return nil, err
		}
		model, err := l.reg.GetOrLoad(ctx, modelKey, registry.Source{Path: m.path})
		if err != nil {
			return nil, err
		}
		if err := model.Close(); err != nil {
			return nil, err
		}
		begin := monotonic()
		err = l.reg.Remove(ctx, modelKey)
		return values{"ns": float64(monotonic() - begin)}, err
	})
}

// microCheck checks a registry of many models.
func (s *session) microCheck(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp(s.shm, "registry-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	reg, err := registry.Open(dir, &registry.Options{Slots: max(1024, 2*s.o.models)})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, reg.Close()) }()
	for i := range s.o.models {
		m, err := reg.GetOrLoad(ctx, fmt.Sprintf("bench/model-%d", i), small("1", nil))
		if err != nil {
			return err
		}
		if err := m.Close(); err != nil {
			return err
		}
	}
	name := fmt.Sprintf("check of %s models of one small file", grouped(int64(s.o.models)))
	return s.alternate(ctx, "micro", name, s.roundsOr(7), []string{checkTable, checkData}, func(way string) (values, error) {
		begin := monotonic()
		problems, err := reg.Check(ctx, registry.CheckOptions{Data: way == checkData})
		if err == nil && len(problems) > 0 {
			err = fmt.Errorf("%d problems, the first: %s", len(problems), problems[0].Text)
		}
		return values{"ns": float64(monotonic() - begin)}, err
	})
}

// small is a source of one small file; begin is called when the load begins.
func small(version string, begin func()) registry.Source {
	return registry.Source{Version: version, Size: 4096, Load: func(_ context.Context, w *registry.Writer) error {
		if begin != nil {
			begin()
		}
		f, err := w.Create("weights.bin", 4096)
		if err != nil {
			return err
		}
		if _, err := f.Write(make([]byte, 4096)); err != nil {
			return err
		}
		return f.Close()
	}}
}
