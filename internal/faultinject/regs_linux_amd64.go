package faultinject

import (
	"syscall"

	"golang.org/x/sys/unix"
)

func callOf(r *unix.PtraceRegs) (nr uint64, args [6]uint64) {
	return r.Orig_rax, [6]uint64{r.Rdi, r.Rsi, r.Rdx, r.R10, r.R8, r.R9}
}

func setResult(r *unix.PtraceRegs, errno syscall.Errno) { r.Rax = uint64(-int64(errno)) }

// skip makes the kernel return errno without executing the call.
func skip(tid int, r *unix.PtraceRegs, errno syscall.Errno) error {
	r.Orig_rax = ^uint64(0)
	setResult(r, errno)
	return unix.PtraceSetRegs(tid, r)
}

// shorten halves the number of bytes that a call is asked for.
func shorten(r *unix.PtraceRegs) { r.Rdx = max(1, r.Rdx/2) }

const sysFstatat = unix.SYS_NEWFSTATAT

// ofMachine are the older calls, without a directory's descriptor, that the C library
// still makes.
var ofMachine = map[uint64]call{
	unix.SYS_MKDIR:    {name: "mkdir", about: path},
	unix.SYS_RMDIR:    {name: "rmdir", about: path},
	unix.SYS_UNLINK:   {name: "unlink", about: path},
	unix.SYS_READLINK: {name: "readlink", about: path},
	unix.SYS_ACCESS:   {name: "access", about: path},
}
