//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/onecopy/onecopy/registry"
)

const modulePath = "github.com/onecopy/onecopy"

// The groups of the part scale, as in its flag.
const (
	scaleList  = "list"
	scaleEvict = "evict"
	scaleScan  = "scan"
)

var allScale = []string{scaleList, scaleEvict, scaleScan}

// The ways of the part scale that the targets look for. Those that are a command are its arguments.
const (
	wayLs      = "ls"
	wayCheck   = "check"
	wayHolders = "holders"
	wayMetrics = "metrics"
	wayScrape  = "metrics --listen, one scrape"
	wayTop     = "top, on a terminal"
	wayTopJSON = "top -o jsonl"
	wayRoom    = "a load of 1 MiB that needs its room"
	wayNoRoom  = "a load of 1 MiB that has room"
	wayTrim    = "trim --to 0"
	wayRm      = "rm"
	wayScan    = "scan"
)

var scaleView = view{
	part: "scale", title: "Many models, many holders",
	about: "Every command is a new process of shmctl, timed from outside; `version` is what starting it costs alone. Each holder is a process that\n" +
		"has attached `--holds` models. A scrape goes to one server that runs, holders not counted. The share of a processor that top takes is\n" +
		"that of a process that runs, after its first refresh. Scan looks for private copies of one model in processes\n" +
		"that have read the file, among them one that has read another model of the same size, whose head is the same.",
	columns: []sampleColumn{
		{head: "time, ms", metric: "wall_ms", text: short},
		{head: "CPU, ms", metric: "cpu_ms", text: short},
		{head: "of one processor, %", metric: "share_percent", text: short},
		{head: "a refresh every 2 s would take, %", metric: "refresh_percent", text: short},
		{head: "between refreshes, ms", metric: "interval_ms", text: short},
		{head: "copies not found", metric: "missed", text: short},
		{head: "found in the other model", metric: "wrong", text: short},
		{head: "other processes", metric: "elsewhere", text: short},
		{head: "reclaimable bytes: error, %", metric: "error_percent", text: short},
	},
}

func (s *session) runScale(ctx context.Context) error {
	programs, err := s.shmctls(ctx)
	if err != nil {
		s.note("scale: not measured: %v", err)
		return nil
	}
	want := func(name string) bool { return slices.Contains(s.o.scale, name) }
	if want(scaleList) {
		if err := s.scaleList(ctx, programs); err != nil {
			return err
		}
	}
	if !want(scaleEvict) && !want(scaleScan) {
		return nil
	}
	if why := s.loadRoom(s.o.scaleSize); why != "" {
		s.note("scale: no model of %s: %s", gibi(s.o.scaleSize), why)
		return nil
	}
	m, err := generate(s.work, s.o.scaleSize, false)
	if err != nil {
		return err
	}
	if want(scaleEvict) {
		err = s.scaleEvict(ctx, programs[0], m)
	}
	if want(scaleScan) && err == nil {
		err = s.scaleScan(ctx, programs[0], m)
	}
	return errors.Join(err, os.Remove(m.path))
}

// shmctl is a program to measure.
type shmctl struct {
	path string
	mark string // behind its ways, when there are several
}

func (p shmctl) way(way string) string { return way + p.mark }

func (p shmctl) argv(dir string, args ...string) []string {
	return append([]string{p.path, "--dir", dir}, args...)
}

// shmctls are those that were named, or the one of this checkout. Of several, all but the first are told
// apart by the names of their files.
func (s *session) shmctls(ctx context.Context) ([]shmctl, error) {
	var all []shmctl
	for i, path := range s.o.shmctl {
		path, err := filepath.Abs(path)
		if err != nil {
			return nil, err
		}
		if _, err := timed(ctx, path, "version"); err != nil {
			return nil, err
		}
		p := shmctl{path: path}
		if i > 0 {
			p.mark = " (" + filepath.Base(path) + ")"
		}
		all = append(all, p)
	}
	if len(all) > 0 {
		return all, nil
	}
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Path}} {{.Dir}}").Output()
	path, dir, _ := strings.Cut(strings.TrimSpace(string(out)), " ")
	if err != nil || path != modulePath {
		return nil, errors.New("this is no checkout of the module, or go is not installed; name a program by --shmctl")
	}
	built := filepath.Join(s.work, "shmctl")
	build := exec.CommandContext(ctx, "go", "build", "-o", built, "./cmd/shmctl")
	build.Dir = dir
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("go build: %w: %s", err, out)
	}
	return []shmctl{{path: built}}, nil
}

func scaleCase(models, holders int) string {
	return fmt.Sprintf("%s models, %s processes that hold some", grouped(int64(models)), grouped(int64(holders)))
}

// scaleList runs what shows a registry on one of many models and many holders.
func (s *session) scaleList(ctx context.Context, programs []shmctl) (err error) {
	dir, err := os.MkdirTemp(s.shm, "registry-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := s.fillRegistry(ctx, dir); err != nil {
		return err
	}
	holders, err := s.startHolders(ctx, dir)
	if err != nil {
		return err
	}
	defer func() { holders.kill() }()

	name := scaleCase(s.o.models, s.o.holders)
	commands := []string{"version", wayLs, "ls -o json", wayCheck, wayHolders, "top --once", wayMetrics}
	type step struct {
		program shmctl
		args    string
	}
	steps := map[string]step{}
	var ways []string
	for _, c := range commands {
		for _, p := range programs {
			steps[p.way(c)] = step{p, c}
			ways = append(ways, p.way(c))
		}
	}
	err = s.alternate(ctx, "scale", name, s.roundsOr(15), ways, func(way string) (values, error) {
		return timed(ctx, steps[way].program.argv(dir, strings.Fields(steps[way].args)...)...)
	})
	if err != nil {
		return err
	}
	for round := range s.roundsOr(3) {
		for _, p := range programs {
			if err := s.scaleServed(ctx, p, dir, name, round); err != nil {
				return err
			}
		}
	}
	return nil
}

// scaleServed measures what stays running: the server of metrics, and top.
func (s *session) scaleServed(ctx context.Context, p shmctl, dir, name string, round int) error {
	for _, one := range []struct {
		way string
		run func(context.Context, []string) (values, error)
		arg []string
	}{
		{wayScrape, scrapes, []string{"metrics", "--listen", "127.0.0.1:0"}},
		{wayTopJSON, s.topStream, []string{"top", "-o", "jsonl"}},
		{wayTop, s.topTerminal, []string{"top"}},
	} {
		s.say("scale: %s, round %d", p.way(one.way), round+1)
		if one.arg[0] == "top" && s.o.interval > 0 {
			one.arg = append(one.arg, "--interval", s.o.interval.String())
		}
		v, err := one.run(ctx, p.argv(dir, one.arg...))
		if err != nil {
			return fmt.Errorf("%s: %w", p.way(one.way), err)
		}
		s.add("scale", name, p.way(one.way), round, v)
	}
	return nil
}

func scaleKey(i int) string { return fmt.Sprintf("bench/model-%d", i) }

func (s *session) fillRegistry(ctx context.Context, dir string) error {
	slots := 0 // the default
	if s.o.models > 1000 {
		slots = 2 * s.o.models
	}
	reg, err := registry.Open(dir, &registry.Options{Slots: slots})
	if err != nil {
		return err
	}
	for i := range s.o.models {
		m, err := reg.GetOrLoad(ctx, scaleKey(i), small("1", nil))
		if err != nil {
			return errors.Join(err, reg.Close())
		}
		if err := m.Close(); err != nil {
			return err
		}
	}
	return reg.Close()
}

// startHolders starts processes that hold models until they are killed.
func (s *session) startHolders(ctx context.Context, dir string) (fleet, error) {
	next := 0
	f, err := startFleet(ctx, s.o.holders, func() (command, error) {
		argv := []string{s.self, taskCommand, "holder", dir}
		for range s.o.holds {
			argv = append(argv, scaleKey(next%s.o.models))
			next++
		}
		return command{argv: argv}, nil
	})
	if err != nil {
		return nil, err
	}
	for _, p := range f {
		if err := p.next(&values{}); err != nil {
			f.kill()
			return nil, err
		}
	}
	return f, nil
}

// taskHolder attaches models, reads a byte of each, and holds them until its standard input ends.
func taskHolder(t terminal, args []string) error {
	if len(args) < 2 {
		return errors.New("takes REGISTRY KEY...")
	}
	reg, err := registry.Open(args[0], nil)
	if err != nil {
		return err
	}
	for _, key := range args[1:] {
		m, err := reg.Get(key)
		if err != nil {
			return err
		}
		data, err := m.Bytes(m.Files()[0].Path)
		if err != nil {
			return err
		}
		sink += data[0]
	}
	if err := t.answer(values{"held": float64(len(args) - 1)}); err != nil {
		return err
	}
	for t.wait() {
	}
	return nil
}
