//go:build amd64 || arm64

package shm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

func TestCopySizes(t *testing.T) {
	d := newDir(t)
	all := randomBytes(1, 130*mib)
	for _, n := range []int{
		0, 1, 4095, 4096, 2*mib - 1, 2 * mib, 2*mib + 1, 4*mib - 1, 4 * mib, 4*mib + 1, 6*mib + 1,
		64*mib - 1, 64 * mib, 64*mib + 1, 66*mib + 3, 130 * mib,
	} {
		if n > 10*mib && testing.Short() {
			continue
		}
		want := all[:n]
		src := sourceFile(t, want)
		for _, threads := range []int{0, 1, 3} {
			if threads > 1 && n <= 64*mib {
				continue // one window
			}
			p := newPending(t, d)
			var progress, reserved atomic.Int64
			f := &Fill{
				Threads:  threads,
				Reserve:  func(n int64, again bool) error { reserved.Add(n); return nil },
				Progress: func(n int64) { progress.Add(n) },
			}
			sums, err := p.Copy(ctxb, src, int64(n), f)
			noErr(t, err)
			wantSegment(t, p, want).Close()
			if !bytes.Equal(sums, sumsOf(want)) {
				t.Errorf("%d bytes, %d threads: other digests", n, threads)
			}
			s := f.Stats()
			if progress.Load() != int64(n) || s.Collapsed+s.Copied != int64(n) || reserved.Load() < int64(n) {
				t.Errorf("%d bytes: progress %d, reserved %d, %+v", n, progress.Load(), reserved.Load(), s)
			}
		}
	}
}

func TestSealedSums(t *testing.T) {
	d := newDir(t)
	for _, n := range []int{0, 1, 4 * mib, 9*mib + 1} {
		want := randomBytes(2, n)
		p := newPending(t, d)
		_, err := p.WriteAt(want, 0)
		noErr(t, err)
		s := wantSegment(t, p, want)
		sums, err := s.Sums(ctxb, int64(n))
		if err != nil || !bytes.Equal(sums, sumsOf(want)) {
			t.Errorf("%d bytes: %v", n, err)
		}
		ctx, cancel := context.WithCancel(ctxb)
		cancel()
		if _, err := s.Sums(ctx, int64(n)); n > 0 && !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
		s.Close()
	}
}

// withoutHugePages: dir, source. It fills a segment after it has forbidden itself
// 2 MiB pages.
var withoutHugePages = child("without-huge-pages", func(args []string) error {
	if err := unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0); err != nil {
		return err
	}
	d, err := OpenDir(args[0], DirOptions{})
	if err != nil {
		return err
	}
	src, err := os.Open(args[1])
	if err != nil {
		return err
	}
	want, err := os.ReadFile(args[1])
	if err != nil {
		return err
	}
	for _, how := range []string{"copy", "write"} {
		p, err := d.NewPending(how)
		if err != nil {
			return err
		}
		f := &Fill{Threads: 2}
		again := atomic.Int64{}
		f.Reserve = func(n int64, second bool) error {
			if second {
				again.Add(n)
			}
			return nil
		}
		if how == "copy" {
			_, err = p.Copy(ctxb, src, int64(len(want)), f)
		} else {
			var w *Writer
			if w, err = p.NewWriter(int64(len(want)), f); err == nil {
				if _, err = w.Write(want); err == nil {
					_, err = w.Finish(ctxb)
				}
			}
		}
		if err != nil {
			return err
		}
		s, err := p.Seal(ctxb)
		if err != nil {
			return err
		}
		m, err := Map(int(s.File().Fd()), int64(len(want)), false)
		if err != nil {
			return err
		}
		if !bytes.Equal(m.Bytes, want) {
			return fmt.Errorf("%s: other bytes", how)
		}
		st := f.Stats()
		if st.Fallbacks != 2 || st.Collapsed != 0 || st.Copied != int64(len(want)) {
			return fmt.Errorf("%s: %+v, want 2 windows without 2 MiB pages", how, st)
		}
		if again.Load() < 64*mib {
			return fmt.Errorf("%s: the memory was not looked at again: %d bytes", how, again.Load())
		}
		s.Close()
	}
	fmt.Println("done")
	return nil
})

func TestFillWithoutHugePages(t *testing.T) {
	d := newDir(t)
	path := filepath.Join(t.TempDir(), "source")
	noErr(t, os.WriteFile(path, randomBytes(1, 68*mib+5), 0o600))
	p := proctest.Start(t, withoutHugePages, d.Path(), path)
	if code := p.Wait(); code != 0 {
		if strings.Contains(p.Stderr(), "invalid argument") {
			t.Skip("prctl cannot forbid huge pages here")
		}
		t.Errorf("code %d\n%s", code, p.Stderr())
	}
}

func TestReserveEndsTheFill(t *testing.T) {
	d := newDir(t)
	short := errors.New("no more")
	for _, n := range []int{100, 9 * mib, 130 * mib} {
		if n > 10*mib && testing.Short() {
			continue
		}
		p := newPending(t, d)
		calls := atomic.Int64{}
		f := &Fill{Threads: 2, Reserve: func(int64, bool) error {
			if calls.Add(1) == 1 && n > 64*mib {
				return nil
			}
			return short
		}}
		if _, err := p.Copy(ctxb, sourceFile(t, make([]byte, n)), int64(n), f); !errors.Is(err, short) {
			t.Errorf("%d bytes: %v", n, err)
		}
		p.Abort()
	}
}

func TestCopyEndsWithItsContext(t *testing.T) {
	d := newDir(t)
	for _, n := range []int{3 * mib, 130 * mib} {
		if n > 10*mib && testing.Short() {
			continue
		}
		src := sourceFile(t, make([]byte, n))
		for _, cause := range []error{nil, errors.New("drained")} {
			ctx, cancel := context.WithCancelCause(ctxb)
			p := newPending(t, d)
			f := &Fill{Threads: 2, Reserve: func(int64, bool) error { cancel(cause); return nil }}
			_, err := p.Copy(ctx, src, int64(n), f)
			if !errors.Is(err, context.Canceled) || cause != nil && !errors.Is(err, cause) {
				t.Errorf("%d bytes: %v", n, err)
			}
			if cause == nil && err.Error() != context.Canceled.Error() {
				t.Errorf("%d bytes: %q", n, err)
			}
			p.Abort()
		}
	}
}

// A thread that a callback ends has not filled its window.
func TestProgressEndsItsGoroutine(t *testing.T) {
	if testing.Short() {
		t.Skip("fills two windows")
	}
	const n = warmWindow + 3*mib/2
	gone := make(chan struct{})
	var once sync.Once
	f := &Fill{Threads: 2, Progress: func(int64) {
		if strings.Contains(string(debug.Stack()), "(*Pending).Copy(") {
			<-gone // the other thread gets the other window
			return
		}
		once.Do(func() { close(gone) })
		runtime.Goexit()
	}}
	_, err := newPending(t, newDir(t)).Copy(ctxb, sourceFile(t, randomBytes(1, n)), n, f)
	if !errors.Is(err, ErrSource) {
		t.Errorf("%v, want ErrSource", err)
	}
}

func TestSourceShrinksDuringTheCopy(t *testing.T) {
	d := newDir(t)
	for _, n := range []int64{3 * mib, 9*mib + 1, 70 * mib} {
		for _, left := range []int64{0, 1, 2*mib + 1} {
			src := sourceFile(t, make([]byte, n))
			p := newPending(t, d)
			f := &Fill{Reserve: func(int64, bool) error { return os.Truncate(src.Name(), left) }}
			_, err := p.Copy(ctxb, src, n, f)
			wantErr(t, err, ErrSource)
			wantText(t, err, src.Name(), "ends at byte")
			p.Abort()
		}
	}
}

// What is appended later is not copied: the caller compares sizes.
func TestSourceGrowsDuringTheCopy(t *testing.T) {
	d := newDir(t)
	want := randomBytes(1, 5*mib)
	src := sourceFile(t, want)
	p := newPending(t, d)
	f := &Fill{Reserve: func(int64, bool) error { return os.Truncate(src.Name(), 9*mib) }}
	_, err := p.Copy(ctxb, src, int64(len(want)), f)
	noErr(t, err)
	wantSegment(t, p, want)
}

// The memory of a process is a file that cannot be read everywhere.
func TestSourceThatFails(t *testing.T) {
	d := newDir(t)
	src, err := os.Open("/proc/self/mem")
	noErr(t, err)
	defer src.Close()
	for _, n := range []int64{100, 5 * mib, 70 * mib} {
		p := newPending(t, d)
		_, err := p.Copy(ctxb, src, n, &Fill{Threads: 2})
		wantErr(t, err, ErrSource, unix.EIO)
		wantText(t, err, "/proc/self/mem")
		p.Abort()
	}
}

func TestSourceThatIsClosed(t *testing.T) {
	d := newDir(t)
	src := sourceFile(t, make([]byte, 100))
	src.Close()
	_, err := newPending(t, d).Copy(ctxb, src, 100, &Fill{})
	if !errors.Is(err, ErrSource) {
		t.Errorf("%v", err)
	}
}

// A source that lies on the disk only is read past the page cache where the file
// system lets us; the bytes are the same.
func TestColdSource(t *testing.T) {
	d := newDir(t)
	for _, n := range []int{100_000, 9*mib + 777, 40*mib + 1} {
		want := randomBytes(3, n)
		src := sourceFile(t, want)
		dropCache(t, src)
		p := newPending(t, d)
		f := &Fill{Threads: 1}
		sums, err := p.Copy(ctxb, src, int64(n), f)
		noErr(t, err)
		wantSegment(t, p, want).Close()
		if !bytes.Equal(sums, sumsOf(want)) {
			t.Errorf("%d bytes: other digests", n)
		}
		if s := f.Stats(); s.Collapsed+s.Copied != int64(n) || s.Direct > int64(n) {
			t.Errorf("%+v", s)
		}
	}
}

// dropCache makes sure that f has to be read from the disk, as far as its file
// system can.
func dropCache(t *testing.T, f *os.File) {
	t.Helper()
	w, err := os.OpenFile(f.Name(), os.O_RDWR, 0)
	noErr(t, err)
	defer w.Close()
	noErr(t, w.Sync())
	noErr(t, unix.Fadvise(int(w.Fd()), 0, 0, unix.FADV_DONTNEED))
}

func TestSparseSource(t *testing.T) {
	d := newDir(t)
	want := make([]byte, 20*mib+9)
	copy(want[8*mib+3:], "island")
	path := filepath.Join(t.TempDir(), "sparse")
	f, err := os.Create(path)
	noErr(t, err)
	defer f.Close()
	noErr(t, f.Truncate(int64(len(want))))
	_, err = f.WriteAt([]byte("island"), 8*mib+3)
	noErr(t, err)
	p := newPending(t, d)
	sums, err := p.Copy(ctxb, f, int64(len(want)), &Fill{})
	noErr(t, err)
	wantSegment(t, p, want)
	if !bytes.Equal(sums, sumsOf(want)) {
		t.Error("other digests")
	}
}

// tinyTmpfs is a tmpfs of its own; see registry's test of the same purpose.
func tinyTmpfs(t *testing.T, size int64) *Dir {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	at := t.TempDir()
	if err := unix.Mount("tmpfs", at, "tmpfs", 0, fmt.Sprintf("size=%d,mode=0700", size)); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	d, err := OpenDir(at, DirOptions{})
	if e := unix.Unmount(at, unix.MNT_DETACH); e != nil {
		t.Errorf("unmount: %v", e)
	}
	noErr(t, err)
	t.Cleanup(func() { d.Close() })
	return d
}

// Without anybody who looks at the memory first, a full tmpfs is an error of the
// write, never a signal.
func TestFullTmpfsIsAnError(t *testing.T) {
	for _, size := range []int64{4 * mib, 16 * mib} {
		d := tinyTmpfs(t, size)
		before, _, err := d.Free()
		noErr(t, err)
		for _, n := range []int64{size + 1, size + 3*mib, 80 * mib} {
			p := newPending(t, d)
			_, err := p.Copy(ctxb, sourceFile(t, make([]byte, n)), n, &Fill{Threads: 2})
			wantErr(t, err, ErrNoSpace)
			p.Abort()
			for _, declared := range []int64{n, -1} {
				p := newPending(t, d)
				w, err := p.NewWriter(declared, &Fill{})
				noErr(t, err)
				for err == nil && w.end < n {
					_, err = w.Write(make([]byte, min(mib, n-w.end)))
				}
				if err == nil {
					_, err = w.Finish(ctxb)
				}
				wantErr(t, err, ErrNoSpace)
				p.Abort()
			}
			if after, _, err := d.Free(); err != nil || after != before {
				t.Errorf("%d bytes were free, %d are: %v", before, after, err)
			}
		}
		// What fits to the last page fits.
		want := randomBytes(1, int(before))
		p := newPending(t, d)
		_, err = p.Copy(ctxb, sourceFile(t, want), int64(len(want)), &Fill{})
		noErr(t, err)
		wantSegment(t, p, want).Close()
	}
}

func TestUnknownSizeFillsTheLastPage(t *testing.T) {
	d := tinyTmpfs(t, 16*mib)
	free, _, err := d.Free()
	noErr(t, err)
	want := randomBytes(1, int(free))
	p := newPending(t, d)
	w, err := p.NewWriter(-1, &Fill{Reserve: func(n int64, _ bool) error {
		if free, _, err := d.Free(); err != nil || n > free {
			return errors.Join(err, ErrNoSpace)
		}
		return nil
	}})
	noErr(t, err)
	for off := 0; off < len(want); off += mib {
		_, err = w.Write(want[off:min(off+mib, len(want))])
		noErr(t, err)
	}
	_, err = w.Finish(ctxb)
	noErr(t, err)
	wantSegment(t, p, want)
}

func TestWriterSizes(t *testing.T) {
	d := newDir(t)
	all := randomBytes(1, 66*mib+3)
	for _, n := range []int{0, 1, 4096, 2*mib + 1, 4*mib - 1, 4 * mib, 4*mib + 1, 64 * mib, 66*mib + 3} {
		if n > 10*mib && testing.Short() {
			continue
		}
		for _, declared := range []int64{int64(n), -1} {
			want := all[:n]
			p := newPending(t, d)
			var progress, reserved atomic.Int64
			f := &Fill{
				Progress: func(k int64) { progress.Add(k) },
				Reserve: func(k int64, again bool) error {
					if !again {
						reserved.Add(k)
					}
					return nil
				},
			}
			w, err := p.NewWriter(declared, f)
			noErr(t, err)
			for off := 0; off < n; off += 700_001 {
				_, err := w.Write(want[off:min(off+700_001, n)])
				noErr(t, err)
			}
			size, err := w.Finish(ctxb)
			if err != nil || size != int64(n) {
				t.Errorf("%d bytes, declared %d: %d, %v", n, declared, size, err)
			}
			wantSegment(t, p, want).Close()
			s := f.Stats()
			if progress.Load() != int64(n) || reserved.Load() < int64(n) || declared >= 0 && s.Collapsed+s.Copied != int64(n) {
				t.Errorf("%d bytes, declared %d: progress %d, reserved %d, %+v", n, declared, progress.Load(), reserved.Load(), s)
			}
		}
	}
}

// Windows in any order, from the last to the first and from several goroutines.
func TestWriterWindows(t *testing.T) {
	if testing.Short() {
		t.Skip("fills several windows")
	}
	d := newDir(t)
	const n = 3*warmWindow + 5*mib + 7
	want := randomBytes(1, n)
	for _, declared := range []int64{n, -1} {
		p := newPending(t, d)
		w, err := p.NewWriter(declared, &Fill{})
		noErr(t, err)
		const part = 5*mib + 13 // across the borders of the windows
		var wg sync.WaitGroup
		for g := range 4 {
			wg.Go(func() {
				for end := n - g*part; end > 0; end -= 4 * part {
					off := max(0, end-part)
					if k, err := w.WriteAt(want[off:end], int64(off)); err != nil || k != end-off {
						t.Errorf("%d of %d, %v", k, end-off, err)
					}
				}
			})
		}
		wg.Wait()
		size, err := w.Finish(ctxb)
		if err != nil || size != n {
			t.Errorf("%d, %v", size, err)
		}
		wantSegment(t, p, want).Close()
	}
}

func TestWriterOutOfRange(t *testing.T) {
	d := newDir(t)
	for _, c := range []struct {
		declared, off int64
		n             int
	}{
		{10, -1, 1}, {10, 10, 1}, {10, 5, 6}, {10, 1 << 62, 1}, {10, 1<<63 - 1, 1}, {10, 1<<63 - 5, 100},
		{0, 0, 1}, {-1, -1, 1}, {-1, 1<<63 - 1, 1}, {-1, 1<<63 - 5, 100},
	} {
		w, err := newPending(t, d).NewWriter(c.declared, &Fill{})
		noErr(t, err)
		k, err := w.WriteAt(make([]byte, c.n), c.off)
		if k != 0 {
			t.Errorf("%+v: wrote %d", c, k)
		}
		wantErr(t, err, ErrSource)
	}
	w, err := newPending(t, d).NewWriter(10, &Fill{})
	noErr(t, err)
	if _, err := w.WriteAt(nil, 10); err != nil {
		t.Errorf("nothing at the end: %v", err)
	}
}

// What was never written is zero, was admitted, and is counted.
func TestWriterFillsItsHoles(t *testing.T) {
	d := newDir(t)
	for _, n := range []int64{1, 4097, 5*mib + 1, 70 * mib} {
		p := newPending(t, d)
		var progress, reserved atomic.Int64
		w, err := p.NewWriter(n, &Fill{
			Progress: func(k int64) { progress.Add(k) },
			Reserve: func(k int64, again bool) error {
				if !again {
					reserved.Add(k)
				}
				return nil
			},
		})
		noErr(t, err)
		if n > mib {
			_, err := w.WriteAt([]byte{0}, n-1)
			noErr(t, err)
		}
		size, err := w.Finish(ctxb)
		if err != nil || size != n {
			t.Errorf("%d, %v", size, err)
		}
		if progress.Load() != n || reserved.Load() != n {
			t.Errorf("%d bytes: progress %d, reserved %d", n, progress.Load(), reserved.Load())
		}
		wantSegment(t, p, make([]byte, n)).Close()
	}
}

// Bytes that were there before their window was allocated are still there then.
func TestWriterKeepsSmallBeginnings(t *testing.T) {
	d := newDir(t)
	want := randomBytes(1, 12*mib)
	p := newPending(t, d)
	w, err := p.NewWriter(-1, &Fill{})
	noErr(t, err)
	for _, part := range [][2]int{{0, 100}, {2 * mib, 2*mib + 100}, {100, 2 * mib}, {2*mib + 100, 12 * mib}} {
		_, err := w.WriteAt(want[part[0]:part[1]], int64(part[0]))
		noErr(t, err)
	}
	_, err = w.Finish(ctxb)
	noErr(t, err)
	wantSegment(t, p, want)
}

func TestWriterReserveRefuses(t *testing.T) {
	d := newDir(t)
	short := errors.New("no more")
	for _, declared := range []int64{10 * mib, -1} {
		p := newPending(t, d)
		w, err := p.NewWriter(declared, &Fill{Reserve: func(int64, bool) error { return short }})
		noErr(t, err)
		if _, err := w.Write(make([]byte, 5*mib)); !errors.Is(err, short) {
			t.Errorf("declared %d: %v", declared, err)
		}
		if _, err := w.Write([]byte("x")); !errors.Is(err, short) {
			t.Errorf("declared %d, again: %v", declared, err)
		}
		p.Abort()
	}
}

// A write that failed is the end of the segment, although there may be memory for
// the next one: nobody knows how much of it is there.
func TestWriterStopsAtItsFirstError(t *testing.T) {
	d := newDir(t)
	short := errors.New("no more")
	for _, c := range []struct{ declared, off int64 }{{-1, 0}, {-1, 9 * mib}, {9 * mib, 0}, {9 * mib, 8 * mib}} {
		p := newPending(t, d)
		refuse, calls := error(nil), 0
		w, err := p.NewWriter(c.declared, &Fill{Reserve: func(int64, bool) error { calls++; return refuse }})
		noErr(t, err)
		refuse = short
		if n, err := w.WriteAt([]byte("xx"), c.off); n != 0 || !errors.Is(err, short) {
			t.Errorf("%+v: %d, %v", c, n, err)
		}
		refuse, calls = nil, 0
		if n, err := w.WriteAt([]byte("xx"), c.off); n != 0 || !errors.Is(err, short) {
			t.Errorf("%+v, again: %d, %v", c, n, err)
		}
		if _, err := w.WriteAt([]byte("x"), -1); !errors.Is(err, ErrSource) {
			t.Errorf("%+v, out of range: %v", c, err)
		}
		if _, err := w.Finish(ctxb); !errors.Is(err, short) {
			t.Errorf("%+v, Finish: %v", c, err)
		}
		if fi, err := p.f.Stat(); err != nil || calls > 0 || fi.Sys().(*syscall.Stat_t).Blocks > 0 {
			t.Errorf("%+v: %d more calls of Reserve, %+v, %v", c, calls, fi.Sys(), err)
		}
		p.Abort()
	}
}

func TestFillStats(t *testing.T) {
	f := &Fill{}
	f.collapsed.Add(1)
	f.copied.Add(2)
	f.direct.Add(3)
	f.fallbacks.Add(4)
	if got, want := f.Stats(), (layout.Fill{Collapsed: 1, Copied: 2, Direct: 3, Fallbacks: 4}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// The zeros that Finish writes into holes are asked for as well.
func TestFinishIsRefusedTheZeros(t *testing.T) {
	refused := errors.New("no more memory")
	p := newPending(t, newDir(t))
	w, err := p.NewWriter(3*mib, &Fill{Reserve: func(_ int64, again bool) error {
		if again {
			return refused
		}
		return nil
	}})
	noErr(t, err)
	_, err = w.WriteAt([]byte("x"), 2*mib)
	noErr(t, err)
	if _, err := w.Finish(ctxb); !errors.Is(err, refused) {
		t.Errorf("Finish: %v", err)
	}
}

// The zeros of a large file take a while: Finish ends with its context, at the
// next chunk.
func TestFinishEndsWithItsContext(t *testing.T) {
	for after := range 3 {
		ctx, cancel := context.WithCancel(ctxb)
		p := newPending(t, newDir(t))
		chunks := 0
		fill := func(_ int64, again bool) error {
			if again {
				chunks++
			}
			if chunks >= after {
				cancel()
			}
			return nil
		}
		w, err := p.NewWriter(130*mib, &Fill{Reserve: fill})
		noErr(t, err)
		if _, err := w.Finish(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("after %d chunks: %v", after, err)
		}
		var st unix.Stat_t
		noErr(t, unix.Fstat(int(p.f.Fd()), &st))
		if filled := st.Blocks * 512; filled != int64(after*chunkBytes) {
			t.Errorf("after %d chunks: %d bytes were filled", after, filled)
		}
		p.Abort()
	}
}
