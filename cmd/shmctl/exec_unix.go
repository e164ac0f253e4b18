//go:build unix

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
)

// keepCleanersOut locks the registry's folder against systemd-tmpfiles, as every process does
// that has it open. The lease alone keeps the memory, not the paths. It may be
// refused, while a cleaner looks at the folder: then it is nil.
func keepCleanersOut(dir string) *os.File {
	f, err := os.Open(filepath.Join(dir, layout.Folder))
	if err != nil {
		return nil
	}
	if unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) != nil {
		f.Close()
		return nil
	}
	return f
}

// execWith replaces this process by file, which inherits the lease on a model of the
// registry dir. It returns only if that failed.
func execWith(file string, args, env []string, lease *os.File, dir string) error {
	fd, held := lease.Fd(), keepCleanersOut(dir)
	for _, f := range []*os.File{lease, held} {
		if f == nil {
			continue
		}
		if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFD, 0); err != nil {
			return os.NewSyscallError("fcntl", err)
		}
	}
	env = setenv(env, "ONECOPY_LEASE_FD", strconv.Itoa(int(fd)))
	// syscall.Exec and not unix.Exec: it gives the command the limit of open
	// files back that the Go runtime raised for itself.
	err := syscall.Exec(file, args, env)
	lease.Close() // and keeps lease reachable until here
	held.Close()
	if errors.Is(err, syscall.ENOENT) { // a script whose interpreter is missing
		return &commandError{exitExecMissing, fmt.Errorf("command %q or its interpreter not found", file)}
	}
	return &commandError{exitExecDenied, &os.PathError{Op: "exec", Path: file, Err: err}}
}
