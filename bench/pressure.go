//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

const (
	casePressure = "next full read after another process took the memory"
	hogStep      = 64 << 20
)

var pressureView = view{
	part: "pressure", title: "Memory pressure",
	about: "Two idle workers have the same model, one by mapping the file of the disk, one by onecopy, and both have read it twice. Then another\n" +
		"process takes memory until only `--leave` of it is available, and keeps it while first one and then the other worker reads\n" +
		"its model again. \"Before\" is the worker's second scan. Without swap a tmpfs cannot lose pages; with swap it can.",
	columns: []sampleColumn{
		{head: "before, ms", metric: "before_ms", text: short},
		{head: "after, ms", metric: "scan_ms", text: short},
		{head: "still in the page cache, %", metric: "cached_percent", text: percent},
		{head: "taken by the other, MB", metric: "hog_bytes", text: megaText},
		{head: "time / mmap", metric: "scan_ms", text: times, base: wayFile},
	},
}

func (s *session) runPressure(ctx context.Context) error {
	if why := s.loadRoom(s.o.pressureSize + s.o.leave); why != "" {
		s.note("pressure: skipped: %s", why)
		return nil
	}
	m, err := generate(s.work, s.o.pressureSize, false)
	if err != nil {
		return err
	}
	reg, _, err := s.bench.load(ctx, m, 0)
	if err != nil {
		return err
	}
	rounds := s.roundsOr(5)
	for round := range rounds {
		s.say("pressure: round %d of %d", round+1, rounds)
		if err = s.pressureRound(ctx, m, reg, round); err != nil {
			break
		}
	}
	return errors.Join(err, reg.remove(), os.Remove(m.path))
}

func (s *session) pressureRound(ctx context.Context, m modelFile, l *loaded, round int) error {
	if err := m.warm(); err != nil {
		return err
	}
	ways := []string{wayFile, wayModel}
	args := map[string][]string{wayFile: {"scan", m.path, ""}, wayModel: {"scan", "", l.dir}}
	workers := map[string]*process{}
	before := map[string]values{}
	for _, way := range ways {
		p, err := s.task(ctx, args[way]...)
		if err != nil {
			return err
		}
		defer func() { fleet{p}.kill() }()
		v := values{}
		if err := p.next(&v); err != nil {
			return err
		}
		workers[way], before[way] = p, v
	}
	hog, err := s.task(ctx, "hog", strconv.FormatInt(s.o.leave, 10), strconv.FormatInt(s.o.most, 10))
	if err != nil {
		return err
	}
	defer func() { fleet{hog}.kill() }()
	taken := values{}
	if err := hog.next(&taken); err != nil {
		return err
	}
	cached := m.cached()
	for _, way := range rotated(ways, round) {
		p := workers[way]
		if err := p.tell("read"); err != nil {
			return err
		}
		v := values{}
		if err := p.next(&v); err != nil {
			return err
		}
		if v["zeros"] != before[way]["zeros"] {
			return p.failed(errors.New("it read other bytes than before"))
		}
		v["before_ms"], v["hog_bytes"] = before[way]["scan2_ms"], taken["hog_bytes"]
		if way == wayFile && cached >= 0 {
			v["cached_percent"] = 100 * float64(cached) / float64(m.size)
		}
		s.add("pressure", fmt.Sprintf("%s, model of %s, %s left", casePressure, mega(m.size), mega(s.o.leave)), way, round, v)
	}
	return nil
}

// taskHog takes memory until only a given number of bytes is available, at most so many, and holds it until
// its standard input ends. Should the machine run out of memory all the same, it is this process that dies.
func taskHog(t terminal, args []string) error {
	if err := need(args, "LEAVE MOST"); err != nil {
		return err
	}
	leave, err1 := strconv.ParseInt(args[0], 10, 64)
	most, err2 := strconv.ParseInt(args[1], 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("1000"), 0); err != nil {
		return err
	}
	var taken int64
	for {
		free, err := available()
		if err != nil {
			return err
		}
		if free-hogStep < leave || taken+hogStep > most {
			break
		}
		mem, err := unix.Mmap(-1, 0, hogStep, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return os.NewSyscallError("mmap", err)
		}
		for at := 0; at < len(mem); at += 4096 {
			mem[at] = 1
		}
		taken += hogStep
	}
	if err := t.answer(values{"hog_bytes": float64(taken)}); err != nil {
		return err
	}
	for t.wait() {
	}
	return nil
}
