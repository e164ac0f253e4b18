//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"time"

	"github.com/onecopy/onecopy/internal/crashpoint"
	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/lockfile"
)

// edit runs fn under T on the READY slot of key.
func (r *Registry) edit(ctx context.Context, op, key string, fn func(*tx, int) error) error {
	if err := layout.ValidKey(key); err != nil {
		return opErr(op, key, err)
	}
	err := r.host.each(func(p *place) error {
		return p.withTable(ctx, "edit.lock-table", func(t *tx) error {
			f, ok := t.lookup(key)
			if !ok || f.Word.State() != layout.Ready {
				return ErrNotFound
			}
			return fn(t, f.Slot)
		})
	})
	return opErr(op, key, err)
}

// Pin keeps the model of key from being evicted by the budget, a full table or
// its TTL. Remove still removes it when nobody uses it. The pin belongs to the
// key: it survives a replacement and ends with Unpin or Remove.
//
// Errors: ErrNotFound, ErrReadOnly, ErrTimeout, ErrKey.
func (r *Registry) Pin(ctx context.Context, key string) error {
	return r.edit(ctx, "pin", key, func(t *tx, slot int) error {
		t.SetHint(slot, layout.HintPin, 1)
		return nil
	})
}

// Unpin undoes Pin.
func (r *Registry) Unpin(ctx context.Context, key string) error {
	return r.edit(ctx, "unpin", key, func(t *tx, slot int) error {
		t.SetHint(slot, layout.HintPin, 0)
		return nil
	})
}

// SetTTL sets how long the model of key may be idle before it expires: counted
// from the last release that a process of the writing user noted, else from the
// first time that a collector found it idle. Zero is the registry's default, a
// negative duration is never. Like a pin it ends when the model is removed.
func (r *Registry) SetTTL(ctx context.Context, key string, ttl time.Duration) error {
	v := uint64(max(ttl, 0))
	if ttl < 0 {
		v = math.MaxUint64
	}
	return r.edit(ctx, "ttl", key, func(t *tx, slot int) error {
		t.SetHint(slot, layout.HintTTL, v)
		return nil
	})
}

// Touch counts as a use of the model now: it is evicted later, and its idle time
// begins anew.
func (r *Registry) Touch(ctx context.Context, key string) error {
	return r.edit(ctx, "touch", key, func(t *tx, slot int) error {
		n := now()
		t.SetHint(slot, layout.HintLastAttach, n)
		t.SetHint(slot, layout.HintLastRelease, n)
		t.SetHint(slot, layout.HintIdleSince, 0)
		return nil
	})
}

// Config returns the registry's limits.
func (r *Registry) Config() (c Config, err error) {
	err = r.host.each(func(p *place) error {
		return guarded(func() error {
			bytes, ppm := p.table.Budget()
			c = Config{BudgetShare: float64(ppm) / 1e6, TTL: time.Duration(min(p.table.DefaultTTL(), math.MaxInt64))}
			if bytes > 0 {
				c.Budget, c.BudgetShare = int64(min(bytes, math.MaxInt64)), 0
			}
			return nil
		})
	})
	return c, opErr("config", "", err)
}

// SetConfig changes the registry's limits for all processes. A budget below what
// is loaded evicts nothing by itself: the next load, or Trim, does.
func (r *Registry) SetConfig(ctx context.Context, c Config) error {
	return r.setConfig(ctx, c, false)
}

// PlanConfig is the error that SetConfig would return now, and changes nothing.
func (r *Registry) PlanConfig(ctx context.Context, c Config) error {
	return r.setConfig(ctx, c, true)
}

func (r *Registry) setConfig(ctx context.Context, c Config, dry bool) error {
	ppm := math.Round(c.BudgetShare * 1e6)
	if c.Budget < 0 || !(c.BudgetShare >= 0 && c.BudgetShare <= 1) || c.BudgetShare > 0 && ppm == 0 || c.TTL < 0 {
		return opErr("config", "", fmt.Errorf("budget %d bytes or %v of the tmpfs, TTL %v: %w", c.Budget, c.BudgetShare, c.TTL, ErrConfig))
	}
	err := r.host.each(func(p *place) error {
		return p.withTable(ctx, "edit.lock-table", func(t *tx) error {
			if !dry {
				t.SetBudget(uint64(c.Budget), uint64(ppm))
				t.SetDefaultTTL(uint64(c.TTL))
			}
			return nil
		})
	})
	return opErr("config", "", err)
}

// Trim evicts idle models that are not pinned, least recently used first, until
// the registry uses at most to bytes, or nothing is left that may be evicted.
// What GC would remove goes first.
//
// Errors: ErrConfig, ErrReadOnly, ErrTimeout.
func (r *Registry) Trim(ctx context.Context, to int64) (TrimReport, error) {
	return r.trim(ctx, to, false)
}

// PlanTrim says what Trim would do now, and does nothing.
func (r *Registry) PlanTrim(ctx context.Context, to int64) (TrimReport, error) {
	return r.trim(ctx, to, true)
}

func (r *Registry) trim(ctx context.Context, to int64, dry bool) (report TrimReport, err error) {
	if to < 0 {
		return report, opErr("trim", "", fmt.Errorf("%d bytes: %w", to, ErrConfig))
	}
	err = r.host.each(func(p *place) error {
		var gone []removal
		report = TrimReport{}
		err := p.withTable(ctx, "evict.lock-table", func(t *tx) error {
			var garbage GCReport
			if dry {
				p.plan(t, &garbage)
				report.Freed = garbage.Freed
			} else {
				gone = t.collect(&garbage)
			}
			report.Removed = garbage.Keys
			used := p.linkedUsage() - report.Freed
			for _, g := range gone {
				used -= p.m.TreeUsage(g.name) + p.m.TreeUsage(g.name+layout.DigestsExt)
			}
			vs, _ := t.candidates("")
			vs = slices.DeleteFunc(vs, func(v victim) bool {
				key, _ := t.Key(v.slot)
				return slices.Contains(garbage.Keys, key) // a plan has removed it already
			})
			idle, _ := t.lockIdle(vs, used-to)
			defer closeAll(idle)
			for _, v := range idle {
				key, _ := t.Key(v.slot)
				if dry {
					report.Freed += v.size
				} else if more, ok := t.evict(v.slot, v.word, layout.CountEvictedSpace); ok {
					gone = append(gone, more...)
				} else {
					continue
				}
				used -= v.size
				report.Removed = append(report.Removed, key)
			}
			if report.Used = used; used > to {
				report.Held = used // everything that could go is gone
			}
			return nil
		})
		report.Freed += p.removeAll(gone)
		return err
	})
	return report, opErr("trim", "", err)
}

// linkedUsage is the memory of everything below m/.
func (p *place) linkedUsage() (n int64) {
	names, _ := p.m.Names()
	for _, name := range names {
		n += p.m.TreeUsage(name)
	}
	return n
}

// PlanRemove is the error that Remove would return now, and removes nothing.
func (r *Registry) PlanRemove(ctx context.Context, key string) error {
	if err := layout.ValidKey(key); err != nil {
		return opErr("remove", key, err)
	}
	err := r.host.each(func(p *place) error {
		return p.withTable(ctx, "evict.lock-table", func(t *tx) error { return t.planRemove(key) })
	})
	if errors.Is(err, lockfile.ErrLocked) {
		holders, _ := r.Holders(key)
		err = &InUseError{Holders: holders}
	}
	return opErr("remove", key, err)
}

func (t *tx) planRemove(key string) error {
	f, ok := t.lookup(key)
	switch {
	case !ok || f.Word.State() == layout.Free:
		return ErrNotFound
	case f.Word.State() == layout.Loading:
		if !t.p.keyFree(key) {
			return &InUseError{Loading: true}
		}
		return ErrNotFound // its loader is dead
	}
	victim, err := t.lockVictim(f.Word)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a slot without files, which goes too
	}
	if err == nil {
		victim.Close()
	}
	return err
}

// PlanGC says what GC would remove now, and removes nothing. Idle models whose
// clock GC would only start are not among it.
//
// Errors: ErrReadOnly, ErrTimeout.
func (r *Registry) PlanGC(ctx context.Context) (report GCReport, err error) {
	err = r.host.each(func(p *place) error {
		report = GCReport{}
		return p.withTable(ctx, "collect.lock-table", func(t *tx) error {
			p.plan(t, &report)
			return nil
		})
	})
	return report, opErr("gc", "", err)
}

func (p *place) plan(t *tx, report *GCReport) {
	doomed := map[string]bool{}
	doom := func(n *int, name string) {
		*n++
		doomed[name] = true
		report.Removed = append(report.Removed, name)
		report.Freed += generationUsage(name, p.m.TreeUsage)
	}
	named := map[uint64]bool{}
	for slot := range t.Slots() {
		w := t.Word(slot)
		key, ok := t.Key(slot)
		switch {
		case t.Sane(slot) != nil || !ok && w.State() != layout.Free, w.State() == layout.Evicting,
			w.State() == layout.Ready && !t.hasManifest(w):
			report.Reclaimed++
		case w.State() == layout.Loading:
			if p.keyFree(key) {
				doom(&report.Reclaimed, t.genName(w))
			}
		case w.State() == layout.Ready && t.wouldExpire(slot, w):
			report.Keys = append(report.Keys, key)
			doom(&report.Expired, t.genName(w))
		}
		if w.State() != layout.Free {
			named[w.Generation()] = true
		}
	}
	names, _ := p.m.Names()
	have := map[string]bool{}
	for _, n := range names {
		have[n] = true
	}
	for _, n := range names {
		e, gen, ext, ok := layout.ParseGenName(n)
		stem := layout.GenName(e, gen)
		switch {
		case !ok:
			report.Leftovers++
			report.Removed = append(report.Removed, n)
			report.Freed += p.m.TreeUsage(n)
		case doomed[stem] || e == t.Identity().Epoch && named[gen]:
		case ext == layout.ManifestExt:
			if f, _, err := p.m.Open(n); err == nil {
				if lockfile.TryExclusive(f) == nil {
					doom(&report.Orphans, stem)
				}
				f.Close()
			}
		case !have[stem+layout.ManifestExt] && !t.hasFile(stem+layout.ManifestExt):
			doom(&report.Leftovers, stem)
		}
	}
}

// Rollout replaces key by a new generation that was proven first: it is loaded
// beside the one in use, digested again, and given to prove under a lease; only
// if prove returns nil it is published. Until then, and for ever if it fails,
// everybody gets the old generation. Info.Replaced is the one that it replaced.
//
// Errors: those of GetOrLoad, and ErrProof with what prove returned.
func (r *Registry) Rollout(ctx context.Context, key string, src Source, prove func(context.Context, *Model) error) (*Model, error) {
	src.Replace = true
	src.prove = func(ctx context.Context, m *Model) error {
		err := m.a.verify(ctx)
		if err == nil && prove != nil {
			err = prove(ctx, m)
		}
		switch {
		case ctx.Err() != nil: // whatever prove made of it
			return ctx.Err()
		case err != nil:
			return fmt.Errorf("%w: %w", ErrProof, err)
		}
		return nil
	}
	return r.GetOrLoad(ctx, key, src)
}

// Undo publishes the generation that the present one of key replaced, if it is
// still in memory: somebody leases it, or nobody has collected it yet. Undoing
// twice is redoing. It returns the generation that it published and the one that
// was published until then.
//
// Errors: ErrNotFound, ErrNoPrevious, ErrReadOnly, ErrTimeout, ErrNestedLoad.
func (r *Registry) Undo(ctx context.Context, key string) (published, replaced uint64, err error) {
	if err := layout.ValidKey(key); err != nil {
		return 0, 0, opErr("undo", key, err)
	}
	if ctx.Value(loadingKey{}) != nil {
		return 0, 0, opErr("undo", key, ErrNestedLoad) // it takes K too
	}
	err = r.host.each(func(p *place) error {
		if no := r.host.cannotWrite(p); no != nil {
			return no
		}
		wait, cancel := context.WithTimeout(ctx, r.opts.LoadTimeout)
		defer cancel()
		held, err := p.lockKey(wait, layout.Stripe(key), nil, nil)
		if err != nil {
			return r.host.waitErr(err, p, key)
		}
		defer held.Unlock()
		crashpoint.Hit("undo.lock-key")
		return p.withTable(ctx, "undo.lock-table", func(t *tx) (err error) {
			published, replaced, err = t.undo(key)
			return err
		})
	})
	return published, replaced, opErr("undo", key, err)
}

func (t *tx) undo(key string) (prev, present uint64, err error) {
	f, ok := t.lookup(key)
	if !ok || f.Word.State() != layout.Ready {
		return 0, 0, ErrNotFound
	}
	prev = t.Hint(f.Slot, layout.HintPrevious)
	if prev == 0 || prev > layout.MaxGen || t.named()[prev] {
		return 0, 0, ErrNoPrevious
	}
	name := layout.GenName(t.Identity().Epoch, prev)
	m, _, err := t.p.m.Open(name + layout.ManifestExt)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0, fmt.Errorf("%w: %w", ErrNoPrevious, err)
	}
	if err != nil {
		return 0, 0, err
	}
	defer m.Close() // and with it the lock, after T is dropped
	if err := lockfile.TryShared(m); err != nil {
		return 0, 0, fmt.Errorf("%w: it is being removed", ErrNoPrevious)
	}
	crashpoint.Hit("undo.lease")
	man, st, err := readManifest(m)
	switch {
	case err != nil:
		return 0, 0, fmt.Errorf("%w: %w", ErrNoPrevious, err)
	case st.Nlink == 0 || man.Key != key || man.Generation != prev || uint64(man.Epoch) != t.Identity().Epoch:
		return 0, 0, ErrNoPrevious
	}
	// A linked manifest alone proves nothing: a killed replacer leaves one.
	for _, mf := range man.Files {
		st, err := t.p.m.Stat(name + "/" + man.Name + "/" + mf.Path)
		switch {
		case errors.Is(err, fs.ErrNotExist), err == nil && st.Size != mf.Size:
			return 0, 0, fmt.Errorf("%w: it is incomplete: %s", ErrNoPrevious, mf.Path)
		case err != nil:
			return 0, 0, err
		}
	}
	if !t.CompareAndSwap(f.Slot, f.Word, layout.MakeWord(layout.Ready, prev)) {
		return 0, 0, ErrBusy
	}
	crashpoint.Hit("undo.ready")
	t.SetHint(f.Slot, layout.HintPrevious, f.Word.Generation())
	t.SetHint(f.Slot, layout.HintBytes, uint64(man.Bytes))
	// The idle time was that of the other generation.
	t.SetHint(f.Slot, layout.HintLastAttach, now())
	t.SetHint(f.Slot, layout.HintIdleSince, 0)
	t.end()
	crashpoint.Hit("undo.unlock")
	return prev, f.Word.Generation(), nil
}

// Generations lists what is in memory of key, the newest first: the published
// generation and those that are still leased, or not collected yet.
//
// Errors: ErrNotFound, ErrKey.
func (r *Registry) Generations(key string) (gens []GenerationInfo, err error) {
	if err := layout.ValidKey(key); err != nil {
		return nil, opErr("generations", key, err)
	}
	err = r.host.each(func(p *place) error {
		gens = nil
		f, ok, err := p.find(key)
		if err != nil {
			return err
		}
		holders, err := p.holders(key)
		if err != nil {
			return err
		}
		names, err := p.m.Names()
		if err != nil {
			return err
		}
		for _, n := range names {
			epoch, gen, ext, named := layout.ParseGenName(n)
			if !named || ext != layout.ManifestExt || epoch != p.table.Identity().Epoch {
				continue
			}
			man, err := p.manifest(gen)
			published := ok && f.Word == layout.MakeWord(layout.Ready, gen)
			if err == nil && man.Key != key || err != nil && (!published || errors.Is(err, fs.ErrNotExist)) {
				continue // somebody else's, gone, or not to be known
			}
			g := GenerationInfo{Generation: gen, Published: published}
			if err == nil {
				g.Bytes, g.LoadedAt, g.Origin = man.Bytes, man.LoadedAt, info(man, "").Origin
			}
			for _, h := range holders {
				if h.Generation == gen {
					g.Holders = append(g.Holders, h)
				}
			}
			gens = append(gens, g)
		}
		if len(gens) == 0 {
			return ErrNotFound
		}
		return nil
	})
	slices.SortFunc(gens, func(a, b GenerationInfo) int { return cmp.Compare(b.Generation, a.Generation) })
	return gens, opErr("generations", key, err)
}
