//go:build amd64 || arm64

package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"reflect"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/shm"
)

// Machine is the one that we run on.
func Machine() Host {
	return Host{UID: os.Geteuid(), Statfs: statfs, Lstat: lstat, Headroom: shm.CgroupHeadroom, Probe: probe}
}

func statfs(p string) (Space, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(p, &st); err != nil {
		return Space{}, &fs.PathError{Op: "statfs", Path: p, Err: err}
	}
	return Space{int64(st.Blocks) * st.Bsize, int64(st.Bavail) * st.Bsize, int64(st.Files), int64(st.Ffree)}, nil
}

func lstat(p string) (Owner, error) {
	info, err := os.Lstat(p)
	if err != nil {
		return Owner{}, err
	}
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		return Owner{}, &fs.PathError{Op: "lstat", Path: p, Err: err}
	}
	return Owner{int(st.Uid), info.Mode()}, nil
}

// probe tries what a load needs, in the registry or where it would be made. The
// file has no name at any time.
func probe(dir string) (p Probe) {
	for dir != "/" {
		if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
			break
		}
		dir = path.Dir(dir)
	}
	p.Dir = dir
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	switch {
	case errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EROFS) || errors.Is(err, unix.ENOTDIR):
		p.Skipped = &fs.PathError{Op: "create", Path: dir, Err: err}
		return p
	case err != nil:
		p.TmpFile = err
		return p
	}
	f := os.NewFile(uintptr(fd), dir)
	_ = f.Chmod(0o600) // whatever the umask is; if it fails, so does what follows
	p.Huge = tryHuge(f)
	p.Lock = tryLock(f)
	reader, err := reopen(f)
	f.Close()
	if err != nil {
		p.Lease = err
		return p
	}
	defer reader.Close()
	_, p.Lease = unix.FcntlInt(reader.Fd(), unix.F_SETLEASE, unix.F_RDLCK)
	return p
}

func reopen(f *os.File) (*os.File, error) {
	return os.Open("/proc/self/fd/" + strconv.Itoa(int(f.Fd())))
}

// tryLock checks that a lock excludes, and that a mapping keeps the lock of a
// closed descriptor.
func tryLock(f *os.File) error {
	if err := f.Truncate(4096); err != nil {
		return err
	}
	holder, err := reopen(f)
	if err != nil {
		return err
	}
	m, err := func() ([]byte, error) {
		defer holder.Close()
		if err := unix.Flock(int(holder.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != nil {
			return nil, err
		}
		return unix.Mmap(int(holder.Fd()), 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
	}()
	if err != nil {
		return err
	}
	mapped := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err := unix.Munmap(m); err != nil {
		return err
	}
	unmapped := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	switch {
	case mapped == nil:
		return errors.New("a lock does not last as long as its mapping")
	case unmapped != nil:
		return fmt.Errorf("a lock outlives its mapping: %w", unmapped)
	}
	return nil
}

// tryHuge turns one block of the file into a 2 MiB page.
func tryHuge(f *os.File) error {
	const length = 2 * shm.HugePage
	if err := f.Truncate(3 * shm.HugePage); err != nil {
		return err
	}
	// A block of the file can be one page where it lies at a multiple of 2 MiB,
	// and mappings do not. But the kernel puts one where the last of its length
	// was: so the next one begins that much into a block. Should another thread
	// have taken the place meanwhile, that is tried again.
	skew := 0
	for range 16 {
		m, err := unix.Mmap(int(f.Fd()), int64(skew), length, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return err
		}
		at := int(reflect.ValueOf(m).Pointer() % shm.HugePage)
		if at == skew {
			first := (shm.HugePage - skew) % shm.HugePage
			if _, err = f.WriteAt([]byte{1}, int64(skew+first)); err == nil {
				const collapse = 25 // MADV_COLLAPSE
				err = unix.Madvise(m[first:][:shm.HugePage], collapse)
			}
			return errors.Join(err, unix.Munmap(m))
		}
		if err := unix.Munmap(m); err != nil {
			return err
		}
		skew = at
	}
	return errors.New("no aligned address was to be had")
}
