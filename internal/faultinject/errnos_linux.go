//go:build amd64 || arm64

package faultinject

import (
	"slices"
	"strings"
	"syscall"
)

// Errnos are the errors with which a call may fail although the program did
// nothing wrong: what the manual page lists for a full disk, a broken one, a
// security module, limits and signals. Nothing is said of those that only a bug
// of the caller would bring (EBADF, EFAULT).
func Errnos(c Call) []syscall.Errno {
	has := func(s string) bool { return slices.Contains(strings.Split(c.Detail, "|"), s) }
	switch c.Name {
	case "openat":
		es := []syscall.Errno{syscall.EINTR, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.EACCES, syscall.EIO}
		if has("TMPFILE") || has("CREAT") {
			es = append(es, syscall.ENOSPC)
		}
		if has("TMPFILE") {
			es = append(es, syscall.EOPNOTSUPP)
		}
		if has("DIRECT") {
			es = append(es, syscall.EINVAL)
		}
		return es
	case "close":
		return []syscall.Errno{syscall.EINTR, syscall.EIO}
	case "read", "pread64", "preadv":
		return []syscall.Errno{syscall.EINTR, syscall.EIO, syscall.ENOMEM}
	case "preadv2":
		return []syscall.Errno{syscall.EINTR, syscall.EIO, syscall.EAGAIN, syscall.EOPNOTSUPP}
	case "write", "pwrite64":
		return []syscall.Errno{syscall.EINTR, syscall.EIO, syscall.ENOMEM, syscall.ENOSPC}
	case "ftruncate", "fallocate":
		return []syscall.Errno{syscall.EINTR, syscall.EIO, syscall.ENOMEM, syscall.ENOSPC}
	case "mkdirat", "mkdir", "linkat":
		return []syscall.Errno{syscall.EACCES, syscall.ENOSPC, syscall.ENOMEM, syscall.EIO}
	case "unlinkat", "unlink", "rmdir", "fchmod", "fchmodat", "readlinkat", "readlink", "faccessat2", "access":
		return []syscall.Errno{syscall.EACCES, syscall.ENOMEM, syscall.EIO}
	case "newfstatat", "statx":
		return []syscall.Errno{syscall.EACCES, syscall.ENOMEM, syscall.EIO}
	case "fstat", "getdents64", "fsync", "lseek":
		return []syscall.Errno{syscall.ENOMEM, syscall.EIO}
	case "statfs", "fstatfs":
		return []syscall.Errno{syscall.EINTR, syscall.EIO, syscall.ENOMEM}
	case "fadvise64":
		return []syscall.Errno{syscall.EINVAL}
	case "flock":
		if has("UN") {
			return []syscall.Errno{syscall.EINTR}
		}
		es := []syscall.Errno{syscall.EINTR, syscall.ENOLCK, syscall.ENOMEM}
		if has("NB") {
			es = append(es, syscall.EWOULDBLOCK)
		}
		return es
	case "fcntl":
		if c.Detail == "SETLEASE" {
			return []syscall.Errno{syscall.EINTR, syscall.EAGAIN, syscall.EACCES, syscall.ENOMEM}
		}
		if c.Detail == "DUPFD" {
			return []syscall.Errno{syscall.EMFILE}
		}
		return nil // asks for, or changes, a few bits
	case "mmap":
		return []syscall.Errno{syscall.ENOMEM, syscall.EACCES, syscall.EAGAIN}
	case "munmap":
		return []syscall.Errno{syscall.ENOMEM}
	case "madvise":
		if c.Detail == "COLLAPSE" {
			return []syscall.Errno{syscall.EINVAL, syscall.ENOMEM, syscall.EAGAIN, syscall.EBUSY}
		}
		return []syscall.Errno{syscall.ENOMEM, syscall.EINVAL}
	}
	return nil
}

// Partial reports whether the call may do less than it was asked for.
func Partial(c Call) bool {
	switch c.Name {
	case "read", "pread64", "write", "pwrite64":
		return true
	}
	return false
}
