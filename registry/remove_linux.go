//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/onecopy/onecopy/internal/crashpoint"
	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/lockfile"
)

// Removing a generation. Whoever does it has the manifest's LOCK_EX, or knows
// that no lease can exist. The manifest goes first, under T: without it nobody
// can lease the generation, and what is left is a leftover that anybody may
// remove. The payload goes after T was dropped, because freeing its pages takes
// 150 ms per GiB.

// removal is a generation whose manifest is gone and whose payload is left.
type removal struct {
	name     string // <epoch>-<gen>
	by       removeSteps
	manifest int64 // bytes that went with it
}

// removeSteps are the crash points of those who remove payload.
type removeSteps struct{ payload, rmdir string }

var (
	byAbort   = removeSteps{"abort.unlink-payload", "abort.rmdir"}
	byRetire  = removeSteps{"retire.unlink-payload", "retire.rmdir"}
	byReclaim = removeSteps{"reclaim.unlink-payload", "reclaim.rmdir"}
	byEvict   = removeSteps{"evict.unlink-payload", "evict.rmdir"}
	byCollect = removeSteps{"collect.unlink-payload", "collect.rmdir"}
)

// removeAll frees the memory of generations without a manifest. T is not held.
func (p *place) removeAll(gone []removal) (freed int64) {
	freed, _ = p.tryRemoveAll(gone) // what could not go is a leftover
	return freed
}

// tryRemoveAll is removeAll for those who wait for the memory: the first error
// says why there is less of it than was hoped.
func (p *place) tryRemoveAll(gone []removal) (freed int64, err error) {
	for _, g := range gone {
		freed += g.manifest + p.m.TreeUsage(g.name) + p.m.TreeUsage(g.name+layout.DigestsExt)
		if e := p.m.RemoveTree(g.name); err == nil {
			err = e
		}
		crashpoint.Hit(g.by.payload)
		if e := p.m.Unlink(g.name + layout.DigestsExt); err == nil {
			err = e
		}
		crashpoint.Hit(g.by.rmdir)
	}
	return freed, err
}

func (t *tx) genName(w layout.Word) string {
	return layout.GenName(t.Identity().Epoch, w.Generation())
}

// keyIs reports whether the slot names key, in whatever state.
func (t *tx) keyIs(slot int, key string) bool {
	k, ok := t.Key(slot)
	return ok && k == key
}

// rename gives a FREE slot to key, unless it names it already: deaths and
// back-off of a key outlive its generations.
func (t *tx) rename(slot int, key string) {
	if t.keyIs(slot, key) {
		return
	}
	if old, ok := t.Key(slot); ok {
		t.IndexDelete(slot, old)
	}
	t.SetKey(slot, key)
	t.inUse = nil
}

// used are the slots that mean anything, which few of a table's slots do.
func (t *tx) used() []int {
	if t.inUse == nil {
		t.inUse = t.Used()
	}
	return t.inUse
}

// lookup is Lookup that does not believe in a miss: a torn index hides a key, and
// is mended here. It also finds the FREE slot that named key last.
func (t *tx) lookup(key string) (f layout.Found, ok bool) {
	if f, ok = t.Lookup(key); ok {
		return f, true
	}
	if f, ok = t.ScanOf(t.used(), key); ok && f.Word.State() != layout.Free {
		t.IndexInsert(f.Slot, key)
	}
	return f, ok
}

// hasManifest reports whether the manifest of a READY slot is still linked.
func (t *tx) hasManifest(w layout.Word) bool {
	return t.hasFile(t.genName(w) + layout.ManifestExt)
}

func (t *tx) hasFile(name string) bool {
	_, err := t.p.m.Stat(name)
	return !errors.Is(err, fs.ErrNotExist)
}

// free makes a slot FREE and takes it out of the index. Its key stays readable,
// because deaths and back-off of a key outlive its generations.
func (t *tx) free(slot int, w layout.Word) bool {
	key, ok := t.Key(slot)
	if !t.CompareAndSwap(slot, w, w.With(layout.Free)) {
		return false
	}
	if ok {
		t.IndexDelete(slot, key)
	}
	return true
}

// countReclaimed counts, here and for everybody, that a dead process's work was
// finished or undone.
func (t *tx) countReclaimed() {
	t.Count(layout.CountReclaimed, 1)
	t.p.counts.reclaimed.Add(1)
}

// buryStripe cleans up, as the holder of a load lock, after every loader that
// died while it held that lock: whoever else has an unfinished load on the
// stripe is dead. Deaths are counted per key; takeovers counts those of key.
func (t *tx) buryStripe(stripe int, key string, takeovers *atomic.Uint64) (gone []removal) {
	for _, slot := range t.used() {
		w := t.Word(slot)
		unfinished := w.State() == layout.Loading
		if !unfinished && t.Hint(slot, layout.HintLoadStart) == 0 && t.Hint(slot, layout.HintReserved) == 0 {
			continue
		}
		k, ok := t.Key(slot)
		if !ok || layout.Stripe(k) != stripe {
			continue
		}
		if k == key {
			takeovers.Add(1)
			t.Count(layout.CountTakeovers, 1)
		}
		gone = append(gone, t.bury(slot, w)...)
	}
	return gone
}

// bury ends the load of a dead loader: LOADING becomes FREE, a replacement that
// was never published is left to the collector. Its K is held.
func (t *tx) bury(slot int, w layout.Word) (gone []removal) {
	if t.Hint(slot, layout.HintLoadStart) != 0 {
		deaths := t.Hint(slot, layout.HintDeaths) + 1
		t.SetHint(slot, layout.HintDeaths, deaths)
		if deaths >= maxDeaths {
			pause := min(firstPause<<min(deaths-maxDeaths, 10), longPause)
			t.SetHint(slot, layout.HintRetryAfter, now()+uint64(pause))
		}
	}
	for _, h := range []layout.Hint{layout.HintPromised, layout.HintReserved, layout.HintLoaderPID, layout.HintLoadStart} {
		t.SetHint(slot, h, 0)
	}
	if w.State() != layout.Loading {
		return nil
	}
	// Nobody can lease a generation that was never READY.
	name := t.genName(w)
	_ = t.p.m.Unlink(name + layout.ManifestExt)
	crashpoint.Hit("reclaim.unlink-dead-load")
	t.free(slot, w)
	t.countReclaimed()
	crashpoint.Hit("reclaim.free")
	if !t.hasFile(name) && !t.hasFile(name+layout.DigestsExt) {
		return nil // what it had filled had no name yet, and is gone with it
	}
	return []removal{{name: name, by: byReclaim}}
}

// reclaim finishes, or undoes, what a dead remover began: EVICTING under T means
// that its owner is dead. Live leases bring the generation back.
func (t *tx) reclaim(slot int, w layout.Word) (gone []removal) {
	name := t.genName(w)
	f, _, err := t.p.m.Open(name + layout.ManifestExt)
	if err == nil {
		defer f.Close()
		if lockfile.TryExclusive(f) != nil {
			crashpoint.Hit("reclaim.lock-manifest")
			// On a description of its own: a refused attempt at LOCK_EX must not
			// cost a lock that we hold.
			if sh, _, err := t.p.m.Open(name + layout.ManifestExt); err == nil {
				shared := lockfile.TryShared(sh)
				crashpoint.Hit("reclaim.try-shared")
				sh.Close()
				if shared == nil {
					t.CompareAndSwap(slot, w, w.With(layout.Ready))
					t.countReclaimed()
					crashpoint.Hit("reclaim.undo")
					return nil
				}
			}
			// Refused too: somebody sits on LOCK_EX, so no lease exists, and
			// none will be granted while the slot is EVICTING.
		} else {
			crashpoint.Hit("reclaim.lock-manifest")
		}
		_ = t.p.m.Unlink(name + layout.ManifestExt)
		crashpoint.Hit("reclaim.unlink-manifest")
	} else if !errors.Is(err, fs.ErrNotExist) {
		_ = t.p.m.Unlink(name + layout.ManifestExt)
	}
	t.free(slot, w)
	t.countReclaimed()
	crashpoint.Hit("reclaim.free")
	return []removal{{name: name, by: byReclaim}}
}

// evict removes the READY generation w of a slot, whose manifest f is locked
// exclusively, and counts it under why.
func (t *tx) evict(slot int, w layout.Word, why layout.Counter) (gone []removal, ok bool) {
	if !t.CompareAndSwap(slot, w, w.With(layout.Evicting)) {
		return nil, false
	}
	crashpoint.Hit("evict.mark")
	g := removal{name: t.genName(w), by: byEvict}
	g.manifest = t.p.m.TreeUsage(g.name + layout.ManifestExt)
	_ = t.p.m.Unlink(g.name + layout.ManifestExt)
	crashpoint.Hit("evict.unlink-manifest")
	t.free(slot, w.With(layout.Evicting))
	t.Count(why, 1)
	crashpoint.Hit("evict.free")
	return []removal{g}, true
}

// lockVictim opens the manifest of a READY slot and tries LOCK_EX on it:
// lockfile.ErrLocked means that it is leased, fs.ErrNotExist that a third party
// deleted it.
func (t *tx) lockVictim(w layout.Word) (*os.File, error) {
	f, _, err := t.p.m.Open(t.genName(w) + layout.ManifestExt)
	if err != nil {
		return nil, err
	}
	crashpoint.Hit("evict.open-manifest")
	if err := lockfile.TryExclusive(f); err != nil {
		f.Close()
		return nil, err
	}
	crashpoint.Hit("evict.lock-manifest")
	return f, nil
}

// freeSlot finds a slot that names nothing, evicting the least recently used
// idle model when there is none. again: memory was freed or a dead load buried,
// look again.
func (t *tx) freeSlot(gone *[]removal) (slot int, again bool, err error) {
	best := -1
	for slot := range t.Slots() {
		if t.Sane(slot) != nil {
			t.Reset(slot)
		}
		if t.Word(slot).State() != layout.Free || t.promised(slot) {
			continue
		}
		if t.Hint(slot, layout.HintDeaths) == 0 {
			return slot, false, nil
		}
		best = slot // remembers the deaths of its key: only if there is no other
	}
	if best >= 0 {
		return best, false, nil
	}
	more, buried := t.buryDead()
	*gone = append(*gone, more...)
	if buried > 0 {
		return 0, true, nil
	}
	vs, _ := t.candidates("")
	idle, _ := t.lockIdle(vs, 1) // the first one that can be had
	defer closeAll(idle)
	for _, v := range idle {
		if more, ok := t.evict(v.slot, v.word, layout.CountEvictedTable); ok {
			*gone = append(*gone, more...)
			return 0, true, nil
		}
	}
	return 0, false, ErrTableFull
}

// promised reports whether a FREE slot holds what a running load was promised: one
// that replaces a generation which somebody has removed meanwhile.
func (t *tx) promised(slot int) bool {
	key, ok := t.Key(slot)
	if !ok || t.Hint(slot, layout.HintPromised) == 0 && t.Hint(slot, layout.HintReserved) == 0 {
		return false
	}
	return !t.p.keyFree(key)
}

// buryDead cleans up after every dead loader of any stripe: LOADING, or bytes
// reserved, and the load lock can be had.
func (t *tx) buryDead() (gone []removal, buried int) {
	for _, slot := range t.used() {
		w := t.Word(slot)
		if w.State() != layout.Loading && t.Hint(slot, layout.HintLoadStart) == 0 && t.Hint(slot, layout.HintReserved) == 0 {
			continue
		}
		key, ok := t.Key(slot)
		if !ok {
			continue
		}
		held, err := t.p.tryKey(key)
		if err != nil {
			continue
		}
		gone = append(gone, t.bury(slot, w)...)
		if w.State() == layout.Loading {
			buried++
		}
		_ = held.Unlock()
	}
	return gone, buried
}

// retireSoon is retire for the last one to release a generation, who must not
// wait. Who holds T may be the last but one and have found this lease: if nobody
// came back the generation would stay until somebody collects.
func (p *place) retireSoon(gen uint64) {
	if !errors.Is(p.retire(context.Background(), gen, true), lockfile.ErrLocked) {
		return
	}
	p.ref()
	go func() {
		defer p.unref()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_ = p.retire(ctx, gen, false) // after that the next collector does it
	}()
}

// retire removes generation gen if no slot names it and nobody leases it. With
// try it gives up when T is held.
func (p *place) retire(ctx context.Context, gen uint64, try bool) error {
	var gone []removal
	do := func(t *tx) error {
		if t.named()[gen] {
			return nil
		}
		name := layout.GenName(t.Identity().Epoch, gen)
		f, _, err := p.m.Open(name + layout.ManifestExt)
		if err != nil {
			return nil // removed already
		}
		defer f.Close()
		if lockfile.TryExclusive(f) != nil {
			return nil // leased: the last one to release it, or a collector, removes it
		}
		crashpoint.Hit("retire.lock-manifest")
		_ = p.m.Unlink(name + layout.ManifestExt)
		crashpoint.Hit("retire.unlink-manifest")
		gone = append(gone, removal{name: name, by: byRetire})
		return nil
	}
	var err error
	if try {
		err = p.tryTable("retire.lock-table", do)
	} else {
		err = p.withTable(ctx, "retire.lock-table", do)
	}
	p.removeAll(gone)
	return err
}

// named are the generations that a slot names.
func (t *tx) named() map[uint64]bool {
	named := map[uint64]bool{}
	for _, slot := range t.used() {
		if w := t.Word(slot); w.State() != layout.Free {
			named[w.Generation()] = true
		}
	}
	return named
}

// Remove removes the model of key from memory. A model in use is not removed:
// *InUseError names the holders.
//
// Errors: ErrNotFound, ErrInUse, ErrReadOnly, ErrTimeout, ErrKey.
func (r *Registry) Remove(ctx context.Context, key string) error {
	if err := layout.ValidKey(key); err != nil {
		return opErr("remove", key, err)
	}
	err := r.host.each(func(p *place) error {
		var gone []removal
		err := p.withTable(ctx, "evict.lock-table", func(t *tx) (err error) {
			gone, err = t.remove(key)
			return err
		})
		p.removeAll(gone)
		return err
	})
	if errors.Is(err, lockfile.ErrLocked) {
		holders, _ := r.Holders(key)
		err = &InUseError{Holders: holders}
	}
	return opErr("remove", key, err)
}

func (t *tx) remove(key string) (gone []removal, err error) {
	f, ok := t.lookup(key)
	if ok && f.Word.State() == layout.Evicting {
		gone = t.reclaim(f.Slot, f.Word)
		if f.Word = t.Word(f.Slot); f.Word.State() == layout.Free {
			return gone, nil
		}
	}
	switch {
	case !ok || f.Word.State() == layout.Free:
		return gone, ErrNotFound
	case f.Word.State() == layout.Loading:
		held, err := t.p.tryKey(key)
		if err != nil {
			return gone, &InUseError{Loading: true}
		}
		defer held.Unlock()
		return append(gone, t.bury(f.Slot, f.Word)...), ErrNotFound
	}
	victim, err := t.lockVictim(f.Word)
	if errors.Is(err, fs.ErrNotExist) {
		t.free(f.Slot, f.Word)
		return append(gone, removal{name: t.genName(f.Word), by: byEvict}), nil
	}
	if err != nil {
		return gone, err
	}
	defer victim.Close()
	more, ok := t.evict(f.Slot, f.Word, layout.CountRemoved)
	if !ok {
		return gone, ErrBusy
	}
	t.end()
	crashpoint.Hit("evict.unlock-table")
	return append(gone, more...), nil
}

// GC cleans up: after processes that died while they loaded or removed a model,
// generations that nobody names or leases any more, files that belong to none,
// and idle models whose TTL is over. It never removes a healthy model whose TTL
// is not over.
//
// Errors: ErrReadOnly, ErrTimeout.
func (r *Registry) GC(ctx context.Context) (GCReport, error) {
	var report GCReport
	err := r.host.each(func(p *place) (err error) {
		report, err = r.host.collect(ctx, p, false)
		return err
	})
	return report, opErr("gc", "", err)
}

// collect is GC of one place. With try it gives up when T is held.
func (h *host) collect(ctx context.Context, p *place, try bool) (report GCReport, err error) {
	var gone []removal
	do := func(t *tx) error {
		gone = t.collect(&report)
		return nil
	}
	if try {
		err = p.tryTable("collect.lock-table", do)
	} else {
		err = p.withTable(ctx, "collect.lock-table", do)
	}
	crashpoint.Hit("collect.unlock-table")
	for _, g := range gone {
		report.Removed = append(report.Removed, g.name)
	}
	report.Freed = p.removeAll(gone)
	return report, err
}

// repairGeneration mends a counter that only a stranger can have changed: one that
// is used up, and one that is behind a generation that exists, which would make
// healthy slots senseless and give a number out twice.
func (t *tx) repairGeneration() {
	counter := t.Generation()
	behind := slices.ContainsFunc(t.used(), func(slot int) bool { return t.Word(slot).Generation() > counter })
	if !behind && counter < layout.MaxGen {
		return
	}
	names, err := t.p.m.Names()
	if err != nil {
		return
	}
	highest := uint64(0)
	for _, n := range names {
		if e, gen, ext, ok := layout.ParseGenName(n); ok && ext == layout.ManifestExt && e == t.Identity().Epoch {
			highest = max(highest, gen)
		}
	}
	if highest > counter || counter >= layout.MaxGen {
		t.SetGeneration(highest)
	}
}

// disown empties slots that name a key or a generation which is another slot's, as
// only a stranger's bytes do: removing the one must not take the other's files.
func (t *tx) disown() (n int) {
	keys, gens := map[string]int{}, map[uint64]int{}
	for _, slot := range t.used() {
		w := t.Word(slot)
		if w.State() == layout.Free || t.Sane(slot) != nil {
			continue
		}
		key, _ := t.Key(slot)
		var rivals []int
		if other, ok := keys[key]; ok {
			rivals = append(rivals, other)
		}
		if other, ok := gens[w.Generation()]; ok {
			rivals = append(rivals, other)
		}
		kept := true
		for _, other := range rivals {
			if !kept || t.Word(other).State() == layout.Free { // it has lost already
				continue
			}
			loser := slot
			if t.owns(slot) && (!t.owns(other) || t.Word(other).Generation() < w.Generation()) {
				loser = other
			}
			t.Reset(loser)
			n++
			kept = loser != slot
		}
		if kept {
			keys[key], gens[w.Generation()] = slot, slot
		}
	}
	return n
}

// owns reports whether the manifest of a slot's generation, if there is one, is
// that of its key.
func (t *tx) owns(slot int) bool {
	w := t.Word(slot)
	man, err := t.p.manifest(w.Generation())
	if err != nil {
		return w.State() != layout.Ready
	}
	return t.keyIs(slot, man.Key) && man.Generation == w.Generation()
}

func (t *tx) collect(report *GCReport) (gone []removal) {
	t.repairGeneration()
	report.Reclaimed += t.disown()
	for _, slot := range t.used() {
		w := t.Word(slot)
		switch {
		case t.Sane(slot) != nil:
			t.Reset(slot)
			report.Reclaimed++
		case w.State() == layout.Evicting:
			gone = append(gone, t.reclaim(slot, w)...)
			report.Reclaimed++
		case w.State() == layout.Ready && !t.hasManifest(w):
			t.free(slot, w)
			report.Reclaimed++
			crashpoint.Hit("collect.slot")
		}
	}
	dead, buried := t.buryDead()
	report.Reclaimed += buried
	expired, keys := t.expire()
	report.Expired += len(expired)
	report.Keys = append(report.Keys, keys...)
	gone = append(append(gone, dead...), expired...)
	t.RepairIndex()

	doomed := map[string]bool{}
	for _, g := range gone {
		doomed[g.name] = true
	}
	more := t.collectUnnamed(doomed, report)
	t.Count(layout.CountLeftovers, uint64(len(more)))
	t.p.counts.leftovers.Add(uint64(len(more)))
	return append(gone, more...)
}

// collectUnnamed removes the manifests of all generations that no slot names and
// nobody leases, and finds what has no manifest.
func (t *tx) collectUnnamed(doomed map[string]bool, report *GCReport) (gone []removal) {
	names, err := t.p.m.Names()
	if err != nil {
		return nil
	}
	crashpoint.Hit("collect.next")
	named := t.named()
	epoch := t.Identity().Epoch
	keep := map[string]bool{}
	for _, n := range names {
		e, gen, ext, ok := layout.ParseGenName(n)
		stem := layout.GenName(e, gen)
		if !ok || ext != layout.ManifestExt || doomed[stem] {
			continue
		}
		if e == epoch && named[gen] {
			keep[stem] = true
			continue
		}
		f, _, err := t.p.m.Open(n)
		if err == nil && lockfile.TryExclusive(f) != nil {
			keep[stem] = true // leased, or in the making
			f.Close()
			continue
		}
		crashpoint.Hit("collect.lock-manifest")
		freed := t.p.m.TreeUsage(n)
		_ = t.p.m.Unlink(n)
		crashpoint.Hit("collect.unlink-manifest")
		if err == nil {
			f.Close()
		}
		doomed[stem] = true
		gone = append(gone, removal{stem, byCollect, freed})
		report.Orphans++
	}
	for _, n := range names {
		e, gen, ext, ok := layout.ParseGenName(n)
		stem := layout.GenName(e, gen)
		switch {
		case ok && (keep[stem] || doomed[stem] || e == epoch && named[gen]):
		case ok && ext == layout.ManifestExt:
		case ok && t.hasFile(stem+layout.ManifestExt):
			// A generation in the making: its manifest, which is linked first,
			// came after the listing had passed its place.
		case ok:
			doomed[stem] = true
			gone = append(gone, removal{name: stem, by: byCollect})
			report.Leftovers++
		default: // nothing of this layout version has such a name
			gone = append(gone, removal{name: n, by: byCollect})
			report.Leftovers++
		}
	}
	return gone
}

// expire evicts every model whose TTL is over.
func (t *tx) expire() (gone []removal, keys []string) {
	for _, slot := range t.used() {
		w := t.Word(slot)
		if w.State() != layout.Ready || !t.expired(slot, w) {
			continue
		}
		if f, err := t.lockVictim(w); err == nil {
			key, _ := t.Key(slot)
			if more, ok := t.evict(slot, w, layout.CountEvictedTTL); ok {
				gone, keys = append(gone, more...), append(keys, key)
			}
			f.Close()
		}
	}
	return gone, keys
}

// expires reports whether any model has a TTL.
func (t *tx) expires() bool {
	for _, slot := range t.used() {
		if t.Word(slot).State() == layout.Ready && t.ttl(slot) != 0 {
			return true
		}
	}
	return false
}

// expired keeps the idle clock of a READY slot and reports whether its TTL is
// over. A lease stops the clock, and is a use whose beginning is now: a release
// before it counts no more.
func (t *tx) expired(slot int, w layout.Word) bool {
	if t.ttl(slot) == 0 {
		return false
	}
	f, err := t.lockVictim(w)
	if err != nil {
		t.SetHint(slot, layout.HintIdleSince, 0)
		t.SetHint(slot, layout.HintLastAttach, now())
		return false
	}
	f.Close()
	for _, h := range []layout.Hint{layout.HintLastAttach, layout.HintLastRelease, layout.HintIdleSince} {
		if n := now(); t.Hint(slot, h) > n {
			t.SetHint(slot, h, n) // or it would be now for ever
		}
	}
	if since := t.stamp(slot, layout.HintIdleSince); since == 0 || since < t.stamp(slot, layout.HintLastAttach) {
		t.SetHint(slot, layout.HintIdleSince, now())
	}
	return t.idleFor(slot) >= t.ttl(slot)
}

// wouldExpire is expired for those who change nothing.
func (t *tx) wouldExpire(slot int, w layout.Word) bool {
	if t.ttl(slot) == 0 || t.idleFor(slot) < t.ttl(slot) {
		return false
	}
	f, err := t.lockVictim(w)
	if err != nil {
		return false
	}
	f.Close()
	return true
}

// idleFor is how long a model that nobody leases has been idle, as far as known:
// since the release after its last use, if that was noted, else since a collector
// first found it idle after that use.
func (t *tx) idleFor(slot int) uint64 {
	n := now()
	used := t.stamp(slot, layout.HintLastAttach)
	since := t.stamp(slot, layout.HintIdleSince)
	if since == 0 || since < used {
		since = n
	}
	if rel := t.stamp(slot, layout.HintLastRelease); rel != 0 && rel >= used {
		since = rel
	}
	return n - min(since, n)
}

// ttl is the idle time in nanoseconds after which the model of a slot expires; 0
// is never.
func (t *tx) ttl(slot int) uint64 { return ttl(t.Table, slot) }

func ttl(t *layout.Table, slot int) uint64 {
	if t.Hint(slot, layout.HintPin) != 0 {
		return 0
	}
	if own := t.Hint(slot, layout.HintTTL); own != 0 {
		return own
	}
	return t.DefaultTTL()
}

// untidy reports, without a lock, whether a collector could find work: files that
// are no whole generation, more or fewer generations than the table names, or a
// model that nobody has used for as long as its TTL. It reads little, because
// every process that starts asks.
func (p *place) untidy() bool {
	named, late := 0, false
	err := guarded(func() error {
		named = p.table.Named()
		late = p.late(named)
		return nil
	})
	if err != nil || late {
		return late
	}
	if n, ok := p.m.Entries(); ok {
		return n != 3*named
	}
	names, err := p.m.Names()
	return err == nil && len(names) != 3*named
}

// late reports whether one of the table's named slots may have outlived its TTL,
// by hints only. Slots are given out from the first one, so it stops early.
func (p *place) late(named int) bool {
	t, n := p.table, uint64(0)
	for slot := 0; slot < t.Slots() && named > 0; slot++ {
		if t.Word(slot).State() != layout.Ready {
			continue
		}
		named--
		if ttl := ttl(t, slot); ttl != 0 {
			if p.otherBoot() {
				return false
			}
			if n == 0 {
				n = now()
			}
			used := max(t.Hint(slot, layout.HintLastAttach), t.Hint(slot, layout.HintLastRelease))
			if n-min(used, n) >= ttl {
				return true
			}
		}
	}
	return false
}
