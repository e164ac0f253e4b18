// Package proctest runs parts of a test in processes of their own.
//
// What happens when a process is killed, stopped or simply another one cannot be
// shown with goroutines. So a test binary registers programs and executes itself
// to run one of them:
//
//	func init() { proctest.Program("holder", holder) }
//
//	func TestMain(m *testing.M) { proctest.Main(m) }
//
//	func holder(args []string) int {
//		... take the lock named by args[0]
//		fmt.Println("locked")
//		io.Copy(io.Discard, os.Stdin) // until the test closes Stdin
//		return 0
//	}
//
//	func TestKilledHolder(t *testing.T) {
//		p := proctest.Start(t, "holder", path)
//		p.Line(t) // "locked"
//		p.Kill()
//		...
//	}
//
// A program speaks to its test by lines on stdout and hears it through stdin;
// what it writes to stderr is shown when the test fails. Processes end with
// their test: when it is over they are killed and reaped, and on Linux the
// kernel kills them when the test binary itself dies.
//
// To bring processes to the same point use [Barrier]; to see that one is really
// waiting for a lock, [AwaitBlocked]; that it has stopped, [Proc.AwaitStop].
// None of them is a sleep.
package proctest

import (
	"fmt"
	"os"
	"os/exec"
	"testing"
)

// TB is the part of [testing.TB] used here. A program that is not a test may
// bring its own.
type TB interface {
	Helper()
	Name() string
	Failed() bool
	Logf(format string, args ...any)
	Fatalf(format string, args ...any)
	Skipf(format string, args ...any)
	Cleanup(func())
}

// programEnv names the program that a process is to run. Programs remove it from
// their environment, so that what they start is not mistaken for one.
const programEnv = "ONECOPY_PROCTEST_PROGRAM"

// exitUnknown is the exit code of a process whose program nobody registered.
const exitUnknown = 125

var programs = map[string]func(args []string) int{}

// Program registers a function that [Start] runs in a process of its own; its
// result is the exit code. It is called from an init function or a variable
// declaration.
func Program(name string, run func(args []string) int) {
	if programs[name] != nil {
		panic("proctest: program " + name + " registered twice")
	}
	programs[name] = run
}

// Main is called by TestMain. It runs the tests, or in a process made by [Start]
// the program, and exits.
func Main(m *testing.M) {
	Dispatch()
	os.Exit(m.Run())
}

// Dispatch runs the program and exits if this process was made by [Start], and
// does nothing otherwise. A main function calls it first to be used with Start.
func Dispatch() {
	name, ok := os.LookupEnv(programEnv)
	if !ok {
		return
	}
	_ = os.Unsetenv(programEnv)
	run := programs[name]
	if run == nil {
		fmt.Fprintf(os.Stderr, "proctest: no program %q is registered in %s\n", name, os.Args[0])
		os.Exit(exitUnknown)
	}
	os.Exit(run(os.Args[1:]))
}

// Start runs a registered program in a new process of this executable.
func Start(t TB, program string, args ...string) *Proc {
	t.Helper()
	return Env().Start(t, program, args...)
}

// Setting is an environment for programs.
type Setting struct{ env []string }

// Env returns a setting with further variables, each "KEY=value":
//
//	p := proctest.Env("ONECOPY_CRASH_AT=" + point).Start(t, "loader", dir)
func Env(env ...string) Setting { return Setting{env} }

// Start is like the function [Start], in the setting's environment.
func (s Setting) Start(t TB, program string, args ...string) *Proc {
	t.Helper()
	return StartCmd(t, program, s.Command(t, program, args...))
}

// Command is what Start starts, for those who run it in a way of their own.
func (s Setting) Command(t TB, program string, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatalf("proctest: %v", err)
	}
	cmd := exec.Command(exe, args...)
	// A race-enabled process sleeps for a second before it exits, unless told
	// otherwise.
	cmd.Env = append([]string{"GORACE=atexit_sleep_ms=0"}, os.Environ()...)
	cmd.Env = append(cmd.Env, s.env...)
	cmd.Env = append(cmd.Env, programEnv+"="+program)
	return cmd
}
