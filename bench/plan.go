//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
)

// runWorkers is the part workers.
func (s *session) runWorkers(ctx context.Context) error {
	if err := s.findPeers(ctx); err != nil {
		return err
	}
	return s.all(ctx, s.o, s.res, s.progress)
}

// all runs everything that the options ask for.
func (b *bench) all(ctx context.Context, o options, res *results, progress io.Writer) error {
	for i, size := range o.sizes {
		if err := b.space(size); err != nil {
			return err
		}
		fmt.Fprintf(progress, "bench: writing a model of %s\n", mega(size))
		m, err := generate(b.work, size, o.reread)
		if err != nil {
			return err
		}
		stop, err := b.startPeers(ctx, o.peers, m, res, progress)
		if err != nil {
			return errors.Join(err, stop())
		}
		for round := range rounds(o, size) {
			fmt.Fprintf(progress, "bench: %s, round %d of %d\n", mega(size), round+1, rounds(o, size))
			if err := b.round(ctx, o, res, m, round); err != nil {
				return errors.Join(err, stop())
			}
			if i == 0 {
				if err := b.users(ctx, o, res, m, round); err != nil {
					return errors.Join(err, stop())
				}
			}
		}
		if err := errors.Join(stop(), os.Remove(m.path)); err != nil {
			return err
		}
	}
	return nil
}

func rounds(o options, size int64) int {
	switch {
	case o.rounds > 0:
		return o.rounds
	case size < 256e6:
		return 5
	}
	return 3
}

// space refuses a model that does not fit before anything is written.
func (b *bench) space(size int64) error {
	// Two copies: the way onecopy-empty fills a second registry beside the first.
	if free := freeBytes(b.shm); free < 2*size+size/4 {
		return fmt.Errorf("%s has %s free and two copies of %s must fit: enlarge it (mount -o remount,size=..., docker run --shm-size=...) or choose smaller --sizes", b.shm, mega(free), mega(size))
	}
	if free := freeBytes(b.work); free < size+size/4 {
		return fmt.Errorf("%s has %s free: choose another folder by --work or smaller --sizes", b.work, mega(free))
	}
	return nil
}

// round runs every cell of a size once. The model stays in the registry for the whole round, so that every way
// finds the same machine.
func (b *bench) round(ctx context.Context, o options, res *results, m modelFile, round int) (err error) {
	reg, rec, err := b.load(ctx, m, round)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, reg.remove()) }()
	res.Loads = append(res.Loads, rec)
	for _, lang := range o.langs {
		for _, n := range o.workers {
			ways := o.ways
			if lang == langPython {
				ways = b.pythonWays(o, res, m.size, n)
			}
			for _, way := range rotated(ways, round) {
				c := cell{Size: m.size, Lang: lang, Way: way, Workers: n, Users: 1}
				if c.Way == wayPath && lang == langGo {
					continue // a Go program would use the library
				}
				if err := b.one(ctx, res, c, m, reg, round); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// users runs one process with several users of one model.
func (b *bench) users(ctx context.Context, o options, res *results, m modelFile, round int) error {
	var ways []string
	for _, way := range []string{wayPrivate, wayMmap, wayEmpty} {
		if slices.Contains(o.ways, way) || way == wayEmpty && slices.Contains(o.ways, wayOnecopy) {
			ways = append(ways, way)
		}
	}
	for _, users := range o.users {
		for _, way := range rotated(ways, round) {
			c := cell{Size: m.size, Lang: langGo, Way: way, Workers: 1, Users: users}
			if err := b.one(ctx, res, c, m, nil, round); err != nil {
				return err
			}
		}
	}
	return nil
}

// one runs one trial or notes why it cannot be run.
func (b *bench) one(ctx context.Context, res *results, c cell, m modelFile, reg *loaded, round int) error {
	if reason := b.room(c); reason != "" {
		res.skip(c, reason)
		return nil
	}
	t, err := b.run(ctx, c, m, reg, round)
	if err != nil && b.peers[c.Way] != nil && ctx.Err() == nil {
		res.skip(c, lastLine(err)) // somebody else's library is no reason to lose everything
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s, %d %s workers, %s: %w", mega(c.Size), c.Workers, c.Lang, c.Way, err)
	}
	res.Trials = append(res.Trials, t)
	return nil
}
