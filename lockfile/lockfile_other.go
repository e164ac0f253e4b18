//go:build !(darwin || dragonfly || freebsd || illumos || linux || netbsd || openbsd)

package lockfile

import (
	"errors"
	"os"
)

func (f *File) attempt(mode, func() bool, bool) (*Held, error) { return nil, errors.ErrUnsupported }

func flockFile(*os.File, mode) error { return errors.ErrUnsupported }

func flockFD(int, mode) error { return errors.ErrUnsupported }

func retry(call func() error) error { return call() }
