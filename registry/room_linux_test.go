//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
	"github.com/onecopy/onecopy/lockfile"
)

// The last one to release a replaced generation finds T held, perhaps by the last
// but one, who has seen this lease: its memory must not stay for that.
func TestLastReleaseWhileTheTableIsHeld(t *testing.T) {
	r := newRegistry(t, nil)
	old := mustLoad(t, r, "k", small("1"))
	mustLoad(t, r, "k", Source{Load: small("2").Load, Version: "2", Replace: true}).Close()
	held, err := lockfile.At(v1(r.Dir()) + "/w/" + layout.TableLock).TryLock()
	must(t, err)
	old.Close()
	if gens, err := r.Generations("k"); err != nil || len(gens) != 2 {
		t.Errorf("while T is held: %d generations, %v", len(gens), err)
	}
	must(t, held.Unlock())
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		gens, err := r.Generations("k")
		must(t, err)
		if len(gens) == 1 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the replaced generation stays: %+v", gens)
		}
	}
}

// halfRemoved does what a remover has done that has not come to the payload.
func halfRemoved(t testing.TB, r *Registry, key string) {
	t.Helper()
	editTable(t, r.Dir(), func(e layout.Editor) {
		f, ok := e.Lookup(key)
		if !ok || !e.CompareAndSwap(f.Slot, f.Word, f.Word.With(layout.Evicting)) {
			t.Fatalf("no slot names %q", key)
		}
		gen := layout.GenName(e.Identity().Epoch, f.Word.Generation())
		must(t, os.Remove(v1(r.Dir())+"/"+layout.ModelsDir+"/"+gen+layout.ManifestExt))
		e.CompareAndSwap(f.Slot, f.Word.With(layout.Evicting), f.Word.With(layout.Free))
		e.IndexDelete(f.Slot, key)
	})
}

// Memory that somebody is giving back just now belongs to nobody: no load fails
// for it, however often that happens while it runs.
func TestBytesThatAreBeingRemoved(t *testing.T) {
	r := newRegistry(t, &Options{Budget: 23 * mib})
	for _, key := range []string{"a", "b"} {
		loadIdle(t, r, key, sized(6*mib))
		must(t, r.Pin(ctxb, key))
	}
	loadIdle(t, r, "k", one("w.bin", -1, func(f *FileWriter) error {
		if err := fillUp(f, 5*mib); err != nil {
			return err
		}
		halfRemoved(t, r, "a")
		if err := fillUpAt(f, 5*mib, 7*mib); err != nil {
			return err
		}
		halfRemoved(t, r, "b")
		return fillUpAt(f, 12*mib, 7*mib)
	}))
	wantKeys(t, r, "k")
}

// fillUpAt writes n bytes at off.
func fillUpAt(f *FileWriter, off, n int64) error {
	_, err := f.WriteAt(randomBytes(byte(off>>20), int(n)), off)
	return err
}

// A load that does not know how much it will write keeps little from others.
func TestUnknownSizePromisesLittle(t *testing.T) {
	r := newRegistry(t, &Options{Budget: 80 * mib})
	running, proceed, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		m, err := r.GetOrLoad(ctxb, "unknown", one("w.bin", -1, func(f *FileWriter) error {
			err := fillUp(f, 5*mib)
			close(running)
			<-proceed
			return err
		}))
		if err == nil {
			err = m.Close()
		}
		done <- err
	}()
	<-running
	loadIdle(t, r, "other", sized(60*mib))
	close(proceed)
	must(t, <-done)
	wantKeys(t, r, "other", "unknown")
	if s := stats(t, r); s.Used > s.Budget || s.Reserved != 0 {
		t.Errorf("%+v", s)
	}
}

// Others fill the tmpfs while a load runs, but idle models make up for that.
func TestIdleModelsMakeUpForAFilledTmpfs(t *testing.T) {
	root := smallTmpfs(t, 64*mib)
	r := openRegistry(t, root+"/reg", &Options{Budget: 64 * mib})
	loadIdle(t, r, "idle", sized(16*mib))
	filler := root + "/filler"
	files := map[string][]byte{}
	for i := range 40 {
		files[fmt.Sprintf("f-%02d", i)] = randomBytes(1, 400<<10)
	}
	src := folderSource(t, files)
	var once sync.Once
	src.Progress = func(done, _ int64) {
		if done >= mib {
			// Of 64 MiB, 16 are those of the idle model, and 15 are still to come.
			once.Do(func() { writeFile(t, filler, make([]byte, 38*mib)) })
		}
	}
	loadIdle(t, r, "k", src)
	wantKeys(t, r, "k")
	must(t, os.Remove(filler))
}

func TestRefusalsAreCounted(t *testing.T) {
	r := newRegistry(t, &Options{Budget: 2 * mib})
	mustLoad(t, r, "leased", sized(mib))
	_, err := r.GetOrLoad(ctxb, "k", sized(2*mib))
	wantErr(t, err, ErrNoSpace)
	c, err := r.Counters()
	must(t, err)
	if c.LoadErrors != 1 || c.Loads != 1 {
		t.Errorf("%+v", c)
	}
	_, err = r.GetOrLoad(ctxb, "k", Source{Load: func(context.Context, *Writer) error { return errors.New("as told") }})
	wantErr(t, err, ErrSource)
	if c, err = r.Counters(); err != nil || c.LoadErrors != 2 {
		t.Errorf("%+v, %v", c, err)
	}
}

// A wait for a load of another process is one, like that for another goroutine.
func TestWaitsForOtherProcessesAreCounted(t *testing.T) {
	r := newRegistry(t, nil)
	loader := startStuck(t, r.Dir(), "k", "")
	done := make(chan error, 1)
	go func() {
		m, err := r.GetOrLoad(ctxb, "k", small("1"))
		if err == nil {
			err = m.Close()
		}
		done <- err
	}()
	proctest.AwaitBlocked(t, v1(r.Dir())+"/w/"+layout.StripeLock(layout.Stripe("k")), 1)
	loader.Kill()
	must(t, <-done)
	if s := stats(t, r); s.Waits != 1 || s.Takeovers != 1 {
		t.Errorf("%+v", s)
	}
}

// Times that are still to come, of a clock in another time namespace or of a torn
// write, count as now: they reorder victims for once and make none immortal.
func TestFutureTimesOfUse(t *testing.T) {
	r := newRegistry(t, &Options{Budget: 4*block - 4097}) // one short of four
	for _, key := range []string{"a", "b", "c"} {
		idle(t, r, key)
	}
	hour := now() + uint64(time.Hour)
	setHints(t, r.Dir(), "a", map[layout.Hint]uint64{layout.HintLastAttach: hour, layout.HintLastRelease: 1<<64 - 1})
	idle(t, r, "d")
	wantKeys(t, r, "a", "c", "d")
	src := one("w.bin", 7*4096, func(f *FileWriter) error { return fillUp(f, 7*4096) })
	src.Size = 7 * 4096
	m, err := r.GetOrLoad(ctxb, "all", src)
	must(t, err)
	m.Close()
	wantKeys(t, r, "all")
	if e, err := r.Entry("all"); err != nil || e.LastAttach.IsZero() {
		t.Errorf("%+v, %v", e, err)
	}
}

// A replacement keeps what it was promised when its old generation is removed
// meanwhile, and so its slot: not the bytes, nor the slot, go to another load.
func TestReplacementKeepsItsPromise(t *testing.T) {
	const big = 30 << 20
	r := newRegistry(t, &Options{Budget: big + 1<<20})
	idle(t, r, "a")
	src := madeSource("2", map[string][]byte{"w.bin": make([]byte, big)})
	load := src.Load
	src.Size, src.Replace = big, true
	src.Load = func(ctx context.Context, w *Writer) error {
		must(t, r.Remove(ctxb, "a"))
		other := madeSource("1", map[string][]byte{"w.bin": make([]byte, big)})
		_, err := r.GetOrLoad(ctxb, "b", other)
		wantErr(t, err, ErrNoSpace)
		return load(ctx, w)
	}
	m, err := r.GetOrLoad(ctxb, "a", src)
	must(t, err)
	m.Close()
	if s := stats(t, r); s.Reserved != 0 || s.Takeovers != 0 {
		t.Errorf("%+v", s)
	}
}

// The same while it grows beyond what it announced.
func TestReplacementExtendsInItsOwnSlot(t *testing.T) {
	r := newRegistry(t, nil)
	idle(t, r, "a")
	m, err := r.GetOrLoad(ctxb, "a", Source{Version: "2", Replace: true, Load: func(ctx context.Context, w *Writer) error {
		must(t, r.Remove(ctxb, "a"))
		idle(t, r, "b")
		f, err := w.Create("w.bin", -1)
		if err == nil {
			_, err = f.Write(make([]byte, 9<<20))
		}
		return err
	}})
	must(t, err)
	m.Close()
	if e, err := r.Entry("b"); err != nil || e.Reserved != 0 {
		t.Errorf("%+v, %v", e, err)
	}
	src := small("2")
	src.Replace = true
	mustLoad(t, r, "b", src).Close()
	if s := stats(t, r); s.Reserved != 0 || s.Takeovers != 0 {
		t.Errorf("nobody died, and no load runs: %+v", s)
	}
}
