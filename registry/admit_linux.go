//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"errors"
	"os"
	"slices"
	"time"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/shm"
)

// victim is an idle model whose manifest is locked exclusively.
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

// idleModels locks every READY model that nobody leases, least recently used
// first, except pinned ones and that of the key not. The caller closes them.
func (t *tx) idleModels(not string) (idle []victim, evictable, leased int64) {
	n := now()
	for slot := range t.Slots() {
		w := t.Word(slot)
		if w.State() != layout.Ready {
			continue
		}
		size := t.p.m.TreeUsage(t.genName(w))
		if t.Hint(slot, layout.HintPin) != 0 || not != "" && t.keyIs(slot, not) {
			leased += size
			continue
		}
		f, err := t.lockVictim(w)
		if err != nil {
			leased += size
			continue
		}
		used := max(past(t.Hint(slot, layout.HintLastAttach), n), past(t.Hint(slot, layout.HintLastRelease), n))
		idle = append(idle, victim{slot, w, size, used, f})
		evictable += size
	}
	slices.SortStableFunc(idle, func(a, b victim) int {
		if a.used < b.used {
			return -1
		}
		return 1
	})
	return idle, evictable, leased
}

// past is a time that cannot be later than now: clocks of hostile writers, or of
// another boot, are worth nothing.
func past(v, now uint64) uint64 { return min(v, now) }

// usage is the memory of all generations, and what running loads still need.
// Reservations of dead loaders are cleared.
func (t *tx) usage(mine string) (used, reserved int64) {
	names, _ := t.p.m.Names()
	for _, n := range names {
		used += t.p.m.TreeUsage(n)
	}
	for slot := range t.Slots() {
		r := int64(t.Hint(slot, layout.HintReserved))
		key, ok := t.Key(slot)
		if r <= 0 || !ok || key == mine {
			continue
		}
		if layout.Stripe(key) != layout.Stripe(mine) { // on our own stripe its loader is dead
			held, err := t.p.lockFile(layout.StripeLock(layout.Stripe(key))).TryLock()
			if err != nil {
				reserved += r
				continue
			}
			_ = held.Unlock()
		}
		t.SetHint(slot, layout.HintReserved, 0)
	}
	return used, reserved
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
// be enough, nothing is evicted.
func (l *loader) admit(t *tx, need int64) (gone []removal, err error) {
	budget, free, _, err := l.p.budget(t.Table)
	if err != nil {
		return nil, err
	}
	used, reserved := t.usage(l.key)
	used += l.filled.Load() // of this load: it has no name yet
	head, limited := headroom()
	if !limited {
		head = -1
	}
	short := max(used+reserved+need-budget, reserved+need-free)
	if short <= 0 && (!limited || need <= head) {
		return nil, nil
	}
	idle, evictable, leased := t.idleModels(l.key)
	defer closeAll(idle)
	no := &NoSpaceError{
		Need: need, Free: free, Budget: budget, Used: used, Reserved: reserved,
		Evictable: evictable, Leased: leased, Headroom: head, Dir: l.p.m.Path(),
	}
	if limited {
		short = max(short, need-head)
	}
	if evictable < short {
		return nil, no
	}
	for _, v := range idle {
		if short <= 0 {
			break
		}
		if more, ok := t.evict(v.slot, v.word, layout.CountEvictedSpace); ok {
			gone = append(gone, more...)
			short -= v.size
		}
	}
	if len(gone) == 0 {
		return nil, no
	}
	return gone, errAgain
}

// extend admits a load function that wrote more than it had announced.
func (l *loader) extend(total int64) error {
	const step = 256 << 20
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for {
		var gone []removal
		err := l.p.withTable(ctx, "load.extend", func(t *tx) (err error) {
			want := max(total, l.need) - l.need
			// In larger steps, so that T is not taken for every window; but a
			// model that just fits must fit.
			for _, n := range []int64{max(want, step), want} {
				if gone, err = l.admit(t, max(0, l.need-l.filled.Load())+n); err == nil {
					l.need += n
					t.SetHint(l.slot, layout.HintReserved, uint64(max(0, l.need-l.filled.Load())))
					return nil
				}
				if errors.Is(err, errAgain) {
					return err
				}
			}
			return err
		})
		l.p.removeAll(gone)
		if !errors.Is(err, errAgain) {
			return err
		}
	}
}

// checkMemory asks whether n bytes are there now.
func (l *loader) checkMemory(n int64) error {
	free, _, err := l.p.m.Free()
	if err != nil {
		return err
	}
	head, limited := headroom()
	if n <= free && (!limited || n <= head) {
		return nil
	}
	if !limited {
		head = -1
	}
	e := &NoSpaceError{Need: n, Free: free, Headroom: head, Dir: l.p.m.Path()}
	_ = guarded(func() (err error) {
		e.Budget, _, _, err = l.p.budget(l.p.table)
		return err
	})
	return e
}

// headroom is what the cgroups of this process allow, less a reserve for the
// process itself: the write that meets the limit is no error but a signal.
func headroom() (int64, bool) {
	n, _, ok := shm.CgroupHeadroom()
	return max(0, n-8<<20), ok
}
