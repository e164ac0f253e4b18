package lockfile

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// create makes the permanent lock file at path, or leaves the one that is there.
//
// The file gets its mode before it gets its name: were it created under its
// name, it would exist for a moment with what the umask leaves, and a process
// killed in that moment would leave a lock that nobody can open.
func create(path string) error {
	var fd int
	err := retry(func() (err error) {
		fd, err = unix.Open(parent(path), unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		return err
	})
	if errors.Is(err, unix.ENOENT) {
		return gone(err)
	}
	if err != nil {
		return fmt.Errorf("create: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Fchmod(fd, 0o600); err != nil {
		return fmt.Errorf("chmod: %w", err)
	}
	err = link(fd, path)
	if errors.Is(err, unix.EEXIST) {
		return nil // somebody else was faster; theirs is as good
	}
	if err != nil {
		return fmt.Errorf("link: %w", err)
	}
	return nil
}

// link gives the unnamed file its name. The first form needs no /proc but, on
// older kernels, a capability; the second one needs /proc.
func link(fd int, path string) error {
	err := unix.Linkat(fd, "", unix.AT_FDCWD, path, unix.AT_EMPTY_PATH)
	if err == nil || errors.Is(err, unix.EEXIST) {
		return err
	}
	self := "/proc/self/fd/" + strconv.Itoa(fd)
	err = unix.Linkat(unix.AT_FDCWD, self, unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
	if !errors.Is(err, unix.ENOENT) {
		return err
	}
	if _, statErr := os.Lstat(self); statErr != nil {
		return errors.ErrUnsupported // no /proc
	}
	return gone(err)
}
