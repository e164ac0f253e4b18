package registry

import "sync"

// Overview is what can be said about a registry as a whole.
type Overview struct {
	Entries  []Entry // by key
	Stats    Stats
	Counters Counters
}

// Overview is Entries, Stats and Counters from one look at the registry.
func (r *Registry) Overview() (Overview, error) { return r.Watch().Overview() }

// Watch looks at a registry again and again, as a live display or a server of
// metrics does, and remembers from one look to the next what costs time and does
// not change. It shows; nothing may be decided by it. It may be used by any
// number of goroutines while the Registry is open.
type Watch struct {
	r      *Registry
	mu     sync.Mutex
	memory watchMemory
}

// Watch returns a Watch of the registry.
func (r *Registry) Watch() *Watch { return &Watch{r: r} }

// Overview is Registry.Overview. What a manifest says is remembered while it is
// the same file, unchanged; the memory of its files for ten seconds.
//
// Errors: ErrGone, ErrNoRegistry, ErrCorrupt, ErrClosed.
func (w *Watch) Overview() (Overview, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	o, _, err := w.look(false)
	return o, opErr("list", "", err)
}

// OverviewAndHolders is Overview and Registry.HolderReport of all models from
// one look. A process is looked into again when its address space or its shared
// memory has grown or shrunk, and after twenty seconds at the latest.
//
// Errors: those of Overview.
func (w *Watch) OverviewAndHolders() (Overview, HolderReport, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	o, rep, err := w.look(true)
	return o, rep, opErr("list", "", err)
}
