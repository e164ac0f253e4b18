//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/registry"
)

// A worker does things with the models until it is killed, or finds something
// wrong, or did not come past its step in so many operations.
const patience = 40

// A wait for a dead loader that ends later than this after the death is reported.
const lateAfter = 100 * time.Millisecond

// wait is that of a load for its load lock. It ends when the worker owns the lock: what
// is done then, before the load begins, is work for which it may wait in turn, for the
// table and for room.
type wait struct {
	owner        *atomic.Uint64 // of the lock, on the board
	begun, owned int64
	before       int // who had it before
}

// awaited is the wait of the load that this process began last.
var awaited atomic.Pointer[wait]

// owns is called with the lock in hand. A load that tries again has it twice, and
// waited the first time.
func (w *wait) owns() {
	if w == nil {
		return
	}
	if before := int(w.owner.Swap(uint64(os.Getpid()))); before != os.Getpid() {
		w.before, w.owned = before, monotonic()
	}
}

// over is called after the load, for whoever waits behind a process that does
// something else when it dies.
func (w *wait) over() {
	if w != nil {
		w.owner.CompareAndSwap(uint64(os.Getpid()), 0)
	}
}

// job is what a worker is told: its arguments, and in its environment the step.
type job struct {
	place
	Slot  int
	Seed  uint64
	Step  string // where it will be killed; "" when it is killed at random
	Stop  bool   // it is stopped there before, for a while
	Shift int64  // seconds by which its CLOCK_BOOTTIME is ahead of that of others
	Only  string // do this one operation, on Key
	Key   string
}

// place is where everything is.
type place struct {
	Base  string // a folder on a disk: board, pool, sources, witnesses
	Shm   string // a tmpfs with the registries
	Slots int
}

func (p place) board() string   { return filepath.Join(p.Base, "board") }
func (p place) pool() string    { return filepath.Join(p.Base, "pool") }
func (p place) witness() string { return filepath.Join(p.Base, "witness") }

// The steady registry is audited to the last byte. The doomed one is deleted, as a
// whole or file by file, all the time.
func (p place) steady() string { return filepath.Join(p.Shm, "steady") }
func (p place) doomed() string { return filepath.Join(p.Shm, "doomed") }

type worker struct {
	job
	board *board
	words []byte // the pool
	rng   *rand.Rand
	r     *registry.Registry
	dir   string
	held  []*registry.Model
	bad   error       // found within a load function
	begun []io.Closer // witnesses of loads from a path, which may fail without a word to us
}

func newWorker(j job) (w *worker, err error) {
	w = &worker{job: j, rng: rand.New(rand.NewPCG(j.Seed, 1)), dir: j.steady()}
	if w.board, err = openBoard(j.place.board(), j.Slots); err != nil {
		return nil, err
	}
	w.words, err = openPool(j.pool())
	return w, err
}

// shifted becomes a worker whose clock is wrong, or right where the kernel has no
// time namespaces for us.
func shifted(j job) error {
	err := unix.Unshare(unix.CLONE_NEWTIME)
	if err == nil {
		err = os.WriteFile("/proc/self/timens_offsets", fmt.Appendf(nil, "boottime %d 0\n", j.Shift), 0)
	}
	if err != nil {
		j.Shift = 0
	}
	cmd := command(j)
	cmd.Args[1] = "worker"
	return unix.Exec(cmd.Path, cmd.Args, os.Environ())
}

// work is the life of a worker.
func work(j job) error {
	w, err := newWorker(j)
	if err != nil {
		return err
	}
	if j.Shift != 0 {
		w.board.word(j.Slot, wordShifted).Add(1)
	}
	if j.Only != "" {
		return w.only()
	}
	way := wayTo(j.Step)
	if way == nil && w.rng.IntN(8) == 0 {
		w.dir = j.doomed()
	}
	for begun := 0; begun < patience || j.Step == ""; {
		if err := w.begin("open", func() (err error) {
			w.r, err = registry.Open(w.dir, nil)
			return err
		}); err != nil {
			return err
		}
		for n := 5 + w.rng.IntN(20); n > 0 && w.r != nil; n-- {
			begun++
			op := way
			if op == nil || w.rng.IntN(5) == 0 {
				op = anything
			}
			if err := w.act(op[w.rng.IntN(len(op))]); err != nil {
				return err
			}
		}
		if err := w.end(); err != nil {
			return err
		}
	}
	return nil
}

// end closes everything that is open.
func (w *worker) end() error {
	for _, m := range w.held {
		if err := w.verify(m); err != nil {
			return err
		}
		if err := w.close(m); err != nil {
			return err
		}
	}
	w.held = nil
	if w.r == nil {
		return nil
	}
	return w.begin("close", w.r.Close)
}

// only does the one operation that another worker wants to see killed.
func (w *worker) only() (err error) {
	if w.r, err = registry.Open(w.dir, nil); err != nil {
		return err
	}
	return w.act(w.job.Only)
}

// begin tells the board that an operation is running while fn does.
func (w *worker) begin(name string, fn func() error) error {
	doing := w.board.word(w.Slot, wordDoing)
	w.board.word(w.Slot, wordOps).Add(1)
	doing.Store(1)
	err := fn()
	awaited.Swap(nil).over()
	for _, c := range w.begun {
		_ = c.Close()
	}
	w.begun = nil
	doing.Store(0)
	if err != nil && !w.fine(err) {
		return fmt.Errorf("%s: %w", name, err)
	}
	return w.bad
}

// act does an operation, compares what it got, and keeps it for a while.
func (w *worker) act(name string) error {
	timeout := 10 * time.Second
	if w.rng.IntN(6) == 0 {
		timeout = time.Duration(w.rng.IntN(20_000)) * time.Microsecond
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	var m *registry.Model
	start := time.Now()
	err := w.begin(name, func() (err error) {
		m, err = operations[name](w, ctx)
		return err
	})
	w.board.longest(w.Slot, wordOverrun, uint64(max(0, time.Since(start)-timeout))) // reported; a busy machine makes it long
	if err != nil || m == nil {
		return err
	}
	if err := w.verify(m); err != nil {
		return err
	}
	if w.held = append(w.held, m); len(w.held) <= 2 {
		return nil
	}
	m, w.held = w.held[0], w.held[1:]
	if err := w.verify(m); err != nil { // after all that has happened since
		return err
	}
	return w.close(m)
}

func (w *worker) close(m *registry.Model) error { return w.begin("release", m.Close) }

func (w *worker) verify(m *registry.Model) error {
	n, err := verify(w.words, m)
	if err != nil && !w.fine(err) {
		return err
	}
	w.board.word(w.Slot, wordModels).Add(1)
	w.board.word(w.Slot, wordBytes).Add(uint64(n))
	return nil
}

// fine are the errors that others may cause.
func (w *worker) fine(err error) bool {
	allowed := []error{registry.ErrNotFound, registry.ErrInUse, registry.ErrNoSpace, registry.ErrTableFull, registry.ErrLoadFailed,
		context.DeadlineExceeded, registry.ErrBusy, registry.ErrNoPrevious, registry.ErrSourceChanged, registry.ErrProof, errTold}
	if w.dir == w.place.doomed() {
		allowed = append(allowed, registry.ErrGone, registry.ErrNoRegistry, registry.ErrCorrupt, os.ErrNotExist)
	}
	return slices.ContainsFunc(allowed, func(e error) bool { return errors.Is(err, e) })
}

var errTold = errors.New("failed as told")

func (w *worker) key() string { return keys[w.rng.IntN(len(keys))] }

// own is a key that nobody else uses.
func (w *worker) own() string { return fmt.Sprintf("own-%d/model-%d", w.Slot, 1-w.rng.IntN(4)/3) }

// source is one of several versions of a key's weights.
func (w *worker) source(key string, change registry.OnChange) registry.Source {
	n := name(key, w.rng.IntN(versions))
	if !strings.HasPrefix(key, "own") && w.rng.IntN(3) > 0 {
		return w.path(n, change)
	}
	return w.function(n, change, nil)
}

// path is a folder on the disk.
func (w *worker) path(name string, change registry.OnChange) registry.Source {
	key, _, _ := strings.Cut(name, "@")
	waiting := w.waits(key)
	var alone io.Closer
	return registry.Source{
		Path:     sourceDir(w.Base, name),
		OnChange: change,
		Progress: func(done, total int64) {
			if alone == nil {
				w.count(key)
				alone = waiting("path")
				w.begun = append(w.begun, alone)
			}
			if done == total {
				alone.Close()
			}
		},
	}
}

// function writes a model; meanwhile runs in the middle of it.
func (w *worker) function(name string, change registry.OnChange, meanwhile func(context.Context) error) registry.Source {
	key, _, _ := strings.Cut(name, "@")
	waiting := w.waits(key)
	return registry.Source{
		Version:  name,
		OnChange: change,
		Load: func(ctx context.Context, out *registry.Writer) error {
			w.count(key)
			defer waiting("function").Close()
			for path, b := range contents(w.words, name) {
				size := int64(len(b))
				if w.rng.IntN(8) == 0 { // has room granted again and again
					size = -1
				}
				f, err := out.Create(path, size)
				if err != nil {
					return err
				}
				step := 64<<10 + w.rng.IntN(1<<20)
				for off := 0; off < len(b); off += step {
					if _, err := f.Write(b[off:min(off+step, len(b))]); err != nil {
						return err
					}
				}
				if err := f.Close(); err != nil {
					return err
				}
			}
			if meanwhile != nil {
				return meanwhile(ctx)
			}
			return nil
		},
	}
}

func (w *worker) count(key string) {
	w.board.word(w.Slot, wordLoads).Add(1)
	if big(key) {
		w.board.word(w.Slot, wordBig).Add(1)
	}
	if e, err := w.r.Entry(key); err == nil && e.State == "ready" {
		w.board.word(w.Slot, wordReplaces).Add(1)
	}
}
