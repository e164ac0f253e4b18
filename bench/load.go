//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// The ways to get a file of the disk into shared memory.
const (
	wayCp       = "cp"
	wayCopy     = "read+write, 1 MiB"
	wayOne      = "onecopy, 1 thread"
	wayTwo      = "onecopy, 2 threads"
	wayPlain    = "onecopy, no 2 MiB pages"
	wayCold     = "onecopy"
	wayRaw      = "O_DIRECT read only"
	coldFrom    = 256 << 20 // smaller files are not worth the disk's attention
	sparseEvery = 16 << 20  // one MiB of data in each
)

var loadView = view{
	part: "load", title: "Load",
	about: "A file of the disk gets into shared memory: `cp` to the tmpfs, a program that reads and writes with a buffer of 1 MiB, and\n" +
		"`GetOrLoad` of a new process with its digests, its manifest and its publication; by Python it is `onecopy.open`, with two threads. Times of `cp` include the start of its process,\n" +
		"the others are taken inside theirs. \"No 2 MiB pages\" runs under `PR_SET_THP_DISABLE`, as on a kernel before 6.1. The page cache has\n" +
		"the whole source where it is warm and, checked before each trial, nothing of it where it is cold; a host's own cache is out of\n" +
		"reach. Speed and processor time are ratios to `cp` in the same round. \"Digest again\" reads and digests the finished model once\n" +
		"more: the digest's share of a load is at most that.",
	columns: []sampleColumn{
		{head: "ms", metric: "wall_ms", text: short},
		{head: "CPU ms", metric: "cpu_ms", text: short},
		{head: "GB/s", metric: "gbps", text: short},
		{head: "speed / cp", metric: "wall_ms", text: times, base: wayCp, inverse: true},
		{head: "CPU / cp", metric: "cpu_ms", text: times, base: wayCp},
		{head: "speed / O_DIRECT", metric: "wall_ms", text: times, base: wayRaw, inverse: true},
		{head: "in 2 MiB pages, %", metric: "huge_percent", text: percent},
		{head: "digest again, ms", metric: "verify_ms", text: short},
		{head: "memory / cp", metric: "memory_bytes", text: times, base: wayCp},
		{head: "left in the page cache, MB", metric: "left_bytes", text: megaText},
	},
}

// loadCase names a case as the targets look for it.
func loadCase(cold bool, size int64) string {
	if cold {
		return "cold, " + gibi(size)
	}
	return "warm, " + gibi(size)
}

// gibi is a size in binary units, which the sizes of this part are.
func gibi(size int64) string {
	switch {
	case size >= 1<<30:
		return short3(float64(size)/(1<<30)) + " GiB"
	case size >= 1<<20:
		return short3(float64(size)/(1<<20)) + " MiB"
	}
	return short3(float64(size)/(1<<10)) + " KiB"
}

func short3(v float64) string { return strconv.FormatFloat(v, 'g', 4, 64) }

func (s *session) runLoad(ctx context.Context) error {
	for _, size := range s.o.loadSizes {
		if why := s.loadRoom(size); why != "" {
			s.note("load of %s: skipped: %s", gibi(size), why)
			continue
		}
		s.say("load: writing a model of %s", gibi(size))
		m, err := generate(s.work, size, false)
		if err != nil {
			return err
		}
		rounds := s.roundsOr(loadRounds(size))
		err = s.loadWarm(ctx, m, rounds)
		if err == nil && size >= s.o.coldFrom {
			err = s.loadCold(ctx, m, rounds)
		}
		if err := errors.Join(err, os.Remove(m.path)); err != nil {
			return err
		}
	}
	if s.o.files > 0 {
		if err := s.loadFolder(ctx); err != nil {
			return err
		}
	}
	if s.o.sparse > 0 {
		return s.loadSparse(ctx)
	}
	return nil
}

// loadRounds: what is short varies more.
func loadRounds(size int64) int {
	switch {
	case size < 64<<20:
		return 15
	case size < 2<<30:
		return 7
	}
	return 3
}

func (s *session) loadRoom(size int64) string {
	if free := freeBytes(s.shm); free < size+size/4 {
		return fmt.Sprintf("%s of shared memory are free", mega(free))
	}
	if free := freeBytes(s.work); free < size+size/4 {
		return fmt.Sprintf("%s of the work folder are free", mega(free))
	}
	return s.roomFor(2*size + size/4)
}

func (s *session) loadWarm(ctx context.Context, m modelFile, rounds int) error {
	ways := s.withPython([]string{wayCp, wayCopy, wayOne, wayTwo, wayPlain})
	return s.alternate(ctx, "load", loadCase(false, m.size), rounds, ways, func(way string) (values, error) {
		if err := errors.Join(m.warm(), s.prewarm(m.size)); err != nil {
			return nil, err
		}
		return s.loadOnce(ctx, way, m.path, m.size)
	})
}

// prewarm gets the memory for n bytes ready, with what the process and the tables need.
func (s *session) prewarm(n int64) error {
	if n < s.o.settleFrom {
		return prewarm(n + 64<<20)
	}
	return prewarmSettled(n + 64<<20)
}

func (s *session) loadCold(ctx context.Context, m modelFile, rounds int) error {
	ways := s.withPython([]string{wayCp, wayCopy, wayCold, wayPlain, wayRaw})
	return s.alternate(ctx, "load", loadCase(true, m.size), rounds, ways, func(way string) (values, error) {
		left, err := chill(m.path)
		if err != nil {
			return nil, err
		}
		if err := s.prewarm(2 * m.size); err != nil { // the page cache and the copy
			return nil, err
		}
		if left > m.size/100 {
			s.note("load: %s: %s of the source stayed in the page cache: these figures are not those of a cold source", loadCase(true, m.size), mega(left))
		}
		v, err := s.loadOnce(ctx, way, m.path, m.size)
		if kept := m.cached(); err == nil && kept >= 0 && way != wayRaw {
			v["left_bytes"] = float64(kept)
		}
		return v, err
	})
}

// loadOnce is one trial; what it made is gone afterwards.
func (s *session) loadOnce(ctx context.Context, way, path string, size int64) (v values, err error) {
	dir, err := os.MkdirTemp(s.shm, "load-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	switch way {
	case wayCp:
		v, err = timed(ctx, "cp", "-r", path, filepath.Join(dir, "copy"))
	case wayCopy:
		v, err = s.ask(ctx, "readwrite", path, filepath.Join(dir, "copy"))
	case wayRaw:
		v, err = s.ask(ctx, "direct", path)
	case wayPython:
		v, err = s.loadByPython(ctx, path, dir)
	default:
		threads := "1"
		if way == wayTwo {
			threads = "2"
		}
		v, err = s.ask(ctx, "load", path, dir, threads, strconv.FormatBool(way != wayPlain))
	}
	if err != nil {
		return nil, err
	}
	if ms := v["wall_ms"]; ms > 0 {
		v["gbps"] = float64(size) / 1e6 / ms
	}
	if way == wayRaw {
		return v, nil
	}
	used, err := usage(dir)
	v["memory_bytes"] = float64(used)
	return v, err
}

// loadFolder is many small files.
func (s *session) loadFolder(ctx context.Context) error {
	const size = 10_000
	folder := filepath.Join(s.work, "folder")
	if err := os.Mkdir(folder, 0o700); err != nil {
		return err
	}
	content := []byte(strings.Repeat("onecopy ", size/8))
	for i := range s.o.files {
		if err := os.WriteFile(filepath.Join(folder, fmt.Sprintf("part-%05d", i)), content, 0o600); err != nil {
			return err
		}
	}
	total := int64(s.o.files) * size
	name := fmt.Sprintf("warm, folder of %s files of 10 kB", grouped(int64(s.o.files)))
	err := s.alternate(ctx, "load", name, s.roundsOr(7), []string{wayCp, wayOne, wayTwo}, func(way string) (values, error) {
		if err := prewarm(4*total + 64<<20); err != nil {
			return nil, err
		}
		return s.loadOnce(ctx, way, folder, total)
	})
	return errors.Join(err, os.RemoveAll(folder))
}

// loadSparse is a file that is mostly holes.
func (s *session) loadSparse(ctx context.Context) error {
	m := modelFile{path: filepath.Join(s.work, "sparse"), size: s.o.sparse}
	f, err := os.OpenFile(m.path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(m.size); err != nil {
		return err
	}
	data := []byte(strings.Repeat("weights ", chunkBytes/8))
	for at := int64(0); at+chunkBytes <= m.size; at += sparseEvery {
		if _, err := f.WriteAt(data, at); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	name := fmt.Sprintf("warm, sparse file of %s, 1 MiB of data in %s", gibi(m.size), gibi(sparseEvery))
	err = s.alternate(ctx, "load", name, s.roundsOr(7), []string{wayCp, wayCopy, wayOne, wayTwo}, func(way string) (values, error) {
		if err := errors.Join(m.warm(), s.prewarm(m.size)); err != nil {
			return nil, err
		}
		return s.loadOnce(ctx, way, m.path, m.size)
	})
	return errors.Join(err, os.Remove(m.path))
}
