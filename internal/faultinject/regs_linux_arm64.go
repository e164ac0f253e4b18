package faultinject

import (
	"reflect"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

func callOf(r *unix.PtraceRegs) (nr uint64, args [6]uint64) {
	return r.Regs[8], [6]uint64(r.Regs[:6])
}

func setResult(r *unix.PtraceRegs, errno syscall.Errno) { r.Regs[0] = uint64(-int64(errno)) }

// skip makes the kernel return errno without executing the call. The number of
// the call is in a set of registers of its own.
func skip(tid int, r *unix.PtraceRegs, errno syscall.Errno) error {
	setResult(r, errno)
	if err := unix.PtraceSetRegs(tid, r); err != nil {
		return err
	}
	none := int32(-1)
	set := &unix.Iovec{Len: 4}
	set.Base = (*byte)(reflect.ValueOf(&none).UnsafePointer())
	const systemCall = 0x404 // NT_ARM_SYSTEM_CALL
	_, _, e := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SETREGSET, uintptr(tid), systemCall, reflect.ValueOf(set).Pointer(), 0, 0)
	runtime.KeepAlive(set)
	if e != 0 {
		return e
	}
	return nil
}

// shorten halves the number of bytes that a call is asked for.
func shorten(r *unix.PtraceRegs) { r.Regs[2] = max(1, r.Regs[2]/2) }

const sysFstatat = unix.SYS_FSTATAT

// ofMachine are calls that other machines have not: none.
var ofMachine = map[uint64]call{}
