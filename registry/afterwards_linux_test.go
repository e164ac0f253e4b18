//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
	"github.com/onecopy/onecopy/lockfile"
)

// What a process that lives long has to notice: its registry was deleted, renamed,
// given away, opened to others, or closed, while it was doing something else.

// hungLoader holds the load lock of a key, as a loader does that never ends.
func hungLoader(t *testing.T, r *Registry, key string) *lockfile.Held {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(keyLockPath(r.Dir(), key)), 0o700))
	held, err := lockfile.At(keyLockPath(r.Dir(), key)).TryLock()
	must(t, err)
	return held
}

func TestWaiterLeavesADeletedRegistry(t *testing.T) {
	r := openOnly(t, proctest.TmpRegistry(t), nil)
	defer r.Close()
	held := hungLoader(t, r, "k")
	done := make(chan error, 1)
	go func() {
		m, err := r.GetOrLoad(ctxb, "k", small("1"))
		if err == nil {
			m.Close()
		}
		done <- err
	}()
	awaitWaits(t, r, 1)
	removeAll(t, r.Dir())
	mustLoad(t, r, "k", small("1")).Close() // it joins the goroutine that waits
	must(t, <-done)
	must(t, held.Unlock())
}

func TestCloseEndsAWait(t *testing.T) {
	r := openOnly(t, proctest.TmpRegistry(t), nil)
	for _, ends := range []bool{false, true} { // the loader that is waited for
		held := hungLoader(t, r, "k")
		src, loads := small("1"), 0
		load := src.Load
		src.Load = func(ctx context.Context, w *Writer) error {
			loads++
			return load(ctx, w)
		}
		before, done := r.stats.waits.Load(), make(chan error, 1)
		go func() {
			_, err := r.GetOrLoad(ctxb, "k", src)
			done <- err
		}()
		awaitWaits(t, r, before+1)
		must(t, r.Close())
		if ends {
			must(t, held.Unlock())
		}
		if err := <-done; !errors.Is(err, ErrClosed) || loads != 0 {
			t.Errorf("%v, %d loads after Close", err, loads)
		}
		if !ends {
			must(t, held.Unlock())
		}
		dir := r.Dir()
		wantNothingOpen(t, dir)
		r = openOnly(t, dir, nil)
	}
	must(t, r.Close())
}

func TestRenamedRegistry(t *testing.T) {
	dir := proctest.TmpRegistry(t)
	r := openOnly(t, dir, nil)
	defer r.Close()
	mustLoad(t, r, "k", small("1")).Close()
	must(t, os.Rename(dir, dir+"-old"))
	t.Cleanup(func() { os.RemoveAll(dir + "-old") })
	mustGet(t, r, "k").Close() // nobody else has the name
	fresh := openOnly(t, dir, nil)
	defer fresh.Close()
	m := mustLoad(t, fresh, "k", small("1"))
	defer m.Close()
	again := mustGet(t, r, "k")
	defer again.Close()
	if again.Info().Epoch != m.Info().Epoch || again.Path() != m.Path() {
		t.Errorf("%s beside %s", again.Path(), m.Path())
	}
}

func TestRegistryIsGivenAway(t *testing.T) {
	needRoot(t)
	r := openOnly(t, proctest.TmpRegistry(t), nil)
	defer r.Close()
	mustLoad(t, r, "k", small("1")).Close()
	must(t, filepath.WalkDir(r.Dir(), func(p string, _ os.DirEntry, err error) error {
		return errors.Join(err, os.Lchown(p, foreignUID, foreignUID))
	}))
	mustGet(t, r, "k").Close()
	_, err := r.GetOrLoad(ctxb, "other", small("1"))
	wantErr(t, err, ErrReadOnly)
}

// A registry that was ours, then another user's, and is gone again may be made.
func TestTheNameWasOursBefore(t *testing.T) {
	needRoot(t)
	r := openOnly(t, proctest.TmpRegistry(t), nil)
	defer r.Close()
	removeAll(t, r.Dir())
	p := proctest.Start(t, ownerProcess, r.Dir())
	p.Line(t)
	mustGet(t, r, "k").Close()
	p.Kill()
	removeAll(t, r.Dir())
	mustLoad(t, r, "k", small("1")).Close()
}

func TestOthersMayReadFromNowOn(t *testing.T) {
	needRoot(t)
	dir := proctest.TmpRegistry(t)
	r := openOnly(t, dir, nil)
	defer r.Close()
	must(t, os.Chmod(dir, 0o755))
	must(t, openOnly(t, dir, nil).Close()) // makes the folders within follow
	mustLoad(t, r, "k", small("1")).Close()
	if a := runForeign(t, r.Dir(), 0, "get", "k"); a.Err.Text != "" {
		t.Errorf("%+v", a)
	}
}

func TestRelativeDirectoryBelowNone(t *testing.T) {
	gone := t.TempDir()
	t.Chdir(gone)
	removeAll(t, gone)
	_, err := Open("registry", nil)
	wantErr(t, err, os.ErrNotExist)
}

func TestRelativeDirectoryAndChdir(t *testing.T) {
	dir := proctest.TmpRegistry(t)
	t.Chdir(filepath.Dir(dir))
	r := openOnly(t, filepath.Base(dir), nil)
	defer r.Close()
	if r.Dir() != dir {
		t.Errorf("%s, want %s", r.Dir(), dir)
	}
	t.Chdir(t.TempDir())
	removeAll(t, dir)
	m := mustLoad(t, r, "k", small("1"))
	defer m.Close()
	if !strings.HasPrefix(m.Path(), dir+"/"+layout.Folder) {
		t.Error(m.Path())
	}
}
