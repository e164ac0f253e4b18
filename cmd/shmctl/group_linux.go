package main

import (
	"os/exec"
	"syscall"
)

// asGroup lets a command be ended with all of its process group, and ends the
// command alone when this process is killed: the caller stays on its thread until
// then.
func asGroup(c *exec.Cmd) {
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	c.Cancel = func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGKILL) }
}
