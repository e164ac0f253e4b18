//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/digest"
	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/lockfile"
	"github.com/onecopy/onecopy/shm"
)

// fillAll makes the segments, the manifest and the digests file, none of which
// has a name yet, and takes the lease.
func (l *loader) fillAll(ctx context.Context) error {
	l.fill.Threads = l.h.r.opts.Threads
	if l.fill.Threads <= 0 {
		l.fill.Threads = min(2, runtime.GOMAXPROCS(0))
	}
	l.fill.Reserve = func(n int64, again bool) error { return tooLate(l.reserve(n, again)) } // a load function sees it
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
		return fmt.Errorf("%w: %w", ErrLimit, err) // names, version and environment are too long
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
	if l.lease, err = shm.Map(int(manifest.File().Fd()), int64(len(text)), false); err != nil {
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
	return l.checkMemory(max(n, min(memoryStep, l.plan.bytes-l.filled.Load()))) // up to the next look
}

// progress tells the caller, and now and then the table, how far the load is.
func (l *loader) progress(n int64) {
	done := l.filled.Add(n)
	if l.src.Progress != nil {
		l.src.Progress(done, l.plan.bytes)
	}
	if last := l.noted.Load(); done-last >= noteEvery && l.noted.CompareAndSwap(last, done) {
		l.note(uint64(max(0, l.need.Load()-done)), layout.HintReserved)
	}
}

// note stores n in hints of the running load if the table can be had at once.
func (l *loader) note(n uint64, hints ...layout.Hint) {
	_ = l.p.tryTable("load.note", func(t *tx) error {
		if t.keyIs(l.slot, l.key) {
			for _, h := range hints {
				t.SetHint(l.slot, h, n)
			}
		}
		return nil
	})
}
