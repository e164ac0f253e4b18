//go:build amd64 || arm64

package shm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Pending is a segment in the making: an anonymous file of the tmpfs that no
// name leads to. Whoever made it fills it, then either seals it or aborts; the
// death of the process is an abort. Abort after Seal does nothing, so that
// defer p.Abort() is always right.
type Pending struct {
	dir  *Dir
	f    *os.File
	name string // for messages
}

// NewPending makes an empty segment on the tmpfs of dir. name is for messages.
// errors.ErrUnsupported: the kernel or file system has no O_TMPFILE.
func (d *Dir) NewPending(name string) (*Pending, error) {
	fd, err := openat(d.fd, ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ENOENT) && d.Alive() {
			err = fmt.Errorf("%w: no anonymous files (O_TMPFILE) here: models can be read but not loaded: %w", errors.ErrUnsupported, err)
		}
		return nil, pathErr("create", d.Join(name), err)
	}
	return &Pending{dir: d, f: os.NewFile(uintptr(fd), d.Join(name)), name: name}, nil
}

// Alive reports whether the directory still has a name, as far as the kernel can
// tell.
func (d *Dir) Alive() bool {
	var st unix.Stat_t
	return unix.Fstat(d.fd, &st) != nil || st.Nlink > 0
}

// Abort drops the segment and its memory.
func (p *Pending) Abort() {
	if p.f != nil {
		p.f.Close()
		p.f = nil
	}
}

// WriteAt writes without any window: for small contents.
func (p *Pending) WriteAt(b []byte, off int64) (int, error) {
	n, err := p.f.WriteAt(b, off)
	return n, p.wrap("write", err)
}

func (p *Pending) wrap(op string, err error) error {
	if err == nil {
		return nil
	}
	var pe *os.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	return pathErr(op, p.dir.Join(p.name), err)
}

// Sealed is a finished segment: mode 0444, no writer anywhere, still without a
// name. Its descriptor is read-only.
type Sealed struct {
	dir *Dir
	f   *os.File
}

// Seal ends the writing: mode 0444, the writing descriptor closed, and the
// kernel's proof that no other one and no writable mapping is left. ErrWriter
// means that one is, for instance in a child of fork; the caller may copy the
// contents into a fresh segment. The Pending is used up in either case.
func (p *Pending) Seal(ctx context.Context) (*Sealed, error) {
	defer p.Abort()
	if err := unix.Fchmod(int(p.f.Fd()), 0o444); err != nil {
		return nil, p.wrap("chmod", err)
	}
	ro, err := p.reopen()
	if err != nil {
		return nil, err
	}
	s := &Sealed{dir: p.dir, f: ro}
	p.Abort()
	if err := s.prove(ctx); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// NeedProc is nil if /proc is mounted, through which writers open what they lock and
// what they have filled, and otherwise says what does not work without it.
func NeedProc() error {
	if _, err := os.Lstat("/proc/self/fd"); errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%w: /proc is not mounted: models can be read, and nothing can be loaded or removed", errors.ErrUnsupported)
	}
	return nil
}

// reopen opens the anonymous file once more, read-only, on an own description.
func (p *Pending) reopen() (*os.File, error) {
	fd, err := openat(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(int(p.f.Fd())), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		if no := NeedProc(); no != nil {
			err = fmt.Errorf("%w: %w", no, err)
		}
		return nil, p.wrap("reopen", err)
	}
	return os.NewFile(uintptr(fd), p.dir.Join(p.name)), nil
}

// prove asks for a read lease, which the kernel grants only while nobody has
// the file open for writing or mapped writable.
func (s *Sealed) prove(ctx context.Context) error {
	delay := 100 * time.Microsecond
	for {
		_, err := unix.FcntlInt(s.f.Fd(), unix.F_SETLEASE, unix.F_RDLCK)
		switch {
		case err == nil:
			_, err = unix.FcntlInt(s.f.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
			if err != nil {
				return pathErr("lease", s.f.Name(), err)
			}
			return nil
		case errors.Is(err, unix.EAGAIN) && ctx.Err() != nil:
			return pathErr("lease", s.f.Name(), ctx.Err())
		case errors.Is(err, unix.EAGAIN) && delay < 100*time.Millisecond:
			// A child between fork and exec holds every descriptor for a moment.
			time.Sleep(delay)
			delay *= 2
		case errors.Is(err, unix.EAGAIN):
			return pathErr("lease", s.f.Name(), ErrWriter)
		case errors.Is(err, unix.EINTR):
		default:
			return pathErr("lease", s.f.Name(), fmt.Errorf("%w: file leases (F_SETLEASE): models can be read but not loaded: %w", errors.ErrUnsupported, err))
		}
	}
}

// File is the read-only descriptor, owned by s.
func (s *Sealed) File() *os.File { return s.f }

// Close drops the descriptor; a segment that has no name is gone with it.
func (s *Sealed) Close() error { return s.f.Close() }

// Link gives the segment its name in dir. It never replaces a file:
// fs.ErrExist. fs.ErrNotExist: the directory was removed.
func (s *Sealed) Link(dir *Dir, name string) error {
	err := unix.Linkat(int(s.f.Fd()), "", dir.fd, name, unix.AT_EMPTY_PATH)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) {
		// Without privileges old kernels know only the way through /proc.
		err = unix.Linkat(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(int(s.f.Fd())), dir.fd, name, unix.AT_SYMLINK_FOLLOW)
	}
	if err != nil {
		return pathErr("link", dir.Join(name), err)
	}
	return nil
}

// Create makes a small file with the given contents and mode under its name in
// one step, so that nobody ever sees a part of it. fs.ErrExist: the name is
// taken, by a file that is left alone.
func (d *Dir) Create(name string, b []byte, perm uint32) error {
	p, err := d.NewPending(name)
	if err != nil {
		return err
	}
	defer p.Abort()
	if _, err := p.WriteAt(b, 0); err != nil {
		return err
	}
	if err := unix.Fchmod(int(p.f.Fd()), perm); err != nil {
		return p.wrap("chmod", err)
	}
	return (&Sealed{dir: d, f: p.f}).Link(d, name)
}
