//go:build amd64 || arm64

package shm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"sync"

	"golang.org/x/sys/unix"
)

// openWindow is the window of a segment whose size nobody knows: its last one is
// allocated, and admitted, beyond the end, at the cost of others' memory.
const openWindow = 8 << 20

// Writer fills a Pending with what a program writes, in any order and from any
// number of goroutines. The bytes land in windows of 2 MiB pages like those of
// Copy; it never hands out the mapping itself, because a store into a full
// tmpfs is a signal and no error.
type Writer struct {
	p    *Pending
	f    *Fill
	size int64 // declared; -1: whatever is written
	step int64 // bytes of a window

	mu     sync.Mutex
	ready  map[int64]bool // windows that were allocated
	end    int64          // of the bytes written so far
	pos    int64          // of Write
	plain  bool           // no room for whole windows of unknown use
	small  int64          // bytes that were admitted before the first window
	failed error          // of the first write that was refused its memory

	reported int64 // of end
}

// NewWriter fills p. With a size of -1 the segment ends with the last byte
// written; otherwise it has exactly size bytes and what was not written is zero.
func (p *Pending) NewWriter(size int64, f *Fill) (*Writer, error) {
	w := &Writer{p: p, f: f, size: size, step: warmWindow, ready: map[int64]bool{}}
	if size < 0 {
		w.step = openWindow
	}
	if size > 0 {
		if err := unix.Ftruncate(int(p.f.Fd()), size); err != nil {
			return nil, p.wrap("truncate", err)
		}
	}
	return w, nil
}

// Write appends behind the last Write.
func (w *Writer) Write(b []byte) (int, error) {
	w.mu.Lock()
	off := w.pos
	w.pos += int64(len(b))
	w.mu.Unlock()
	return w.WriteAt(b, off)
}

// WriteAt writes b at off. Beyond the declared size it is ErrSource, and nothing
// is written. Any other error is that of all later writes and of Finish too.
func (w *Writer) WriteAt(b []byte, off int64) (n int, err error) {
	limit := w.size
	if limit < 0 {
		limit = math.MaxInt64 - w.step // so that no window ends beyond an int64
	}
	if off < 0 || off > limit-int64(len(b)) {
		return 0, pathErr("write", w.p.dir.Join(w.p.name), fmt.Errorf("%w: %d bytes at %d are beyond the declared size %d", ErrSource, len(b), off, limit))
	}
	for len(b) > 0 {
		room := w.step - off%w.step
		part := b[:min(int64(len(b)), room)]
		k, err := w.writeWindow(part, off)
		n += k
		if err != nil {
			w.mu.Lock()
			w.failed = cmp.Or(w.failed, err)
			w.mu.Unlock()
			return n, err
		}
		w.report(int64(k))
		b, off = b[k:], off+int64(k)
	}
	return n, nil
}

// report passes n further bytes on, but never more than the file has: who writes
// a byte twice has not made it longer.
func (w *Writer) report(n int64) {
	w.mu.Lock()
	n = min(n, w.end-w.reported)
	w.reported += n
	w.mu.Unlock()
	if n > 0 && w.f.Progress != nil {
		w.f.Progress(n)
	}
}

// writeWindow writes b, which lies within one window, after that window was
// allocated.
func (w *Writer) writeWindow(b []byte, off int64) (int, error) {
	w.mu.Lock()
	if err := w.failed; err != nil {
		w.mu.Unlock()
		return 0, err
	}
	i, end, before := off/w.step, off+int64(len(b)), w.end
	w.end = max(w.end, end)
	if !w.ready[i] && w.size < 0 && (w.plain || i == 0 && w.end < smallFile) {
		// Nobody knows whether more will come: a small file stays small. The
		// lock is held, because allocating the window moves these bytes.
		defer w.mu.Unlock()
		more := max(0, end-before)
		err := w.f.reserve(more, false)
		if err == nil {
			w.small += more
		}
		if err == nil && w.plain {
			err = w.f.reserve(int64(len(b)), true)
		}
		if err != nil {
			return 0, err
		}
		return w.p.WriteAt(b, off)
	}
	if !w.ready[i] {
		err := w.prepare(i)
		if w.size < 0 && errors.Is(err, ErrNoSpace) {
			// What comes may be much less than a window.
			w.plain, w.end = true, before
			w.giveBack()
			w.mu.Unlock()
			return w.writeWindow(b, off)
		}
		if err != nil {
			w.mu.Unlock()
			return 0, err
		}
		w.ready[i] = true
	}
	w.mu.Unlock()
	return w.p.WriteAt(b, off)
}

// giveBack frees what a window that could not be had in full has got already. The
// caller holds mu.
func (w *Writer) giveBack() {
	keep := w.end
	for i := range w.ready {
		keep = max(keep, (i+1)*w.step)
	}
	_ = unix.Ftruncate(int(w.p.f.Fd()), keep)
}

// prepare allocates window i. The caller holds mu.
func (w *Writer) prepare(i int64) error {
	off, n := i*w.step, w.step
	if w.size >= 0 {
		n = min(n, w.size-off)
	}
	admitted := int64(0)
	if i == 0 {
		admitted = w.small
	}
	err := w.f.reserve(n-admitted, false)
	if err == nil && w.size < 0 {
		if err = unix.Ftruncate(int(w.p.f.Fd()), max(off+n, w.end)); err != nil {
			err = w.p.wrap("truncate", err)
		}
	}
	if err == nil && n >= smallFile {
		var m Mapping
		m, err = w.p.hugeWindow(off, n, true, w.f)
		w.f.collapsed.Add(int64(len(m.Bytes)))
		w.f.copied.Add(n - int64(len(m.Bytes)))
		if e := m.Unmap(); err == nil && e != nil {
			err = w.p.wrap("munmap", e)
		}
	} else if err == nil {
		w.f.copied.Add(n)
	}
	return err
}

// Finish ends the writing and returns the segment's size, or the error of a write
// that was refused its memory. Bytes of the declared size that nobody wrote become
// real zeros, until ctx ends: a hole would be allocated by the first reader, and on
// a full tmpfs that reader gets SIGBUS.
func (w *Writer) Finish(ctx context.Context) (int64, error) {
	size, err := w.finish(ctx)
	if err == nil {
		w.report(size)
	}
	return size, err
}

func (w *Writer) finish(ctx context.Context) (int64, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failed != nil {
		return 0, w.failed
	}
	size := w.size
	w.end = max(w.end, size)
	fd := int(w.p.f.Fd())
	if size < 0 {
		size = w.end
		if err := unix.Ftruncate(fd, size); err != nil {
			return 0, w.p.wrap("truncate", err)
		}
		if len(w.ready) == 0 {
			w.f.copied.Add(size)
		}
	}
	// Windows that nobody touched were not admitted yet.
	for off := int64(0); off < size && !w.plain && (w.size >= 0 || len(w.ready) > 0); off += w.step {
		if err := ended(ctx); err != nil {
			return 0, err
		}
		if !w.ready[off/w.step] {
			n := min(w.step, size-off)
			if err := w.f.reserve(n, false); err != nil {
				return 0, err
			}
			w.f.copied.Add(n)
		}
	}
	var zeros []byte
	for at := int64(0); at < size; {
		hole, err := unix.Seek(fd, at, unix.SEEK_HOLE)
		if err != nil {
			return 0, w.p.wrap("seek", err)
		}
		if hole >= size {
			break
		}
		end, err := unix.Seek(fd, hole, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			end, err = size, nil
		}
		if err != nil {
			return 0, w.p.wrap("seek", err)
		}
		for at = hole; at < end; {
			if err := ended(ctx); err != nil {
				return 0, err
			}
			n := min(end-at, chunkBytes)
			if err := w.f.reserve(n, true); err != nil {
				return 0, err
			}
			if zeros == nil {
				zeros = make([]byte, chunkBytes)
			}
			if _, err := w.p.WriteAt(zeros[:n], at); err != nil {
				return 0, err
			}
			at += n
		}
	}
	return size, nil
}
