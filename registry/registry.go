package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/onecopy/onecopy/internal/invariants"
	"github.com/onecopy/onecopy/internal/layout"
)

// Registry is one directory of shared models, as this process sees it. It may
// be used by any number of goroutines. Two Registries of one directory in one
// process are independent: each maps a model for itself.
type Registry struct {
	dir  string
	opts Options
	host host // the platform's half

	// local maps a key to the generation that this process uses now. It is
	// replaced as a whole, under mu, so that a hit takes no lock.
	local atomic.Pointer[map[string]*attachment]

	mu struct {
		sync.Mutex
		flights map[string]*flight
		kept    map[string]*attachment // by Use: one reference each
		live    map[*attachment]struct{}
		stacks  map[*Model]string // of open Models, under the invariants tag
		closed  bool
	}

	stats localStats
}

// localStats is what this process counted.
type localStats struct {
	hits, misses, attaches, loads, waits, takeovers, replaced, fallbacks, retries atomic.Uint64
	reclaimed, leftovers                                                          atomic.Uint64
	loadNanos, bytesLoaded, bytesSaved                                            atomic.Int64
}

// flight is a load that one goroutine of this process runs and others wait for.
type flight struct{ done chan struct{} }

// Open opens the registry in dir, and creates it unless opts.MustExist.
//
// The registry is shared by all processes of one host that see the same tmpfs.
// One user writes it: the owner of the directory. Other users may read it if
// the directory lets them and they trust its owner. It is not for network file
// systems, and refuses everything that is not a tmpfs.
//
// Off Linux (amd64, arm64) models are private to the process; Sharing says so.
//
// Errors: ErrNoRegistry, ErrUntrusted, ErrVersion, ErrCorrupt, ErrLimit,
// ErrNoSpace, errors.ErrUnsupported, fs.ErrPermission.
func Open(dir string, opts *Options) (*Registry, error) {
	// The working directory may be another one when a deleted registry is made again.
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, &Error{Op: "open", Path: dir, Err: err}
	}
	r := &Registry{dir: dir}
	if opts != nil {
		r.opts = *opts
	}
	if err := r.opts.check(); err != nil {
		return nil, &Error{Op: "open", Path: dir, Err: err}
	}
	if r.opts.LoadTimeout == 0 {
		r.opts.LoadTimeout = 10 * time.Minute
	}
	r.local.Store(&map[string]*attachment{})
	r.mu.flights = map[string]*flight{}
	r.mu.kept = map[string]*attachment{}
	r.mu.live = map[*attachment]struct{}{}
	r.mu.stacks = map[*Model]string{}
	if err := r.host.open(r); err != nil {
		var pe *fs.PathError
		if errors.As(err, &pe) && pe.Path == dir {
			err = pe.Err // the path is said once
		}
		return nil, &Error{Op: "open", Path: dir, Err: err}
	}
	return r, nil
}

func (o *Options) check() error {
	switch {
	case o.Mode != 0 && o.Mode != 0o700 && o.Mode != 0o755:
		return fmt.Errorf("%w: mode %#o: 0700, or 0755 to let other users read", ErrConfig, o.Mode)
	case o.Slots != 0 && (o.Slots < layout.MinSlots || o.Slots > layout.MaxSlots):
		return fmt.Errorf("%w: %d slots: %d to %d", ErrConfig, o.Slots, layout.MinSlots, layout.MaxSlots)
	case o.Budget < 0 || o.LoadTimeout < 0:
		return fmt.Errorf("%w: budget %d, load timeout %v", ErrConfig, o.Budget, o.LoadTimeout)
	}
	return nil
}

// Dir is the directory that was opened, as an absolute path.
func (r *Registry) Dir() string { return r.dir }

// Close ends the use of the registry by this process. Models that are still
// open stay valid until they are closed; they are reported as a *LeakError.
func (r *Registry) Close() error {
	r.mu.Lock()
	if r.mu.closed {
		r.mu.Unlock()
		return nil
	}
	r.mu.closed = true
	kept := r.mu.kept
	r.mu.kept = nil
	r.local.Store(&map[string]*attachment{})
	leak := &LeakError{}
	for a := range r.mu.live {
		for range a.models.Load() {
			leak.Keys = append(leak.Keys, a.key)
		}
	}
	for _, stack := range r.mu.stacks {
		leak.Stacks = append(leak.Stacks, stack)
	}
	r.mu.Unlock()
	for _, a := range kept {
		a.unref()
	}
	err := r.host.close()
	if len(leak.Keys) > 0 {
		slices.Sort(leak.Keys)
		err = errors.Join(&Error{Op: "close", Path: r.dir, Err: leak}, err)
	}
	return err
}

func (r *Registry) isClosed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mu.closed
}

// Get returns the model of key if it is loaded. It never waits for a load.
//
// Errors: ErrNotFound, ErrBusy, ErrKey, ErrCorrupt, ErrGone, ErrLimit, ErrClosed.
func (r *Registry) Get(key string) (*Model, error) {
	if a := r.hit(key); a != nil {
		return r.newModel(a, false), nil
	}
	a, err := r.attach(key)
	if err != nil {
		return nil, opErr("get", key, err)
	}
	return r.newModel(a, false), nil
}

// GetOrLoad returns the model of key and loads it from src if no process has
// done so: one loader per key and machine. The others wait, without using the
// processor, until the model is there, their context ends, or
// Options.LoadTimeout is over; when the loader dies one of them takes over. An
// error of a loader goes to its own caller only, the next waiter tries its own
// source.
//
// When a process gets a model with a source for the first time, the source is
// compared with what was loaded: see Source.OnChange.
//
// Errors: those of Get but ErrNotFound, and ErrSource,
// ErrSourceChanged, ErrLoadFailed, ErrNoSpace, ErrTableFull, ErrNestedLoad,
// ErrPath, ErrReadOnly, ErrTimeout, context.Canceled.
func (r *Registry) GetOrLoad(ctx context.Context, key string, src Source) (*Model, error) {
	if a := r.hit(key); a != nil {
		if !src.Replace && a.knows(&src) {
			return r.newModel(a, false), nil
		}
		a.unref()
	}
	slow := src                                    // only this copy escapes to the heap
	slow.Environment = maps.Clone(src.Environment) // what is kept of it outlives the call
	a, loaded, err := r.getOrLoad(ctx, key, &slow)
	if err != nil {
		return nil, opErr("load", key, err)
	}
	m := r.newModel(a, loaded)
	m.replaced = slow.replaced
	return m, nil
}

// Use calls fn with the model of key and keeps the model attached in this
// process until Release or Close, so that further calls cost a map access and
// one atomic load and allocate nothing. fn must not keep the model or its bytes,
// and closing it has no effect. When a new generation was published, the next
// Use sees it.
//
// Errors: those of Get, and what fn returns.
func (r *Registry) Use(key string, fn func(*Model) error) error {
	a := r.hit(key)
	if a == nil || !a.kept.Load() {
		var err error
		if a == nil {
			if a, err = r.attach(key); err != nil {
				return opErr("use", key, err)
			}
		}
		if !r.keep(a) {
			a.unref()
			return opErr("use", key, ErrClosed)
		}
	}
	defer a.unref() // also when fn panics
	return fn(&a.borrowed)
}

// keep adds the reference that Use holds on the current generation of a key.
func (r *Registry) keep(a *attachment) bool {
	r.mu.Lock()
	if r.mu.closed {
		r.mu.Unlock()
		return false
	}
	old := r.mu.kept[a.key]
	if old != a {
		a.ref()
		a.kept.Store(true)
		r.mu.kept[a.key] = a
		if old != nil {
			old.kept.Store(false)
		}
	}
	r.mu.Unlock()
	if old != nil && old != a {
		old.unref()
	}
	return true
}

// Release drops what Use keeps of key in this process. Models that Get returned
// are not affected.
func (r *Registry) Release(key string) {
	r.mu.Lock()
	a := r.mu.kept[key]
	delete(r.mu.kept, key)
	if a != nil {
		a.kept.Store(false)
	}
	r.mu.Unlock()
	if a != nil {
		a.unref()
	}
}

// hit returns the process's own mapping of key, referenced, if its generation
// is still the published one.
func (r *Registry) hit(key string) *attachment {
	a := (*r.local.Load())[key]
	if a == nil || !a.current() {
		return nil
	}
	ok, due := a.hit()
	if !ok {
		return nil
	}
	if due && a.orphaned() {
		a.unref()
		return nil
	}
	return a
}

// hits is the number of hits so far.
func (r *Registry) hits() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.stats.hits.Load()
	for a := range r.mu.live {
		n += a.refs.Load() / oneHit
	}
	return n
}

// setLocal makes a the process's mapping of its key. The caller holds a
// reference on a.
func (r *Registry) setLocal(a *attachment) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.live[a] = struct{}{}
	if !r.mu.closed {
		r.replaceLocal(a.key, a)
	}
}

// dropLocal forgets a, which has no references left.
func (r *Registry) dropLocal(a *attachment) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, live := r.mu.live[a]; live {
		delete(r.mu.live, a)
		r.stats.hits.Add(a.refs.Load() / oneHit)
	}
	if (*r.local.Load())[a.key] == a {
		r.replaceLocal(a.key, nil)
	}
}

// replaceLocal needs mu.
func (r *Registry) replaceLocal(key string, a *attachment) {
	old := *r.local.Load()
	m := make(map[string]*attachment, len(old)+1)
	for k, v := range old {
		m[k] = v
	}
	if a != nil {
		m[key] = a
	} else {
		delete(m, key)
	}
	r.local.Store(&m)
}

// join waits for another goroutine's load of key, until the end of ctx or of
// Options.LoadTimeout since begun, or makes the caller the one who loads: then
// leave must be called when the load is over.
func (r *Registry) join(ctx context.Context, key string, begun time.Time) (leave func(), err error) {
	for {
		r.mu.Lock()
		f := r.mu.flights[key]
		if f == nil {
			f = &flight{done: make(chan struct{})}
			r.mu.flights[key] = f
			r.mu.Unlock()
			return func() {
				r.mu.Lock()
				delete(r.mu.flights, key)
				r.mu.Unlock()
				close(f.done)
			}, nil
		}
		r.mu.Unlock()
		r.stats.waits.Add(1)
		timeout := time.NewTimer(time.Until(begun.Add(r.opts.LoadTimeout)))
		defer timeout.Stop()
		select {
		case <-f.done:
			return nil, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-timeout.C:
			return nil, fmt.Errorf("%w: another goroutine of this process is loading it, or waits for it", ErrTimeout)
		}
	}
}

func (r *Registry) newModel(a *attachment, loaded bool) *Model {
	m := &Model{a: a, loaded: loaded}
	if !loaded {
		r.stats.bytesSaved.Add(a.bytes)
	}
	a.models.Add(1)
	if invariants.Enabled {
		r.mu.Lock()
		r.mu.stacks[m] = string(debug.Stack())
		r.mu.Unlock()
	}
	return m
}
