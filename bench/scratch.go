//go:build linux

package main

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const scratchPrefix = "onecopy-bench-"

// scratch is a folder that is removed at the end, and by the next run if this one is killed: whoever can
// lock such a folder knows that its owner is gone.
type scratch struct {
	path string
	lock *os.File
}

func newScratch(parent string) (*scratch, error) {
	if err := removeLeftovers(parent); err != nil {
		return nil, err
	}
	for {
		path, err := os.MkdirTemp(parent, scratchPrefix)
		if err != nil {
			return nil, err
		}
		lock, err := os.Open(path)
		if errors.Is(err, os.ErrNotExist) {
			continue // another run took the folder for a leftover before it was locked
		}
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			lock.Close()
			continue // the same
		}
		if _, err := os.Stat(path); err != nil {
			lock.Close()
			continue // the same
		}
		return &scratch{path, lock}, nil
	}
}

// removeLeftovers removes what killed runs of the same user left in parent.
func removeLeftovers(parent string) error {
	old, err := filepath.Glob(filepath.Join(parent, scratchPrefix+"*"))
	if err != nil {
		return err
	}
	for _, path := range old {
		f, err := os.Open(path)
		if err != nil {
			continue // gone, or somebody else's
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			_ = os.RemoveAll(path) // somebody else's stays
		}
		f.Close()
	}
	return nil
}

func (s *scratch) remove() error {
	err := os.RemoveAll(s.path)
	return errors.Join(err, s.lock.Close())
}
