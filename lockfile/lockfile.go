// Package lockfile provides advisory locks on files, across processes and
// across the goroutines of one process.
//
// A lock is the kernel's: it ends with the process that holds it, whatever
// killed that process, and there is nothing to clean up afterwards. No pid is
// stored or looked at. [At] names a permanent lock file, which is created by
// the first lock and never removed; [Existing] names a file that others may
// remove, and never creates it.
//
// Locks are flock(2) locks, taken through [github.com/gofrs/flock]. What this
// package adds:
//
//   - Every acquisition has a file description of its own. flock belongs to the
//     description, so a shared one would let two goroutines both believe that
//     they hold the lock, and the first Unlock would free it for both.
//   - After locking, the name must still lead to the inode that was locked.
//     Otherwise somebody who waited on a removed file and somebody who locked
//     its successor would both hold "the" lock.
//   - A holder releases with LOCK_UN before closing. A child of another
//     goroutine's fork+exec has a copy of the descriptor for a moment, and would
//     keep a lock that was only closed.
//   - A process that did not acquire the lock never issues LOCK_UN: after a fork
//     it would take the lock away from the parent.
//   - Interrupted system calls are repeated, every wait but that of [File.Wait]
//     ends with its context, and nothing that lies at the path instead of a
//     regular file (FIFO, symbolic link, device) is followed or blocks.
//   - Unlocking happens before the next locking of the same file in the sense of
//     the Go memory model, so data guarded by a lock needs no further
//     synchronisation and the race detector agrees.
//
// # Limits
//
// The locks exclude processes of one machine. Network file systems may grant a
// flock to everybody, so a caller who is not sure of the file system probes it
// first. A lock is not re-entrant: a goroutine that locks a file twice waits for
// itself. A shared lock cannot be made exclusive, on purpose: where the kernel
// refuses the change it drops the shared lock as well. Code that forks without
// exec (not possible from Go) hands a copy of every lock to the child.
//
// Where the operating system has no flock, every call returns an error that is
// [errors.ErrUnsupported].
package lockfile

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync/atomic"
	"time"
)

var (
	// ErrLocked is returned by a try when somebody else holds the lock. A
	// further goroutine of this process counts as somebody else.
	ErrLocked = errors.New("locked by somebody else")

	// ErrNotHeld is returned by Unlock when there is nothing to unlock: it was
	// unlocked before, or another process acquired it.
	ErrNotHeld = errors.New("lock not held")

	// ErrGone is returned for a permanent lock file that is missing and cannot
	// be created, because its directory was removed, and for a file that is
	// replaced again and again while it is being locked.
	ErrGone = errors.New("lock file or its directory was removed")
)

// A wait that honours a context polls. The first polls are close together,
// because most critical sections are a few stores long; the last ones cost a
// waiter well under a thousandth of a CPU.
const (
	pollMin = 50 * time.Microsecond
	pollMax = 5 * time.Millisecond
)

// maxReplaced bounds how often a file may turn out to have been removed or
// replaced during one acquisition.
const maxReplaced = 1000

// errReplaced says that the locked inode is no longer what the path names.
var errReplaced = errors.New("lock file was replaced")

// File names a lock. It holds no resource and is safe for concurrent use.
type File struct {
	path      string
	permanent bool
}

// At returns the permanent lock file at path. The file is created when it is
// first locked, readable and writable for its owner only, and must never be
// removed while the lock is in use; if it is removed nevertheless, the next
// lock creates it again.
//
// The path is used as it is, so it may lead through /proc/self/fd.
func At(path string) *File { return &File{path: path, permanent: true} }

// Existing returns the lock on a file that exists for another purpose and may be
// removed or replaced at any time. It is never created: locking a missing file
// is [fs.ErrNotExist].
func Existing(path string) *File { return &File{path: path} }

// Lock acquires the lock exclusively. It waits until it is granted or ctx is
// done, and then returns an error that is ctx's error and its cause. A waiter
// asks again every 50 µs at first and every 5 ms in the end; there is no queue.
func (f *File) Lock(ctx context.Context) (*Held, error) { return f.poll(ctx, exclusive) }

// RLock acquires the lock shared with other holders of RLock. It waits like
// [File.Lock].
func (f *File) RLock(ctx context.Context) (*Held, error) { return f.poll(ctx, shared) }

// TryLock acquires the lock exclusively if that is possible at once, and
// otherwise returns [ErrLocked].
func (f *File) TryLock() (*Held, error) { return f.once(exclusive) }

// TryRLock acquires the lock shared if that is possible at once, and otherwise
// returns [ErrLocked].
func (f *File) TryRLock() (*Held, error) { return f.once(shared) }

// Wait acquires the lock exclusively and blocks in the kernel until it is
// granted: it uses no CPU, is woken within microseconds when the holder unlocks
// or dies, and is served in turn. In exchange it occupies one thread of the
// operating system and cannot be cancelled. It is meant for the one goroutine of
// a process that waits for a long lock on behalf of all others.
func (f *File) Wait() (*Held, error) { return f.WaitUnless(nil) }

// WaitUnless is Wait for those who may want the lock no more when their turn
// comes: when it is granted, and before anything else, no is asked. If it is
// true the next one in the queue gets the lock at once, and WaitUnless returns
// nil and no error.
func (f *File) WaitUnless(no func() bool) (*Held, error) {
	h, err := f.acquire(exclusive, no, true)
	if err != nil {
		return nil, f.error(exclusive, err)
	}
	return h, nil
}

func (f *File) poll(ctx context.Context, m mode) (*Held, error) {
	for delay := pollMin; ; delay = min(2*delay, pollMax) {
		if ctx.Err() != nil {
			return nil, f.error(m, contextError(ctx))
		}
		h, err := f.acquire(m, nil, false)
		if err == nil {
			return h, nil
		}
		if !errors.Is(err, ErrLocked) {
			return nil, f.error(m, err)
		}
		timer := time.NewTimer(delay)
		select {
		case <-ctx.Done():
			timer.Stop()
		case <-timer.C:
		}
	}
}

func (f *File) once(m mode) (*Held, error) {
	h, err := f.acquire(m, nil, false)
	if err != nil {
		return nil, f.error(m, err)
	}
	return h, nil
}

// acquire takes the lock on whatever inode the path names when it is granted.
func (f *File) acquire(m mode, no func() bool, block bool) (*Held, error) {
	for range maxReplaced {
		h, err := f.attempt(m, no, block)
		if !errors.Is(err, errReplaced) {
			return h, err
		}
	}
	return nil, fmt.Errorf("%w: replaced %d times in a row", ErrGone, maxReplaced)
}

func (f *File) error(m mode, err error) error {
	// os and flock name the path and their own operation; say it once.
	var pe *fs.PathError
	if errors.As(err, &pe) && pe.Path == f.path {
		err = pe.Err
	}
	return &fs.PathError{Op: m.String(), Path: f.path, Err: err}
}

// contextError returns an error that is both ctx's error and its cause.
func contextError(ctx context.Context) error {
	err, cause := ctx.Err(), context.Cause(ctx)
	if errors.Is(cause, err) {
		return cause
	}
	return fmt.Errorf("%w: %w", err, cause)
}

// Held is a lock that has been acquired. Keep it reachable for as long as the
// lock is needed: the lock of a forgotten Held ends at some garbage collection.
type Held struct {
	path     string
	pid      int
	released atomic.Bool
	lock     unlocker
	edge     edge
}

// unlocker is the locked *flock.Flock.
type unlocker interface{ Unlock() error }

// Path returns the path with which the lock was named.
func (h *Held) Path() string { return h.path }

// Unlock releases the lock. A second call returns [ErrNotHeld], and so does a
// call in a process other than the one that acquired the lock; there it leaves
// the lock alone.
func (h *Held) Unlock() error {
	if !h.released.CompareAndSwap(false, true) || h.pid != os.Getpid() {
		return h.error(ErrNotHeld)
	}
	h.edge.release()
	if err := retry(h.lock.Unlock); err != nil {
		return h.error(err)
	}
	return nil
}

func (h *Held) error(err error) error {
	return &fs.PathError{Op: "unlock", Path: h.path, Err: err}
}

// TryShared takes a shared lock on the description of f, for as long as any
// descriptor or mapping made from it lives. It returns [ErrLocked] if somebody
// holds an exclusive lock.
func TryShared(f *os.File) error { return tryFile(f, shared) }

// TrySharedFD is TryShared for a bare descriptor.
func TrySharedFD(fd int) error {
	if err := flockFD(fd, shared); err != nil {
		return fmt.Errorf("rlock: %w", err)
	}
	return nil
}

// TryExclusive takes an exclusive lock on the description of f. It returns
// [ErrLocked] if somebody else holds any lock.
//
// Never call it for a description that holds a shared lock: if the kernel
// refuses the upgrade, the shared lock is gone too.
func TryExclusive(f *os.File) error { return tryFile(f, exclusive) }

func tryFile(f *os.File, m mode) error {
	if err := flockFile(f, m); err != nil {
		return &fs.PathError{Op: m.String(), Path: f.Name(), Err: err}
	}
	return nil
}

// mode is how a lock is held.
type mode int

const (
	exclusive mode = iota
	shared
)

// String returns the operation that errors name.
func (m mode) String() string {
	if m == shared {
		return "rlock"
	}
	return "lock"
}
