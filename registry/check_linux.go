//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/procfs"
	"github.com/onecopy/onecopy/lockfile"
)

// Repairs that Check proposes.
const (
	repairGC     = "shmctl gc"
	repairReload = "shmctl rm KEY, then load it again"
	repairDelete = "remove the directory when no process uses it; models load anew"
)

// Check looks for every broken invariant: in the table, and between the table,
// the manifests, the payload and the locks. It changes nothing;
// with opts.Data each model is attached, which counts as a use. With T obtainable
// within a second it sees one moment; otherwise what it lists may be in motion.
//
// Errors: ErrNotFound (opts.Key), ErrReadOnly never; an empty list means sound.
func (r *Registry) Check(ctx context.Context, opts CheckOptions) (ps []Problem, err error) {
	if opts.Key != "" {
		if _, err := r.Entry(opts.Key); err != nil {
			return nil, err
		}
	}
	err = r.host.each(func(p *place) error {
		c := &checker{p: p, only: opts.Key}
		quick, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		err := ErrReadOnly
		if p.w != nil {
			err = p.withTable(quick, "check.lock-table", func(*tx) error {
				err := c.structure()
				c.findBusy()
				return err
			})
		}
		if err != nil && !errors.Is(err, errGone) && ctx.Err() == nil {
			c.problems = nil
			switch {
			case errors.Is(err, context.DeadlineExceeded):
				c.add("lock", "", p.w.Join(layout.TableLock), repairHolder, "the table lock could not be had for a second: %s holds it, and is stopped or hangs", c.tableHolder())
			case errors.Is(err, ErrCorrupt), errors.Is(err, ErrVersion): // of all keys
				c.problems = append(c.problems, Problem{Kind: "table", Path: p.v1.Join(layout.TableFile), Text: err.Error(), Repair: repairDelete})
			}
			err = guarded(c.structure)
		}
		if err == nil {
			c.locks()
		}
		ps = c.problems
		return err
	})
	if err == nil && opts.Data {
		more, e := r.checkData(ctx, opts.Key)
		ps, err = append(ps, more...), e
	}
	return ps, opErr("check", opts.Key, err)
}

// otherVersion reports whether name is the folder of a layout version. (A regular
// expression would be compiled by every process that starts.)
func otherVersion(name string) bool {
	number, is := strings.CutPrefix(name, "v")
	return is && number != "" && strings.Trim(number, "0123456789") == ""
}

type checker struct {
	p        *place
	only     string
	problems []Problem

	busy      map[uint64]bool      // READY generations that are locked exclusively; nil: not known
	processes map[int]*procfs.Proc // that were asked about; nil: not there

	foreigners map[int]bool // processes of other users; false: of none
}

func (c *checker) add(kind, key, path, repair, text string, args ...any) {
	if c.only == "" || key == c.only {
		c.problems = append(c.problems, Problem{Kind: kind, Key: key, Path: path, Text: fmt.Sprintf(text, args...), Repair: repair})
	}
}

func (c *checker) structure() error {
	t, m := c.p.table, c.p.m
	tablePath := c.p.v1.Join(layout.TableFile)
	if g := t.Generation(); g >= layout.MaxGen {
		c.add("table", "", tablePath, repairGC, "the generation counter says %d: every number is used up", g)
	}
	for _, pr := range t.Problems() {
		key, _ := "", false
		if pr.Slot >= 0 {
			key, _ = t.Key(pr.Slot)
		}
		c.add("table", key, tablePath, repairGC, "slot %d: %s", pr.Slot, pr.Text)
	}
	for _, n := range c.p.otherNames() {
		if otherVersion(n) {
			if c.only == "" {
				c.problems = append(c.problems, Problem{Kind: "version", Path: c.p.top.Join(n), Text: "holds another layout version: it is neither read nor counted here", Note: true})
			}
			continue
		}
		c.add("leftover", "", c.p.top.Join(n), repairName, "belongs to no layout version")
	}
	if err := c.lockFiles(); err != nil {
		return err
	}
	names, err := m.Names()
	if err != nil {
		return err
	}
	have := map[string]bool{}
	for _, n := range names {
		have[n] = true
	}
	id := t.Identity()
	named := map[uint64]bool{}
	type published struct {
		key string
		gen uint64
	}
	var ready []published
	for slot := range t.Slots() {
		w := t.Word(slot)
		key, ok := t.Key(slot)
		if w.State() == layout.Free || !ok {
			continue
		}
		gen := layout.GenName(id.Epoch, w.Generation())
		named[w.Generation()] = true
		switch w.State() {
		case layout.Loading:
			if c.keyFree(key) {
				c.add("loading", key, tablePath, repairGC, "slot %d: its loader died", slot)
			}
		case layout.Evicting:
			c.add("evicting", key, tablePath, repairGC, "slot %d: its remover died", slot)
		case layout.Ready:
			if !have[gen+layout.ManifestExt] {
				c.add("manifest", key, m.Join(gen+layout.ManifestExt), repairGC, "missing although the slot is READY: a third party deleted it")
				continue
			}
			ready = append(ready, published{key, w.Generation()})
			if t.Hint(slot, layout.HintLoadStart) != 0 && c.keyFree(key) {
				c.add("loading", key, tablePath, repairGC, "slot %d: the loader of a replacement died", slot)
			}
		}
	}
	found := make([]checker, len(ready))
	parallel(len(ready), func(i int) {
		found[i] = checker{p: c.p, only: c.only}
		found[i].generation(ready[i].key, ready[i].gen)
	})
	for i := range found {
		c.problems = append(c.problems, found[i].problems...)
	}
	for _, n := range names {
		epoch, gen, ext, ok := layout.ParseGenName(n)
		if ok && epoch == id.Epoch && named[gen] {
			continue
		}
		stem := layout.GenName(epoch, gen)
		switch {
		case ok && ext == layout.ManifestExt:
			f, _, err := m.Open(n)
			switch {
			case notExist(err): // removed since
			case err != nil:
				c.add("leftover", "", m.Join(n), repairGC, "no slot names this generation: %v", err)
			default:
				if lockfile.TryExclusive(f) == nil {
					c.add("leftover", "", m.Join(n), repairGC, "no slot names this generation and nobody leases it")
				}
				f.Close()
			}
		case ok && have[stem+layout.ManifestExt]:
		default:
			if _, err := m.Stat(stem + layout.ManifestExt); ok && err == nil {
				continue // in the making: it was linked after the listing passed its place
			}
			c.add("leftover", "", m.Join(n), repairGC, "belongs to no generation")
		}
	}
	return nil
}

// keyFree reports whether nobody holds the load lock of key.
func (c *checker) keyFree(key string) bool {
	return c.p.w != nil && c.p.keyFree(key)
}

// generation checks the files of a READY generation against its manifest.
func (c *checker) generation(key string, gen uint64) {
	m, id := c.p.m, c.p.table.Identity()
	name := layout.GenName(id.Epoch, gen)
	man, err := c.p.manifest(gen)
	if err != nil {
		if errors.Is(err, ErrUntrusted) { // nothing here opens it, not even to remove it
			c.add("manifest", key, m.Join(name+layout.ManifestExt), repairUnlink, "%v", err)
			return
		}
		c.add("manifest", key, m.Join(name+layout.ManifestExt), repairReload, "%v", err)
		return
	}
	if man.Key != key || man.Generation != gen || uint64(man.Epoch) != id.Epoch {
		c.add("manifest", key, m.Join(name+layout.ManifestExt), repairReload, "describes key %q, generation %d", man.Key, man.Generation)
		return
	}
	if _, err := m.Stat(name + layout.DigestsExt); err != nil {
		c.add("digest", key, m.Join(name+layout.DigestsExt), repairReload, "missing: the contents cannot be verified")
	}
	for _, f := range man.Files {
		path := name + "/" + man.Name + "/" + f.Path
		st, err := m.Stat(path)
		switch {
		case notExist(err):
			c.add("payload", key, m.Join(path), repairReload, "missing: a third party deleted it")
		case err != nil:
			c.add("payload", key, m.Join(path), repairReload, "%v", err)
		case st.Mode&unix.S_IFMT != unix.S_IFREG:
			c.add("payload", key, m.Join(path), repairReload, "is no regular file")
		case st.Size != f.Size:
			c.add("payload", key, m.Join(path), repairReload, "has %d bytes, published were %d", st.Size, f.Size)
		case st.Mode&0o222 != 0:
			c.add("payload", key, m.Join(path), repairMode, "is writable (mode %#o)", st.Mode&0o777)
		}
	}
	c.strangers(key, name, man)
}

// checkData digests the payload again, under a lease.
func (r *Registry) checkData(ctx context.Context, only string) (ps []Problem, err error) {
	entries, err := r.Entries()
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if e.State != layout.Ready.String() || only != "" && e.Key != only {
			continue
		}
		m, err := r.Get(e.Key)
		if errors.Is(err, ErrNotFound) || errors.Is(err, ErrBusy) {
			continue // removed meanwhile, or locks names who holds it
		}
		if err == nil {
			err = m.Verify(ctx)
			path := m.Path()
			m.Close()
			if err == nil {
				continue
			}
			if ctx.Err() != nil {
				return ps, ctx.Err()
			}
			ps = append(ps, Problem{Kind: "digest", Key: e.Key, Path: path, Text: err.Error(), Repair: repairReload})
			continue
		}
		ps = append(ps, Problem{Kind: "payload", Key: e.Key, Text: err.Error(), Repair: repairReload})
	}
	return ps, nil
}
