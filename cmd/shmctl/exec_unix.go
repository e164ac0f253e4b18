//go:build unix

package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// execWith replaces this process by file, which inherits the lease. It returns
// only if that failed.
func execWith(file string, args, env []string, lease *os.File) error {
	fd := lease.Fd()
	if _, err := unix.FcntlInt(fd, unix.F_SETFD, 0); err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	env = setenv(env, "ONECOPY_LEASE_FD", strconv.Itoa(int(fd)))
	// syscall.Exec and not unix.Exec: it gives the command the limit of open
	// files back that the Go runtime raised for itself.
	err := syscall.Exec(file, args, env)
	lease.Close()                       // and keeps lease reachable until here
	if errors.Is(err, syscall.ENOENT) { // a script whose interpreter is missing
		return &commandError{exitExecMissing, fmt.Errorf("command %q or its interpreter not found", file)}
	}
	return &commandError{exitExecDenied, &os.PathError{Op: "exec", Path: file, Err: err}}
}
