//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"cmp"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/procfs"
)

// Everything here is for display: it takes no lock and may be overtaken while it
// runs.

// Entries lists what the table names, by key.
func (r *Registry) Entries() (entries []Entry, err error) {
	err = r.host.each(func(p *place) error {
		entries, err = p.entries("")
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
		es, err := p.entries(key)
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

func (p *place) entries(only string) (entries []Entry, err error) {
	leased := p.leasedGenerations()
	err = guarded(func() error {
		t := p.table
		n := now()
		if p.otherBoot {
			n = 0 // no time of the table means anything
		}
		for slot := range t.Slots() {
			w := t.Word(slot)
			if w.State() == layout.Free || !w.State().Valid() {
				continue
			}
			key, ok := t.Key(slot)
			if !ok || only != "" && key != only {
				continue
			}
			h := func(h layout.Hint) uint64 { return t.Hint(slot, h) }
			e := Entry{
				Key: key, State: w.State().String(), Generation: w.Generation(), Bytes: int64(h(layout.HintBytes)),
				Leased: leased[w.Generation()], Pinned: h(layout.HintPin) != 0, TTL: time.Duration(h(layout.HintTTL)),
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
			if w.State() == layout.Ready {
				if man, err := p.manifest(w.Generation()); err == nil {
					i := info(man, p.m.Join(layout.GenName(uint64(man.Epoch), man.Generation)+"/"+man.Name))
					i.AlreadyPresent = true
					e.Info, e.Bytes = &i, man.Bytes
				}
			}
			entries = append(entries, e)
		}
		return nil
	})
	slices.SortFunc(entries, func(a, b Entry) int { return strings.Compare(a.Key, b.Key) })
	return entries, err
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

// manifests maps the file of each manifest below m/ to its generation.
func (p *place) manifests() map[procfs.FileID]uint64 {
	gens := map[procfs.FileID]uint64{}
	names, _ := p.m.Names()
	for _, n := range names {
		epoch, gen, ext, ok := layout.ParseGenName(n)
		if !ok || ext != layout.ManifestExt || epoch != p.table.Identity().Epoch {
			continue
		}
		if st, err := p.m.Stat(n); err == nil {
			gens[procfs.FileID{Dev: uint64(st.Dev), Inode: st.Ino}] = gen
		}
	}
	return gens
}

// leasedGenerations reads the kernel's list of locks instead of trying them: a
// try, however short, could make a reader believe that the model is busy.
func (p *place) leasedGenerations() map[uint64]bool {
	gens := p.manifests()
	leased := map[uint64]bool{}
	locks, _ := procfs.Locks()
	for _, l := range locks {
		if gen, ok := gens[l.File()]; ok && l.Type == "FLOCK" && !l.Waiting {
			leased[gen] = true
		}
	}
	return leased
}

// Holders lists the processes that hold a lease on key, or on any model if key
// is "", as far as this process may look into them.
func (r *Registry) Holders(key string) ([]Holder, error) {
	rep, err := r.HolderReport(key)
	return rep.Holders, err
}

// HolderReport is Holders with what could not be seen.
func (r *Registry) HolderReport(key string) (rep HolderReport, err error) {
	if key != "" {
		if err := layout.ValidKey(key); err != nil {
			return rep, opErr("holders", key, err)
		}
	}
	err = r.host.each(func(p *place) error {
		rep, err = p.holderReport(key)
		if err == nil && key == "" {
			p.addUnlinked(&rep)
		}
		return err
	})
	return rep, opErr("holders", key, err)
}

// holders is for those who decide nothing by it either.
func (p *place) holders(only string) ([]Holder, error) {
	rep, err := p.holderReport(only)
	return rep.Holders, err
}

func (p *place) holderReport(only string) (rep HolderReport, err error) {
	type who struct {
		pid int
		gen uint64
	}
	want := map[procfs.FileID]struct{}{}
	gens := map[procfs.FileID]uint64{}
	keys := map[uint64]string{}
	payload := map[procfs.FileID]uint64{}
	for id, gen := range p.manifests() {
		man, err := p.manifest(gen)
		if err != nil || only != "" && man.Key != only {
			continue
		}
		want[id], gens[id], keys[gen] = struct{}{}, gen, man.Key
		dir := layout.GenName(uint64(man.Epoch), gen) + "/" + man.Name + "/"
		for _, f := range man.Files {
			if st, err := p.m.Stat(dir + f.Path); err == nil {
				payload[procfs.FileID{Dev: uint64(st.Dev), Inode: st.Ino}] = gen
			}
		}
	}
	if len(want) == 0 {
		return rep, nil
	}
	via := map[who]string{}
	maps, hidden, err := procfs.FindMappings(want)
	if err != nil {
		return rep, err
	}
	rep.Hidden = hidden
	for _, m := range maps {
		via[who{m.PID, gens[m.File]}] = "mapping"
	}
	fds, _, err := procfs.FindDescriptors(want)
	if err != nil {
		return rep, err
	}
	for _, d := range fds {
		if w := (who{d.PID, gens[d.File]}); via[w] == "" {
			via[w] = "descriptor"
		}
	}
	locks, _ := procfs.Locks()
	leased := map[uint64]bool{}
	for _, l := range locks {
		gen, ok := gens[l.File()]
		if !ok || l.Waiting {
			continue
		}
		leased[gen] = true
		if l.PID <= 0 {
			continue
		}
		if w := (who{l.PID, gen}); via[w] == "" {
			// The kernel names the process that took the lock. It may be dead, or
			// have handed its descriptor to a child, who is listed above.
			if _, err := procfs.Resident(l.PID, want); err == nil || notExist(err) || errors.Is(err, unix.ESRCH) {
				continue
			}
			via[w] = "lock"
		}
	}
	payloadWant := map[procfs.FileID]struct{}{}
	for id := range payload {
		payloadWant[id] = struct{}{}
	}
	for w := range via {
		delete(leased, w.gen)
	}
	rep.Unseen = len(leased)
	for w, how := range via {
		h := Holder{Key: keys[w.gen], Generation: w.gen, PID: w.pid, Via: how}
		if pr, err := procfs.Process(w.pid); err == nil {
			h.Command, h.UID, h.Since, h.Visible, h.Cgroup = pr.Command, pr.UID, pr.Start, how != "lock", pr.CgroupPath
		}
		if res, err := procfs.Resident(w.pid, payloadWant); err == nil {
			for id, r := range res {
				if payload[id] == w.gen {
					h.Resident += r.RSS
					h.Proportional += r.PSS
				}
			}
		}
		rep.Holders = append(rep.Holders, h)
	}
	sortHolders(rep.Holders)
	return rep, nil
}

func sortHolders(hs []Holder) {
	slices.SortFunc(hs, func(a, b Holder) int {
		return cmp.Or(strings.Compare(a.Key, b.Key), cmp.Compare(a.Generation, b.Generation), cmp.Compare(a.PID, b.PID))
	})
}

// addUnlinked adds those who map what was deleted below m/: memory that has no
// name any more is still used.
func (p *place) addUnlinked(rep *HolderReport) {
	type who struct {
		pid int
		gen uint64
	}
	at := map[who]int64{}
	size := map[procfs.FileID]int64{}
	files, _ := procfs.FindUnlinked(p.m.Path())
	for _, f := range files {
		name, _, _ := strings.Cut(strings.TrimPrefix(f.Path, p.m.Path()+"/"), "/")
		epoch, gen, _, ok := layout.ParseGenName(name)
		if !ok || epoch != p.table.Identity().Epoch {
			gen = 0
		}
		at[who{f.PID, gen}] += f.Bytes
		size[f.File] = max(size[f.File], f.Bytes)
	}
	for _, n := range size {
		rep.Unlinked += n
	}
	for w, n := range at {
		h := Holder{Generation: w.gen, PID: w.pid, Resident: n, Via: "unlinked"}
		if pr, err := procfs.Process(w.pid); err == nil {
			h.Command, h.UID, h.Since, h.Visible, h.Cgroup = pr.Command, pr.UID, pr.Start, true, pr.CgroupPath
		}
		rep.Holders = append(rep.Holders, h)
	}
	sortHolders(rep.Holders)
}

// Counters reads what all processes counted in the registry.
func (r *Registry) Counters() (c Counters, err error) {
	err = r.host.each(func(p *place) error {
		return guarded(func() error {
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
	})
	return c, opErr("counters", "", err)
}

// Stats counts what this process did and measures the registry.
func (r *Registry) Stats() (Stats, error) {
	s := r.localStats()
	err := r.host.each(func(p *place) error {
		if err := guarded(func() (err error) {
			s.Budget, s.Free, s.Size, err = p.budget(p.table)
			return err
		}); err != nil {
			return err
		}
		s.Epoch, s.Slots, s.LayoutVersion = p.table.Identity().Epoch, p.table.Slots(), layout.Version
		named := map[uint64]bool{}
		s.Models, s.Reserved = 0, 0
		if err := guarded(func() error {
			for slot := range p.table.Slots() {
				w := p.table.Word(slot)
				if w.State() == layout.Free {
					continue
				}
				named[w.Generation()] = true
				s.Reserved += int64(p.table.Hint(slot, layout.HintReserved))
				if w.State() == layout.Ready {
					s.Models++
				}
			}
			return nil
		}); err != nil {
			return err
		}
		names, err := p.m.Names()
		if err != nil {
			return err
		}
		s.Used, s.Superseded, s.SupersededBytes = 0, 0, 0
		s.Overhead = p.v1.TreeUsage(layout.TableFile)
		for _, n := range names {
			u := p.m.TreeUsage(n)
			s.Used += u
			if e, gen, ext, ok := layout.ParseGenName(n); ok && (e != s.Epoch || !named[gen]) {
				s.SupersededBytes += u
				if ext == layout.ManifestExt {
					s.Superseded++
				}
			}
		}
		s.ModelBytes = s.Used - s.SupersededBytes
		return nil
	})
	return s, opErr("stats", "", err)
}

// otherNames is what lies beside v1/.
func (p *place) otherNames() []string {
	names, _ := p.top.Names()
	return slices.DeleteFunc(names, func(n string) bool { return n == layout.Folder })
}

func notExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }
