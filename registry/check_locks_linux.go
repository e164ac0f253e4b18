//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/procfs"
	"github.com/onecopy/onecopy/lockfile"
)

// Whoever may read a manifest may lock it, and for as long as he likes: nothing is
// broken by that, but somebody has to be told who it is. As all that comes from
// /proc this is for display; the kernel names the process that took a lock, which
// may have handed it on.

// findBusy finds, under T, where none of us locks a manifest exclusively, those that
// are. A reader's lock of a moment is in nobody's way there.
func (c *checker) findBusy() {
	var ready []uint64
	for slot := range c.p.table.Slots() {
		if w := c.p.table.Word(slot); w.State() == layout.Ready {
			ready = append(ready, w.Generation())
		}
	}
	epoch, busy := c.p.table.Identity().Epoch, make([]bool, len(ready))
	parallel(len(ready), func(i int) {
		busy[i] = c.p.staysLocked(layout.GenName(epoch, ready[i]) + layout.ManifestExt)
	})
	c.busy = map[uint64]bool{}
	for i, gen := range ready {
		c.busy[gen] = busy[i]
	}
}

// locks names who keeps a generation locked: exclusively, so that nobody can get
// it, or shared and as another user, so that its memory stays.
func (c *checker) locks() {
	s, err := c.p.slots("")
	if err != nil {
		return // structure has said so
	}
	names, err := c.p.m.Names()
	if err != nil {
		return
	}
	ready := map[uint64]bool{}
	for i := range s.entries {
		if s.entries[i].State == layout.Ready.String() {
			ready[s.entries[i].Generation] = true
		}
	}
	held := locksOf()
	gens := c.p.lookAt(c.p.withManifest(names, s), nil, false)
	for _, gen := range slices.Sorted(maps.Keys(gens)) {
		g := gens[gen]
		if g.man == nil || s.named[gen] && !ready[gen] { // in the making, or being removed
			continue
		}
		path := g.name + layout.ManifestExt
		busy := c.busy[gen]
		if c.busy == nil && (!procfs.SeesEverybody() || slices.ContainsFunc(held[g.id], isExclusive)) {
			busy = c.p.staysLocked(path)
		}
		if busy && ready[gen] {
			c.add("lock", g.man.Key, c.p.m.Join(path), "end that process; until then a load of the key replaces the model",
				"locked exclusively by %s: nobody can get the model", c.holder(g.id))
			continue
		}
		seen := map[int]bool{}
		for _, l := range held[g.id] {
			if !seen[l.PID] {
				seen[l.PID] = true
				c.foreign(g, l.PID)
			}
		}
	}
}

func isExclusive(l procfs.Lock) bool { return l.Exclusive }

// locksOf are the locks that the kernel lists, by file.
func locksOf() map[procfs.FileID][]procfs.Lock {
	locks, _ := procfs.Locks()
	held := map[procfs.FileID][]procfs.Lock{}
	for _, l := range locks {
		if l.Type == "FLOCK" && !l.Waiting {
			held[l.File()] = append(held[l.File()], l)
		}
	}
	return held
}

// foreign notes a lease of a user other than the one that writes.
func (c *checker) foreign(g *generation, pid int) {
	if c.only != "" && c.only != g.man.Key || !c.isForeign(pid) {
		return
	}
	pr, ok := c.process(pid)
	if !ok {
		return
	}
	c.problems = append(c.problems, Problem{
		Kind: "lock", Key: g.man.Key, Path: c.p.m.Join(g.name + layout.ManifestExt), Note: true,
		Text: "leased by " + nameProcess(pr) + ", another user: its memory stays until that process lets go",
	})
}

// isForeign reports whether a process is that of a user other than the one that
// writes, and root. Most are not, so only the user is asked for, once.
func (c *checker) isForeign(pid int) bool {
	foreign, known := c.foreigners[pid]
	if !known {
		uid, err := procfs.UID(pid)
		foreign = err == nil && uid > 0 && uint32(uid) != c.p.top.Owner()
		if c.foreigners == nil {
			c.foreigners = map[int]bool{}
		}
		c.foreigners[pid] = foreign
	}
	return foreign
}

// process describes one, once.
func (c *checker) process(pid int) (*procfs.Proc, bool) {
	pr, known := c.processes[pid]
	if !known {
		if p, err := procfs.Process(pid); err == nil {
			pr = &p
		}
		if c.processes == nil {
			c.processes = map[int]*procfs.Proc{}
		}
		c.processes[pid] = pr
	}
	return pr, pr != nil
}

// staysLocked reports whether a manifest stays exclusively locked for as long as a
// reader would try. An evictor or a collector holds it for a moment only.
func (p *place) staysLocked(name string) bool {
	for try := range 4 {
		fd, _, err := p.m.OpenFD(name)
		if err != nil {
			return false
		}
		err = lockfile.TrySharedFD(fd)
		unix.Close(fd)
		if !errors.Is(err, lockfile.ErrLocked) {
			return false
		}
		time.Sleep(time.Millisecond << (2 * try))
	}
	return true
}

// tableHolder names who holds T.
func (c *checker) tableHolder() string {
	st, err := c.p.w.Stat(layout.TableLock)
	if err != nil {
		return unseen
	}
	return c.holder(fileOf(&st))
}

const unseen = "a process that is not visible from here"

// holder names who took the exclusive lock of a file. The kernel lists a page of
// its locks at a time, and may leave one out when others come and go meanwhile.
func (c *checker) holder(file procfs.FileID) string {
	for range 10 {
		for _, l := range locksOf()[file] {
			if !l.Exclusive {
				continue
			}
			if pr, ok := c.process(l.PID); ok {
				return nameProcess(pr)
			}
			return fmt.Sprintf("pid %d", l.PID)
		}
		time.Sleep(time.Millisecond)
	}
	return unseen
}

func nameProcess(pr *procfs.Proc) string {
	return fmt.Sprintf("pid %d (%s) of uid %d", pr.PID, clip(pr.Command, 60), pr.UID)
}
