//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/crashpoint"
	"github.com/onecopy/onecopy/internal/digest"
	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/lockfile"
	"github.com/onecopy/onecopy/shm"
)

// tie binds an attachment to the place it came from.
type tie struct {
	place *place
	slot  int
	word  layout.Word
	dir   string      // below m/: <epoch>-<gen>/<name>
	lease shm.Mapping // of the manifest: the kernel keeps the shared lock as long as it is mapped
}

// mapped is a file of a model, mapped or not yet.
type mapped struct {
	m    shm.Mapping
	done bool
}

// attach maps the published generation of key.
func (r *Registry) attach(key string) (*attachment, error) {
	if err := layout.ValidKey(key); err != nil {
		return nil, err
	}
	mu := r.host.attachLock(key)
	mu.Lock()
	defer mu.Unlock()
	if a := r.hit(key); a != nil { // another goroutine was faster
		return a, nil
	}
	r.stats.misses.Add(1)
	var a *attachment
	err := r.host.each(func(p *place) (err error) {
		a, err = p.attach(r, key)
		return err
	})
	if err != nil {
		return nil, err
	}
	r.stats.attaches.Add(1)
	r.setLocal(a)
	return a, nil
}

func (h *host) attachLock(key string) *sync.Mutex {
	return &h.attaching[xxhash.Sum64String(key)%uint64(len(h.attaching))]
}

// adopt is setLocal for the result of a load. If another goroutine has attached
// the same generation since it was published, its mapping is the process's, and a
// is given back for it.
func (r *Registry) adopt(a *attachment) *attachment {
	mu := r.host.attachLock(a.key)
	mu.Lock()
	defer mu.Unlock()
	b := (*r.local.Load())[a.key]
	if b == nil || b.tie.place != a.tie.place || b.tie.word != a.tie.word || !b.ref() {
		r.setLocal(a)
		return a
	}
	if k := a.known.Load(); k != nil {
		b.known.Store(k)
	}
	a.unref()
	return b
}

// attach is the reader's half of the protocol: no lock is held, no permission to
// write is needed. ErrNotFound, ErrBusy, ErrGone, ErrCorrupt, errGone.
func (p *place) attach(r *Registry, key string) (*attachment, error) {
	busy := 0
	for try := 0; try < 10_000; try++ {
		a, err := p.attachOnce(r, key)
		switch {
		case err == nil:
			p.touch(a.tie.slot)
			return a, nil
		case errors.Is(err, errMoved):
			r.stats.retries.Add(1)
			busy = 0
		case errors.Is(err, lockfile.ErrLocked):
			// An evictor or collector tries the lock for a moment; a stranger
			// may hold it for ever.
			if busy++; busy == 4 {
				return nil, ErrBusy
			}
			r.stats.retries.Add(1)
			time.Sleep(50 * time.Microsecond << (2 * busy))
		case p.isGone() && !errors.Is(err, ErrLimit):
			return nil, errGone
		default:
			return nil, err
		}
	}
	return nil, ErrBusy
}

func (p *place) attachOnce(r *Registry, key string) (*attachment, error) {
	f, ok, err := p.find(key)
	if err != nil {
		return nil, err
	}
	if !ok || f.Word.State() != layout.Ready {
		return nil, ErrNotFound
	}
	moved := func(otherwise error) error {
		if w, ok := p.word(f.Slot); !ok || w != f.Word {
			return errMoved
		}
		return otherwise
	}
	name := layout.GenName(p.table.Identity().Epoch, f.Word.Generation()) + layout.ManifestExt
	fd, st, err := p.m.OpenFD(name)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, moved(ErrNotFound)
		}
		return nil, err
	}
	defer unix.Close(fd)
	crashpoint.Hit("acquire.open-manifest")
	if err := lockfile.TrySharedFD(fd); err != nil {
		if errors.Is(err, lockfile.ErrLocked) {
			return nil, moved(err)
		}
		return nil, err
	}
	crashpoint.Hit("acquire.lease")
	if err := moved(nil); err != nil {
		return nil, err
	}
	man, err := readManifestFD(fd, name, &st)
	if err != nil {
		man, err = readManifestFD(fd, p.m.Join(name), &st) // for the message
	}
	if err == nil && st.Nlink == 0 {
		err = ErrNotFound
	}
	if err == nil && (man.Key != key || man.Generation != f.Word.Generation() || uint64(man.Epoch) != p.table.Identity().Epoch) {
		err = fmt.Errorf("%w: the manifest %s describes key %q, generation %d", ErrCorrupt, p.m.Join(name), man.Key, man.Generation)
	}
	if err != nil {
		return nil, moved(err)
	}
	lease, err := shm.Map(fd, st.Size, false)
	if err != nil {
		return nil, &fs.PathError{Op: "mmap", Path: p.m.Join(name), Err: err}
	}
	crashpoint.Hit("acquire.map")
	a := p.newAttachment(r, man, f.Slot, f.Word, lease)
	if len(man.Files) == 1 { // the others when they are asked for: docs/adr/0005
		if _, err := a.fileBytes(0); err != nil {
			a.detach()
			return nil, moved(err)
		}
	}
	return a, nil
}

// newAttachment takes over the lease and a reference on p.
func (p *place) newAttachment(r *Registry, man *layout.Manifest, slot int, word layout.Word, lease shm.Mapping) *attachment {
	a := newAttachment(r, man)
	p.ref()
	dir := layout.GenName(uint64(man.Epoch), man.Generation) + "/" + man.Name
	a.tie = tie{place: p, slot: slot, word: word, dir: dir, lease: lease}
	a.path = p.m.Join(dir)
	return a
}

// readManifest reads and validates a manifest by read(), which a truncated file
// cannot turn into a fault.
func readManifest(f *os.File) (*layout.Manifest, *unix.Stat_t, error) {
	var st unix.Stat_t
	man, err := readManifestFD(int(f.Fd()), f.Name(), &st)
	return man, &st, err
}

func readManifestFD(fd int, path string, st *unix.Stat_t) (*layout.Manifest, error) {
	if err := unix.Fstat(fd, st); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return decodeManifestFD(fd, path, st.Size)
}

// decodeManifestFD reads a manifest of which the size is known.
func decodeManifestFD(fd int, path string, size int64) (*layout.Manifest, error) {
	if size == 0 || size > layout.MaxManifest {
		return nil, fmt.Errorf("%w: %s has %d bytes", ErrCorrupt, path, size)
	}
	b := make([]byte, size)
	for at := 0; at < len(b); {
		n, err := unix.Pread(fd, b[at:], int64(at))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, &fs.PathError{Op: "read", Path: path, Err: err}
		case n == 0:
			return nil, fmt.Errorf("%s: %w", path, ErrCorrupt)
		default:
			at += n
		}
	}
	man, err := layout.DecodeManifest(b)
	if err != nil && !errors.Is(err, ErrVersion) {
		err = fmt.Errorf("%w: %s: %w", ErrCorrupt, path, err)
	}
	return man, err
}

// touch notes that the slot's model was attached: hints, written without T.
func (p *place) touch(slot int) {
	if p.w == nil {
		return
	}
	n := uint64(0)
	if guarded(func() error { n = p.table.Hint(slot, layout.HintAttaches); return nil }) == nil {
		p.writeHints(slot, hint{layout.HintLastAttach, now()}, hint{layout.HintAttaches, n + 1})
	}
}

type hint struct {
	h layout.Hint
	v uint64
}

// writeHints stores hints with one aligned 8-byte write each.
func (p *place) writeHints(slot int, hs ...hint) {
	fd, st, err := p.v1.OpenWritableFD(layout.TableFile)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if st.Size != p.stat.Size {
		return
	}
	for _, h := range hs {
		var b [8]byte
		binary.LittleEndian.PutUint64(b[:], h.v)
		_, _ = unix.Pwrite(fd, b[:], layout.HintOffset(p.table.Slots(), slot, h.h))
	}
}

// current reports whether a's generation is still the published one.
func (a *attachment) current() bool {
	w, ok := a.tie.place.word(a.tie.slot)
	return ok && w == a.tie.word && !a.tie.place.gone.Load()
}

// orphaned reports whether the registry that a came from was deleted.
func (a *attachment) orphaned() bool { return a.tie.place.isGone() }

// fileBytes maps file i, once.
func (a *attachment) fileBytes(i int) ([]byte, error) {
	f := &a.files.maps[i]
	if f.done {
		return f.m.Bytes, nil
	}
	p, name, want := a.tie.place, a.tie.dir+"/"+a.manifest.Files[i].Path, a.manifest.Files[i].Size
	fd, st, err := p.m.OpenFD(name)
	if err != nil {
		return nil, lost(err)
	}
	defer unix.Close(fd)
	if st.Size != want {
		return nil, fmt.Errorf("%w: %s has %d bytes, published were %d", ErrCorrupt, p.m.Join(name), st.Size, want)
	}
	m, err := shm.Map(fd, want, a.r.opts.Populate)
	if err != nil {
		return nil, err
	}
	*f = mapped{m: m, done: true}
	return m.Bytes, nil
}

// lost says that a missing file was deleted by a third party.
func lost(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrGone, err)
	}
	return err
}

// detach unmaps everything, the lease last. What nobody names any more is
// removed; there is no context, so T is only tried.
func (a *attachment) detach() {
	for i := range a.files.maps {
		_ = a.files.maps[i].m.Unmap()
	}
	_ = a.tie.lease.Unmap()
	crashpoint.Hit("use.release")
	p := a.tie.place
	defer p.unref()
	h := &a.r.host
	if !p.mine || p.gone.Load() {
		return
	}
	w, ok := p.word(a.tie.slot)
	published := ok && w == a.tie.word
	if published {
		p.writeHints(a.tie.slot, hint{layout.HintLastRelease, now()})
		if !p.expires(a.tie.slot) {
			return
		}
	}
	switch {
	case h.cannotWrite(p) != nil:
	case published:
		p.expire()
	default:
		p.retireSoon(a.tie.word.Generation())
	}
}

// expires reports whether a process that has just released the model of slot
// should look for models past their TTL: not where nothing ever expires.
func (p *place) expires(slot int) (some bool) {
	_ = guarded(func() error {
		some = p.table.DefaultTTL() != 0 || p.table.Hint(slot, layout.HintTTL) != 0
		return nil
	})
	return some
}

// expire evicts what is past its TTL.
func (p *place) expire() {
	var gone []removal
	_ = p.tryTable("collect.lock-table", func(t *tx) error {
		gone, _ = t.expire()
		return nil
	})
	p.removeAll(gone)
}

// lease opens the manifest once more and locks it shared.
func (a *attachment) lease() (*os.File, error) {
	gen := layout.GenName(uint64(a.manifest.Epoch), a.manifest.Generation)
	f, st, err := a.tie.place.m.Open(gen + layout.ManifestExt)
	if err != nil {
		return nil, lost(err)
	}
	if err = lockfile.TryShared(f); err == nil && st.Nlink == 0 {
		err = ErrGone
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// verify digests every chunk of every file again.
func (a *attachment) verify(ctx context.Context) error {
	chunks, err := a.chunkDigests()
	if err != nil {
		return err
	}
	a.files.Lock()
	defer a.files.Unlock()
	for i, f := range a.manifest.Files {
		if root := digest.Root(f.Size, chunks[i]); root != f.Digest {
			return fmt.Errorf("%w: %s: its chunk digests make %s, the manifest says %s", ErrCorrupt, f.Path, root, f.Digest)
		}
		b, err := a.fileBytes(i)
		if err != nil {
			return err
		}
		for off := int64(0); off < f.Size; off += digest.ChunkBytes {
			if err := ctx.Err(); err != nil {
				return err
			}
			var sum [digest.Size]byte
			err := guarded(func() error {
				sum = digest.Sum(b[off:min(off+digest.ChunkBytes, f.Size)])
				return nil
			})
			n := off / digest.ChunkBytes
			if err == nil && [digest.Size]byte(chunks[i][n*digest.Size:]) != sum {
				err = fmt.Errorf("%w: bytes %d to %d differ from what was loaded", ErrCorrupt, off, min(off+digest.ChunkBytes, f.Size))
			}
			if err != nil {
				return fmt.Errorf("%s: chunk %d: %w", f.Path, n, err)
			}
		}
	}
	return nil
}

func (a *attachment) chunkDigests() ([][]byte, error) {
	gen := layout.GenName(uint64(a.manifest.Epoch), a.manifest.Generation)
	f, st, err := a.tie.place.m.Open(gen + layout.DigestsExt)
	if err != nil {
		return nil, lost(err)
	}
	defer f.Close()
	var chunks int64
	for _, mf := range a.manifest.Files {
		chunks += layout.ChunkCount(mf.Size, a.manifest.ChunkBytes)
	}
	if st.Size > (chunks+8)*layout.DigestSize {
		return nil, fmt.Errorf("%w: %s has %d bytes", ErrCorrupt, f.Name(), st.Size)
	}
	b, err := io.ReadAll(f)
	if err != nil {
		return nil, err
	}
	perFile, err := layout.DecodeDigests(b, a.manifest, digest.Algorithm)
	if err != nil && !errors.Is(err, ErrVersion) {
		err = fmt.Errorf("%w: %s: %w", ErrCorrupt, f.Name(), err)
	}
	return perFile, err
}
