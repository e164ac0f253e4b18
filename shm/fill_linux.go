//go:build amd64 || arm64

package shm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/digest"
	"github.com/onecopy/onecopy/internal/layout"
)

// A window is what is allocated, collapsed into 2 MiB pages and filled at a
// time. One collapse call per window, because each call waits for every CPU.
const (
	chunkBytes = digest.ChunkBytes
	smallFile  = 4 << 20 // below it plain writes are as good
)

// Fill says how a segment is to be filled and counts what happened. One Fill
// may serve several files at once.
type Fill struct {
	// Threads that fill windows at the same time, at least 1.
	Threads int
	// Reserve is called before n further bytes are allocated, from any of the
	// threads; an error ends the fill. again says that an attempt to get 2 MiB
	// pages failed: the memory may have run out since the first call, and a
	// write beyond a cgroup's limit is no error but a signal.
	Reserve func(n int64, again bool) error
	// Progress is called with the number of bytes that were filled since the
	// last call, from any of the threads.
	Progress func(n int64)

	collapsed, copied, direct, fallbacks atomic.Int64
}

// Stats are the bytes filled so far by the way they took.
func (f *Fill) Stats() layout.Fill {
	return layout.Fill{Collapsed: f.collapsed.Load(), Copied: f.copied.Load(), Direct: f.direct.Load(), Fallbacks: int(f.fallbacks.Load())}
}

// Copy fills p with the size bytes of src and returns the digest of each chunk,
// taken right after the chunk was read. The segment has exactly size bytes. A
// source that is shorter is ErrSource; ctx ends the copy between chunks.
func (p *Pending) Copy(ctx context.Context, src *os.File, size int64, f *Fill) ([]byte, error) {
	s := newSource(src, size)
	defer s.close()
	c := &copying{p: p, src: s, f: f, sums: make([]byte, layout.ChunkCount(size, chunkBytes)*digest.Size)}
	if size < smallFile {
		if err := f.reserve(size, false); err != nil {
			return nil, err
		}
		err := c.plain(ctx, 0, size, false, new([]byte))
		if s.cold {
			s.forget(0, size)
		}
		return c.sums, err
	}
	if err := unix.Ftruncate(int(p.f.Fd()), size); err != nil {
		return nil, p.wrap("truncate", err)
	}
	window, threads := int64(warmWindow), f.Threads
	if s.direct.Load() != nil {
		// The threads wait for the disk, not for the processor.
		window, threads = coldWindow, coldThreads
	}
	return c.sums, eachWindow(ctx, size, window, threads, c.window)
}

// copying is one Copy.
type copying struct {
	p    *Pending
	src  *source
	f    *Fill
	sums []byte
}

// eachWindow calls fn for the windows of a file of size bytes, on up to threads
// goroutines, and returns the first error.
func eachWindow(ctx context.Context, size, window int64, threads int, fn func(ctx context.Context, off, n int64, buf *[]byte) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	windows := (size + window - 1) / window
	var next atomic.Int64
	fill := func() error {
		var buf []byte
		for {
			w := next.Add(1) - 1
			if w >= windows {
				return nil
			}
			if err := ended(ctx); err != nil {
				return err
			}
			off := w * window
			if err := fn(ctx, off, min(window, size-off), &buf); err != nil {
				return err
			}
		}
	}
	var first error
	var once sync.Once
	work := func() {
		// Until fill returns: a callback may panic, or call runtime.Goexit.
		err := fmt.Errorf("%w: Progress or Reserve did not return", ErrSource)
		defer func() {
			if err != nil {
				once.Do(func() { first = err })
				cancel()
			}
		}()
		err = fill()
	}
	var wg sync.WaitGroup
	for range min(int64(max(threads, 1)), windows) - 1 {
		wg.Go(work)
	}
	defer wg.Wait() // also when work panics: the caller then closes what the others use
	work()
	wg.Wait()
	return first
}

// ended is the error of a context that is over, and the cause if it has one: who
// cancels may name a cause, and who loads asks for context.Canceled.
func ended(ctx context.Context) error {
	err, cause := ctx.Err(), context.Cause(ctx)
	if err == nil || cause == nil || errors.Is(err, cause) {
		return err
	}
	return fmt.Errorf("%w: %w", err, cause)
}

// window fills [off, off+n): whole 2 MiB blocks through a mapping of collapsed
// pages, the rest by plain writes.
func (c *copying) window(ctx context.Context, off, n int64, buf *[]byte) (err error) {
	if err := c.f.reserve(n, false); err != nil {
		return err
	}
	cold := c.src.uncached(off, n, 4)
	m, err := c.p.hugeWindow(off, n, false, c.f)
	if err != nil {
		return err
	}
	defer func() {
		if e := m.Unmap(); err == nil && e != nil {
			err = c.p.wrap("munmap", e)
		}
	}()
	huge := int64(len(m.Bytes))
	at := int64(0) // how far the window is filled; always at a chunk
	for ; at+chunkBytes <= huge && err == nil; at += chunkBytes {
		err = c.hugeChunk(ctx, m.Bytes[at:at+chunkBytes], off+at, cold)
	}
	if err == nil && at < huge {
		// The last chunk of the file: some 2 MiB pages, then perhaps a tail.
		err = c.mixedChunk(ctx, m.Bytes[at:huge], off+at, n-at, cold, buf)
		at = n
	}
	if err == nil && at < n {
		err = c.plain(ctx, off+at, n-at, cold, buf)
	}
	if cold {
		c.src.forget(off, n)
	}
	return err
}

// hugeChunk reads and digests one chunk that lies wholly in 2 MiB pages.
func (c *copying) hugeChunk(ctx context.Context, b []byte, off int64, cold bool) error {
	if err := ended(ctx); err != nil {
		return err
	}
	if c.src.hole(off, int64(len(b))) { // the pages are zero already
		putSum(c.sums, off, zeroSum())
	} else {
		direct, err := c.src.read(b, off, cold)
		if err != nil {
			return err
		}
		if direct {
			c.f.direct.Add(int64(len(b)))
		}
		putSum(c.sums, off, digest.Sum(b))
	}
	c.f.done(&c.f.collapsed, len(b))
	return nil
}

// mixedChunk fills a chunk of n bytes whose first part, head, lies in 2 MiB pages.
func (c *copying) mixedChunk(ctx context.Context, head []byte, off, n int64, cold bool, buf *[]byte) error {
	if err := ended(ctx); err != nil {
		return err
	}
	if _, err := c.src.read(head, off, cold); err != nil {
		return err
	}
	c.f.done(&c.f.collapsed, len(head))
	b := grow(buf, int(n))
	copy(b, head)
	tail := b[len(head):]
	if err := readFull(c.src.f, tail, off+int64(len(head))); err != nil {
		return err
	}
	if err := c.write(tail, off+int64(len(head))); err != nil {
		return err
	}
	putSum(c.sums, off, digest.Sum(b))
	return nil
}

// plain reads and writes [off, off+n) through a buffer, chunk by chunk; off is
// at the start of a chunk.
func (c *copying) plain(ctx context.Context, off, n int64, cold bool, buf *[]byte) error {
	for end := off + n; off < end; off += chunkBytes {
		if err := ended(ctx); err != nil {
			return err
		}
		b := grow(buf, int(min(chunkBytes, end-off)))
		// A whole chunk's buffer is aligned as O_DIRECT wants it.
		direct, err := c.src.read(b, off, cold && len(b) == chunkBytes)
		if err != nil {
			return err
		}
		if direct {
			c.f.direct.Add(int64(len(b)))
		}
		if err := c.write(b, off); err != nil {
			return err
		}
		putSum(c.sums, off, digest.Sum(b))
	}
	return nil
}

func (c *copying) write(b []byte, off int64) error {
	if len(b) == 0 {
		return nil
	}
	if _, err := c.p.WriteAt(b, off); err != nil {
		return err
	}
	c.f.done(&c.f.copied, len(b))
	return nil
}

// hugeWindow allocates the whole 2 MiB blocks of [off, off+n) as 2 MiB pages and
// maps them writable; keep says that bytes may lie there already. An empty
// mapping means that the kernel did not grant them and the caller writes
// plainly; an error, that there is no memory.
func (p *Pending) hugeWindow(off, n int64, keep bool, f *Fill) (m Mapping, err error) {
	huge := n &^ (HugePage - 1)
	if huge == 0 {
		return m, nil
	}
	// One byte per block: a full tmpfs says ENOSPC here, where a store through
	// the mapping would be SIGBUS; and a collapse wants a page to start from.
	for at := off; at < off+huge; at += HugePage {
		first := []byte{0}
		if keep {
			if _, err := p.f.ReadAt(first, at); err != nil {
				return m, p.wrap("read", err)
			}
		}
		if _, err := p.WriteAt(first, at); err != nil {
			return m, err
		}
	}
	m, err = mapAt(int(p.f.Fd()), off, huge, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err == nil {
		// A child of fork must not keep a writable mapping alive.
		_ = unix.Madvise(m.Bytes, unix.MADV_DONTFORK)
		if err = unix.Madvise(m.Bytes, madvCollapse); err == nil {
			return m, nil
		}
		_ = m.Unmap()
	}
	f.fallbacks.Add(1)
	return Mapping{}, f.reserve(huge, true)
}

func (f *Fill) reserve(n int64, again bool) error {
	if f.Reserve == nil {
		return nil
	}
	return f.Reserve(n, again)
}

func (f *Fill) done(way *atomic.Int64, n int) {
	way.Add(int64(n))
	if f.Progress != nil {
		f.Progress(int64(n))
	}
}

func putSum(sums []byte, off int64, s [digest.Size]byte) {
	copy(sums[off/chunkBytes*digest.Size:], s[:])
}

func grow(buf *[]byte, n int) []byte {
	if cap(*buf) < n {
		*buf = make([]byte, max(n, min(2*n, chunkBytes)))
	}
	return (*buf)[:n]
}

// Sums digests the chunks of a finished segment of size bytes.
func (s *Sealed) Sums(ctx context.Context, size int64) ([]byte, error) {
	m, err := Map(int(s.f.Fd()), size, false)
	if err != nil {
		return nil, err
	}
	defer m.Unmap()
	sums := make([]byte, layout.ChunkCount(size, chunkBytes)*digest.Size)
	for off := int64(0); off < size; off += chunkBytes {
		if err := ended(ctx); err != nil {
			return nil, err
		}
		putSum(sums, off, digest.Sum(m.Bytes[off:min(off+chunkBytes, size)]))
	}
	return sums, nil
}
