// Package crashpoint names the steps at which a process may be killed in a test.
//
// Code that must survive kill -9 at some step calls [Hit] there. In normal
// builds that is nothing at all. In builds with the tag "crashpoint" (Linux
// only) the environment of the process decides what happens:
//
//	ONECOPY_CRASH_AT    name of the step at which the process kills itself
//	ONECOPY_CRASH_SKIP  how many times it passes that step before (default 0)
//	ONECOPY_STOP_AT     name of the step at which the process stops itself, once
//	ONECOPY_STOP_FILE   file that it creates before it stops; may be a FIFO
//
// Killing is SIGKILL, so that nothing can be cleaned up: no deferred call, no
// handler. Stopping is SIGSTOP, for tests that need a process frozen at a step;
// SIGCONT lets it go on.
package crashpoint

// Points lists every name that the code passes to Hit. docs/CRASH.md has a row
// for each: what is on disk when the process dies there, and who repairs it. A
// test in internal/lint keeps code, list and document together.
var Points = []string{}
