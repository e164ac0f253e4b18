//go:build unix && !linux

package main

import (
	"os/exec"
	"syscall"
)

// asGroup lets a command be ended with everything that it started.
func asGroup(c *exec.Cmd) {
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Cancel = func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGKILL) }
}
