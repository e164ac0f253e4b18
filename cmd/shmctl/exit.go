package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/internal/doctor"
	"github.com/onecopy/onecopy/registry"
)

// Exit codes. They are a contract: scripts branch on them.
const (
	exitOK          = 0
	exitOther       = 1 // anything else, and problems found by check
	exitUsage       = 2
	exitNotFound    = 3
	exitPermission  = 4
	exitInUse       = 5
	exitCorrupt     = 6 // or of another layout version
	exitNoSpace     = 7
	exitSource      = 8 // failed or changed
	exitTimeout     = 9
	exitExecSelf    = 125 // exec: shmctl itself failed; these three as env and docker do
	exitExecDenied  = 126 // exec: found, but not executable
	exitExecMissing = 127 // exec: not found
	exitInterrupted = 130
)

// An outcome is what one kind of error means to a caller: an exit code and, in
// JSON, a word.
type outcome struct {
	err  error
	exit int
	code string
}

// outcomes in the order in which they are tried: an error may match several,
// and the first is the one that tells most. A load that timed out is a timeout
// before it is a failed load; an unreadable source is a bad source before it is
// a lack of permission.
var outcomes = []outcome{
	{errUsage, exitUsage, "usage"},
	{errProblems, exitOther, "problems"},
	{registry.ErrKey, exitUsage, "key"},
	{registry.ErrConfig, exitUsage, "config"},
	{registry.ErrProof, exitSource, "proof"},
	{registry.ErrTimeout, exitTimeout, "timeout"},
	{context.DeadlineExceeded, exitTimeout, "timeout"},
	{registry.ErrNoSpace, exitNoSpace, "no_space"},
	{registry.ErrTableFull, exitNoSpace, "table_full"},
	{registry.ErrSourceChanged, exitSource, "source_changed"},
	{registry.ErrSource, exitSource, "source"},
	{registry.ErrLoadFailed, exitSource, "load_failed"},
	{registry.ErrPath, exitUsage, "path"},
	{errNoFile, exitNotFound, "file_not_found"},
	{registry.ErrNoRegistry, exitNotFound, "no_registry"},
	{registry.ErrNotFound, exitNotFound, "not_found"},
	{registry.ErrNoPrevious, exitNotFound, "no_previous"},
	{registry.ErrUntrusted, exitPermission, "untrusted"},
	{registry.ErrReadOnly, exitPermission, "read_only"},
	{registry.ErrInUse, exitInUse, "in_use"},
	{registry.ErrBusy, exitInUse, "busy"},
	{registry.ErrVersion, exitCorrupt, "version"},
	{registry.ErrCorrupt, exitCorrupt, "corrupt"},
	{registry.ErrGone, exitCorrupt, "gone"},
	{fs.ErrPermission, exitPermission, "permission"},
}

var (
	errUsage    = errors.New("usage")
	errProblems = errors.New("problems found")
	errNoFile   = errors.New("no file")
)

// classify maps an error to its exit code and word.
func (a *app) classify(err error) (exit int, code string) {
	if a.signals.caught() && errors.Is(err, context.Canceled) {
		return exitInterrupted, "interrupted"
	}
	for _, o := range outcomes {
		if errors.Is(err, o.err) {
			return o.exit, o.code
		}
	}
	return exitOther, "error"
}

// fail reports what ended cmd and returns the exit code.
func (a *app) fail(cmd *cobra.Command, err error) int {
	if errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, registry.ErrTimeout) {
		err = &registry.Error{Op: cmd.Name(), Err: registry.ErrTimeout} // as the library says it
	}
	exit, code := a.classify(err)
	if cmd.Name() == "exec" && exit != exitInterrupted {
		exit = exitExecSelf
	}
	var ce *commandError
	if errors.As(err, &ce) {
		exit, code = ce.exit, "command"
	}
	// The list of problems is the answer; a second, machine-read error beside
	// it would say nothing new.
	if code == "problems" && a.json() {
		return exit
	}
	text := err.Error()
	if code == "interrupted" {
		text = "interrupted"
	}
	a.report(code, text, a.hintOf(err))
	return exit
}

// hinted is an error with advice.
type hinted struct {
	err  error
	hint string
}

func (e *hinted) Error() string { return e.err.Error() }
func (e *hinted) Unwrap() error { return e.err }

func withHint(err error, hint string) error {
	if err == nil || hint == "" {
		return err
	}
	return &hinted{err, hint}
}

// hintOf is the advice that belongs to an error: the command's own, else what
// the command line can do about it, else the library's.
func (a *app) hintOf(err error) string {
	var h *hinted
	if errors.As(err, &h) {
		return h.hint
	}
	var ce *commandError
	var e *registry.Error
	var room *registry.NoSpaceError
	switch {
	case errors.As(err, &ce):
		return "" // what the library would say is about registries
	case errors.As(err, &room) && room.Need <= room.Free && (room.Headroom < 0 || room.Need <= room.Headroom):
		return "the budget is the limit: shmctl config set budget=SIZE raises it, shmctl rm KEY frees a model"
	case errors.Is(err, registry.ErrNoSpace):
		return "free models with shmctl rm KEY, or give the tmpfs more room: " + a.moreRoom()
	case errors.Is(err, registry.ErrNoRegistry):
		return "shmctl load KEY PATH creates it; --dir or ONECOPY_DIR names another"
	case errors.Is(err, registry.ErrCorrupt) && errors.As(err, &e) && (e.Op == "open" || e.Op == "dump"):
		return "nothing can be read from this table: remove the directory when no process uses it, and load again"
	case errors.Is(err, registry.ErrSourceChanged):
		return "shmctl load --replace loads the source as it is now; --on-change ignore keeps what is loaded"
	}
	hint := registry.Hint(err)
	if errors.As(err, &e) && !errors.Is(err, registry.ErrTableFull) {
		return nameKey(hint, e.Key) // where room is wanted, KEY is any other one
	}
	return hint
}

// moreRoom is the command that enlarges the registry's tmpfs.
func (a *app) moreRoom() string {
	remount := doctor.RemountSize(a.registryDir())
	if strings.HasSuffix(remount, " /dev/shm") {
		remount += " (containers: --shm-size)"
	}
	return remount
}

// nameKey puts a key into advice such as "shmctl rm KEY", so that it can be
// pasted.
func nameKey(advice, key string) string {
	if key == "" {
		return advice
	}
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_./:@%+=,", r)
	}
	if strings.IndexFunc(key, func(r rune) bool { return !plain(r) }) >= 0 {
		key = "'" + strings.ReplaceAll(key, "'", `'\''`) + "'"
	}
	if strings.HasPrefix(key, "-") {
		key = "-- " + key
	}
	return strings.ReplaceAll(advice, "KEY", key)
}

// usageError is a mistake in the command line.
type usageError string

func (e usageError) Error() string        { return string(e) }
func (e usageError) Is(target error) bool { return target == errUsage }

func usagef(hint, format string, args ...any) error {
	return withHint(usageError(fmt.Sprintf(format, args...)), hint)
}

func prefixed(prefix string, words []string) []string {
	out := make([]string, len(words))
	for i, w := range words {
		out[i] = prefix + w
	}
	return out
}

func quotedList(words []string) string {
	q := make([]string, len(words))
	for i, w := range words {
		q[i] = fmt.Sprintf("%q", w)
	}
	return strings.Join(q, " or ")
}
