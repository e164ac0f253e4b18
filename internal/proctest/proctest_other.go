//go:build !linux

package proctest

import (
	"os"
	"os/exec"
	"runtime"
)

func dieWithParent(*exec.Cmd) {}

func signalOf(*os.ProcessState) int { return 0 }

func dumpStacks(*Proc) {}

func skip(t TB) {
	t.Helper()
	t.Skipf("not supported on %s", runtime.GOOS)
}

// Stop skips the test: it needs Linux.
func (p *Proc) Stop() { skip(p.t) }

// Cont skips the test: it needs Linux.
func (p *Proc) Cont() { skip(p.t) }

// AwaitStop skips the test: it needs Linux.
func (p *Proc) AwaitStop(t TB) { skip(t) }

// AwaitBlocked skips the test: it needs Linux.
func AwaitBlocked(t TB, path string, n int) { skip(t) }

// TmpRegistry skips the test: it needs Linux.
func TmpRegistry(t TB) string { skip(t); return "" }

// OpenFDs skips the test: it needs Linux.
func OpenFDs(t TB) int { skip(t); return 0 }

// Barrier panics: it needs Linux.
func Barrier(dir string, n int) { panic("proctest: no barrier on " + runtime.GOOS) }
