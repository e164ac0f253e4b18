//go:build darwin || dragonfly || freebsd || illumos || linux || netbsd || openbsd

package lockfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"github.com/gofrs/flock"
	"golang.org/x/sys/unix"
)

// openFlag opens a lock file without creating it, without following a symbolic
// link, and without waiting for the other end of a FIFO. (os adds O_CLOEXEC.)
const openFlag = os.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK

// attempt locks the inode that the path names now. It returns errReplaced if
// the path names another one, or none, when the lock is granted; and nothing if
// no says that the lock is not wanted any more.
func (f *File) attempt(m mode, no func() bool, block bool) (*Held, error) {
	if err := f.look(); err != nil {
		return nil, err
	}
	l := flock.New(f.path, flock.SetFlag(openFlag))
	if err := lock(l, m, block); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, errReplaced // removed since look
		}
		return nil, err
	}
	if no != nil && no() {
		return nil, retry(l.Unlock)
	}
	inode, err := f.recheck(l)
	if err != nil {
		_ = retry(l.Unlock) // the first error says what went wrong
		return nil, err
	}
	h := &Held{path: f.path, pid: os.Getpid(), lock: l, edge: edgeOf(inode, m)}
	h.edge.acquire()
	return h, nil
}

// look makes sure that there is a regular file at the path. Opening anything
// else can have effects of its own (a FIFO lets its writer go on, a device may
// do anything), so that is found out first.
func (f *File) look() error {
	fi, err := os.Lstat(f.path)
	if f.permanent && errors.Is(err, fs.ErrNotExist) {
		if err := create(f.path); err != nil {
			return err
		}
		fi, err = os.Lstat(f.path)
		if errors.Is(err, fs.ErrNotExist) {
			return errReplaced // removed at once
		}
	}
	if err != nil {
		return err
	}
	return mustBeRegular(fi)
}

// recheck returns the inode that l has locked if the path still names it.
func (f *File) recheck(l *flock.Flock) (uint64, error) {
	locked, err := l.Stat()
	if err != nil {
		return 0, err
	}
	if err := mustBeRegular(locked); err != nil {
		return 0, err
	}
	named, err := os.Lstat(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, errReplaced
	}
	if err != nil {
		return 0, err
	}
	if !os.SameFile(locked, named) {
		return 0, errReplaced
	}
	return uint64(locked.Sys().(*syscall.Stat_t).Ino), nil
}

func mustBeRegular(fi fs.FileInfo) error {
	if fi.Mode().IsRegular() {
		return nil
	}
	return fmt.Errorf("%w: not a regular file (%v)", fs.ErrInvalid, fi.Mode())
}

// lock returns ErrLocked if block is false and the lock is not free.
func lock(l *flock.Flock, m mode, block bool) error {
	if block {
		return retry(l.Lock)
	}
	try := l.TryLock
	if m == shared {
		try = l.TryRLock
	}
	return retry(func() error {
		ok, err := try()
		if err == nil && !ok {
			return ErrLocked
		}
		return err
	})
}

func flockFile(f *os.File, m mode) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	// Control, unlike Fd, keeps the descriptor open meanwhile and leaves its
	// flags alone. It fails for a closed file only.
	var lockErr error
	err = conn.Control(func(fd uintptr) {
		lockErr = flockFD(int(fd), m)
	})
	if err != nil {
		return fs.ErrClosed
	}
	return lockErr
}

func flockFD(fd int, m mode) error {
	how := unix.LOCK_EX | unix.LOCK_NB
	if m == shared {
		how = unix.LOCK_SH | unix.LOCK_NB
	}
	err := retry(func() error { return unix.Flock(fd, how) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		return ErrLocked
	}
	return err
}

// retry repeats call while a signal interrupts it. The Go runtime asks for
// restarted system calls, but a handler installed by other code in the process
// need not.
func retry(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// parent returns the directory part of path without cleaning it: ".." behind a
// symbolic link or /proc/self/fd means what the kernel says it means.
func parent(path string) string {
	switch i := strings.LastIndexByte(path, '/'); i {
	case -1:
		return "."
	case 0:
		return "/"
	default:
		return path[:i]
	}
}

// gone says that the directory of a permanent lock file is missing.
func gone(err error) error { return fmt.Errorf("%w: %w", ErrGone, err) }
