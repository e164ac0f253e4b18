package main

import "github.com/onecopy/onecopy/registry"

// watcher keeps a registry open for those who look again and again. It may come
// and go meanwhile.
type watcher struct {
	a *app
	r *registry.Registry
	w *registry.Watch
}

// open opens the registry unless it is open. registry.ErrNoRegistry.
func (w *watcher) open() (err error) {
	if w.r == nil {
		if w.r, err = w.a.open(); err == nil {
			w.w = w.r.Watch()
		}
	}
	return err
}

func (w *watcher) close() {
	if w.r != nil {
		w.r.Close() // nothing is attached: no error is worth knowing
	}
	w.r, w.w = nil, nil
}

// look calls fn with the registry, and with the one that took its place if it
// was deleted. registry.ErrNoRegistry: there is none.
func (w *watcher) look(fn func(*registry.Watch) error) error {
	was := w.r != nil
	err := w.open()
	if err == nil {
		err = fn(w.w)
	}
	if err == nil {
		return nil
	}
	w.close()
	if !was {
		return err
	}
	return w.look(fn)
}
