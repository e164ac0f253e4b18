//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"errors"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/procfs"
)

// Everything here is for display: it takes no lock and may be overtaken while it
// runs.

// watchMemory is what a Watch remembers.
type watchMemory struct {
	epoch  uint64
	known  map[uint64]*generation
	survey procfs.Surveyor
}

// How long a Watch believes what it found in a process, and how much memory the
// files of a generation take.
const (
	believeProcess = 20 * time.Second
	believeFiles   = 10 * time.Second
)

func (w *Watch) look(holders bool) (o Overview, rep HolderReport, err error) {
	err = w.r.host.each(func(p *place) error {
		if epoch := p.table.Identity().Epoch; w.memory.epoch != epoch { // another life of the registry
			w.memory = watchMemory{epoch: epoch}
			w.memory.survey.Believe = believeProcess
		}
		s, err := p.slots("")
		if err != nil {
			return err
		}
		names, err := p.m.Names()
		if err != nil {
			return err
		}
		want := s.generations()
		if holders {
			want = p.withManifest(names, s)
		}
		gens := p.lookAt(want, w.memory.known, true)
		w.memory.known = gens
		o.Stats = w.r.localStats()
		if o.Counters, err = p.counters(); err == nil {
			err = p.stats(&o.Stats, s, names, gens)
		}
		if err != nil {
			return err
		}
		locks, _ := procfs.Locks()
		o.Entries = p.entries(s, gens, locks)
		if holders {
			rep, err = p.holderReport("", gens, locks, &w.memory.survey)
		}
		return err
	})
	return o, rep, err
}

// withManifest are the generations of the slots, and all others of this table
// that have a manifest.
func (p *place) withManifest(names []string, s *slots) []uint64 {
	gens := s.generations()
	for _, n := range names {
		epoch, gen, ext, ok := layout.ParseGenName(n)
		if ok && ext == layout.ManifestExt && epoch == p.table.Identity().Epoch && !s.named[gen] {
			gens = append(gens, gen)
		}
	}
	return gens
}

// Entries lists what the table names, by key.
func (r *Registry) Entries() (entries []Entry, err error) {
	err = r.host.each(func(p *place) error {
		entries, err = p.list("")
		return err
	})
	return entries, opErr("list", "", err)
}

// Entry describes one key. ErrNotFound.
func (r *Registry) Entry(key string) (e Entry, err error) {
	if err := layout.ValidKey(key); err != nil {
		return e, opErr("stat", key, err)
	}
	err = r.host.each(func(p *place) error {
		es, err := p.list(key)
		if err == nil && len(es) == 0 {
			err = ErrNotFound
		}
		if err == nil {
			e = es[0]
		}
		return err
	})
	return e, opErr("stat", key, err)
}

func (p *place) list(only string) ([]Entry, error) {
	s, err := p.slots(only)
	if err != nil {
		return nil, err
	}
	gens := p.lookAt(s.generations(), nil, false)
	locks, _ := procfs.Locks()
	return p.entries(s, gens, locks), nil
}

// slots is a copy of what the table says about its slots.
type slots struct {
	entries  []Entry // by slot
	named    map[uint64]bool
	models   int // that are published
	reserved int64
}

// generations are those of the copies.
func (s *slots) generations() []uint64 {
	gens := make([]uint64, len(s.entries))
	for i := range s.entries {
		gens[i] = s.entries[i].Generation
	}
	return gens
}

// slots copies all slots, or that of the key only.
func (p *place) slots(only string) (s *slots, err error) {
	s = &slots{named: map[uint64]bool{}}
	err = guarded(func() error {
		t := p.table
		n := now()
		if p.otherBoot() {
			n = 0 // no time of the table means anything
		}
		for slot := range t.Slots() {
			w := t.Word(slot)
			if w.State() == layout.Free {
				continue
			}
			s.named[w.Generation()] = true
			h := func(h layout.Hint) uint64 { return t.Hint(slot, h) }
			s.reserved += int64(h(layout.HintReserved))
			if w.State() == layout.Ready {
				s.models++
			}
			key, ok := t.Key(slot)
			if !w.State().Valid() || !ok || only != "" && key != only {
				continue
			}
			e := Entry{
				Key: key, State: w.State().String(), Generation: w.Generation(), Bytes: int64(h(layout.HintBytes)),
				Pinned: h(layout.HintPin) != 0, TTL: time.Duration(h(layout.HintTTL)),
				LastAttach: wallClock(h(layout.HintLastAttach), n), LastRelease: wallClock(h(layout.HintLastRelease), n),
				IdleSince: wallClock(h(layout.HintIdleSince), n), Reserved: int64(h(layout.HintReserved)),
				Deaths: int(h(layout.HintDeaths)), LoaderPID: int(h(layout.HintLoaderPID)), Attaches: h(layout.HintAttaches),
			}
			if w.State() == layout.Loading {
				e.Bytes = 0 // the hint is what the load may use, files or not
			}
			if at := h(layout.HintRetryAfter); at > n {
				e.RetryAfter = time.Now().Add(time.Duration(at - n))
			}
			s.entries = append(s.entries, e)
		}
		return nil
	})
	return s, err
}

// entries completes the copies by what the manifests and the kernel's list of
// locks say. Trying the locks instead, however shortly, could make a reader
// believe that a model is busy.
func (p *place) entries(s *slots, gens map[uint64]*generation, locks []procfs.Lock) []Entry {
	files := make(map[procfs.FileID]uint64, len(gens))
	for _, g := range gens {
		files[g.id] = g.gen
	}
	leased := map[uint64]bool{}
	for _, l := range locks {
		if gen, ok := files[l.File()]; ok && l.Type == "FLOCK" && !l.Waiting {
			leased[gen] = true
		}
	}
	for i := range s.entries {
		e := &s.entries[i]
		e.Leased = leased[e.Generation] || p.leasedOutside(e.Generation)
		if g := gens[e.Generation]; g != nil && g.man != nil && e.State == layout.Ready.String() {
			i := info(g.man, p.m.Join(g.name+"/"+g.man.Name))
			i.AlreadyPresent = true
			e.Info, e.Bytes = &i, g.man.Bytes
		}
	}
	slices.SortFunc(s.entries, func(a, b Entry) int { return strings.Compare(a.Key, b.Key) })
	return s.entries
}

// wallClock turns a CLOCK_BOOTTIME stamp into a time; 0 and the future are none.
func wallClock(ns, now uint64) time.Time {
	if ns == 0 || ns > now {
		return time.Time{}
	}
	return time.Now().Add(-time.Duration(now - ns))
}

func (p *place) manifest(gen uint64) (*layout.Manifest, error) {
	f, _, err := p.m.Open(layout.GenName(p.table.Identity().Epoch, gen) + layout.ManifestExt)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	man, _, err := readManifest(f)
	return man, err
}

// Counters reads what all processes counted in the registry.
func (r *Registry) Counters() (c Counters, err error) {
	err = r.host.each(func(p *place) error {
		c, err = p.counters()
		return err
	})
	return c, opErr("counters", "", err)
}

func (p *place) counters() (c Counters, err error) {
	err = guarded(func() error {
		n := p.table.Counter
		c = Counters{
			Loads: n(layout.CountLoads), LoadTime: time.Duration(n(layout.CountLoadNanos)), LoadBytes: int64(n(layout.CountLoadBytes)),
			CollapsedBytes: int64(n(layout.CountCollapsedBytes)), LoadErrors: n(layout.CountLoadErrors), Takeovers: n(layout.CountTakeovers),
			Replaced: n(layout.CountReplaced), Removed: n(layout.CountRemoved), EvictedSpace: n(layout.CountEvictedSpace),
			EvictedTable: n(layout.CountEvictedTable), EvictedTTL: n(layout.CountEvictedTTL), Reclaimed: n(layout.CountReclaimed),
			Leftovers: n(layout.CountLeftovers), Fallbacks: n(layout.CountFallbacks),
		}
		return nil
	})
	return c, err
}

// Stats counts what this process did and measures the registry.
func (r *Registry) Stats() (Stats, error) {
	st := r.localStats()
	err := r.host.each(func(p *place) error {
		s, err := p.slots("")
		if err != nil {
			return err
		}
		names, err := p.m.Names()
		if err != nil {
			return err
		}
		return p.stats(&st, s, names, p.lookAt(s.generations(), nil, true))
	})
	return st, opErr("stats", "", err)
}

// stats measures the registry: what lies below m/ under the names that were
// listed, of which gens are measured already.
func (p *place) stats(st *Stats, s *slots, names []string, gens map[uint64]*generation) error {
	if err := guarded(func() (err error) {
		st.Budget, st.Free, st.Size, err = p.budget(p.table)
		return err
	}); err != nil {
		return err
	}
	st.Epoch, st.Slots, st.LayoutVersion = p.table.Identity().Epoch, p.table.Slots(), layout.Version
	st.Models, st.Reserved = s.models, s.reserved
	st.Used, st.Superseded, st.SupersededBytes = 0, 0, 0
	st.Overhead = p.v1.TreeUsage(layout.TableFile)
	measured := func(gen uint64) bool { return gens[gen] != nil && gens[gen].man != nil }
	for _, g := range gens {
		if !measured(g.gen) {
			continue
		}
		st.Used += g.bytes
		if !s.named[g.gen] {
			st.Superseded++
			st.SupersededBytes += g.bytes
		}
	}
	for _, n := range names {
		e, gen, ext, ok := layout.ParseGenName(n)
		ours := ok && e == st.Epoch
		if ours && measured(gen) {
			continue
		}
		u := p.m.TreeUsage(n)
		st.Used += u
		if ok && (!ours || !s.named[gen]) {
			st.SupersededBytes += u
			if ext == layout.ManifestExt {
				st.Superseded++
			}
		}
	}
	st.ModelBytes = st.Used - st.SupersededBytes
	return nil
}

// otherNames is what lies beside v1/.
func (p *place) otherNames() []string {
	names, _ := p.top.Names()
	return slices.DeleteFunc(names, func(n string) bool { return n == layout.Folder })
}

func notExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }
