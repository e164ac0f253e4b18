package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/onecopy/onecopy/internal/layout"
)

var (
	_ io.WriteCloser = (*FileWriter)(nil)
	_ io.WriterAt    = (*FileWriter)(nil)
)

// one is a load function for one file.
func one(name string, size int64, fn func(*FileWriter) error) Source {
	return Source{Version: "1", Load: func(ctx context.Context, w *Writer) error {
		f, err := w.Create(name, size)
		if err != nil {
			return err
		}
		return fn(f)
	}}
}

func TestFuncOfKnownSizes(t *testing.T) {
	r := newRegistry(t, nil)
	for _, n := range []int{0, 1, 4095, 4096, 4097, 2<<20 - 1, 2 << 20, 2<<20 + 1, 4<<20 - 1, 4 << 20, 4<<20 + 1, 9<<20 + 5} {
		want := map[string][]byte{"w.bin": randomBytes(7, n)}
		m := mustLoad(t, r, fmt.Sprint("k/", n), madeSource("1", want))
		wantFiles(t, m, want)
	}
}

func TestFuncOfUnknownSizes(t *testing.T) {
	r := newRegistry(t, nil)
	for _, n := range []int{0, 1, 4096, 2<<20 + 1, 4<<20 - 1, 4 << 20, 4<<20 + 1, 9<<20 + 5, 64<<20 + 4097} {
		want := randomBytes(7, n)
		m := mustLoad(t, r, fmt.Sprint("k/", n), one("w.bin", -1, func(f *FileWriter) error {
			// In pieces that end nowhere in particular.
			for rest := want; len(rest) > 0; {
				k := min(len(rest), 1<<20+77)
				if _, err := f.Write(rest[:k]); err != nil {
					return err
				}
				rest = rest[k:]
			}
			return f.Close()
		}))
		wantFiles(t, m, map[string][]byte{"w.bin": want})
	}
}

func TestFuncWritesSeveralFiles(t *testing.T) {
	r := newRegistry(t, nil)
	want := map[string][]byte{
		"config.json": []byte("{}"), "empty": {}, "onnx/model.onnx": randomBytes(1, 5<<20),
		"1_Pooling/config.json": []byte("[]"), "a/b/c/d": randomBytes(2, 3),
	}
	m := mustLoad(t, r, "k", madeSource("1", want))
	wantFiles(t, m, want)
}

func TestFuncInterleavesItsFiles(t *testing.T) {
	r := newRegistry(t, nil)
	a, b := randomBytes(1, 3<<20), randomBytes(2, 5<<20)
	m := mustLoad(t, r, "k", Source{Load: func(ctx context.Context, w *Writer) error {
		fa, err := w.Create("a", -1)
		if err != nil {
			return err
		}
		fb, err := w.Create("b", int64(len(b)))
		if err != nil {
			return err
		}
		for i := 0; i < len(b); i += 1 << 20 {
			if i < len(a) {
				if _, err := fa.Write(a[i : i+1<<20]); err != nil {
					return err
				}
			}
			if _, err := fb.Write(b[i : i+1<<20]); err != nil {
				return err
			}
		}
		return nil
	}})
	wantFiles(t, m, map[string][]byte{"a": a, "b": b})
}

// Goroutines write the parts of several files in an order that nobody chose.
func TestFuncWritesAtFromSeveralGoroutines(t *testing.T) {
	r := newRegistry(t, nil)
	want := map[string][]byte{"a": randomBytes(1, 9<<20+11), "b": randomBytes(2, 6<<20+1), "c": randomBytes(3, 100_000), "d": randomBytes(4, 8<<20)}
	m := mustLoad(t, r, "k", Source{Load: func(ctx context.Context, w *Writer) error {
		var wg sync.WaitGroup
		var failed atomic.Pointer[error]
		for _, name := range sortedNames(want) {
			b, size := want[name], int64(len(want[name]))
			if name >= "c" {
				size = -1
			}
			f, err := w.Create(name, size)
			if err != nil {
				return err
			}
			const part = 777_777
			for worker := range 4 {
				wg.Go(func() {
					for off := worker * part; off < len(b); off += 4 * part {
						end := len(b) - off // from the back
						if _, err := f.WriteAt(b[max(0, end-part):end], int64(max(0, end-part))); err != nil {
							failed.Store(&err)
						}
					}
				})
			}
		}
		wg.Wait()
		if err := failed.Load(); err != nil {
			return *err
		}
		return nil
	}})
	wantFiles(t, m, want)
}

func TestFuncThatLeavesGaps(t *testing.T) {
	r := newRegistry(t, nil)
	for _, size := range []int64{100, 3 << 20, 9<<20 + 3} {
		want := make([]byte, size)
		copy(want[size-10:], "0123456789")
		want[0] = 'x'
		m := mustLoad(t, r, fmt.Sprint("k/", size), one("w.bin", size, func(f *FileWriter) error {
			if _, err := f.WriteAt(want[size-10:], size-10); err != nil {
				return err
			}
			_, err := f.WriteAt(want[:1], 0)
			return err
		}))
		wantFiles(t, m, map[string][]byte{"w.bin": want})
	}
}

func TestFuncThatWritesNothingOfItsSize(t *testing.T) {
	r := newRegistry(t, nil)
	for _, size := range []int64{1, 4096, 5<<20 + 1} {
		m := mustLoad(t, r, fmt.Sprint("k/", size), one("w.bin", size, func(*FileWriter) error { return nil }))
		wantFiles(t, m, map[string][]byte{"w.bin": make([]byte, size)})
	}
}

func TestFuncWithGapsOfUnknownSize(t *testing.T) {
	r := newRegistry(t, nil)
	want := make([]byte, 70<<20)
	copy(want[70<<20-3:], "end")
	m := mustLoad(t, r, "k", one("w.bin", -1, func(f *FileWriter) error {
		_, err := f.WriteAt([]byte("end"), 70<<20-3)
		return err
	}))
	wantFiles(t, m, map[string][]byte{"w.bin": want})
}

func TestFuncWritesOverItsOwnBytes(t *testing.T) {
	r := newRegistry(t, nil)
	first, want := randomBytes(1, 6<<20), randomBytes(2, 6<<20)
	for _, size := range []int64{-1, 6 << 20} {
		m := mustLoad(t, r, fmt.Sprint("k", size), one("w.bin", size, func(f *FileWriter) error {
			for _, b := range [][]byte{first, want} {
				if _, err := f.WriteAt(b, 0); err != nil {
					return err
				}
			}
			return nil
		}))
		wantFiles(t, m, map[string][]byte{"w.bin": want})
	}
}

func TestFuncWritesBeyondItsSize(t *testing.T) {
	r := newRegistry(t, nil)
	for name, write := range map[string]func(*FileWriter) error{
		"at the end": func(f *FileWriter) error { _, err := f.WriteAt([]byte("x"), 10); return err },
		"across":     func(f *FileWriter) error { _, err := f.WriteAt([]byte("xx"), 9); return err },
		"appended": func(f *FileWriter) error {
			if _, err := f.Write(make([]byte, 10)); err != nil {
				return err
			}
			_, err := f.Write([]byte("x"))
			return err
		},
		"far away":     func(f *FileWriter) error { _, err := f.WriteAt([]byte("x"), 1<<62); return err },
		"out of int64": func(f *FileWriter) error { _, err := f.WriteAt([]byte("x"), 1<<63-1); return err },
		"negative":     func(f *FileWriter) error { _, err := f.WriteAt([]byte("x"), -1); return err },
	} {
		_, err := r.GetOrLoad(ctxb, "k", one("w.bin", 10, func(f *FileWriter) error {
			err := write(f)
			if !errors.Is(err, ErrSource) {
				t.Errorf("%s: %v, want ErrSource", name, err)
			}
			return err
		}))
		wantErr(t, err, ErrSource)
	}
	_, err := r.Get("k")
	wantErr(t, err, ErrNotFound)
}

func TestFuncWritesOutOfRangeOfUnknownSize(t *testing.T) {
	r := newRegistry(t, nil)
	for _, off := range []int64{-1, 1<<63 - 1} {
		_, err := r.GetOrLoad(ctxb, "k", one("w.bin", -1, func(f *FileWriter) error {
			_, err := f.WriteAt([]byte("xx"), off)
			if !errors.Is(err, ErrSource) {
				t.Errorf("at %d: %v, want ErrSource", off, err)
			}
			return err
		}))
		wantErr(t, err, ErrSource)
	}
}

func TestFuncWithoutFiles(t *testing.T) {
	r := newRegistry(t, nil)
	_, err := r.GetOrLoad(ctxb, "k", Source{Load: func(context.Context, *Writer) error { return nil }})
	wantErr(t, err, ErrSource)
	wantText(t, err, "no file")
}

func TestFuncErrorGoesToItsCaller(t *testing.T) {
	r := newRegistry(t, nil)
	failed := errors.New("the network is down")
	_, err := r.GetOrLoad(ctxb, "k", one("w.bin", 5<<20, func(f *FileWriter) error {
		if _, err := f.Write(make([]byte, 1<<20)); err != nil {
			return err
		}
		return failed
	}))
	wantErr(t, err, ErrSource, failed)
	_, err = r.Get("k")
	wantErr(t, err, ErrNotFound)
	wantFiles(t, mustLoad(t, r, "k", small("1")), map[string][]byte{"w.bin": []byte("weights 1")})
}

// A time-out within the function, as of an HTTP client, is not that of the call.
func TestFuncThatTimesOut(t *testing.T) {
	r := newRegistry(t, nil)
	slow := func(*FileWriter) error { return fmt.Errorf("GET https://models/x: %w", context.DeadlineExceeded) }
	_, err := r.GetOrLoad(ctxb, "k", one("w.bin", 1, slow))
	wantErr(t, err, ErrSource, context.DeadlineExceeded)
	wantText(t, err, "https://models/x")
	if errors.Is(err, ErrTimeout) {
		t.Errorf("%q is ErrTimeout", err)
	}
	ctx := &expires{Context: ctxb}
	_, err = r.GetOrLoad(ctx, "k", one("w.bin", 1, func(f *FileWriter) error {
		ctx.over.Store(true)
		return slow(f)
	}))
	wantErr(t, err, ErrSource, ErrTimeout)
	wantText(t, err, "https://models/x")
}

// An error of a call within is not that of the load.
func TestFuncErrorOfAnotherKey(t *testing.T) {
	r := newRegistry(t, nil)
	_, err := r.GetOrLoad(ctxb, "derived", one("w.bin", 1, func(*FileWriter) error {
		_, err := r.Get("base")
		return err
	}))
	wantErr(t, err, ErrSource, ErrNotFound)
	wantText(t, err, `load "derived": `, `get "base": `)
	var e *Error
	if !errors.As(err, &e) || e.Op != "load" || e.Key != "derived" {
		t.Errorf("%+v", e)
	}
}

func TestFuncThatPanics(t *testing.T) {
	r := newRegistry(t, nil)
	for range 5 { // more often than a key may kill its loaders
		func() {
			defer func() {
				if x := recover(); x != "as told" {
					t.Errorf("recovered %v", x)
				}
			}()
			_, _ = r.GetOrLoad(ctxb, "k", one("w.bin", 3<<20, func(f *FileWriter) error {
				if _, err := f.Write([]byte("some bytes")); err != nil {
					t.Error(err)
				}
				panic("as told")
			}))
		}()
	}
	m := mustLoad(t, r, "k", small("1"))
	wantFiles(t, m, map[string][]byte{"w.bin": []byte("weights 1")})
}

func TestFuncWithBadFileNames(t *testing.T) {
	r := newRegistry(t, nil)
	for _, name := range []string{
		"", "/etc/passwd", "..", "../x", "a/../b", "a//b", "a/", "./a", "a\x00b", "a\nb", `a\b`, "\xff",
		strings.Repeat("x", 256), strings.Repeat("x/", 513) + "x",
	} {
		_, err := r.GetOrLoad(ctxb, "k", one(name, 1, func(*FileWriter) error { t.Errorf("%q accepted", name); return nil }))
		wantErr(t, err, ErrPath)
	}
}

func TestFuncWithTwoFilesOfOneName(t *testing.T) {
	r := newRegistry(t, nil)
	for _, names := range [][2]string{{"a", "a"}, {"a", "a/b"}, {"a/b", "a"}} {
		_, err := r.GetOrLoad(ctxb, "k", Source{Load: func(ctx context.Context, w *Writer) error {
			if _, err := w.Create(names[0], 1); err != nil {
				return err
			}
			_, err := w.Create(names[1], 1)
			return err
		}})
		wantErr(t, err, ErrPath)
	}
}

func TestFuncMayGoOnAfterABadName(t *testing.T) {
	r := newRegistry(t, nil)
	m := mustLoad(t, r, "k", Source{Load: func(ctx context.Context, w *Writer) error {
		if _, err := w.Create("../x", 1); !errors.Is(err, ErrPath) {
			t.Errorf("%v, want ErrPath", err)
		}
		f, err := w.Create("x", -1)
		if err != nil {
			return err
		}
		_, err = f.Write([]byte("bytes"))
		return err
	}})
	wantFiles(t, m, map[string][]byte{"x": []byte("bytes")})
}

func TestFuncWithTooManyFiles(t *testing.T) {
	if testing.Short() {
		t.Skip("makes 16,384 files")
	}
	r := newRegistry(t, nil)
	created := 0
	_, err := r.GetOrLoad(ctxb, "k", Source{Load: func(ctx context.Context, w *Writer) error {
		for i := range layout.MaxFiles + 1 {
			if _, err := w.Create(fmt.Sprint("f", i), 0); err != nil {
				return err
			}
			created++
		}
		return nil
	}})
	wantErr(t, err, ErrLimit)
}

func TestNestedLoadIsRefused(t *testing.T) {
	r := newRegistry(t, nil)
	for _, inner := range []string{"k", "another"} {
		_, err := r.GetOrLoad(ctxb, "k", Source{Load: func(ctx context.Context, w *Writer) error {
			_, err := r.GetOrLoad(ctx, inner, small("1"))
			return err
		}})
		wantErr(t, err, ErrNestedLoad)
	}
}

func TestNestedUseOfALoadedModel(t *testing.T) {
	r := newRegistry(t, nil)
	mustLoad(t, r, "base", small("base"))
	m := mustLoad(t, r, "derived", Source{Load: func(ctx context.Context, w *Writer) error {
		base, err := r.GetOrLoad(ctx, "base", Source{Path: "never looked at", OnChange: ChangeIgnore})
		if err != nil {
			return err
		}
		defer base.Close()
		b, err := base.Bytes("w.bin")
		if err != nil {
			return err
		}
		f, err := w.Create("w.bin", -1)
		if err != nil {
			return err
		}
		_, err = f.Write(bytes.ToUpper(b))
		return err
	}})
	wantBytes(t, m, "w.bin", []byte("WEIGHTS BASE"))
}

// What a load function refers to, perhaps the model before it was quantised, is
// garbage when the load is over, however long the model is open.
func TestLoadFunctionIsForgotten(t *testing.T) {
	r := newRegistry(t, nil)
	freed := make(chan struct{})
	func() {
		private := &[]byte{1}
		runtime.AddCleanup(private, func(c chan struct{}) { close(c) }, freed)
		mustLoad(t, r, "k", one("w.bin", 1, func(f *FileWriter) error {
			_, err := f.Write(*private)
			return err
		}))
	}()
	for n := 0; ; n++ {
		runtime.GC()
		select {
		case <-freed:
			return
		case <-time.After(10 * time.Millisecond): // cleanups have a goroutine of their own
		}
		if n == 1000 {
			t.Fatal("it is kept as long as the model is open")
		}
	}
}

func TestCancelledContextEndsALoadFunction(t *testing.T) {
	r := newRegistry(t, nil)
	ctx, cancel := context.WithCancel(ctxb)
	_, err := r.GetOrLoad(ctx, "k", one("w.bin", 100, func(f *FileWriter) error {
		cancel()
		_, err := f.Write([]byte("x"))
		return err
	}))
	wantErr(t, err, context.Canceled)
	// Also if the function does not notice.
	ctx, cancel = context.WithCancel(ctxb)
	_, err = r.GetOrLoad(ctx, "k", one("w.bin", 100, func(f *FileWriter) error { cancel(); return nil }))
	wantErr(t, err, context.Canceled)
	_, err = r.Get("k")
	wantErr(t, err, ErrNotFound)
}

func TestDeadContextLoadsNothing(t *testing.T) {
	r := newRegistry(t, nil)
	ctx, cancel := context.WithCancel(ctxb)
	cancel()
	_, err := r.GetOrLoad(ctx, "k", one("w.bin", 1, func(*FileWriter) error { t.Error("called"); return nil }))
	wantErr(t, err, context.Canceled)
}

func TestWriterAfterTheLoad(t *testing.T) {
	r := newRegistry(t, nil)
	var late *FileWriter
	var writer *Writer
	m := mustLoad(t, r, "k", Source{Load: func(ctx context.Context, w *Writer) (err error) {
		writer = w
		late, err = w.Create("w.bin", 10)
		return err
	}})
	if _, err := late.WriteAt([]byte("late"), 0); err == nil {
		t.Error("a FileWriter still writes when the model is published")
	}
	if _, err := late.Write([]byte("late")); err == nil {
		t.Error("a FileWriter still writes when the model is published")
	}
	if _, err := writer.Create("more", 1); err == nil {
		t.Error("a Writer still creates files when the model is published")
	}
	wantFiles(t, m, map[string][]byte{"w.bin": make([]byte, 10)})
}

func TestProgressOfAFunction(t *testing.T) {
	r := newRegistry(t, nil)
	for _, size := range []int64{0, 5 << 20} {
		var last, total atomic.Int64
		src := one("w.bin", -1, func(f *FileWriter) error {
			if _, err := f.WriteAt(make([]byte, 1<<20), 0); err != nil { // written twice, counted once
				return err
			}
			_, err := f.Write(make([]byte, 5<<20))
			return err
		})
		src.Size = size
		src.Progress = func(done, all int64) { last.Store(done); total.Store(all) }
		mustLoad(t, r, fmt.Sprint("k", size), src)
		if last.Load() != 5<<20 || total.Load() != size {
			t.Errorf("the last progress was %d of %d, want %d of %d", last.Load(), total.Load(), 5<<20, size)
		}
	}
}

func TestSourceHasToBeOneThing(t *testing.T) {
	r := newRegistry(t, nil)
	load := func(context.Context, *Writer) error { t.Error("called"); return nil }
	for _, src := range []Source{{}, {Path: "x", Load: load}, {Load: load, Size: -1}} {
		_, err := r.GetOrLoad(ctxb, "k", src)
		wantErr(t, err, ErrSource)
	}
	for _, size := range []int64{1 << 62, math.MaxInt64 - 8192, math.MaxInt64} { // would overflow what is added to it
		_, err := r.GetOrLoad(ctxb, "k", Source{Load: load, Size: size})
		wantErr(t, err, ErrLimit)
	}
}

func TestOneLoadForManyGoroutines(t *testing.T) {
	r := newRegistry(t, nil)
	var loads atomic.Int64
	src := one("w.bin", 3, func(f *FileWriter) error {
		loads.Add(1)
		_, err := f.Write([]byte("one"))
		return err
	})
	var ready, done sync.WaitGroup
	start := make(chan struct{})
	for range 64 {
		ready.Add(1)
		done.Go(func() {
			ready.Done()
			<-start
			m, err := r.GetOrLoad(ctxb, "k", src)
			if err != nil {
				t.Error(err)
				return
			}
			defer m.Close()
			wantBytes(t, m, "w.bin", []byte("one"))
		})
	}
	ready.Wait()
	close(start)
	done.Wait()
	if loads.Load() != 1 {
		t.Errorf("%d loads, want 1", loads.Load())
	}
}

// Everybody tries his own source when the one before him failed.
func TestLoaderErrorIsNotShared(t *testing.T) {
	r := newRegistry(t, nil)
	failed := errors.New("as told")
	running, goOn := make(chan struct{}), make(chan struct{})
	first := make(chan error)
	go func() {
		_, err := r.GetOrLoad(ctxb, "k", one("w.bin", 1, func(*FileWriter) error {
			close(running)
			<-goOn
			return failed
		}))
		first <- err
	}()
	<-running
	second := make(chan error)
	go func() {
		m, err := r.GetOrLoad(ctxb, "k", small("2"))
		if err == nil {
			wantBytes(t, m, "w.bin", []byte("weights 2"))
			m.Close()
		}
		second <- err
	}()
	close(goOn)
	wantErr(t, <-first, failed)
	if err := <-second; err != nil {
		t.Errorf("the second: %v", err)
	}
}

func TestWaiterLeavesWithItsContext(t *testing.T) {
	r := newRegistry(t, nil)
	running, goOn, first := make(chan struct{}), make(chan struct{}), make(chan error)
	go func() {
		m, err := r.GetOrLoad(ctxb, "k", one("w.bin", 1, func(*FileWriter) error {
			close(running)
			<-goOn
			return nil
		}))
		if err == nil {
			m.Close()
		}
		first <- err
	}()
	<-running
	ctx, cancel := context.WithCancel(ctxb)
	waiter := make(chan error)
	go func() {
		_, err := r.GetOrLoad(ctx, "k", small("2"))
		waiter <- err
	}()
	awaitWaits(t, r, 1)
	cancel()
	wantErr(t, <-waiter, context.Canceled)
	close(goOn)
	if err := <-first; err != nil {
		t.Error(err)
	}
}
