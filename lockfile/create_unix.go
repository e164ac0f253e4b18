//go:build darwin || dragonfly || freebsd || illumos || netbsd || openbsd

package lockfile

import (
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// create makes the permanent lock file at path, or leaves the one that is there.
// These systems cannot link an unnamed file, so a file can be seen with fewer
// permissions than it is to have, but never with more.
func create(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	switch {
	case errors.Is(err, fs.ErrExist):
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return gone(unix.ENOENT)
	case err != nil:
		return err
	}
	return errors.Join(f.Chmod(0o600), f.Close())
}
