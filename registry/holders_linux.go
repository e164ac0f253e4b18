//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"cmp"
	"slices"
	"strings"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/procfs"
)

// For display only, like all that is read from /proc.

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
		rep, err = p.holdersNow(key)
		return err
	})
	return rep, opErr("holders", key, err)
}

// holders is for those who decide nothing by it either.
func (p *place) holders(only string) ([]Holder, error) {
	rep, err := p.holdersNow(only)
	return rep.Holders, err
}

func (p *place) holdersNow(only string) (rep HolderReport, err error) {
	names, err := p.m.Names()
	if err != nil {
		return rep, err
	}
	gens := p.lookAt(p.withManifest(names, &slots{}), nil, true)
	locks, _ := procfs.Locks()
	return p.holderReport(only, gens, locks, new(procfs.Surveyor))
}

// holderReport looks through the processes for holders of the generations. One
// whose manifest cannot be read has none: its key is not known.
func (p *place) holderReport(only string, gens map[uint64]*generation, locks []procfs.Lock, survey *procfs.Surveyor) (rep HolderReport, err error) {
	q := procfs.Query{Want: map[procfs.FileID]struct{}{}, Weigh: map[procfs.FileID]struct{}{}, Likely: map[int]struct{}{}}
	if only == "" {
		q.Deleted = p.m.Path()
	}
	owner := map[procfs.FileID]*generation{} // of manifests and files
	for _, g := range gens {
		if g.man == nil || only != "" && g.man.Key != only {
			continue
		}
		q.Want[g.id], owner[g.id] = struct{}{}, g
		for _, id := range g.files {
			q.Weigh[id], owner[id] = struct{}{}, g
		}
	}
	leased := map[uint64]bool{}
	locks = slices.DeleteFunc(slices.Clone(locks), func(l procfs.Lock) bool {
		_, ours := q.Want[l.File()]
		return !ours || l.Waiting
	})
	for _, l := range locks {
		leased[owner[l.File()].gen] = true
		if l.PID > 0 {
			q.Likely[l.PID] = struct{}{}
		}
	}
	for _, g := range gens {
		if _, ours := q.Want[g.id]; ours && !leased[g.gen] && p.leasedOutside(g.gen) {
			leased[g.gen] = true
		}
	}
	uses, hidden, err := survey.Run(q)
	if err != nil {
		return rep, err
	}
	rep.Hidden, rep.Outside = len(hidden), !procfs.SeesEverybody()
	for i := range uses {
		for _, h := range holdersOf(&uses[i], owner) {
			rep.Holders = append(rep.Holders, h)
			delete(leased, h.Generation)
		}
	}
	for _, l := range locks {
		// The kernel names the process that took the lock. It may be dead, or have
		// handed its descriptor to a child, who is found as any other.
		if _, is := slices.BinarySearch(hidden, l.PID); !is {
			continue
		}
		g := owner[l.File()]
		h := Holder{Key: g.man.Key, Generation: g.gen, PID: l.PID, Via: "lock"}
		if pr, err := procfs.Process(l.PID); err == nil {
			h.describe(&pr)
			h.Visible = false
		}
		if !slices.Contains(rep.Holders, h) {
			rep.Holders = append(rep.Holders, h)
		}
		delete(leased, g.gen)
	}
	rep.Unseen = len(leased)
	p.addUnlinked(&rep, uses, owner)
	for i := range rep.Holders {
		h := &rep.Holders[i]
		if g := gens[h.Generation]; h.Key == "" && g != nil && g.man != nil { // only its files are gone
			h.Key = g.man.Key
		}
	}
	sortHolders(rep.Holders)
	return rep, nil
}

// holdersOf says which generations a process holds.
func holdersOf(u *procfs.Use, owner map[procfs.FileID]*generation) (hs []Holder) {
	at := map[uint64]int{}
	add := func(files []procfs.FileID, via string) {
		for _, id := range files {
			g := owner[id]
			if g == nil { // deleted since somebody looked into the process
				continue
			}
			if _, is := at[g.gen]; is {
				continue
			}
			at[g.gen] = len(hs)
			h := Holder{Key: g.man.Key, Generation: g.gen, PID: u.PID, Via: via}
			h.describe(&u.Proc)
			hs = append(hs, h)
		}
	}
	add(u.Mapped, "mapping")
	add(u.Open, "descriptor")
	for _, w := range u.Weights {
		g := owner[w.File]
		if g == nil {
			continue
		}
		if i, is := at[g.gen]; is {
			hs[i].Resident += w.RSS
			hs[i].Proportional += w.PSS
		}
	}
	return hs
}

func (h *Holder) describe(pr *procfs.Proc) {
	h.Command, h.UID, h.Since, h.Visible, h.Cgroup = pr.Command, pr.UID, pr.Start, true, pr.CgroupPath
}

func sortHolders(hs []Holder) {
	slices.SortFunc(hs, func(a, b Holder) int {
		return cmp.Or(strings.Compare(a.Key, b.Key), cmp.Compare(a.Generation, b.Generation), cmp.Compare(a.PID, b.PID))
	})
}

// addUnlinked adds those who map what was deleted below m/: memory that has no
// name any more is still used. What the loader of a model maps has a name, but
// not the one by which the loader opened it.
func (p *place) addUnlinked(rep *HolderReport, uses []procfs.Use, owner map[procfs.FileID]*generation) {
	size := map[procfs.FileID]int64{}
	for i := range uses {
		u := &uses[i]
		at := map[uint64]int64{}
		for _, f := range u.Unlinked {
			if owner[f.File] != nil {
				continue
			}
			name, _, _ := strings.Cut(strings.TrimPrefix(f.Path, p.m.Path()+"/"), "/")
			epoch, gen, _, ok := layout.ParseGenName(name)
			if !ok || epoch != p.table.Identity().Epoch {
				gen = 0
			}
			at[gen] += f.Bytes
			size[f.File] = max(size[f.File], f.Bytes)
		}
		for gen, n := range at {
			h := Holder{Generation: gen, PID: u.PID, Resident: n, Via: "unlinked"}
			h.describe(&u.Proc)
			rep.Holders = append(rep.Holders, h)
		}
	}
	for _, n := range size {
		rep.Unlinked += n
	}
}
