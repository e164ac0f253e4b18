//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/onecopy/onecopy/internal/crashpoint"
	"github.com/onecopy/onecopy/internal/layout"
)

// link gives the generation its names, the manifest first: its lock protects
// what follows, and only the slot makes it visible.
func (l *loader) link() error {
	gen := layout.GenName(uint64(l.man.Epoch), l.gen)
	n := len(l.plan.files)
	manifest, digests := l.sealed[n], l.sealed[n+1]
	m := l.p.m
	if err := manifest.Link(m, gen+layout.ManifestExt); err != nil {
		return l.linkErr(err) // what has the name, if anything, is not ours to remove
	}
	l.linked = true
	crashpoint.Hit("load.link-manifest")
	if err := digests.Link(m, gen+layout.DigestsExt); err != nil {
		return l.linkErr(err)
	}
	crashpoint.Hit("load.link-digests")
	made := map[string]bool{}
	mkdir := func(dir string) error {
		if made[dir] {
			return nil
		}
		made[dir] = true
		return m.Mkdir(dir, m.Perm()&0o777)
	}
	folder := gen + "/" + l.man.Name
	for _, dir := range []string{gen, folder} {
		if err := mkdir(dir); err != nil {
			return l.linkErr(err)
		}
	}
	crashpoint.Hit("load.mkdir")
	for i, f := range l.man.Files {
		for j, c := range f.Path {
			if c == '/' {
				if err := mkdir(folder + "/" + f.Path[:j]); err != nil {
					return l.linkErr(err)
				}
			}
		}
		if err := l.sealed[i].Link(m, folder+"/"+f.Path); err != nil {
			return l.linkErr(err)
		}
		crashpoint.Hit("load.link-payload")
	}
	return nil
}

// linkErr: a directory that vanished under us means that the registry did.
func (l *loader) linkErr(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		if l.p.isGone() {
			return errGone
		}
		return fmt.Errorf("%w: %w", ErrGone, err)
	}
	return err
}

// publish makes the generation visible: one change of the slot's word.
func (l *loader) publish(ctx context.Context) error {
	ready := layout.MakeWord(layout.Ready, l.gen)
	for {
		var gone []removal
		err := l.p.withTable(ctx, "publish.lock-table", func(t *tx) error {
			w := t.Word(l.slot)
			switch {
			case w == l.word && t.keyIs(l.slot, l.key):
				l.settle(t, l.slot)
				if !t.CompareAndSwap(l.slot, w, ready) {
					return errAgain
				}
			case l.word.State() == layout.Ready:
				// The generation that we replace was evicted meanwhile. Nobody
				// else takes the slot as long as K is ours and room promised; a
				// stranger's change may have moved it all the same.
				slot, w, err := l.look(t, &gone)
				if err != nil {
					return err
				}
				if slot < 0 {
					return errAgain
				}
				if w.State() == layout.Free {
					t.rename(slot, l.key)
					t.IndexInsert(slot, l.key)
					t.newLife(slot)
				}
				l.settle(t, slot)
				if !t.CompareAndSwap(slot, w, ready) {
					return errAgain
				}
				l.slot = slot
				crashpoint.Hit("publish.claim-evicted")
			default:
				return fmt.Errorf("%w: slot %d was changed from %v to %v although its load lock is held", ErrCorrupt, l.slot, l.word, w)
			}
			crashpoint.Hit("publish.ready")
			l.finish(t)
			t.end()
			crashpoint.Hit("publish.unlock-table")
			return nil
		})
		l.p.removeAll(gone)
		if !errors.Is(err, errAgain) {
			return err
		}
	}
}

// newLife clears what ended with the model that a FREE slot held last: only deaths
// and back-off of its key outlive it.
func (t *tx) newLife(slot int) {
	for _, h := range []layout.Hint{
		layout.HintPin, layout.HintTTL, layout.HintPrevious, layout.HintAttaches,
		layout.HintLastAttach, layout.HintLastRelease, layout.HintIdleSince,
	} {
		t.SetHint(slot, h, 0)
	}
}

// settle stores what has to be true as soon as the word changes: a loader that is
// killed right after that has not failed, and an undo must not go back too far.
func (l *loader) settle(t *tx, slot int) {
	previous := uint64(0)
	if l.old.State() == layout.Ready {
		previous = l.old.Generation()
	}
	t.SetHint(slot, layout.HintPrevious, previous)
	t.SetHint(slot, layout.HintLoadStart, 0)
}

// finish stores the hints and counters of a finished load. T is held.
func (l *loader) finish(t *tx) {
	for _, h := range []layout.Hint{
		layout.HintDeaths, layout.HintRetryAfter, layout.HintPromised, layout.HintReserved,
		layout.HintLoaderPID, layout.HintIdleSince,
	} {
		t.SetHint(l.slot, h, 0)
	}
	t.SetHint(l.slot, layout.HintBytes, uint64(l.man.Bytes))
	t.SetHint(l.slot, layout.HintLastAttach, now())
	if l.old.State() == layout.Ready {
		t.Count(layout.CountReplaced, 1)
	}
	t.Count(layout.CountLoads, 1)
	t.Count(layout.CountLoadNanos, uint64(time.Since(l.started)))
	t.Count(layout.CountLoadBytes, uint64(l.man.Bytes))
	t.Count(layout.CountCollapsedBytes, uint64(l.man.Fill.Collapsed))
	t.Count(layout.CountFallbacks, uint64(l.man.Fill.Fallbacks))
}

// abort undoes a load that failed: what was linked goes, the manifest first, and
// the slot becomes free. Should T not be had within a moment, the next holder of
// K does it.
func (l *loader) abort() {
	for _, c := range l.closing {
		_ = c()
	}
	l.closing = nil
	crashpoint.Hit("abort.drop-files")
	gen := layout.GenName(l.p.table.Identity().Epoch, l.gen)
	if l.linked {
		_ = l.p.m.Unlink(gen + layout.ManifestExt)
		crashpoint.Hit("abort.unlink-manifest")
		l.p.removeAll([]removal{{name: gen, by: byAbort}})
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	p := l.p
	if p.isGone() {
		// Of the registry as it is now the table may still be the same.
		now, err := l.h.here()
		if err != nil {
			return
		}
		defer now.unref()
		if now.stat.Ino != p.stat.Ino || now.table.Identity() != p.table.Identity() {
			return
		}
		p = now
	}
	_ = p.withTable(ctx, "abort.lock-table", func(t *tx) error {
		if !t.keyIs(l.slot, l.key) || l.word.State() == layout.Loading && t.Word(l.slot) != l.word {
			return nil
		}
		for _, h := range []layout.Hint{layout.HintPromised, layout.HintReserved, layout.HintLoaderPID, layout.HintLoadStart} {
			t.SetHint(l.slot, h, 0)
		}
		if l.word.State() == layout.Loading {
			t.free(l.slot, l.word)
		}
		t.Count(layout.CountLoadErrors, 1)
		crashpoint.Hit("abort.free")
		return nil
	})
}
