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

// Points lists every name that the code passes to Hit, in the order of the
// protocol. docs/CRASH.md has a row for each: what is on disk when the process
// dies there, and who repairs it. Tests in internal/lint and registry/ keep code,
// list, document and model together.
var Points = []string{
	"open.registry",

	"acquire.open-manifest",
	"acquire.lease",
	"acquire.map",
	"use.release",

	"load.lock-key",
	"load.lock-table",
	"load.look",
	"load.generation",
	"load.key",
	"load.claim",
	"load.unlock-table",
	"load.extend",
	"load.note",
	"load.fill",
	"load.link-manifest",
	"load.link-digests",
	"load.mkdir",
	"load.link-payload",

	"publish.lock-table",
	"publish.claim-evicted",
	"publish.ready",
	"publish.unlock-table",
	"publish.unlock-key",

	"abort.drop-files",
	"abort.unlink-manifest",
	"abort.unlink-payload",
	"abort.rmdir",
	"abort.lock-table",
	"abort.free",

	"retire.lock-table",
	"retire.lock-manifest",
	"retire.unlink-manifest",
	"retire.unlink-payload",
	"retire.rmdir",

	"evict.lock-table",
	"evict.open-manifest",
	"evict.lock-manifest",
	"evict.mark",
	"evict.unlink-manifest",
	"evict.free",
	"evict.unlock-table",
	"evict.unlink-payload",
	"evict.rmdir",

	"reclaim.lock-manifest",
	"reclaim.try-shared",
	"reclaim.undo",
	"reclaim.unlink-manifest",
	"reclaim.unlink-dead-load",
	"reclaim.free",
	"reclaim.unlink-payload",
	"reclaim.rmdir",

	"undo.lock-key",
	"undo.lock-table",
	"undo.lease",
	"undo.ready",
	"undo.unlock",

	"collect.lock-table",
	"collect.slot",
	"collect.next",
	"collect.lock-manifest",
	"collect.unlink-manifest",
	"collect.unlink-payload",
	"collect.rmdir",
	"collect.unlock-table",

	"edit.lock-table",
	"check.lock-table",
}
