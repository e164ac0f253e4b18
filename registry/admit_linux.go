//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/shm"
)

// victim is a model that may be evicted if nobody leases it.
type victim struct {
	slot int
	word layout.Word
	size int64
	used uint64 // last use, CLOCK_BOOTTIME nanoseconds
	file *os.File
}

func closeAll(vs []victim) {
	for _, v := range vs {
		v.file.Close()
	}
}

// candidates are the READY models that are not pinned, least recently used
// first, except that of the key not. Whether somebody leases them is not known.
func (t *tx) candidates(not string) (vs []victim, pinned int64) {
	for _, slot := range t.used() {
		w := t.Word(slot)
		if w.State() != layout.Ready {
			continue
		}
		size := generationUsage(t.genName(w), t.p.publishedUsage)
		switch {
		case not != "" && t.keyIs(slot, not):
		case t.Hint(slot, layout.HintPin) != 0:
			pinned += size
		default:
			used := max(t.stamp(slot, layout.HintLastAttach), t.stamp(slot, layout.HintLastRelease))
			vs = append(vs, victim{slot: slot, word: w, size: size, used: used})
		}
	}
	slices.SortStableFunc(vs, func(a, b victim) int { return cmp.Compare(a.used, b.used) })
	return vs, pinned
}

// lockIdle locks the manifests of candidates that nobody leases, in their order,
// until they make up short bytes. No more are locked than needed, because a
// reader that meets the lock must try again. The caller closes what it gets.
func (t *tx) lockIdle(vs []victim, short int64) (idle []victim, sum int64) {
	for _, v := range vs {
		if sum >= short {
			break
		}
		f, err := t.lockVictim(v.word)
		if err != nil {
			continue
		}
		v.file = f
		idle = append(idle, v)
		sum += v.size
	}
	return idle, sum
}

// stamp is a hint that is a time. Clocks are hints of others: a time that is
// still to come counts as now, one of another boot as never.
func (t *tx) stamp(slot int, h layout.Hint) uint64 { return t.p.stamp(t.Table, slot, h) }

func (p *place) stamp(t *layout.Table, slot int, h layout.Hint) uint64 {
	if p.otherBoot() {
		return 0
	}
	return min(t.Hint(slot, h), now())
}

// generationUsage is the memory of a generation by its name; of is that of what one
// name leads to.
func generationUsage(name string, of func(string) int64) int64 {
	return of(name) + of(name+layout.ManifestExt) + of(name+layout.DigestsExt)
}

// publishedUsage is TreeUsage for a name of a READY generation, as usage found it
// last. Under T.
func (p *place) publishedUsage(name string) int64 {
	if size, known := p.sizes[name]; known {
		return size
	}
	return p.m.TreeUsage(name)
}

// demand is what a registry's memory is used for.
type demand struct {
	linked   int64 // by all generations that have a name
	reserved int64 // running loads have still to allocate
	promised int64 // running loads may use in all; their generations are not in linked
}

// usage adds up the memory of all generations, and what running loads need
// besides that of the key mine, whose load lock the caller holds ("" for none).
// Reservations of dead loaders are cleared.
func (t *tx) usage(mine string) (d demand) {
	epoch, loading, ready := t.Identity().Epoch, map[uint64]bool{}, map[uint64]bool{}
	for _, slot := range t.used() {
		r, promised := int64(t.Hint(slot, layout.HintReserved)), int64(t.Hint(slot, layout.HintPromised))
		w := t.Word(slot)
		ready[w.Generation()] = w.State() == layout.Ready
		if r <= 0 && promised <= 0 && w.State() != layout.Loading {
			continue
		}
		key, ok := t.Key(slot)
		if !ok || key == mine {
			continue
		}
		if mine == "" || layout.Stripe(key) != layout.Stripe(mine) { // on our own stripe its loader is dead
			held, err := t.p.tryKey(key)
			if err != nil {
				d.reserved += r
				promised = max(r, promised)
				if w.State() == layout.Loading {
					promised = max(promised, int64(t.Hint(slot, layout.HintBytes)))
					loading[w.Generation()] = true
				}
				d.promised += promised
				continue
			}
			_ = held.Unlock()
		}
		t.SetHint(slot, layout.HintPromised, 0)
		t.SetHint(slot, layout.HintReserved, 0)
	}
	names, _ := t.p.m.Names()
	// A load asks several times, and each time the whole machine waits for T.
	sizes := make(map[string]int64, len(names))
	for _, n := range names {
		e, gen, _, ok := layout.ParseGenName(n)
		ours := ok && e == epoch
		if ours && loading[gen] {
			continue
		}
		if ours && ready[gen] {
			sizes[n] = t.p.publishedUsage(n)
			d.linked += sizes[n]
		} else { // who removes it may be half-way
			d.linked += t.p.m.TreeUsage(n)
		}
	}
	t.p.sizes = sizes
	return d
}

// budget is the number of bytes that the registry may use.
func (p *place) budget(t *layout.Table) (budget, free, size int64, err error) {
	if free, size, err = p.m.Free(); err != nil {
		return 0, 0, 0, err
	}
	bytes, ppm := t.Budget()
	if budget = int64(bytes); budget <= 0 {
		budget = size / 1_000_000 * int64(ppm)
	}
	return budget, free, size, nil
}

// admit decides under T whether need bytes may be loaded, and evicts idle
// models, least recently used first, to make that so: then it returns errAgain,
// because the memory comes only when T is dropped. If everything idle would not
// be enough, or without evict, nothing is evicted.
func (l *loader) admit(t *tx, need int64, evict bool) (gone []removal, err error) {
	budget, free, _, err := l.p.budget(t.Table)
	if err != nil {
		return nil, err
	}
	d := t.usage(l.key)
	d.linked += l.filled.Load() // of this load: it has no name yet
	head, limited := headroom()
	if !limited {
		head = -1
	}
	short := max(d.linked+d.promised+need-budget, d.reserved+need-free)
	if limited {
		short = max(short, need-head)
	}
	if short <= 0 {
		return nil, nil
	}
	if !evict {
		return nil, ErrNoSpace
	}
	if !l.swept {
		if gone = l.sweep(t); len(gone) > 0 {
			return gone, errAgain
		}
	}
	vs, pinned := t.candidates(l.key)
	idle, sum := t.lockIdle(vs, short)
	defer func() { closeAll(idle) }()
	no := &NoSpaceError{
		Need: need, Free: free, Budget: budget, Used: d.linked, Reserved: d.promised,
		Evictable: sum, Leased: d.linked - sum - pinned, Pinned: pinned, Headroom: head, Dir: l.p.m.Path(),
	}
	if sum < short {
		// What somebody is removing just now, evicted or replaced, counts until
		// its payload is gone, but it is nobody's any more.
		closeAll(idle)
		idle = nil
		gone = t.collect(&GCReport{})
		switch {
		case l.stuck != nil: // or this would go on for ever
			return gone, fmt.Errorf("%w; what is not needed any more cannot be removed: %w", no, l.stuck)
		case len(gone) > 0:
			return gone, errAgain
		}
		return nil, no
	}
	for _, v := range idle {
		if more, ok := t.evict(v.slot, v.word, layout.CountEvictedSpace); ok {
			gone = append(gone, more...)
		}
	}
	if len(gone) == 0 {
		return nil, no
	}
	return gone, errAgain
}

// extend admits a load function that wrote more than it had announced: total
// bytes so far.
func (l *loader) extend(total int64) error {
	// Every admission takes T, so very small ones are made together. But what is
	// promised here is lost to others until the load is over.
	const step = 4 << 20
	l.more.Lock()
	defer l.more.Unlock()
	want := total - l.need.Load()
	if want <= 0 {
		return nil // another goroutine's bytes were admitted together with ours
	}
	return l.underTable(func(t *tx) (gone []removal, err error) {
		left := max(0, l.need.Load()-l.filled.Load())
		// No model is evicted for bytes that may never come.
		n := max(want, step)
		if _, err = l.admit(t, left+n, false); errors.Is(err, ErrNoSpace) {
			n = want
			gone, err = l.admit(t, left+n, true)
		}
		if err != nil {
			return gone, err
		}
		need := uint64(l.need.Add(n))
		if !t.keyIs(l.slot, l.key) {
			return gone, nil // a stranger's change
		}
		t.SetHint(l.slot, layout.HintReserved, uint64(left+n))
		t.SetHint(l.slot, layout.HintPromised, need)
		if l.word.State() == layout.Loading {
			t.SetHint(l.slot, layout.HintBytes, need)
		}
		return gone, nil
	})
}

// underTable repeats fn, which admits something while the load runs, as long as
// it makes room.
func (l *loader) underTable(fn func(*tx) ([]removal, error)) error {
	ctx, cancel := context.WithTimeout(l.ctx, l.h.r.opts.LoadTimeout)
	defer cancel()
	for {
		var gone []removal
		err := l.p.withTable(ctx, "load.extend", func(t *tx) (err error) {
			gone, err = fn(t)
			return err
		})
		l.remove(gone)
		if !errors.Is(err, errAgain) {
			var no *NoSpaceError
			if errors.As(err, &no) && no.Leased > 0 {
				no.Holders, _ = l.p.holders("") // now: the load function may wrap the text
			}
			return err
		}
	}
}

// remove makes the room that an admission has decided about.
func (l *loader) remove(gone []removal) {
	if _, err := l.p.tryRemoveAll(gone); err != nil {
		l.stuck = err
	}
}

// checkMemory asks whether n bytes are there now. If others have taken what was
// granted, idle models make up for it.
func (l *loader) checkMemory(n int64) error {
	free, _, err := l.p.m.Free()
	if err != nil {
		return err
	}
	if head, limited := headroom(); n <= free && (!limited || n <= head) {
		return nil
	}
	l.more.Lock()
	defer l.more.Unlock()
	return l.underTable(func(t *tx) ([]removal, error) { return l.admit(t, n, true) })
}

// headroom is what the cgroups of this process allow, less a reserve for the
// process itself: the write that meets the limit is no error but a signal.
func headroom() (int64, bool) {
	n, _, ok := shm.CgroupHeadroom()
	return max(0, n-8<<20), ok
}
