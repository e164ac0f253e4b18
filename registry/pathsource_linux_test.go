//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/onecopy/onecopy/internal/proctest"
)

// A source that changes while it is read is no model.
func TestSourceThatChangesDuringTheLoad(t *testing.T) {
	r := newRegistry(t, nil)
	for name, change := range map[string]func(path string) error{
		"grows":     func(p string) error { return appendTo(p, "more") },
		"shrinks":   func(p string) error { return os.Truncate(p, 5<<20) },
		"is empty":  func(p string) error { return os.Truncate(p, 0) },
		"is edited": func(p string) error { return os.Chtimes(p, time.Now(), time.Now().Add(time.Hour)) },
	} {
		src := fileSource(t, "w.bin", randomBytes(1, 12<<20))
		var once atomic.Bool
		src.Progress = func(done, total int64) {
			if once.CompareAndSwap(false, true) {
				if err := change(src.Path); err != nil {
					t.Error(err)
				}
			}
		}
		_, err := r.GetOrLoad(ctxb, "k", src)
		if err == nil {
			t.Errorf("a source that %s: loaded", name)
			continue
		}
		wantErr(t, err, ErrSource)
		wantText(t, err, "w.bin")
	}
	_, err := r.Get("k")
	wantErr(t, err, ErrNotFound)
}

func appendTo(path, text string) error {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(text)
	return err
}

// Whoever ends a load with a cause of his own still gets context.Canceled, or the
// time-out.
func TestLoadThatIsCancelledWithACause(t *testing.T) {
	r := newRegistry(t, &Options{Threads: 1})
	src := fileSource(t, "w", make([]byte, 9<<20))
	drained := errors.New("the worker is drained")
	ctx, cancel := context.WithCancelCause(ctxb)
	src.Progress = func(int64, int64) { cancel(drained) }
	_, err := r.GetOrLoad(ctx, "k", src)
	wantErr(t, err, context.Canceled, drained)
	ctx, stop := context.WithTimeoutCause(ctxb, 20*time.Millisecond, errors.New("too slow a start"))
	defer stop()
	src.Progress = func(int64, int64) { <-ctx.Done() }
	_, err = r.GetOrLoad(ctx, "k", src)
	wantErr(t, err, ErrTimeout)
}

// Progress is the caller's code: a panic in it leaves no mapping of the segment
// behind, which would keep its memory; newRegistry looks.
func TestProgressThatPanics(t *testing.T) {
	r := newRegistry(t, &Options{Threads: 1})
	src := fileSource(t, "w", make([]byte, 9<<20))
	src.Progress = func(int64, int64) { panic("as told") }
	for range 5 { // more often than a key may kill its loaders
		func() {
			defer func() {
				if x := recover(); x != "as told" {
					t.Errorf("recovered %v", x)
				}
			}()
			_, err := r.GetOrLoad(ctxb, "k", src)
			t.Errorf("returned: %v", err)
		}()
	}
	src.Progress = nil
	mustLoad(t, r, "k", src)
}

// Sizes whose sum is beyond an int64, as sparse files of a tmpfs can have them, are
// refused before anything is reserved for them.
func TestSourceOfTooManyBytes(t *testing.T) {
	r := newRegistry(t, nil)
	for _, c := range []struct {
		size int64
		n    int
		want error
	}{
		{1 << 62, 4, ErrLimit}, {1 << 62, 1, ErrLimit}, {math.MaxInt64, 1, ErrLimit}, {math.MaxInt64 - 8192, 1, ErrLimit},
		{maxBytes / 2, 3, ErrLimit}, {maxBytes, 1, ErrNoSpace}, {maxBytes / 2, 2, ErrNoSpace},
	} {
		dir := proctest.TmpRegistry(t)
		for i := range c.n {
			path := filepath.Join(dir, fmt.Sprint(i))
			writeFile(t, path, nil)
			if err := os.Truncate(path, c.size); err != nil {
				t.Fatal(err)
			}
		}
		_, err := r.GetOrLoad(ctxb, "k", Source{Path: dir})
		wantErr(t, err, c.want)
		var no *NoSpaceError
		if errors.As(err, &no) && no.Need < c.size {
			t.Errorf("%d files of %d bytes: %+v", c.n, c.size, no)
		}
	}
}
