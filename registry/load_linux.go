//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/onecopy/onecopy/internal/crashpoint"
	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/lockfile"
	"github.com/onecopy/onecopy/shm"
)

// No death march: after maxDeaths killed loaders in a row the next attempt has
// to wait, twice as long each time.
const (
	maxDeaths  = 3
	firstPause = 10 * time.Second
	longPause  = 5 * time.Minute
)

// memoryStep is how much a load allocates between two looks at the memory that
// is left.
const memoryStep = 4 << 20

// noteEvery is how many bytes a load fills before it tells the table again how
// many are still to come. Tests lower it.
var noteEvery int64 = 256 << 20 / crashpoint.Shrink

type loadingKey struct{} // marks the context of a load function, and of a proof

// getOrLoad attaches key, loading it if need be.
func (r *Registry) getOrLoad(ctx context.Context, key string, src *Source) (a *attachment, loaded bool, err error) {
	if err := layout.ValidKey(key); err != nil {
		return nil, false, err
	}
	if err := src.check(); err != nil {
		return nil, false, err
	}
	begun := time.Now()
	var wait context.Context // of a user who can only read
	for {
		if err := ctx.Err(); err != nil {
			return nil, false, r.host.nameLoader(err, key)
		}
		if !src.Replace {
			a, err = r.attach(key)
			if err == nil {
				if err = a.accept(src); err == nil {
					return a, false, nil
				}
				a.unref()
			}
			if !reload(err, src) {
				return nil, false, err
			}
		}
		if no := r.host.each((*place).foreign); no != nil {
			// What is loaded can be used, and a load that runs awaited. Anything
			// else takes a writer.
			if src.Replace || !errors.Is(err, ErrNotFound) || !errors.Is(no, ErrReadOnly) {
				return nil, false, no
			}
			if wait == nil {
				var cancel context.CancelFunc
				wait, cancel = context.WithTimeout(ctx, r.opts.LoadTimeout)
				defer cancel()
			}
			if err := r.host.awaitForeign(wait, key); err != nil {
				return nil, false, err
			}
			continue
		}
		if ctx.Value(loadingKey{}) != nil {
			return nil, false, ErrNestedLoad
		}
		leave, err := r.join(ctx, key, begun)
		if err != nil {
			return nil, false, r.host.nameLoader(err, key)
		}
		if leave == nil {
			continue // another goroutine's load ended
		}
		a, loaded, err := func() (*attachment, bool, error) {
			defer leave()
			return r.host.load(ctx, key, src)
		}()
		if errors.Is(err, errAgain) {
			continue
		}
		return a, loaded, err
	}
}

// accept compares the source with the generation, once per process.
func (a *attachment) accept(src *Source) error {
	if a.knows(src) {
		return nil
	}
	err := src.compare(a.manifest)
	if err == nil {
		a.remember(src)
	}
	return err
}

// reload reports whether err is a reason to load although an entry may exist: a
// miss, a changed source that is to be replaced, or a generation that nobody
// can use any more. A manifest that a stranger keeps locked only costs memory.
func reload(err error, src *Source) bool {
	switch {
	case errors.Is(err, ErrNotFound), errors.Is(err, ErrBusy), errors.Is(err, ErrGone), errors.Is(err, ErrCorrupt):
		return true
	case errors.Is(err, ErrSourceChanged):
		return src.OnChange == ChangeReplace
	}
	return false
}

// awaitForeign waits, as a user who can only read, for a load that is running.
func (h *host) awaitForeign(ctx context.Context, key string) error {
	for delay := time.Millisecond; ; delay = min(2*delay, 50*time.Millisecond) {
		var state layout.State
		var no error // nil: it is this user's by now
		err := h.each(func(p *place) error {
			no = p.foreign()
			f, ok, err := p.find(key)
			if ok {
				state = f.Word.State()
			}
			return err
		})
		switch {
		case err != nil || no == nil:
			return err
		case state == layout.Ready && delay > time.Millisecond:
			return nil // it was loading before
		case state != layout.Loading && state != layout.Ready:
			return no
		}
		// READY at the first look although the attach missed: it has just been
		// published, or its manifest is gone, and then this ends with ctx.
		t := time.NewTimer(delay)
		select {
		case <-ctx.Done():
			t.Stop()
			return h.nameLoader(ctx.Err(), key)
		case <-t.C:
		}
	}
}

// load is the loader's half of the protocol: it returns with the key's model,
// loaded by this call or by somebody else while it waited.
func (h *host) load(ctx context.Context, key string, src *Source) (a *attachment, loaded bool, err error) {
	p, err := h.here()
	if err != nil {
		return nil, false, err
	}
	defer p.unref()
	if no := h.cannotWrite(p); no != nil {
		return nil, false, no
	}
	plan, err := src.survey()
	if err != nil {
		return nil, false, err
	}
	begun := time.Now()
	wait, cancel := context.WithTimeout(ctx, h.r.opts.LoadTimeout)
	held, err := p.lockKey(wait, layout.Stripe(key), p.published(key, src), &h.r.stats.waits)
	cancel()
	if err != nil {
		if errors.Is(err, errAgain) {
			return nil, false, err
		}
		if errors.Is(err, errGone) {
			return nil, false, errAgain
		}
		return nil, false, h.waitErr(err, p, key)
	}
	defer func() {
		if held != nil {
			_ = held.Unlock()
		}
	}()
	crashpoint.Hit("load.lock-key")
	if p.closed.Load() {
		return nil, false, ErrClosed
	}

	l := &loader{ctx: ctx, h: h, p: p, key: key, src: src, plan: plan, replace: src.Replace, started: time.Now()}
	if !src.Replace {
		a, err := p.attach(h.r, key)
		if err == nil {
			if err = a.accept(src); err == nil {
				h.r.stats.attaches.Add(1)
				return h.r.adopt(a), false, nil
			}
			a.unref()
		}
		switch {
		case errors.Is(err, errGone):
			return nil, false, errAgain
		case !reload(err, src):
			return nil, false, err
		}
		l.replace, l.busy = !errors.Is(err, ErrNotFound), errors.Is(err, ErrBusy)
	}
	if time.Since(begun) > time.Second { // the source may have changed while we waited
		if l.plan, err = src.survey(); err != nil {
			return nil, false, err
		}
	}
	a, err = l.run(ctx)
	if errors.Is(err, errGone) || errors.Is(err, errMoved) {
		err = errAgain
	}
	if err != nil {
		var no *NoSpaceError
		if errors.As(err, &no) && no.Leased > 0 {
			no.Holders, _ = p.holders("")
		}
		return nil, false, err
	}
	_ = held.Unlock()
	held = nil
	crashpoint.Hit("publish.unlock-key")
	a = h.r.adopt(a)
	if l.old.State() == layout.Ready {
		src.replaced = l.old.Generation()
		h.r.stats.replaced.Add(1)
		_ = p.retire(ctx, l.old.Generation(), false)
	}
	return a, true, nil
}

// published is what a load that has to wait for another one asks when its turn
// comes: has a generation been published since? Then nobody needs the lock to
// attach it.
func (p *place) published(key string, src *Source) func() bool {
	if src.Replace {
		return nil
	}
	word := func() layout.Word {
		if f, ok, err := p.find(key); ok && err == nil {
			return f.Word
		}
		return 0
	}
	was := word()
	return func() bool {
		is := word()
		return is != was && is.State() == layout.Ready
	}
}

// waitErr names, to one who waited for a load lock, the process that is loading, as a hint.
func (h *host) waitErr(err error, p *place, key string) error {
	if !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if pid := p.loaderPID(key); pid != 0 {
		return hungErr(pid)
	}
	return waitedError{fmt.Errorf("%w: another load holds this key's lock", ErrTimeout)}
}

// nameLoader is waitErr for those who have waited for something else, or whose
// time was over before they could.
func (h *host) nameLoader(err error, key string) error {
	if !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	pid := uint64(0)
	_ = h.each(func(p *place) error { pid = p.loaderPID(key); return nil })
	if pid == 0 {
		return err
	}
	return hungErr(pid)
}

func hungErr(pid uint64) error {
	return waitedError{fmt.Errorf("%w: pid %d is loading it, or hangs", ErrTimeout, pid)}
}

// loaderPID is what the loader of key calls itself; 0 if there is none.
func (p *place) loaderPID(key string) (pid uint64) {
	if f, ok, err := p.find(key); ok && err == nil {
		_ = guarded(func() error { pid = p.table.Hint(f.Slot, layout.HintLoaderPID); return nil })
	}
	return pid
}

// loader is one load, from the claim of a slot to publication. K is held.
type loader struct {
	ctx     context.Context // of the caller: what a load function calls has none
	h       *host
	p       *place
	key     string
	src     *Source
	plan    *plan
	replace bool
	busy    bool // replace only because the manifest was found locked
	started time.Time

	slot int
	old  layout.Word // as found; READY when a generation is being replaced
	word layout.Word // LOADING|gen, or READY|old while replacing
	gen  uint64
	need atomic.Int64 // bytes admitted
	more sync.Mutex   // held to have more admitted

	looked bool  // whether the dead left anything
	swept  bool  // it was collected
	stuck  error // why something that was to make room is still there

	taken   atomic.Int64 // bytes that Reserve was asked for
	trusted atomic.Int64 // of them, since the memory was looked at last
	filled  atomic.Int64
	noted   atomic.Int64 // filled, when the table was told last
	fill    shm.Fill
	man     *layout.Manifest
	sealed  []*shm.Sealed // the files, in the manifest's order
	closing []func() error
	linked  bool
	lease   shm.Mapping
}

func (l *loader) run(ctx context.Context) (a *attachment, err error) {
	defer func() {
		for _, c := range l.closing {
			_ = c()
		}
	}()
	if err := l.claim(ctx); err != nil {
		return nil, err
	}
	published := false
	defer func() {
		// Also when the caller's code panics: this process goes on, so nobody
		// must count its load among the dead.
		if published {
			return
		}
		l.abort()
		switch {
		case a != nil:
			a.detach()
			a = nil
		default:
			_ = l.lease.Unmap()
		}
	}()
	if err = l.fillAll(ctx); err == nil {
		crashpoint.Hit("load.fill")
		if err = l.link(); err == nil {
			if a, err = l.attach(); err == nil {
				if l.replace || l.src.prove != nil {
					// What has a name is counted by it: publishing may be far.
					l.note(0, layout.HintReserved, layout.HintPromised)
				}
				if l.src.prove != nil {
					a.borrowed.loaded = true // for the proof; to those who borrow it later it was there
					err = l.src.prove(context.WithValue(ctx, loadingKey{}, true), &a.borrowed)
					a.borrowed.loaded = false
				}
				if err == nil {
					err = l.publish(ctx)
				}
			}
		}
	}
	if err != nil {
		return a, err
	}
	published = true
	a.tie.slot = l.slot
	took := time.Since(l.started)
	s := &l.h.r.stats
	s.loads.Add(1)
	s.loadNanos.Add(int64(took))
	s.bytesLoaded.Add(l.man.Bytes)
	s.fallbacks.Add(uint64(l.man.Fill.Fallbacks))
	return a, nil
}

// attach makes this process's mapping, while the segments are still open.
func (l *loader) attach() (*attachment, error) {
	a := l.p.newAttachment(l.h.r, l.man, l.slot, layout.MakeWord(layout.Ready, l.gen), l.lease)
	a.remember(l.src)
	if len(l.man.Files) == 1 {
		if _, err := a.fileBytes(0); err != nil {
			a.detach()
			l.lease = shm.Mapping{}
			return nil, err
		}
	}
	return a, nil
}

// claim takes a slot, a generation and the right to the memory.
func (l *loader) claim(ctx context.Context) error {
	for {
		var gone []removal
		err := l.p.withTable(ctx, "load.lock-table", func(t *tx) (err error) {
			gone, err = l.claimLocked(t)
			if errors.Is(err, ErrNoSpace) || errors.Is(err, ErrTableFull) {
				t.Count(layout.CountLoadErrors, 1) // the others are counted when they give up
			}
			return err
		})
		l.remove(gone)
		if !errors.Is(err, errAgain) {
			return err
		}
		crashpoint.Hit("load.unlock-table")
	}
}

// claimLocked returns errAgain when it made room and memory has to be freed,
// outside T, before the next try.
func (l *loader) claimLocked(t *tx) (gone []removal, err error) {
	t.repairGeneration()
	gone = t.buryStripe(layout.Stripe(l.key), l.key, &l.h.r.stats.takeovers)
	first := !l.looked
	if first {
		l.looked = true
		if l.p.untidy() || t.expires() {
			gone = append(gone, l.sweep(t)...)
		}
	}
	slot, w, err := l.look(t, &gone)
	if err != nil {
		return gone, err
	}
	crashpoint.Hit("load.look")
	if slot < 0 || first && len(gone) > 0 {
		// What is gone counts as used until its payload is removed.
		return gone, errAgain
	}
	if deaths := t.Hint(slot, layout.HintDeaths); deaths >= maxDeaths && t.keyIs(slot, l.key) {
		if at, n := t.Hint(slot, layout.HintRetryAfter), now(); at > n && at-n <= uint64(longPause) && !l.p.otherBoot() {
			return gone, &LoadFailedError{Deaths: int(deaths), RetryAfter: time.Duration(at - n)}
		}
	}
	need := l.plan.bytes + int64(len(l.plan.files)+2)*4096
	l.need.Store(need)
	evicted, err := l.admit(t, need, true)
	if gone = append(gone, evicted...); err != nil {
		return gone, err
	}
	if l.gen = t.NextGeneration(); l.gen == 0 {
		return gone, fmt.Errorf("%w: every generation number is used up", ErrCorrupt)
	}
	crashpoint.Hit("load.generation")
	l.slot, l.old, l.word = slot, w, w
	if w.State() == layout.Free {
		t.rename(slot, l.key)
		crashpoint.Hit("load.key")
		if !t.IndexInsert(slot, l.key) {
			return gone, fmt.Errorf("%w: the index has no free entry", ErrCorrupt)
		}
		t.newLife(slot)
		t.SetHint(slot, layout.HintBytes, uint64(need))
		l.word = layout.MakeWord(layout.Loading, l.gen)
	}
	t.SetHint(slot, layout.HintReserved, uint64(need))
	t.SetHint(slot, layout.HintPromised, uint64(need))
	t.SetHint(slot, layout.HintLoaderPID, uint64(os.Getpid()))
	t.SetHint(slot, layout.HintLoadStart, now())
	if l.word != w && !t.CompareAndSwap(slot, w, l.word) {
		return gone, errAgain
	}
	crashpoint.Hit("load.claim")
	t.end()
	crashpoint.Hit("load.unlock-table")
	return gone, nil
}

// sweep collects what the dead left, once.
func (l *loader) sweep(t *tx) []removal {
	l.swept = true
	return t.collect(&GCReport{})
}

// look finds the slot to load into: the key's own, or a free one. A slot of -1
// asks to look again.
func (l *loader) look(t *tx, gone *[]removal) (slot int, w layout.Word, err error) {
	for range 2 * t.Slots() {
		f, ok := t.lookup(l.key)
		if !ok {
			slot, again, err := t.freeSlot(gone)
			if again {
				slot = -1
			}
			if err != nil || again {
				return slot, 0, err
			}
			return slot, t.Word(slot), nil
		}
		switch {
		case t.Sane(f.Slot) != nil:
			t.Reset(f.Slot)
		case f.Word.State() == layout.Free:
			return f.Slot, f.Word, nil
		case f.Word.State() == layout.Evicting:
			*gone = append(*gone, t.reclaim(f.Slot, f.Word)...)
		case f.Word.State() == layout.Loading:
			// K is ours and buryStripe has seen this slot: a stranger's bytes.
			*gone = append(*gone, t.bury(f.Slot, f.Word)...)
		case !t.hasManifest(f.Word):
			t.free(f.Slot, f.Word)
		case !l.replace:
			// Published since we looked under K: a dead remover's work was undone.
			return 0, 0, errMoved
		case l.busy && t.canLease(f.Word):
			// It was an evictor, or a collector, that looked at many models.
			return 0, 0, errMoved
		default:
			return f.Slot, f.Word, nil
		}
	}
	return 0, 0, fmt.Errorf("%w: the table changes although its lock is held", ErrCorrupt)
}

// canLease reports whether the manifest of a READY slot can be locked by readers.
func (t *tx) canLease(w layout.Word) bool {
	f, _, err := t.p.m.Open(t.genName(w) + layout.ManifestExt)
	if err != nil {
		return false
	}
	defer f.Close()
	return lockfile.TryShared(f) == nil
}
