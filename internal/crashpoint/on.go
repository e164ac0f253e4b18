//go:build crashpoint && linux

package crashpoint

import (
	"fmt"
	"os"
	"runtime"
	"runtime/coverage"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Enabled is true in builds in which Hit can kill the process.
const Enabled = true

// Shrink is what sizes of windows are divided by, so that small models have several
// and a thousand loads take seconds.
const Shrink = 64

// The environment is read once: what a process does is decided by who starts it.
var (
	crashAt  = os.Getenv("ONECOPY_CRASH_AT")
	skip     = skipFromEnv()
	stopAt   = os.Getenv("ONECOPY_STOP_AT")
	stopFile = os.Getenv("ONECOPY_STOP_FILE")
)

var (
	hits    atomic.Int64
	stopped atomic.Bool
)

// Hook, if a test's program sets it before its first step, is called at each step,
// before anything else happens there.
var Hook func(name string)

// Hit marks a named step: the process may be killed or stopped here.
func Hit(name string) {
	// Names may be computed, so that only this can see them all.
	if !slices.Contains(Points, name) {
		panic("crashpoint: " + name + " is missing in Points")
	}
	if Hook != nil {
		Hook(name)
	}
	if name == stopAt && stopped.CompareAndSwap(false, true) {
		stop()
	}
	if name == crashAt && hits.Add(1) == skip+1 {
		crash()
	}
}

func crash() {
	saveCoverage()
	must(syscall.Kill(os.Getpid(), syscall.SIGKILL))
	for { // the signal is on its way; take no further step
		time.Sleep(time.Hour)
	}
}

// saveCoverage writes what a process has counted that was built to count what it
// covers: nobody could after the signal. In other builds it does nothing.
//
// A test binary writes its counters only when it exits, so there an exit takes the
// place of the signal, with the code that a shell gives to it. Like the signal it
// runs no deferred call and leaves the rest to the kernel; but while it writes,
// other goroutines go on.
func saveCoverage() {
	dir := os.Getenv("GOCOVERDIR")
	if dir == "" {
		return
	}
	if testing.CoverMode() != "" {
		os.Exit(128 + int(syscall.SIGKILL))
	}
	_ = coverage.WriteMetaDir(dir) // an error, unless go build -cover made this binary
	_ = coverage.WriteCountersDir(dir)
}

func stop() {
	if stopFile != "" {
		f, err := os.OpenFile(stopFile, os.O_CREATE|os.O_WRONLY, 0o600)
		must(err)
		_, err = f.WriteString(stopAt + "\n")
		must(err)
		must(f.Close())
	}
	// A signal for the process may be handled by another thread while this one
	// runs on for a few instructions. One for this thread stops it here.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	must(syscall.Tgkill(os.Getpid(), syscall.Gettid(), syscall.SIGSTOP))
}

func skipFromEnv() int64 {
	s := os.Getenv("ONECOPY_CRASH_SKIP")
	if s == "" {
		return 0
	}
	n, err := strconv.ParseInt(s, 10, 64)
	must(err)
	return n
}

// must: a step that should have killed the process and did not makes its test
// worthless, so nothing here may fail quietly.
func must(err error) {
	if err != nil {
		panic(fmt.Sprintf("crashpoint: %v", err))
	}
}
