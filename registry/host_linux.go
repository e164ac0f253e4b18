//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/lockfile"
)

// host is the half of a Registry that shares models with other processes.
type host struct {
	r *Registry

	mu     sync.Mutex
	place  *place
	closed bool
	own    bool // this user had the registry, in one of its lives

	// attaching keeps the goroutines of this process from mapping one model
	// twice at the same moment; striped by key.
	attaching [64]sync.Mutex
}

func (h *host) open(r *Registry) error {
	h.r = r
	p, err := openPlace(r, !r.opts.MustExist)
	if err != nil {
		return err
	}
	h.place, h.own = p, p.mine
	if p.mine && !r.opts.MustExist && p.untidy() && h.cannotWrite(p) == nil {
		// Open has no context: if somebody holds T, he or the next collects.
		_, err = h.collect(context.Background(), p, true)
		if err != nil && !errors.Is(err, lockfile.ErrLocked) && !errors.Is(err, errGone) {
			h.place = nil
			p.unref()
			return err
		}
	}
	return nil
}

// cannotWrite says why this process may load and remove nothing. What locks rest
// on is tried once per process, when it first writes: one that only attaches
// need not know.
func (h *host) cannotWrite(p *place) error {
	if no := p.foreign(); no != nil {
		return no
	}
	// A full tmpfs has no room for the probe's page; that proves nothing.
	if err := p.top.ProbeLocks(); !errors.Is(err, ErrNoSpace) {
		return err
	}
	return nil
}

func (h *host) close() error {
	h.mu.Lock()
	p := h.place
	h.place, h.closed = nil, true
	h.mu.Unlock()
	if p != nil {
		p.closed.Store(true)
		p.unref()
	}
	return nil
}

// here returns the registry as it is now, referenced. One that was deleted, or moved
// away where another one is now, is opened, or made, again.
func (h *host) here() (*place, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil, ErrClosed
	}
	if h.place.isGone() || h.place.top.Moved() {
		// Whoever only reads somebody else's registry must not make one in its
		// place: the name is not his.
		p, err := openPlace(h.r, !h.r.opts.MustExist && h.own)
		if err != nil {
			return nil, err
		}
		h.place.unref()
		h.place, h.own = p, h.own || p.mine
	}
	h.place.ref()
	return h.place, nil
}

// each runs fn with the registry as it is, again when it was deleted meanwhile.
func (h *host) each(fn func(*place) error) error {
	for range 100 {
		p, err := h.here()
		if err != nil {
			return err
		}
		err = fn(p)
		// A folder that is deleted while it is read says so in its own way.
		gone := errors.Is(err, errGone) || errors.Is(err, fs.ErrNotExist) && p.isGone()
		p.unref()
		if !gone {
			return err
		}
	}
	return fmt.Errorf("%w: it is deleted again and again", ErrGone)
}

// Sharing is nil: models are shared with other processes. It says why not where
// they are private to this process.
func (r *Registry) Sharing() error { return nil }

// now is CLOCK_BOOTTIME in nanoseconds: it runs on during suspend and nobody
// sets it.
func now() uint64 {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0
	}
	return uint64(ts.Nano())
}
