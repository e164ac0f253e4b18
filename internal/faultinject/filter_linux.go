//go:build amd64 || arm64

package faultinject

import (
	"fmt"
	"os"
	"reflect"
	"runtime"

	"golang.org/x/sys/unix"
)

// Marks are calls that fail with EBADF and that nobody makes by accident.
const (
	markBegin = -0x6f6e65
	markEnd   = -0x636f70
)

// Begin begins the part of the program in which calls are listed and fail. In a
// process that is not traced it does nothing. It is called once.
func Begin() {
	if os.Getenv(traceEnv) == "" {
		return
	}
	if err := install(); err != nil {
		panic(fmt.Sprintf("faultinject: %v", err))
	}
	_ = unix.Close(markBegin)
}

// End ends it.
func End() {
	if os.Getenv(traceEnv) != "" {
		_ = unix.Close(markEnd)
	}
}

// install puts a filter on all threads that stops the calls of the table at the
// tracer. The others run at full speed.
func install() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	const load, equal, ret = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
	filter := []unix.SockFilter{{Code: load, K: 0}} // seccomp_data.nr
	for nr := range calls {
		filter = append(filter,
			unix.SockFilter{Code: equal, K: uint32(nr), Jf: 1},
			unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_TRACE})
	}
	filter = append(filter, unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ALLOW})
	prog := &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	// An address without package unsafe: the kernel wants one, and reflection
	// has it.
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
		unix.SECCOMP_FILTER_FLAG_TSYNC, reflect.ValueOf(prog).Pointer())
	runtime.KeepAlive(prog)
	if errno != 0 {
		return fmt.Errorf("seccomp filter: %w", errno)
	}
	return nil
}

// canFilter asks the kernel whether filters may send calls to a tracer.
func canFilter() error {
	action := uint32(unix.SECCOMP_RET_TRACE)
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0, reflect.ValueOf(&action).Pointer())
	if errno != 0 {
		return fmt.Errorf("faultinject: seccomp: %w", errno)
	}
	return nil
}
