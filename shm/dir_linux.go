//go:build amd64 || arm64

package shm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Dir is an open, verified directory. Its methods take names without slashes.
// It may be used by any number of goroutines until Close.
type Dir struct {
	fd    int
	path  string // as opened, for messages and for showing to people
	owner uint32
	perm  uint32
	dev   uint64
	ino   uint64
	made  bool // by this call

	readOnly bool
}

// DirOptions of OpenDir.
type DirOptions struct {
	Create     bool
	Perm       uint32 // of a directory that is created
	TrustOwner uint32 // accepted besides our own uid and root
}

// OpenDir opens the directory at path and verifies that nobody but its owner
// can change it, that the owner is this process's user, root or
// opts.TrustOwner (root accepts any owner), that it is no symbolic link, and
// that it lies on a tmpfs. With opts.Create a missing one is made.
//
// Errors: fs.ErrNotExist, ErrUntrusted, errors.ErrUnsupported (not a tmpfs).
func OpenDir(path string, opts DirOptions) (*Dir, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	d, err := openDirAt(unix.AT_FDCWD, path, path, opts)
	if err != nil {
		return nil, err
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(d.fd, &fs); err != nil {
		d.Close()
		return nil, pathErr("statfs", path, err)
	}
	if fs.Type != unix.TMPFS_MAGIC {
		d.Close()
		if d.made {
			_ = unix.Rmdir(path)
		}
		return nil, pathErr("open", path, fmt.Errorf("%w: not on a tmpfs (file system type %#x): shared memory needs one, such as /dev/shm", errors.ErrUnsupported, fs.Type))
	}
	d.readOnly = fs.Flags&unix.ST_RDONLY != 0
	return d, nil
}

// Sub opens (with create: makes) a directory within d. One of our own with the
// wrong mode is repaired.
func (d *Dir) Sub(name string, perm uint32, create bool) (*Dir, error) {
	s, err := openDirAt(d.fd, name, d.Join(name), DirOptions{Create: create, Perm: perm, TrustOwner: d.owner})
	if err != nil {
		return nil, err
	}
	if s.owner != d.owner {
		s.Close()
		return nil, untrusted(s.path, "owned by %s, its parent by %s", userName(s.owner), userName(d.owner))
	}
	if s.perm != perm && s.owner == uint32(os.Geteuid()) && create {
		if err := unix.Fchmod(s.fd, perm); err != nil {
			s.Close()
			return nil, pathErr("chmod", s.path, err)
		}
		s.perm = perm
	}
	return s, nil
}

func openDirAt(at int, name, path string, opts DirOptions) (*Dir, error) {
	created := false
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := openat(at, name, flags, 0)
	if opts.Create && errors.Is(err, unix.ENOENT) {
		switch err := unix.Mkdirat(at, name, opts.Perm); {
		case err == nil:
			created = true
		case !errors.Is(err, unix.EEXIST):
			return nil, pathErr("mkdir", path, err)
		}
		fd, err = openat(at, name, flags, 0)
	}
	if errors.Is(err, unix.EACCES) && opts.Create {
		// Our own directory with a mode that shuts us out: made under a hostile
		// umask by a process that died before it could set the mode.
		var st unix.Stat_t
		if unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Uid == uint32(os.Geteuid()) && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			if unix.Fchmodat(at, name, opts.Perm, 0) == nil {
				fd, err = openat(at, name, flags, 0)
			}
		}
	}
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		var st unix.Stat_t
		if unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
			return nil, untrusted(path, "is a %s owned by %s, not a directory; remove it or use another directory", kind(st.Mode), userName(st.Uid))
		}
	}
	if errors.Is(err, unix.EACCES) {
		return nil, opts.denied(at, name, path, err)
	}
	if err != nil {
		return nil, pathErr("open", path, err)
	}
	d := &Dir{fd: fd, path: path, made: created}
	if created {
		if err := unix.Fchmod(fd, opts.Perm); err != nil {
			d.Close()
			return nil, pathErr("chmod", path, err)
		}
	}
	if err := d.verify(opts.TrustOwner); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// denied says whose directory it is that may not be opened: for a name that somebody
// else took first, nothing else would tell.
func (o *DirOptions) denied(at int, name, path string, err error) error {
	var st unix.Stat_t
	if unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
		return pathErr("open", path, err) // it is a directory on the way
	}
	err = fmt.Errorf("owned by %s with mode %#o: %w", userName(st.Uid), st.Mode&0o777, err)
	if st.Uid != uint32(os.Geteuid()) && st.Uid != 0 && st.Uid != o.TrustOwner {
		err = fmt.Errorf("%w: %w", ErrUntrusted, err)
	}
	return pathErr("open", path, err)
}

func (d *Dir) verify(trust uint32) error {
	var st unix.Stat_t
	if err := unix.Fstat(d.fd, &st); err != nil {
		return pathErr("stat", d.path, err)
	}
	d.owner, d.perm, d.dev, d.ino = st.Uid, st.Mode&0o7777, st.Dev, st.Ino
	euid := uint32(os.Geteuid())
	switch {
	case st.Uid != euid && st.Uid != 0 && st.Uid != trust && euid != 0:
		return untrusted(d.path, "owned by %s, and this process is %s: use a directory of your own, or name that owner as trusted", userName(st.Uid), userName(euid))
	case st.Uid != euid && st.Uid == overflowUID():
		return untrusted(d.path, "its owner is not visible in this user namespace")
	case st.Mode&0o022 != 0 && st.Mode&unix.S_ISVTX != 0:
		return untrusted(d.path, "mode %#o and sticky, owned by %s, is for everybody: use a directory of your own below it", st.Mode&0o777, userName(st.Uid))
	case st.Mode&0o022 != 0:
		return untrusted(d.path, "mode %#o lets others than its owner (%s) write: chmod go-w it if you know who made it", st.Mode&0o777, userName(st.Uid))
	}
	return nil
}

// Close closes the directory; its files stay.
func (d *Dir) Close() error { return unix.Close(d.fd) }

// Path of the directory, as opened.
func (d *Dir) Path() string { return d.path }

// FDPath is a path that leads to name through the open descriptor, for
// libraries that open by path. It is empty of meaning in other processes.
func (d *Dir) FDPath(name string) string {
	return "/proc/self/fd/" + strconv.Itoa(d.fd) + "/" + name
}

// Join is the path of name below the directory, for messages.
func (d *Dir) Join(name string) string { return d.path + "/" + name }

// Owner is the uid that may write.
func (d *Dir) Owner() uint32 { return d.owner }

// ReadOnly reports whether the tmpfs was mounted so when the directory was opened, as
// in a container that is only to read. OpenDir knows; Sub does not ask.
func (d *Dir) ReadOnly() bool { return d.readOnly }

// Perm are the directory's permission bits as they are now: its owner may have let
// others read since it was opened.
func (d *Dir) Perm() uint32 {
	var st unix.Stat_t
	if unix.Fstat(d.fd, &st) != nil {
		return d.perm
	}
	return st.Mode & 0o7777
}

// Moved reports whether the path leads to another directory now.
func (d *Dir) Moved() bool {
	var st unix.Stat_t
	return unix.Lstat(d.path, &st) == nil && (st.Dev != d.dev || st.Ino != d.ino)
}

// Device is the tmpfs that the directory lies on.
func (d *Dir) Device() uint64 { return d.dev }

// TryHold takes a shared lock on the directory, which keeps systemd-tmpfiles
// from ageing what is below it. It lasts until Close; that it is refused is no
// error, because a cleaner may hold it exclusively for a moment.
func (d *Dir) TryHold() { _ = unix.Flock(d.fd, unix.LOCK_SH|unix.LOCK_NB) }

// Open opens a regular file of the directory for reading and checks that it is
// what the directory's owner made: its own, with one name at most, and writable
// by nobody else. It never follows a link and never blocks on a FIFO.
func (d *Dir) Open(name string) (*os.File, *unix.Stat_t, error) { return d.open(name, unix.O_RDONLY) }

// OpenWritable is Open for reading and writing.
func (d *Dir) OpenWritable(name string) (*os.File, *unix.Stat_t, error) {
	return d.open(name, unix.O_RDWR)
}

func (d *Dir) open(name string, flags int) (*os.File, *unix.Stat_t, error) {
	fd, st, err := d.openFD(name, flags)
	if err != nil {
		return nil, nil, err
	}
	// It is a regular file; left non-blocking, the runtime would try to poll it.
	_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETFL, 0)
	return os.NewFile(uintptr(fd), d.Join(name)), &st, nil
}

// OpenFD is Open for callers that only map or need one call: a bare descriptor,
// close-on-exec. It takes two system calls less and no memory.
func (d *Dir) OpenFD(name string) (fd int, st unix.Stat_t, err error) {
	return d.openFD(name, unix.O_RDONLY)
}

// OpenWritableFD is OpenFD for reading and writing.
func (d *Dir) OpenWritableFD(name string) (fd int, st unix.Stat_t, err error) {
	return d.openFD(name, unix.O_RDWR)
}

func (d *Dir) openFD(name string, flags int) (fd int, st unix.Stat_t, err error) {
	fd, err = openat(d.fd, name, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, unix.ELOOP) {
			return -1, st, untrusted(d.Join(name), "is a symbolic link")
		}
		if errors.Is(err, unix.ENXIO) {
			return -1, st, untrusted(d.Join(name), "is a socket")
		}
		return -1, st, pathErr("open", d.Join(name), err)
	}
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return -1, st, pathErr("stat", d.Join(name), err)
	}
	why := ""
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		why = "is a " + kind(st.Mode)
	case st.Uid != d.owner:
		why = "owned by " + userName(st.Uid) + ", the directory by " + userName(d.owner)
	case st.Mode&0o022 != 0:
		why = fmt.Sprintf("mode %#o lets others write", st.Mode&0o777)
	case st.Nlink > 1:
		why = "has a second name (hard link)"
	}
	if why != "" {
		unix.Close(fd)
		return -1, st, untrusted(d.Join(name), "%s", why)
	}
	return fd, st, nil
}

// Stat describes a name of the directory without following links.
func (d *Dir) Stat(name string) (unix.Stat_t, error) {
	var st unix.Stat_t
	err := unix.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return st, pathErr("stat", d.Join(name), err)
	}
	return st, nil
}

// Mkdir makes a directory whose mode does not depend on the umask.
func (d *Dir) Mkdir(name string, perm uint32) error {
	if err := unix.Mkdirat(d.fd, name, perm); err != nil {
		return pathErr("mkdir", d.Join(name), err)
	}
	if err := unix.Fchmodat(d.fd, name, perm, 0); err != nil {
		return pathErr("chmod", d.Join(name), err)
	}
	return nil
}

// Unlink removes a file's name; one that is gone already is fine.
func (d *Dir) Unlink(name string) error {
	if err := unix.Unlinkat(d.fd, name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return pathErr("unlink", d.Join(name), err)
	}
	return nil
}

// RemoveTree removes a directory with all that is below it, or a file, without
// following links. One that is gone already is fine.
func (d *Dir) RemoveTree(name string) error {
	// Most names are directories; unlinking a file first would say EISDIR.
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := openat(d.fd, name, flags, 0)
	if errors.Is(err, unix.EACCES) && unix.Fchmodat(d.fd, name, 0o700, 0) == nil {
		// Made under a hostile umask by a process that died before it could set
		// the mode.
		fd, err = openat(d.fd, name, flags, 0)
	}
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP):
		return d.Unlink(name)
	case err != nil:
		return pathErr("open", d.Join(name), err)
	}
	sub := &Dir{fd: fd, path: d.Join(name), owner: d.owner}
	names, err := sub.Names()
	if err == nil {
		for _, n := range names {
			if e := sub.RemoveTree(n); e != nil && err == nil {
				err = e
			}
		}
	}
	sub.Close()
	if e := unix.Unlinkat(d.fd, name, unix.AT_REMOVEDIR); e != nil && !errors.Is(e, unix.ENOENT) && err == nil {
		err = pathErr("rmdir", d.Join(name), e)
	}
	return err
}

// Names lists the directory, in no order. One that was removed has no names.
func (d *Dir) Names() ([]string, error) {
	// A second description: reading a directory moves its offset.
	fd, err := openat(d.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, pathErr("open", d.path, err)
	}
	f := os.NewFile(uintptr(fd), d.path)
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return names, err
}

// TreeUsage is the memory that the files below name take, in bytes.
func (d *Dir) TreeUsage(name string) int64 {
	fd, err := openat(d.fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		if st, err := d.Stat(name); err == nil {
			return st.Blocks * 512
		}
		return 0
	}
	sub := &Dir{fd: fd, path: d.Join(name), owner: d.owner}
	defer sub.Close()
	names, err := sub.Names()
	if err != nil {
		return 0
	}
	var sum int64
	for _, n := range names {
		st, err := sub.Stat(n)
		switch {
		case err != nil:
		case st.Mode&unix.S_IFMT == unix.S_IFDIR:
			sum += sub.TreeUsage(n)
		default:
			sum += st.Blocks * 512
		}
	}
	return sum
}

// Entries is how many names the directory has, without reading them: a tmpfs
// counts 20 bytes for each, the two dots included. ok is false where the size
// is no such number.
func (d *Dir) Entries() (n int, ok bool) {
	const each, dots = 20, 2
	var st unix.Stat_t
	if unix.Fstat(d.fd, &st) != nil || st.Size%each != 0 || st.Size < each*dots {
		return 0, false
	}
	return int(st.Size/each) - dots, true
}

// Free returns the free bytes and the size of the tmpfs.
func (d *Dir) Free() (free, size int64, err error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(d.fd, &st); err != nil {
		return 0, 0, pathErr("statfs", d.path, err)
	}
	return int64(st.Bavail) * st.Bsize, int64(st.Blocks) * st.Bsize, nil
}

// openat never returns the number of a standard stream. A program that has closed those
// may hold a library that writes there all the same: not into a table or a model. Or it
// opens them again.
func openat(at int, name string, flags int, perm uint32) (fd int, err error) {
	if flags&unix.O_ACCMODE != unix.O_RDONLY {
		// Not for a moment either: another thread may write in between.
		for fd := range 3 {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); errors.Is(err, unix.EBADF) {
				if null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
					defer unix.Close(null)
				}
			}
		}
	}
	for {
		fd, err = unix.Openat(at, name, flags, perm)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err == nil && fd <= 2 {
		low := fd
		fd, err = unix.FcntlInt(uintptr(low), unix.F_DUPFD_CLOEXEC, 3)
		unix.Close(low)
	}
	return fd, err
}

func pathErr(op, path string, err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC):
		err = fmt.Errorf("%w: %w", ErrNoSpace, err)
	case errors.Is(err, unix.EDQUOT): // nothing tells beforehand
		err = fmt.Errorf("%w: the quota of this user or group on the tmpfs is used up: %w", ErrNoSpace, err)
	case errors.Is(err, unix.EMFILE):
		err = fmt.Errorf("%w: too many open files: raise the limit (ulimit -n): %w", ErrLimit, err)
	case errors.Is(err, unix.ENFILE):
		err = fmt.Errorf("%w: too many open files on this machine (sysctl fs.file-max): %w", ErrLimit, err)
	case errors.Is(err, unix.EFBIG):
		err = fmt.Errorf("%w: files of this size: raise the limit (ulimit -f): %w", ErrLimit, err)
	}
	return &fs.PathError{Op: op, Path: path, Err: err}
}

func untrusted(path, format string, args ...any) error {
	return &fs.PathError{Op: "open", Path: path, Err: fmt.Errorf("%w: %s", ErrUntrusted, fmt.Sprintf(format, args...))}
}

func userName(uid uint32) string {
	if uid == uint32(os.Geteuid()) {
		return fmt.Sprintf("uid %d (this process)", uid)
	}
	return fmt.Sprintf("uid %d", uid)
}

// overflowUID is what the kernel shows for users without a place in this user
// namespace.
var overflowUID = sync.OnceValue(func() uint32 {
	const fallback = 65534
	b, err := readFile("/proc/sys/kernel/overflowuid")
	if err != nil {
		return fallback
	}
	uid, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 32)
	if err != nil {
		return fallback
	}
	return uint32(uid)
})

// readFile is os.ReadFile for the small files of /proc and /sys, without the
// runtime's poller: starting that is half of what a fresh process pays to open a
// registry.
func readFile(path string) ([]byte, error) {
	fd, err := openat(unix.AT_FDCWD, path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, pathErr("open", path, err)
	}
	defer unix.Close(fd)
	b := make([]byte, 0, 4096)
	for {
		n, err := unix.Read(fd, b[len(b):cap(b)])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, pathErr("read", path, err)
		case n == 0:
			return b, nil
		default:
			if b = b[:len(b)+n]; len(b) == cap(b) {
				b = append(b, 0)[:len(b)]
			}
		}
	}
}

func kind(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFLNK:
		return "symbolic link"
	case unix.S_IFIFO:
		return "FIFO"
	case unix.S_IFSOCK:
		return "socket"
	case unix.S_IFREG:
		return "file"
	case unix.S_IFBLK, unix.S_IFCHR:
		return "device"
	}
	return "special file"
}
