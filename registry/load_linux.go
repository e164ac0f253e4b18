//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/edsrzf/mmap-go"
	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/crashpoint"
	"github.com/onecopy/onecopy/internal/digest"
	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/lockfile"
	"github.com/onecopy/onecopy/shm"
)

// No death march: after maxDeaths killed loaders in a row the next attempt has
// to wait, twice as long each time.
const (
	maxDeaths  = 3
	firstPause = 10 * time.Second
	longPause  = 5 * time.Minute
)

// memoryStep is how much a load allocates between two looks at the memory that
// is left.
const memoryStep = 4 << 20

// noteEvery is how many bytes a load fills before it tells the table again how
// many are still to come. Tests lower it.
var noteEvery int64 = 256 << 20

type loadingKey struct{} // marks the context of a load function, and of a proof

// getOrLoad attaches key, loading it if need be.
func (r *Registry) getOrLoad(ctx context.Context, key string, src *Source) (a *attachment, loaded bool, err error) {
	if err := layout.ValidKey(key); err != nil {
		return nil, false, err
	}
	if err := src.check(); err != nil {
		return nil, false, err
	}
	begun := time.Now()
	var wait context.Context // of a user who can only read
	for {
		if err := ctx.Err(); err != nil {
			return nil, false, err
		}
		if !src.Replace {
			a, err = r.attach(key)
			if err == nil {
				if err = a.accept(src); err == nil {
					return a, false, nil
				}
				a.unref()
			}
			if !reload(err, src) {
				return nil, false, err
			}
		}
		if no := r.host.cannotWrite; no != nil {
			// What is loaded can be used, and a load that runs awaited. Anything
			// else takes a writer.
			if !errors.Is(no, ErrReadOnly) || src.Replace || !errors.Is(err, ErrNotFound) {
				return nil, false, no
			}
			if wait == nil {
				var cancel context.CancelFunc
				wait, cancel = context.WithTimeout(ctx, r.opts.LoadTimeout)
				defer cancel()
			}
			if err := r.host.awaitForeign(wait, key); err != nil {
				return nil, false, err
			}
			continue
		}
		if ctx.Value(loadingKey{}) != nil {
			return nil, false, ErrNestedLoad
		}
		leave, err := r.join(ctx, key, begun)
		if err != nil {
			return nil, false, err
		}
		if leave == nil {
			continue // another goroutine's load ended
		}
		a, loaded, err := func() (*attachment, bool, error) {
			defer leave()
			return r.host.load(ctx, key, src)
		}()
		if errors.Is(err, errAgain) {
			continue
		}
		return a, loaded, err
	}
}

// accept compares the source with the generation, once per process.
func (a *attachment) accept(src *Source) error {
	if a.knows(src) {
		return nil
	}
	err := src.compare(a.manifest)
	if err == nil {
		a.remember(src)
	}
	return err
}

// reload reports whether err is a reason to load although an entry may exist: a
// miss, a changed source that is to be replaced, or a generation that nobody
// can use any more. A manifest that a stranger keeps locked only costs memory.
func reload(err error, src *Source) bool {
	switch {
	case errors.Is(err, ErrNotFound), errors.Is(err, ErrBusy), errors.Is(err, ErrGone), errors.Is(err, ErrCorrupt):
		return true
	case errors.Is(err, ErrSourceChanged):
		return src.OnChange == ChangeReplace
	}
	return false
}

// awaitForeign waits, as a user who can only read, for a load that is running.
func (h *host) awaitForeign(ctx context.Context, key string) error {
	for delay := time.Millisecond; ; delay = min(2*delay, 50*time.Millisecond) {
		var state layout.State
		err := h.each(func(p *place) error {
			f, ok, err := p.find(key)
			if ok {
				state = f.Word.State()
			}
			return err
		})
		switch {
		case err != nil:
			return err
		case state == layout.Ready && delay > time.Millisecond:
			return nil // it was loading before
		case state != layout.Loading && state != layout.Ready:
			return h.cannotWrite
		}
		// READY at the first look although the attach missed: it has just been
		// published, or its manifest is gone, and then this ends with ctx.
		t := time.NewTimer(delay)
		select {
		case <-ctx.Done():
			t.Stop()
			return h.waitErr(ctx.Err(), nil, key)
		case <-t.C:
		}
	}
}

// load is the loader's half of the protocol: it returns with the key's model,
// loaded by this call or by somebody else while it waited.
func (h *host) load(ctx context.Context, key string, src *Source) (a *attachment, loaded bool, err error) {
	plan, err := src.survey()
	if err != nil {
		return nil, false, err
	}
	p, err := h.here()
	if err != nil {
		return nil, false, err
	}
	defer p.unref()
	begun := time.Now()
	wait, cancel := context.WithTimeout(ctx, h.r.opts.LoadTimeout)
	held, err := p.lockKey(wait, layout.Stripe(key))
	cancel()
	if err != nil {
		if errors.Is(err, errGone) {
			return nil, false, errAgain
		}
		return nil, false, h.waitErr(err, p, key)
	}
	defer func() {
		if held != nil {
			_ = held.Unlock()
		}
	}()
	crashpoint.Hit("load.lock-key")

	l := &loader{h: h, p: p, key: key, src: src, plan: plan, replace: src.Replace, started: time.Now()}
	if !src.Replace {
		a, err := p.attach(h.r, key)
		if err == nil {
			if err = a.accept(src); err == nil {
				h.r.stats.attaches.Add(1)
				return h.r.adopt(a), false, nil
			}
			a.unref()
		}
		switch {
		case errors.Is(err, errGone):
			return nil, false, errAgain
		case !reload(err, src):
			return nil, false, err
		}
		l.replace, l.busy = !errors.Is(err, ErrNotFound), errors.Is(err, ErrBusy)
	}
	if time.Since(begun) > time.Second { // the source may have changed while we waited
		if l.plan, err = src.survey(); err != nil {
			return nil, false, err
		}
	}
	a, err = l.run(ctx)
	if errors.Is(err, errGone) || errors.Is(err, errMoved) {
		err = errAgain
	}
	if err != nil {
		var no *NoSpaceError
		if errors.As(err, &no) && no.Leased > 0 {
			no.Holders, _ = p.holders("")
		}
		return nil, false, err
	}
	_ = held.Unlock()
	held = nil
	crashpoint.Hit("publish.unlock-key")
	a = h.r.adopt(a)
	if l.old.State() == layout.Ready {
		h.r.stats.replaced.Add(1)
		_ = p.retire(ctx, l.old.Generation(), false)
	}
	return a, true, nil
}

// waitErr names the process that is loading, as a hint.
func (h *host) waitErr(err error, p *place, key string) error {
	if !errors.Is(err, context.DeadlineExceeded) || p == nil {
		return err
	}
	pid := uint64(0)
	if f, ok, e := p.find(key); ok && e == nil {
		_ = guarded(func() error { pid = p.table.Hint(f.Slot, layout.HintLoaderPID); return nil })
	}
	if pid == 0 {
		return fmt.Errorf("%w: another load holds this key's lock", ErrTimeout)
	}
	return fmt.Errorf("%w: pid %d is loading it, or hangs", ErrTimeout, pid)
}

// loader is one load, from the claim of a slot to publication. K is held.
type loader struct {
	h       *host
	p       *place
	key     string
	src     *Source
	plan    *plan
	replace bool
	busy    bool // replace only because the manifest was found locked
	started time.Time

	slot int
	old  layout.Word // as found; READY when a generation is being replaced
	word layout.Word // LOADING|gen, or READY|old while replacing
	gen  uint64
	need atomic.Int64 // bytes admitted
	more sync.Mutex   // held to have more admitted

	swept bool // what the dead left was collected

	taken   atomic.Int64 // bytes that Reserve was asked for
	trusted atomic.Int64 // of them, since the memory was looked at last
	filled  atomic.Int64
	noted   atomic.Int64 // filled, when the table was told last
	fill    shm.Fill
	man     *layout.Manifest
	sealed  []*shm.Sealed // the files, in the manifest's order
	closing []func() error
	linked  bool
	lease   mmap.MMap
}

func (l *loader) run(ctx context.Context) (a *attachment, err error) {
	defer func() {
		for _, c := range l.closing {
			_ = c()
		}
	}()
	if err := l.claim(ctx); err != nil {
		return nil, err
	}
	published := false
	defer func() {
		// Also when the caller's code panics: this process goes on, so nobody
		// must count its load among the dead.
		if published {
			return
		}
		l.abort()
		switch {
		case a != nil:
			a.detach()
			a = nil
		case l.lease != nil:
			_ = l.lease.Unmap()
		}
	}()
	if err = l.fillAll(ctx); err == nil {
		crashpoint.Hit("load.fill")
		if err = l.link(); err == nil {
			if a, err = l.attach(); err == nil {
				if l.replace || l.src.prove != nil {
					// What has a name is counted by it: publishing may be far.
					l.tellReserved(0)
				}
				if l.src.prove != nil {
					err = l.src.prove(context.WithValue(ctx, loadingKey{}, true), &a.borrowed)
				}
				if err == nil {
					err = l.publish(ctx)
				}
			}
		}
	}
	if err != nil {
		return a, err
	}
	published = true
	a.tie.slot = l.slot
	took := time.Since(l.started)
	s := &l.h.r.stats
	s.loads.Add(1)
	s.loadNanos.Add(int64(took))
	s.bytesLoaded.Add(l.man.Bytes)
	s.fallbacks.Add(uint64(l.man.Fill.Fallbacks))
	return a, nil
}

// attach makes this process's mapping, while the segments are still open.
func (l *loader) attach() (*attachment, error) {
	a := l.p.newAttachment(l.h.r, l.man, l.slot, layout.MakeWord(layout.Ready, l.gen), l.lease)
	a.remember(l.src)
	if len(l.man.Files) == 1 {
		if _, err := a.fileBytes(0); err != nil {
			a.detach()
			l.lease = nil
			return nil, err
		}
	}
	return a, nil
}

// claim takes a slot, a generation and the right to the memory.
func (l *loader) claim(ctx context.Context) error {
	for {
		var gone []removal
		err := l.p.withTable(ctx, "load.lock-table", func(t *tx) (err error) {
			gone, err = l.claimLocked(t)
			return err
		})
		l.p.removeAll(gone)
		if !errors.Is(err, errAgain) {
			return err
		}
		crashpoint.Hit("load.unlock-table")
	}
}

// claimLocked returns errAgain when it made room and memory has to be freed,
// outside T, before the next try.
func (l *loader) claimLocked(t *tx) (gone []removal, err error) {
	first := !l.swept
	if first {
		l.swept = true
		gone = t.collect(&GCReport{})
	}
	gone = append(gone, t.buryStripe(layout.Stripe(l.key), l.key, &l.h.r.stats.takeovers)...)
	slot, w, err := l.look(t, &gone)
	if err != nil {
		return gone, err
	}
	crashpoint.Hit("load.look")
	if slot < 0 || first && len(gone) > 0 {
		// What is gone counts as used until its payload is removed.
		return gone, errAgain
	}
	if deaths := t.Hint(slot, layout.HintDeaths); deaths >= maxDeaths && t.keyIs(slot, l.key) {
		if at, n := t.Hint(slot, layout.HintRetryAfter), now(); at > n && at-n <= uint64(longPause) && !l.p.otherBoot {
			return gone, &LoadFailedError{Deaths: int(deaths), RetryAfter: time.Duration(at - n)}
		}
	}
	need := l.plan.bytes + int64(len(l.plan.files)+2)*4096
	l.need.Store(need)
	evicted, err := l.admit(t, need, true)
	if gone = append(gone, evicted...); err != nil {
		return gone, err
	}
	if l.gen = t.NextGeneration(); l.gen == 0 {
		return gone, fmt.Errorf("%w: every generation number is used up", ErrCorrupt)
	}
	crashpoint.Hit("load.generation")
	l.slot, l.old, l.word = slot, w, w
	if w.State() == layout.Free {
		t.rename(slot, l.key)
		crashpoint.Hit("load.key")
		if !t.IndexInsert(slot, l.key) {
			return gone, fmt.Errorf("%w: the index has no free entry", ErrCorrupt)
		}
		t.newLife(slot)
		t.SetHint(slot, layout.HintBytes, uint64(need))
		l.word = layout.MakeWord(layout.Loading, l.gen)
	}
	t.SetHint(slot, layout.HintReserved, uint64(need))
	t.SetHint(slot, layout.HintLoaderPID, uint64(os.Getpid()))
	t.SetHint(slot, layout.HintLoadStart, now())
	if l.word != w && !t.CompareAndSwap(slot, w, l.word) {
		return gone, errAgain
	}
	crashpoint.Hit("load.claim")
	t.end()
	crashpoint.Hit("load.unlock-table")
	return gone, nil
}

// look finds the slot to load into: the key's own, or a free one. A slot of -1
// asks to look again.
func (l *loader) look(t *tx, gone *[]removal) (slot int, w layout.Word, err error) {
	for range 2 * t.Slots() {
		f, ok := t.lookup(l.key)
		if !ok {
			slot, again, err := t.freeSlot(gone)
			if again {
				slot = -1
			}
			if err != nil || again {
				return slot, 0, err
			}
			return slot, t.Word(slot), nil
		}
		switch {
		case t.Sane(f.Slot) != nil:
			t.Reset(f.Slot)
		case f.Word.State() == layout.Free:
			return f.Slot, f.Word, nil
		case f.Word.State() == layout.Evicting:
			*gone = append(*gone, t.reclaim(f.Slot, f.Word)...)
		case f.Word.State() == layout.Loading:
			// K is ours and buryStripe has seen this slot: a stranger's bytes.
			*gone = append(*gone, t.bury(f.Slot, f.Word)...)
		case !t.hasManifest(f.Word):
			t.free(f.Slot, f.Word)
		case !l.replace:
			// Published since we looked under K: a dead remover's work was undone.
			return 0, 0, errMoved
		case l.busy && t.canLease(f.Word):
			// It was an evictor, or a collector, that looked at many models.
			return 0, 0, errMoved
		default:
			return f.Slot, f.Word, nil
		}
	}
	return 0, 0, fmt.Errorf("%w: the table changes although its lock is held", ErrCorrupt)
}

// canLease reports whether the manifest of a READY slot can be locked by readers.
func (t *tx) canLease(w layout.Word) bool {
	f, _, err := t.p.m.Open(t.genName(w) + layout.ManifestExt)
	if err != nil {
		return false
	}
	defer f.Close()
	return lockfile.TryShared(f) == nil
}

// fillAll makes the segments, the manifest and the digests file, none of which
// has a name yet, and takes the lease.
func (l *loader) fillAll(ctx context.Context) error {
	l.fill.Threads = l.h.r.opts.Threads
	if l.fill.Threads <= 0 {
		l.fill.Threads = min(2, runtime.GOMAXPROCS(0))
	}
	l.fill.Reserve = l.reserve
	l.fill.Progress = l.progress
	var sums [][]byte
	var err error
	if l.src.Load != nil {
		sums, err = l.runLoad(ctx)
	} else {
		sums, err = l.copyAll(ctx)
	}
	if err != nil {
		return err
	}
	var chunks [][layout.DigestSize]byte
	for i := range l.plan.files {
		l.plan.files[i].Digest = digest.Root(l.plan.files[i].Size, sums[i])
		for s := sums[i]; len(s) > 0; s = s[layout.DigestSize:] {
			chunks = append(chunks, [layout.DigestSize]byte(s))
		}
	}
	id := l.p.table.Identity()
	l.man = &layout.Manifest{
		Schema: layout.SchemaVersion, Key: l.key, Name: layout.SafeName(l.key),
		Epoch: layout.Hex64(id.Epoch), Generation: l.gen, Backing: layout.BackingShm,
		ChunkBytes: digest.ChunkBytes, Origin: l.plan.origin,
		LoadedAt: time.Now().UTC().Truncate(time.Millisecond), LoadSeconds: time.Since(l.started).Seconds(),
		Fill: l.fill.Stats(), Files: l.plan.files,
	}
	for _, f := range l.plan.files {
		l.man.Bytes += f.Size
	}
	text, err := l.man.Encode()
	if err != nil {
		return err
	}
	manifest, err := l.small(ctx, layout.ManifestExt, text)
	if err != nil {
		return err
	}
	digests, err := l.small(ctx, layout.DigestsExt, layout.EncodeDigests(l.man, digest.Algorithm, chunks))
	if err != nil {
		return err
	}
	// The lease, before anything has a name: the collector leaves a generation
	// whose manifest is locked alone.
	if err := lockfile.TryShared(manifest.File()); err != nil {
		return err
	}
	if l.lease, err = mmap.MapRegion(manifest.File(), len(text), mmap.RDONLY, 0, 0); err != nil {
		return &fs.PathError{Op: "mmap", Path: manifest.File().Name(), Err: err}
	}
	l.sealed = append(l.sealed, manifest, digests)
	return nil
}

// small makes the manifest or the digests file.
func (l *loader) small(ctx context.Context, ext string, b []byte) (*shm.Sealed, error) {
	p, err := l.p.m.NewPending(layout.GenName(l.p.table.Identity().Epoch, l.gen) + ext)
	if err != nil {
		return nil, err
	}
	defer p.Abort()
	if _, err := p.WriteAt(b, 0); err != nil {
		return nil, err
	}
	return l.seal(ctx, p)
}

func (l *loader) seal(ctx context.Context, p *shm.Pending) (*shm.Sealed, error) {
	s, err := p.Seal(ctx)
	if err == nil {
		l.closing = append(l.closing, s.Close)
	}
	return s, err
}

// copyAll fills one segment per file of the source.
func (l *loader) copyAll(ctx context.Context) (sums [][]byte, err error) {
	for i := range l.plan.files {
		sum, err := l.copyFile(ctx, i)
		if errors.Is(err, shm.ErrWriter) {
			// Somebody, a child of fork for instance, could still write the first
			// copy. Nobody ever had the second one.
			sum, err = l.copyFile(ctx, i)
		}
		if err != nil {
			return nil, err
		}
		sums = append(sums, sum)
	}
	return sums, nil
}

func (l *loader) copyFile(ctx context.Context, i int) ([]byte, error) {
	want := l.plan.files[i]
	// Not blocking, should a FIFO have taken the file's place since the survey.
	src, err := os.OpenFile(l.plan.paths[i], os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, l.sourceErr(err)
	}
	defer src.Close()
	if err := l.unchanged(src, want); err != nil {
		return nil, err
	}
	p, err := l.p.m.NewPending(want.Path)
	if err != nil {
		return nil, err
	}
	defer p.Abort()
	sum, err := p.Copy(ctx, src, want.Size, &l.fill)
	if err != nil {
		return nil, err
	}
	if err := l.unchanged(src, want); err != nil {
		return nil, err
	}
	s, err := l.seal(ctx, p)
	if err != nil {
		return nil, err
	}
	l.sealed = append(l.sealed, s)
	return sum, nil
}

func (l *loader) unchanged(src *os.File, want layout.ManifestFile) error {
	fi, err := src.Stat()
	switch {
	case err != nil:
		return l.sourceErr(err)
	case !fi.Mode().IsRegular():
		return fmt.Errorf("%w: %s is a %s now", ErrSource, src.Name(), describe(fi.Mode()))
	case fi.Size() != want.Size:
		return fmt.Errorf("%w: %s changed during the load: %d bytes, then %d", ErrSource, src.Name(), want.Size, fi.Size())
	case fi.ModTime().UnixNano() != want.ModTime:
		return fmt.Errorf("%w: %s was written to during the load", ErrSource, src.Name())
	}
	return nil
}

func (l *loader) sourceErr(err error) error {
	if errors.Is(err, ErrLimit) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrSource, err)
}

// reserve is asked before every window: is the memory still there? The claim
// admitted the model as a whole, but the tmpfs and the cgroup have other users.
func (l *loader) reserve(n int64, again bool) error {
	if !again {
		if taken := l.taken.Add(n); taken > l.need.Load() {
			if err := l.extend(taken); err != nil {
				l.taken.Add(-n)
				return err
			}
		}
	}
	// The files that tell cost more to read than a small file to copy.
	if l.trusted.Add(n) < memoryStep && !again {
		return nil
	}
	l.trusted.Store(0)
	return l.checkMemory(n)
}

// progress tells the caller, and now and then the table, how far the load is.
func (l *loader) progress(n int64) {
	done := l.filled.Add(n)
	if l.src.Progress != nil {
		l.src.Progress(done, l.plan.bytes)
	}
	if last := l.noted.Load(); done-last >= noteEvery && l.noted.CompareAndSwap(last, done) {
		l.tellReserved(max(0, l.need.Load()-done))
	}
}

// tellReserved tells the table, if it can be had at once, how many bytes are
// still to be allocated.
func (l *loader) tellReserved(n int64) {
	_ = l.p.tryTable("load.note", func(t *tx) error {
		if t.keyIs(l.slot, l.key) {
			t.SetHint(l.slot, layout.HintReserved, uint64(n))
		}
		return nil
	})
}

// link gives the generation its names, the manifest first: its lock protects
// what follows, and only the slot makes it visible.
func (l *loader) link() error {
	gen := layout.GenName(uint64(l.man.Epoch), l.gen)
	n := len(l.plan.files)
	manifest, digests := l.sealed[n], l.sealed[n+1]
	m := l.p.m
	l.linked = true
	if err := manifest.Link(m, gen+layout.ManifestExt); err != nil {
		return l.linkErr(err)
	}
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
				// The generation that we replace was evicted meanwhile, and the
				// slot may be another key's by now. K is still ours.
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
			l.note(t)
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

// note stores the hints and counters of a finished load. T is held.
func (l *loader) note(t *tx) {
	for h, v := range map[layout.Hint]uint64{
		layout.HintBytes: uint64(l.man.Bytes), layout.HintDeaths: 0, layout.HintRetryAfter: 0,
		layout.HintReserved: 0, layout.HintLoaderPID: 0,
		layout.HintLastAttach: now(), layout.HintIdleSince: 0,
	} {
		t.SetHint(l.slot, h, v)
	}
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
		l.p.removeAll([]removal{{gen, byAbort}})
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
		for _, h := range []layout.Hint{layout.HintReserved, layout.HintLoaderPID, layout.HintLoadStart} {
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
