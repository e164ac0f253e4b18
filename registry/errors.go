package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"
	"time"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/lockfile"
	"github.com/onecopy/onecopy/shm"
)

// What can go wrong, grouped by the moment. Every error of this package is an
// *Error that wraps one of these, an errno, or context.Canceled; test with
// errors.Is. Missing kernel features and systems other than Linux are
// errors.ErrUnsupported.
var (
	// Opening a registry.
	ErrNoRegistry = errors.New("no registry here")                   // Options.MustExist and there is none
	ErrUntrusted  = shm.ErrUntrusted                                 // somebody else could have made or changed it
	ErrVersion    = layout.ErrVersion                                // another layout version
	ErrCorrupt    = errors.New("damaged")                            // table, manifest or payload is not what was published
	ErrClosed     = errors.New("closed")                             // registry or model used after Close
	ErrKey        = layout.ErrKey                                    // 1 to 255 bytes of UTF-8 without control characters
	ErrPath       = layout.ErrPath                                   // a file name that no model may have
	ErrLimit      = shm.ErrLimit                                     // descriptors, mappings, files per model
	ErrReadOnly   = errors.New("this user may read here, not write") // the registry belongs to another user, or is mounted read-only

	// Getting a model.
	ErrNotFound       = errors.New("not loaded")            // no generation of this key is published
	ErrBusy           = errors.New("held by somebody else") // READY, but its manifest stays exclusively locked; of a load: somebody can still write what it made
	ErrGone           = errors.New("removed while in use")  // a third party deleted files under the lease
	ErrTimeout  error = timeoutError{}                      // the wait for another loader, or for a lock, ended; also context.DeadlineExceeded

	// Loading a model.
	ErrSource        = shm.ErrSource                                  // missing, unreadable, empty, or changed during the load
	ErrSourceChanged = errors.New("the source changed")               // differs from what was loaded: *SourceChangedError
	ErrLoadFailed    = errors.New("loaders keep dying")               // *LoadFailedError
	ErrNoSpace       = shm.ErrNoSpace                                 // *NoSpaceError when known before the load
	ErrTableFull     = errors.New("the header table is full")         // every slot is in use and none is idle
	ErrNestedLoad    = errors.New("a load function asked for a load") // or for Undo, as a proof may: it would wait for itself

	ErrProof      = errors.New("the new generation failed its proof")  // Rollout: nothing was published
	ErrNoPrevious = errors.New("no previous generation to go back to") // Undo: replaced long ago, or collected

	// Removing a model, changing limits.
	ErrInUse  = errors.New("in use")            // *InUseError names the holders
	ErrConfig = errors.New("not a valid limit") // a budget, share or TTL that makes no sense
)

type timeoutError struct{}

func (timeoutError) Error() string { return "timed out" }

func (timeoutError) Is(target error) bool { return target == context.DeadlineExceeded }

// waitedError is the ErrTimeout of one who waited for another load.
type waitedError struct{ error }

func (e waitedError) Unwrap() error { return e.error }

// Error says which operation failed on what. Path is empty where it would
// repeat the text of Err.
type Error struct {
	Op   string // get, load, remove, open, ...
	Key  string
	Path string
	Err  error
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Op)
	if e.Key != "" {
		fmt.Fprintf(&b, " %q", clip(e.Key, layout.MaxKey)) // one that is refused may be of any length
	}
	if e.Path != "" {
		b.WriteByte(' ')
		b.WriteString(e.Path)
	}
	b.WriteString(": ")
	b.WriteString(e.Err.Error())
	return b.String()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

func opErr(op, key string, err error) error {
	if err == nil {
		return nil
	}
	if e, ok := err.(*Error); ok { //nolint:errorlint // one deeper within is of another call, on another key
		return e
	}
	if !errors.Is(err, ErrSource) && !errors.Is(err, ErrProof) { // of the caller's code: see inTime
		err = tooLate(err)
	}
	if (errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)) && !errors.Is(err, ErrLimit) {
		err = fmt.Errorf("%w: raise it (ulimit -n, sysctl fs.file-max): %w", ErrLimit, err)
	}
	if errors.Is(err, syscall.EROFS) && !errors.Is(err, ErrReadOnly) { // it was mounted anew
		err = fmt.Errorf("%w: %w", ErrReadOnly, err)
	}
	if (errors.Is(err, lockfile.ErrLocked) || errors.Is(err, shm.ErrWriter)) && !errors.Is(err, ErrBusy) {
		err = fmt.Errorf("%w: %w", ErrBusy, err)
	}
	return &Error{Op: op, Key: key, Err: err}
}

// tooLate makes ErrTimeout of the end of a wait: the path and the call that waited
// say nothing to a user.
func tooLate(err error) error {
	if errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, ErrTimeout) {
		return ErrTimeout
	}
	return err
}

// inTime is an error of the caller's own code, which may be a time-out of its own:
// ErrTimeout is only that of the call.
func inTime(ctx context.Context, err error) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) && !errors.Is(err, ErrTimeout) {
		return fmt.Errorf("%w: %w", ErrTimeout, err)
	}
	return err
}

// NoSpaceError is the arithmetic behind ErrNoSpace, in bytes.
type NoSpaceError struct {
	Need      int64 // of the model to be loaded
	Free      int64 // on the tmpfs
	Budget    int64 // of the registry
	Used      int64 // by all generations of the registry
	Reserved  int64 // still to be allocated by other loads that run now
	Evictable int64 // idle and not pinned
	Leased    int64 // in use, or replaced and still in use
	Pinned    int64
	Headroom  int64 // up to the memory limit of the cgroup; -1: no limit
	Dir       string
	Holders   []Holder // who leases, as far as this process may see them
}

func (e *NoSpaceError) Error() string {
	s := fmt.Sprintf("not enough memory: the model needs %s; %s has %s free, the registry uses %s of its budget of %s",
		size(e.Need), e.Dir, size(e.Free), size(e.Used), size(e.Budget))
	if e.Reserved > 0 {
		s += fmt.Sprintf(", running loads still need %s", size(e.Reserved))
	}
	if e.Headroom >= 0 {
		s += fmt.Sprintf(", the cgroup of this process has %s left", size(e.Headroom))
	}
	s += fmt.Sprintf("; %s are idle and can be evicted, %s are in use", size(e.Evictable), size(e.Leased))
	if len(e.Holders) > 0 {
		s += by(e.Holders)
	}
	if e.Pinned > 0 {
		s += fmt.Sprintf(", %s are pinned", size(e.Pinned))
	}
	return s
}

// Is reports ErrNoSpace.
func (e *NoSpaceError) Is(target error) bool { return target == ErrNoSpace }

// InUseError names who holds a model.
type InUseError struct {
	Holders []Holder // as far as this process may see them
	Loading bool     // a load of the key is running
}

func (e *InUseError) Error() string {
	if e.Loading {
		return "in use: it is being loaded"
	}
	if len(e.Holders) == 0 {
		return "in use by a process that is not visible from here"
	}
	return "in use" + by(e.Holders)
}

// by names the processes that hold something, each of them once.
func by(holders []Holder) string {
	s, n := " by", 0
	seen := map[int]bool{}
	for _, h := range holders {
		if seen[h.PID] {
			continue
		}
		seen[h.PID] = true
		if n++; n > 5 {
			continue
		}
		if n > 1 {
			s += ","
		}
		s += fmt.Sprintf(" pid %d", h.PID)
		if h.Command != "" {
			s += fmt.Sprintf(" (%s)", clip(h.Command, 60))
		}
	}
	if n > 5 {
		s += fmt.Sprintf(" and %d more", n-5)
	}
	return s
}

// Is reports ErrInUse.
func (e *InUseError) Is(target error) bool { return target == ErrInUse }

// SourceChangedError names the first field of the fingerprint that differs.
type SourceChangedError struct {
	Field           string // "path", "version", "environment X", "file NAME", "size of NAME", "mtime of NAME"
	Loaded, Current string
}

func (e *SourceChangedError) Error() string {
	return fmt.Sprintf("the source changed: %s was %s when the model was loaded and is %s now", e.Field, e.Loaded, e.Current)
}

// Is reports ErrSourceChanged.
func (e *SourceChangedError) Is(target error) bool { return target == ErrSourceChanged }

// LoadFailedError says that one loader after the other was killed.
type LoadFailedError struct {
	Deaths     int
	RetryAfter time.Duration // from now
}

func (e *LoadFailedError) Error() string {
	return fmt.Sprintf("loaders keep dying: %d were killed in a row (out of memory?); the next attempt is allowed in %s",
		e.Deaths, e.RetryAfter.Round(time.Second))
}

// Is reports ErrLoadFailed.
func (e *LoadFailedError) Is(target error) bool { return target == ErrLoadFailed }

// LeakError lists the models that were still open when their registry was
// closed.
type LeakError struct {
	Keys   []string
	Stacks []string // where each was obtained; only under the invariants tag
}

func (e *LeakError) Error() string {
	s := fmt.Sprintf("%d models were not closed: %q", len(e.Keys), e.Keys)
	for _, st := range e.Stacks {
		s += "\n" + st
	}
	return s
}

// Hint says what a user can do about err; "" if there is nothing to add to its
// text.
func Hint(err error) string {
	var changed *SourceChangedError
	var inUse *InUseError
	var waited waitedError
	var ours *Error
	switch {
	case errors.Is(err, ErrNoRegistry):
		return "load a model first: shmctl load KEY PATH"
	case errors.Is(err, ErrNotFound):
		return "see what is loaded with shmctl ls; load it with shmctl load KEY PATH"
	case errors.As(err, &inUse) && inUse.Loading:
		return "wait until the load is over, or stop the process that loads"
	case errors.Is(err, ErrInUse):
		return "shmctl holders KEY shows who; the memory goes when the last of them ends"
	case errors.Is(err, ErrNoSpace):
		return "free models with shmctl rm KEY, or give the tmpfs more room: remount it with a larger size= (containers: --shm-size)"
	case errors.Is(err, ErrTableFull):
		return "remove models with shmctl rm KEY, or create the registry with more slots (--slots)"
	case errors.As(err, &changed):
		return "use --replace to load the new version beside the old one, or another key for another model"
	case errors.Is(err, ErrLoadFailed):
		return "look for the killer (dmesg, the cgroup's memory.events), then try again"
	case errors.Is(err, syscall.EROFS):
		return "do it where the registry's tmpfs is mounted writable"
	case errors.Is(err, ErrReadOnly):
		return "only the user who owns the registry can load or remove models in it"
	case errors.Is(err, ErrUntrusted):
		return "choose another directory with --dir or ONECOPY_DIR, or have its owner repair it"
	case errors.Is(err, ErrVersion):
		return "use the program version that made it; another version never touches it"
	case errors.Is(err, ErrCorrupt), errors.Is(err, ErrGone):
		return "shmctl check lists the damage; shmctl rm KEY and load it again"
	case errors.Is(err, ErrBusy):
		return "somebody holds the manifest exclusively: shmctl holders KEY"
	case errors.Is(err, ErrNoPrevious):
		return "load the previous version again: shmctl load --replace KEY PATH"
	case errors.As(err, &waited):
		return "another process is loading; shmctl ls shows it, --timeout waits longer"
	case errors.Is(err, ErrTimeout):
		return "a longer --timeout gives it more time"
	case errors.Is(err, ErrLimit):
		return "raise the limit that the text names"
	case errors.Is(err, ErrSource), errors.Is(err, ErrProof):
		return "" // whatever was refused is not in the registry
	case errors.Is(err, fs.ErrPermission) && errors.As(err, &ours):
		return "run as the user who owns the registry"
	}
	return ""
}

// size prints bytes with a binary unit.
func size(n int64) string {
	const units = "KMGTPE"
	f, u := float64(n), -1
	for f >= 1024 && u < len(units)-1 {
		f, u = f/1024, u+1
	}
	if u < 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %ciB", f, units[u])
}

func clip(s string, n int) string {
	if len(s) > n {
		return s[:n] + "..."
	}
	return s
}
