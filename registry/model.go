package registry

import (
	"context"
	"fmt"
	"maps"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/onecopy/onecopy/internal/invariants"
	"github.com/onecopy/onecopy/internal/layout"
)

// Model is one generation of a model, attached to this process: a reference to
// the process's one mapping of it, and with it a share of the lease that keeps
// it in memory. It may be used by any number of goroutines until Close.
type Model struct {
	a        *attachment
	loaded   bool
	replaced uint64 // see Info
	closed   atomic.Bool
}

// attachment is a process's mapping of a generation, shared by all its Models.
type attachment struct {
	r        *Registry
	key      string
	bytes    int64
	manifest *layout.Manifest
	path     string
	refs     atomic.Uint64 // see references
	models   atomic.Int64  // open Models, for the report of forgotten ones
	kept     atomic.Bool   // Use holds a reference
	borrowed Model         // what Use hands out
	known    atomic.Pointer[Source]
	tie      tie // the platform's half: lease and table

	files struct {
		sync.Mutex
		maps  []mapped
		index map[string]int
	}
}

func newAttachment(r *Registry, man *layout.Manifest) *attachment {
	a := &attachment{r: r, key: man.Key, bytes: man.Bytes, manifest: man}
	a.refs.Store(1)
	a.borrowed = Model{a: a}
	a.files.maps = make([]mapped, len(man.Files))
	return a
}

// An attachment counts in one word, so that a hit costs one atomic change: the
// references in the low half, of which 0 is dead for ever, and in the high half
// the hits that the registry's statistics do not have yet.
const oneHit = 1 << 32

// hitsAtOnce is how many hits the statistics get at a time.
const hitsAtOnce = 1024

func (a *attachment) references() uint32 { return uint32(a.refs.Load()) }

// ref takes a reference unless the last one is gone.
func (a *attachment) ref() bool { return a.add(1) != 0 }

// hit is ref for a hit, of which every hitsAtOnce-th is due to look whether the
// table itself was deleted.
func (a *attachment) hit() (ok, due bool) {
	n := a.add(1 + oneHit)
	if due = n/oneHit == hitsAtOnce; due {
		a.refs.Add(^uint64(hitsAtOnce*oneHit - 1)) // minus
		a.r.stats.hits.Add(hitsAtOnce)
	}
	return n != 0, due
}

func (a *attachment) add(d uint64) uint64 {
	for {
		n := a.refs.Load()
		if uint32(n) == 0 {
			return 0
		}
		if a.refs.CompareAndSwap(n, n+d) {
			return n + d
		}
	}
}

func (a *attachment) unref() {
	if uint32(a.refs.Add(^uint64(0))) == 0 {
		a.r.dropLocal(a)
		a.detach()
	}
}

// knows reports whether src was compared with this generation before, in which
// case it is not compared again.
func (a *attachment) knows(src *Source) bool {
	k := a.known.Load()
	if k == nil || k.Path != src.Path || k.Version != src.Version || (k.Path == "") != (src.Load != nil) || len(k.Environment) != len(src.Environment) {
		return src.OnChange == ChangeIgnore
	}
	for name, v := range src.Environment {
		if was, ok := k.Environment[name]; !ok || was != v {
			return src.OnChange == ChangeIgnore
		}
	}
	return true
}

// remember keeps what knows compares, but not the load function: with it, all
// that it refers to would stay in memory as long as the model is open.
func (a *attachment) remember(src *Source) {
	a.known.Store(&Source{Path: src.Path, Version: src.Version, Environment: src.Environment})
}

// Key of the model.
func (m *Model) Key() string { return m.a.key }

// Generation of the model: another one was published when Stale.
func (m *Model) Generation() uint64 { return m.a.manifest.Generation }

// Path is the folder with exactly the model's files, under their own names. It
// is valid as long as a lease is held: this Model's, or that of Lease.
func (m *Model) Path() string { return m.a.path }

// Files of the model.
func (m *Model) Files() []File { return files(m.a.manifest) }

// Info describes the generation.
func (m *Model) Info() Info {
	i := info(m.a.manifest, m.a.path)
	i.AlreadyPresent, i.Replaced = !m.loaded, m.replaced
	return i
}

// Bytes returns the contents of a file, mapped read-only: a write faults. The
// file is mapped once per process, when it is first asked for; should somebody
// delete it before that, it is ErrGone although the lease holds. The bytes are valid until Close; then reading
// them is an error that the process may not survive, and builds with the
// invariants tag make sure that it does not.
//
// Errors: ErrPath (no such file), ErrClosed, ErrGone, ErrCorrupt, ErrLimit.
func (m *Model) Bytes(name string) ([]byte, error) {
	if m.closed.Load() {
		return nil, &Error{Op: "bytes", Key: m.Key(), Path: name, Err: ErrClosed}
	}
	a := m.a
	a.files.Lock()
	defer a.files.Unlock()
	if a.files.index == nil {
		a.files.index = make(map[string]int, len(a.manifest.Files))
		for i, f := range a.manifest.Files {
			a.files.index[f.Path] = i
		}
	}
	i, ok := a.files.index[name]
	if !ok {
		return nil, &Error{Op: "bytes", Key: m.Key(), Path: name, Err: fmt.Errorf("%w: the model has no such file", ErrPath)}
	}
	b, err := a.fileBytes(i)
	if err != nil {
		return nil, &Error{Op: "bytes", Key: m.Key(), Path: name, Err: err}
	}
	return b, nil
}

// Stale reports whether another generation of the key was published, the model
// was removed, or the registry was deleted since this Model was obtained. The
// Model stays valid. It costs one atomic load and, to notice a deleted registry,
// one system call.
func (m *Model) Stale() bool { return !m.a.current() || m.a.orphaned() }

// Lease returns a further lease on the model, on a file description of its own.
// It lasts until every copy of the descriptor is closed, in this process and in
// children that inherited it: give it to a program that opens Path by itself. It
// is close-on-exec; exec.Cmd.ExtraFiles or FcntlInt(F_SETFD, 0) change that.
//
// Errors: ErrGone, ErrClosed, ErrLimit, errors.ErrUnsupported.
func (m *Model) Lease() (*os.File, error) {
	if m.closed.Load() {
		return nil, &Error{Op: "lease", Key: m.Key(), Err: ErrClosed}
	}
	f, err := m.a.lease()
	return f, opErr("lease", m.Key(), err)
}

// Verify digests all bytes again. ErrCorrupt names the file and the chunk that
// differ; a truncated file is ErrCorrupt too and no fault.
func (m *Model) Verify(ctx context.Context) error {
	if m.closed.Load() {
		return &Error{Op: "verify", Key: m.Key(), Err: ErrClosed}
	}
	return opErr("verify", m.Key(), m.a.verify(ctx))
}

// Close gives the reference back. It is idempotent. The memory of a generation
// that no slot names any more goes with its last lease.
func (m *Model) Close() error {
	if m == &m.a.borrowed || !m.closed.CompareAndSwap(false, true) {
		return nil
	}
	m.a.models.Add(-1)
	if invariants.Enabled {
		r := m.a.r
		r.mu.Lock()
		delete(r.mu.stacks, m)
		r.mu.Unlock()
	}
	m.a.unref()
	return nil
}

func files(man *layout.Manifest) []File {
	fs := make([]File, len(man.Files))
	for i, f := range man.Files {
		fs[i] = File{Path: f.Path, Size: f.Size, Digest: f.Digest}
		if f.ModTime != 0 {
			fs[i].ModTime = time.Unix(0, f.ModTime)
		}
	}
	return fs
}

func info(man *layout.Manifest, path string) Info {
	return Info{
		Key: man.Key, Name: man.Name, Generation: man.Generation, Epoch: uint64(man.Epoch),
		Bytes: man.Bytes, Backing: man.Backing,
		Origin:   Origin{Kind: man.Origin.Kind, Path: man.Origin.Path, Version: man.Origin.Version, Environment: maps.Clone(man.Origin.Environment)},
		LoadedAt: man.LoadedAt, LoadTime: time.Duration(man.LoadSeconds * float64(time.Second)),
		Fill:  FillStats{Collapsed: man.Fill.Collapsed, Copied: man.Fill.Copied, Direct: man.Fill.Direct, Fallbacks: man.Fill.Fallbacks},
		Files: files(man), Path: path,
	}
}
