package proctest

import "syscall"

// Fork makes a child as fork(2) does: with every descriptor, close-on-exec or not,
// and every mapping of this process. Go has no such call, but code in other
// languages in its process has, and what that child keeps is what a test wants to
// see. The child never returns to Go, of which only the calling thread is left: it
// waits until its standard input ends, and exits.
func Fork() (pid int, err error) {
	child, _, errno := syscall.RawSyscall6(syscall.SYS_CLONE, uintptr(syscall.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	if child != 0 {
		return int(child), nil
	}
	for {
		// Nothing is read: at the end of the input this returns, and if there were
		// any it would fail.
		if _, _, errno := syscall.RawSyscall(syscall.SYS_READ, 0, 0, 1); errno != syscall.EINTR {
			syscall.RawSyscall(syscall.SYS_EXIT_GROUP, 0, 0, 0)
		}
	}
}
