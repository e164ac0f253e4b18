//go:build !linux || !(amd64 || arm64) || onecopy_private

package registry

// Where models cannot be shared between processes: the same calls, with one
// private copy per process. Sharing says so, and so does the log.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/onecopy/onecopy/internal/digest"
	"github.com/onecopy/onecopy/internal/layout"
)

var errPrivate = fmt.Errorf("%w: models are private to this process on %s/%s: sharing needs Linux on amd64 or arm64", errors.ErrUnsupported, runtime.GOOS, runtime.GOARCH)

type host struct {
	mu     sync.Mutex
	gen    uint64
	models map[string]*attachment // published; one reference each
}

type tie struct{ h *host }

type mapped struct{ b []byte }

func (h *host) open(r *Registry) error {
	if r.opts.MustExist {
		return fmt.Errorf("%w: %w", ErrNoRegistry, errPrivate)
	}
	h.models = map[string]*attachment{}
	if r.opts.Logger != nil {
		r.opts.Logger.Warn("onecopy: models are private to this process", slog.Any("reason", errPrivate))
	}
	return nil
}

func (h *host) close() error {
	h.mu.Lock()
	models := h.models
	h.models = nil
	h.mu.Unlock()
	for _, a := range models {
		a.unref()
	}
	return nil
}

// Sharing is nil where models are shared with other processes; here it says why
// they are private to this process.
func (r *Registry) Sharing() error { return errPrivate }

func (r *Registry) attach(key string) (*attachment, error) {
	if err := layout.ValidKey(key); err != nil {
		return nil, err
	}
	r.stats.misses.Add(1)
	h := &r.host
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.models == nil {
		return nil, ErrClosed
	}
	a := h.models[key]
	if a == nil || !a.ref() {
		return nil, ErrNotFound
	}
	r.setLocal(a)
	return a, nil
}

func (r *Registry) getOrLoad(ctx context.Context, key string, src *Source) (*attachment, bool, error) {
	if err := src.check(); err != nil {
		return nil, false, err
	}
	begun := time.Now()
	for {
		if err := ctx.Err(); err != nil {
			return nil, false, err
		}
		a, err := r.attach(key)
		if err == nil && !src.Replace {
			if a.knows(src) {
				return a, false, nil
			}
			if err = src.compare(a.manifest); err == nil {
				a.remember(src)
				return a, false, nil
			}
		}
		if a != nil {
			a.unref()
		}
		if err != nil && !errors.Is(err, ErrNotFound) && (!errors.Is(err, ErrSourceChanged) || src.OnChange != ChangeReplace) {
			return nil, false, err
		}
		if ctx.Value(loadingKey{}) != nil {
			return nil, false, ErrNestedLoad
		}
		leave, err := r.join(ctx, key, begun)
		if err != nil {
			return nil, false, err
		}
		if leave == nil {
			continue
		}
		return func() (*attachment, bool, error) {
			defer leave()
			if !src.Replace { // the load before ours may have ended since we looked
				if a, err := r.attach(key); err == nil {
					if a.knows(src) || src.compare(a.manifest) == nil {
						return a, false, nil
					}
					a.unref()
				}
			}
			a, err := r.load(ctx, key, src)
			return a, err == nil, err
		}()
	}
}

type loadingKey struct{} // marks the context of a load function

func (r *Registry) load(ctx context.Context, key string, src *Source) (*attachment, error) {
	begun := time.Now()
	plan, err := src.survey()
	if err != nil {
		return nil, err
	}
	var contents [][]byte
	path := ""
	if src.Load != nil {
		contents, err = private(ctx, src, plan)
	} else {
		if path = plan.origin.Path; len(plan.paths) == 1 && plan.paths[0] == path {
			path = filepath.Dir(path)
		}
		contents, err = read(ctx, src, plan)
	}
	if err != nil {
		return nil, err
	}
	h := &r.host
	h.mu.Lock()
	h.gen++
	man := &layout.Manifest{
		Schema: layout.SchemaVersion, Key: key, Name: layout.SafeName(key), Epoch: 1, Generation: h.gen,
		Backing: "private", ChunkBytes: digest.ChunkBytes, Origin: plan.origin,
		LoadedAt: time.Now().UTC(), LoadSeconds: time.Since(begun).Seconds(), Files: plan.files,
	}
	h.mu.Unlock()
	for i, b := range contents {
		man.Files[i].Digest = digest.Root(int64(len(b)), sums(b))
		man.Bytes += int64(len(b))
	}
	man.Fill.Copied = man.Bytes
	a := newAttachment(r, man)
	a.tie.h, a.path = h, path
	for i, b := range contents {
		a.files.maps[i].b = b
	}
	a.remember(src)
	a.ref() // the published one
	h.mu.Lock()
	old := h.models[key]
	if h.models == nil {
		h.mu.Unlock()
		return nil, ErrClosed
	}
	h.models[key] = a
	h.mu.Unlock()
	if old != nil {
		old.unref()
	}
	r.setLocal(a)
	r.stats.loads.Add(1)
	r.stats.loadNanos.Add(int64(time.Since(begun)))
	r.stats.bytesLoaded.Add(man.Bytes)
	return a, nil
}

func read(ctx context.Context, src *Source, p *plan) (contents [][]byte, err error) {
	if err := tooLarge(p.bytes); err != nil {
		return nil, err
	}
	var done int64
	for i, path := range p.paths {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrSource, err)
		}
		if int64(len(b)) != p.files[i].Size {
			return nil, fmt.Errorf("%w: %s changed during the load", ErrSource, path)
		}
		contents = append(contents, b)
		if done += int64(len(b)); src.Progress != nil {
			src.Progress(done, p.bytes)
		}
	}
	return contents, nil
}

// maxPrivate is more memory than a process gets: to ask for more is no error in Go,
// but the end of the process.
const maxPrivate = 1 << 40

// tooLarge is ErrLimit for a model, or a file of one, that is too large to try.
func tooLarge(n int64) error {
	if n > maxPrivate {
		return fmt.Errorf("%w: %d bytes of private memory", ErrLimit, n)
	}
	return nil
}

// buffer is a file that a load function writes into private memory.
type buffer struct {
	mu   sync.Mutex
	b    []byte
	size int64
	pos  int64
}

func (f *buffer) Write(b []byte) (int, error) {
	f.mu.Lock()
	off := f.pos
	f.pos += int64(len(b))
	f.mu.Unlock()
	return f.WriteAt(b, off)
}

func (f *buffer) WriteAt(b []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	limit := f.size
	if limit < 0 {
		limit = math.MaxInt64
	}
	if off < 0 || off > limit-int64(len(b)) {
		return 0, fmt.Errorf("%w: %d bytes at %d are beyond the declared size %d", ErrSource, len(b), off, limit)
	}
	end := off + int64(len(b))
	if err := tooLarge(end); err != nil {
		return 0, err
	}
	if end > int64(len(f.b)) {
		f.b = append(f.b, make([]byte, end-int64(len(f.b)))...)
	}
	return copy(f.b[off:], b), nil
}

// finish returns the file: what nobody wrote of its size is zero.
func (f *buffer) finish() []byte {
	if f.size > int64(len(f.b)) {
		f.b = append(f.b, make([]byte, f.size-int64(len(f.b)))...)
	}
	return f.b
}

func private(ctx context.Context, src *Source, p *plan) (contents [][]byte, err error) {
	var files []*buffer
	w := &Writer{ctx: context.WithValue(ctx, loadingKey{}, true)}
	w.create = func(path string, size int64) (segmentWriter, error) {
		if err := tooLarge(size); err != nil {
			return nil, err
		}
		f := &buffer{size: size}
		files = append(files, f)
		return f, nil
	}
	defer w.end()
	err = src.Load(w.ctx, w)
	w.end()
	if err != nil {
		return nil, fmt.Errorf("%w: the load function: %w", ErrSource, inTime(ctx, err))
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("%w: the load function wrote no file", ErrSource)
	}
	var done int64
	for i, f := range files {
		b := f.finish()
		if done += int64(len(b)); src.Progress != nil {
			src.Progress(done, p.bytes)
		}
		p.files = append(p.files, layout.ManifestFile{Path: w.names[i], Size: int64(len(b))})
		contents = append(contents, b)
	}
	return contents, ctx.Err()
}

func sums(b []byte) (sums []byte) {
	for len(b) > 0 {
		n := min(len(b), digest.ChunkBytes)
		s := digest.Sum(b[:n])
		sums, b = append(sums, s[:]...), b[n:]
	}
	return sums
}

func (a *attachment) current() bool {
	a.tie.h.mu.Lock()
	defer a.tie.h.mu.Unlock()
	return a.tie.h.models[a.key] == a
}

func (a *attachment) orphaned() bool { return false }

func (a *attachment) detach() {}

func (a *attachment) fileBytes(i int) ([]byte, error) { return a.files.maps[i].b, nil }

func (a *attachment) lease() (*os.File, error) { return nil, errPrivate }

func (a *attachment) verify(ctx context.Context) error {
	for i, f := range a.manifest.Files {
		if err := ctx.Err(); err != nil {
			return err
		}
		if root := digest.Root(f.Size, sums(a.files.maps[i].b)); root != f.Digest {
			return fmt.Errorf("%w: %s: digest %s, loaded was %s", ErrCorrupt, f.Path, root, f.Digest)
		}
	}
	return nil
}

// Remove forgets the model; its memory goes with its last user.
func (r *Registry) Remove(ctx context.Context, key string) error {
	h := &r.host
	h.mu.Lock()
	a := h.models[key]
	switch {
	case a == nil:
		h.mu.Unlock()
		return opErr("remove", key, ErrNotFound)
	case a.references() > 1:
		h.mu.Unlock()
		return opErr("remove", key, &InUseError{Holders: []Holder{{Key: key, Generation: a.manifest.Generation, PID: os.Getpid(), Via: "mapping", Visible: true}}})
	}
	delete(h.models, key)
	h.mu.Unlock()
	a.unref()
	return nil
}

// GC has nothing to do in private memory.
func (r *Registry) GC(ctx context.Context) (GCReport, error) { return GCReport{}, nil }

// Entries lists the models of this process, by key.
func (r *Registry) Entries() (entries []Entry, err error) {
	r.host.mu.Lock()
	defer r.host.mu.Unlock()
	for key, a := range r.host.models {
		i := info(a.manifest, a.path)
		entries = append(entries, Entry{Key: key, State: layout.Ready.String(), Generation: a.manifest.Generation, Bytes: a.bytes, Leased: a.references() > 1, Info: &i})
	}
	slices.SortFunc(entries, func(a, b Entry) int { return strings.Compare(a.Key, b.Key) })
	return entries, nil
}

// Entry describes one key. ErrNotFound.
func (r *Registry) Entry(key string) (Entry, error) {
	es, _ := r.Entries()
	for _, e := range es {
		if e.Key == key {
			return e, nil
		}
	}
	return Entry{}, opErr("stat", key, ErrNotFound)
}

// Holders is empty: nobody else can hold private memory.
func (r *Registry) Holders(key string) ([]Holder, error) { return nil, nil }

// HolderReport is empty.
func (r *Registry) HolderReport(key string) (HolderReport, error) { return HolderReport{}, nil }

// Check verifies the digests when opts.Data; nothing else can break.
func (r *Registry) Check(ctx context.Context, opts CheckOptions) (ps []Problem, err error) {
	if !opts.Data {
		return nil, nil
	}
	es, _ := r.Entries()
	for _, e := range es {
		if opts.Key != "" && e.Key != opts.Key {
			continue
		}
		if m, err := r.Get(e.Key); err == nil {
			if err := m.Verify(ctx); err != nil {
				ps = append(ps, Problem{Kind: "digest", Key: e.Key, Text: err.Error()})
			}
			m.Close()
		}
	}
	return ps, ctx.Err()
}

// Stats counts what this process did.
func (r *Registry) Stats() (Stats, error) {
	s := r.localStats()
	es, _ := r.Entries()
	for _, e := range es {
		s.Models++
		s.Used += e.Bytes
	}
	s.LayoutVersion = layout.Version
	return s, nil
}

// watchMemory is empty: there is nothing to find.
type watchMemory struct{}

func (w *Watch) look(bool) (o Overview, rep HolderReport, err error) {
	o.Entries, _ = w.r.Entries()
	o.Stats, err = w.r.Stats()
	return o, rep, err
}
