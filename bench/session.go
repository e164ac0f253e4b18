//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// session is one run of the benchmark.
type session struct {
	*bench
	o        options
	res      *results
	progress io.Writer
}

// part is what can be run by its name.
type part struct {
	name string
	run  func(*session, context.Context) error
	view view // what its samples look like; workers have tables of their own
}

// parts are run in this order.
var parts = []part{
	{"load", (*session).runLoad, loadView},
	{"micro", (*session).runMicro, microView},
	{"pressure", (*session).runPressure, pressureView},
	{"tokens", (*session).runTokens, tokensView},
	{"scale", (*session).runScale, scaleView},
	{"workers", (*session).runWorkers, view{}},
}

func partNames() []string {
	var names []string
	for _, p := range parts {
		names = append(names, p.name)
	}
	return names
}

func (s *session) say(text string, args ...any) {
	fmt.Fprintf(s.progress, "bench: "+text+"\n", args...)
}

// note is for the reader of the results, once.
func (s *session) note(text string, args ...any) {
	line := fmt.Sprintf(text, args...)
	for _, old := range s.res.Notes {
		if old == line {
			return
		}
	}
	s.res.Notes = append(s.res.Notes, line)
	s.say("%s", line)
}

func (s *session) add(part, name, way string, round int, values map[string]float64) {
	s.res.Samples = append(s.res.Samples, sample{part, name, way, round, values})
}

// roundsOr is the number of rounds that the flags ask for, or n.
func (s *session) roundsOr(n int) int {
	if s.o.rounds > 0 {
		return s.o.rounds
	}
	return n
}

// rotated is the order of the ways in a round: nobody is always first.
func rotated(ways []string, round int) []string {
	var all []string
	for i := range ways {
		all = append(all, ways[(i+round)%len(ways)])
	}
	return all
}

// alternate runs every way once in each round and keeps what it measured.
func (s *session) alternate(ctx context.Context, part, name string, rounds int, ways []string, run func(way string) (map[string]float64, error)) error {
	for round := range rounds {
		s.say("%s: %s, round %d of %d", part, name, round+1, rounds)
		for _, way := range rotated(ways, round) {
			if err := ctx.Err(); err != nil {
				return err
			}
			values, err := run(way)
			if err != nil {
				return fmt.Errorf("%s, %s, %s: %w", part, name, way, err)
			}
			s.add(part, name, way, round, values)
		}
	}
	return nil
}

// room says why a trial that needs memory cannot be run, or "".
func (s *session) roomFor(need int64) string {
	free, err := available()
	if err != nil {
		return err.Error()
	}
	if need > free*9/10 {
		return fmt.Sprintf("needs %s of memory, %s are available", mega(need), mega(free))
	}
	return ""
}

// timed runs a foreign program to its end.
func timed(ctx context.Context, argv ...string) (map[string]float64, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var text strings.Builder
	cmd.Stderr = &text
	begin := monotonic()
	err := cmd.Run()
	wall := monotonic() - begin
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", argv[0], err, strings.TrimSpace(text.String()))
	}
	state := cmd.ProcessState
	return map[string]float64{"wall_ms": milliseconds(wall), "cpu_ms": milliseconds(int64(state.UserTime() + state.SystemTime()))}, nil
}

// chill drops a file from the page cache and reports the bytes that stayed there.
func chill(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if err := unix.Fdatasync(int(f.Fd())); err != nil {
		return 0, &fs.PathError{Op: "fdatasync", Path: path, Err: err}
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return 0, &fs.PathError{Op: "posix_fadvise", Path: path, Err: err}
	}
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if left := (modelFile{path: path, size: info.Size()}).cached(); left >= 0 {
		return left, nil
	}
	return probeCached(f, info.Size()), nil
}

// probeCached is for kernels that cannot tell: reads that may not wait for the disk, at many places.
func probeCached(f *os.File, size int64) int64 {
	const places = 256
	found := int64(0)
	var b [1]byte
	for i := range int64(places) {
		n, err := unix.Preadv2(int(f.Fd()), [][]byte{b[:]}, size*i/places, unix.RWF_NOWAIT)
		if n == 1 || err != nil && !errors.Is(err, unix.EAGAIN) {
			found++
		}
	}
	return size * found / places
}
