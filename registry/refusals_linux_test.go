//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/digest"
	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// Errors that need a special situation.

func TestInvalidKeysEverywhere(t *testing.T) {
	r := newRegistry(t, nil)
	for name, call := range map[string]func(key string) error{
		"Charges":     func(key string) error { _, err := r.Charges(key); return err },
		"HugePages":   func(key string) error { _, err := r.HugePages(key); return err },
		"Generations": func(key string) error { _, err := r.Generations(key); return err },
		"Entry":       func(key string) error { _, err := r.Entry(key); return err },
		"Holders":     func(key string) error { _, err := r.Holders(key + "\x00"); return err },
		"Undo":        func(key string) error { return undo(ctxb, r, key) },
		"Remove":      func(key string) error { return r.Remove(ctxb, key) },
		"PlanRemove":  func(key string) error { return r.PlanRemove(ctxb, key) },
		"Touch":       func(key string) error { return r.Touch(ctxb, key) },
		"Get":         func(key string) error { _, err := r.Get(key); return err },
		"Use":         func(key string) error { return r.Use(key, func(*Model) error { return nil }) },
		"GetOrLoad": func(key string) error {
			m, err := r.GetOrLoad(ctxb, key, small("1"))
			if err == nil {
				m.Close()
			}
			return err
		},
	} {
		for _, key := range []string{"", strings.Repeat("k", 1_000_000), "a\x00b", "a\nb"} {
			err := call(key)
			if !errors.Is(err, ErrKey) {
				t.Errorf("%s of %.20q: %v", name, key, err)
			}
		}
	}
	for _, o := range []*Options{{Budget: -1}, {LoadTimeout: -1}, {Slots: 1}, {Slots: layout.MaxSlots + 1}} {
		_, err := Open(r.Dir(), o)
		wantErr(t, err, ErrConfig)
	}
}

// A table that is cut off in the middle of a call.
func TestTruncationWithinACall(t *testing.T) {
	if raceEnabled {
		t.Skip("under the race detector a fault cannot be recovered from")
	}
	r := openOnly(t, proctest.TmpRegistry(t), nil)
	loadIdle(t, r, "k", small("1"))
	p, err := r.host.here() // as each call does first
	must(t, err)
	defer p.unref()
	must(t, os.Truncate(tablePath(r.Dir()), 0))
	for name, call := range map[string]func() error{
		"attach":    func() error { _, err := p.attachOnce(r, "k"); return err },
		"list":      func() error { _, err := p.list(""); return err },
		"counters":  func() error { _, err := p.counters(); return err },
		"stats":     func() error { return p.stats(&Stats{}, &slots{}, nil, nil) },
		"hugePages": func() error { _, err := p.hugePages("k"); return err },
		"charges":   func() error { _, err := p.charges("k"); return err },
	} {
		if err := call(); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestHeaderChangedUnderAWriter(t *testing.T) {
	r := newRegistry(t, nil)
	loadIdle(t, r, "k", small("1"))
	good, err := os.ReadFile(tablePath(r.Dir()))
	must(t, err)
	write := func(b []byte) {
		f, err := os.OpenFile(tablePath(r.Dir()), os.O_WRONLY, 0)
		must(t, err)
		defer f.Close()
		_, err = f.WriteAt(b, 0)
		must(t, err)
	}
	write(make([]byte, 64))
	wantErr(t, r.Remove(ctxb, "k"), ErrCorrupt)
	write(good[:64])
	must(t, r.Remove(ctxb, "k"))
}

// An index that a stranger has filled has no entry left; the first load repairs it.
func TestFullIndex(t *testing.T) {
	r := newRegistry(t, nil)
	f, err := os.OpenFile(tablePath(r.Dir()), os.O_WRONLY, 0)
	must(t, err)
	defer f.Close()
	end := layout.SlotsOffset(readTable(t, r.Dir()).Slots())
	_, err = f.WriteAt([]byte(strings.Repeat("A", end-layout.HeaderSize)), layout.HeaderSize)
	must(t, err)
	mustLoad(t, r, "k", small("1")).Close()
	wantBytes(t, mustGet(t, r, "k"), "w.bin", []byte("weights 1"))
}

// A slot that somebody changes although its load lock is held.
func TestSlotChangedDuringALoad(t *testing.T) {
	r := newRegistry(t, nil)
	_, err := r.GetOrLoad(ctxb, "k", one("w.bin", -1, func(f *FileWriter) error {
		setWord(t, r.Dir(), "k", layout.MakeWord(layout.Free, 1))
		return nil
	}))
	wantErr(t, err, ErrCorrupt)
	wantText(t, err, "although its load lock is held")
	mustLoad(t, r, "k", small("1"))
}

// The model that is being replaced is removed, and all other slots are taken: its own
// is kept for it, and is not to be had.
func TestReplacementKeepsItsSlot(t *testing.T) {
	for _, idle := range []bool{true, false} {
		t.Run(fmt.Sprintf("one may go %v", idle), func(t *testing.T) {
			r := newRegistry(t, &Options{Slots: layout.MinSlots})
			loadIdle(t, r, "k", small("1"))
			src := one("w.bin", -1, func(f *FileWriter) error {
				must(t, r.Remove(ctxb, "k"))
				for i := range layout.MinSlots - 1 {
					m := mustLoad(t, r, fmt.Sprint("other/", i), small("1"))
					if idle && i == 0 {
						must(t, m.Close())
					}
				}
				m, err := r.GetOrLoad(ctxb, "one more", small("1"))
				if idle {
					must(t, err)
					must(t, m.Close())
				} else {
					wantErr(t, err, ErrTableFull)
				}
				_, err = f.Write([]byte("second"))
				return err
			})
			src.Replace = true
			m, err := r.GetOrLoad(ctxb, "k", src)
			must(t, err)
			defer m.Close()
			wantBytes(t, m, "w.bin", []byte("second"))
			if _, err = r.Entry("other/0"); errors.Is(err, ErrNotFound) != idle {
				t.Errorf("other/0: %v", err)
			}
		})
	}
}

func TestRemoveAfterADeadLoader(t *testing.T) {
	r := newRegistry(t, nil)
	startStuck(t, r.Dir(), "k", "").Kill()
	wantErr(t, r.Remove(ctxb, "k"), ErrNotFound)
	if got := keysOf(t, r); got != "" {
		t.Errorf("left: %s", got)
	}
	m := mustLoad(t, r, "k", small("1"))
	must(t, m.Close())
	setWord(t, r.Dir(), "k", layout.MakeWord(layout.Evicting, m.Generation()))
	must(t, r.Remove(ctxb, "k")) // what a dead remover began
	wantErr(t, r.Remove(ctxb, "k"), ErrNotFound)
}

func TestUndoOfADamagedGeneration(t *testing.T) {
	for name, damage := range map[string]func(t *testing.T, r *Registry, old Info){
		"garbage": func(t *testing.T, r *Registry, old Info) {
			swap(t, genPath(r.Dir(), old, layout.ManifestExt), []byte("garbage"))
		},
		"another key": func(t *testing.T, r *Registry, old Info) {
			other := mustLoad(t, r, "other", small("1")).Info()
			b, err := os.ReadFile(genPath(r.Dir(), other, layout.ManifestExt))
			must(t, err)
			swap(t, genPath(r.Dir(), old, layout.ManifestExt), b)
		},
		"incomplete": func(t *testing.T, r *Registry, old Info) { removeFile(t, filepath.Join(old.Path, "w.bin")) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRegistry(t, nil)
			old := mustLoad(t, r, "k", small("1"))
			src := small("2")
			src.Replace = true
			must(t, mustLoad(t, r, "k", src).Close())
			damage(t, r, old.Info())
			wantErr(t, undo(ctxb, r, "k"), ErrNoPrevious)
			wantBytes(t, mustGet(t, r, "k"), "w.bin", []byte("weights 2"))
		})
	}
}

// holdLoadLock holds the load lock of a key.
func holdLoadLock(t *testing.T, r *Registry, key string) (release func()) {
	t.Helper()
	p, err := r.host.here()
	must(t, err)
	defer p.unref()
	held, err := p.lockFile(layout.StripeLock(layout.Stripe(key))).TryLock()
	must(t, err)
	return func() { must(t, held.Unlock()) }
}

func TestLoadLockThatSomebodyHolds(t *testing.T) {
	r := newRegistry(t, nil)
	loadIdle(t, r, "k", small("1"))
	release := holdLoadLock(t, r, "k")
	defer release()
	ctx, cancel := contextFor(20)
	defer cancel()
	err := undo(ctx, r, "k")
	wantErr(t, err, ErrTimeout)
	wantText(t, err, "another load holds this key's lock")
}

// Whoever waited long for another load looks at the source again.
func TestSourceGoneWhileWaiting(t *testing.T) {
	r := newRegistry(t, nil)
	src := fileSource(t, "w.bin", []byte("x"))
	release := holdLoadLock(t, r, "k")
	result := make(chan error, 1)
	begun := time.Now()
	go func() {
		m, err := r.GetOrLoad(ctxb, "k", src)
		if err == nil {
			err = errors.Join(m.Close(), errors.New("loaded"))
		}
		result <- err
	}()
	awaitWaits(t, r, 1)
	removeFile(t, src.Path)
	time.Sleep(time.Until(begun.Add(1100 * time.Millisecond))) // what counts as long
	release()
	wantErr(t, <-result, ErrSource)
}

// A FIFO that takes the place of a file of the source since it was listed is not
// opened for reading, which could block for ever.
func TestFileOfTheSourceBecomesAFIFO(t *testing.T) {
	r := newRegistry(t, nil)
	src := folderSource(t, map[string][]byte{"a": randomBytes(1, 5000), "b": randomBytes(2, 5000)})
	swapped := false
	src.Progress = func(done, total int64) {
		if !swapped {
			swapped = true
			removeFile(t, filepath.Join(src.Path, "b"))
			must(t, unix.Mkfifo(filepath.Join(src.Path, "b"), 0o600))
		}
	}
	_, err := r.GetOrLoad(ctxb, "k", src)
	wantErr(t, err, ErrSource)
	wantText(t, err, "is a FIFO now")
}

func TestRelativeSourceWithoutAFolder(t *testing.T) {
	r := newRegistry(t, nil)
	dir := filepath.Join(t.TempDir(), "gone")
	must(t, os.Mkdir(dir, 0o700))
	t.Chdir(dir)
	must(t, os.Remove(dir))
	_, err := r.GetOrLoad(ctxb, "k", Source{Path: "weights.bin"})
	wantErr(t, err, ErrSource)
}

func TestSourceWithTooManyFiles(t *testing.T) {
	r := newRegistry(t, nil)
	dir := t.TempDir()
	for i := range layout.MaxFiles + 1 {
		f, err := os.Create(fmt.Sprintf("%s/%05d", dir, i))
		must(t, err)
		must(t, f.Close())
	}
	_, err := r.GetOrLoad(ctxb, "k", Source{Path: dir})
	wantErr(t, err, ErrLimit)
}

func TestManifestThatIsTooLarge(t *testing.T) {
	r := newRegistry(t, nil)
	_, err := r.GetOrLoad(ctxb, "k", Source{Version: strings.Repeat("v", layout.MaxManifest), Load: small("1").Load})
	wantErr(t, err, ErrLimit)
	if got := keysOf(t, r); got != "" {
		t.Errorf("left: %s", got)
	}
}

// A digests file that is whole, but of other bytes.
func TestDigestsOfOtherBytes(t *testing.T) {
	r := newRegistry(t, nil)
	m := mustLoad(t, r, "k", small("1"))
	text, err := os.ReadFile(genPath(r.Dir(), m.Info(), layout.ManifestExt))
	must(t, err)
	man, err := layout.DecodeManifest(text)
	must(t, err)
	other := [][layout.DigestSize]byte{digest.Sum([]byte("other bytes"))}
	swap(t, genPath(r.Dir(), m.Info(), layout.DigestsExt), layout.EncodeDigests(man, digest.Algorithm, other))
	err = m.Verify(ctxb)
	wantErr(t, err, ErrCorrupt)
	wantText(t, err, "w.bin", "chunk digests")
	must(t, m.Close())
	must(t, r.Remove(ctxb, "k"))
}

// endsAfter is a context that is over when it has been asked often enough.
type endsAfter struct {
	context.Context
	asks int
}

func (c *endsAfter) Err() error {
	if c.asks--; c.asks < 0 {
		return context.Canceled
	}
	return nil
}

func TestCheckIsInterrupted(t *testing.T) {
	r := newRegistry(t, nil)
	loadIdle(t, r, "a", small("1"))
	loadIdle(t, r, "b", small("1"))
	interrupted := 0
	for asks := range 20 {
		_, err := r.Check(&endsAfter{ctxb, asks}, CheckOptions{Data: true})
		if err != nil {
			wantErr(t, err, context.Canceled)
			interrupted++
		}
	}
	if interrupted < 2 || interrupted == 20 {
		t.Errorf("interrupted at %d of 20 moments", interrupted)
	}
}

func TestRegistryDeletedForEver(t *testing.T) {
	r := newRegistry(t, nil)
	err := r.host.each(func(*place) error { return errGone })
	if !errors.Is(err, ErrGone) {
		t.Error(err)
	}
}

// The load of another user never ends: who only reads gives up in time.
func TestForeignReaderGivesUp(t *testing.T) {
	r := foreignRegistry(t)
	startStuck(t, r.Dir(), "slow", "")
	if a := runForeign(t, r.Dir(), 0, "wait a moment", "slow"); !a.Err.is("ErrTimeout") {
		t.Errorf("%+v", a)
	}
}

// An eviction whose owner died, of a model that is leased: a load undoes it and
// gets the model.
func TestLoadUndoesADeadEviction(t *testing.T) {
	r := newRegistry(t, nil)
	m := mustLoad(t, r, "k", small("1"))
	setWord(t, r.Dir(), "k", layout.MakeWord(layout.Evicting, m.Generation()))
	other, err := Open(r.Dir(), nil)
	must(t, err)
	defer other.Close()
	again := mustLoad(t, other, "k", small("1"))
	if again.Generation() != m.Generation() || m.Stale() {
		t.Errorf("generation %d, was %d", again.Generation(), m.Generation())
	}
	must(t, again.Close())
}

// The manifest was locked when a load looked, by an evictor that looked at many
// models, say, and is free when the load may replace the model: it is not replaced.
func TestModelThatWasBusyForAMoment(t *testing.T) {
	r := newRegistry(t, nil)
	m := mustLoad(t, r, "k", small("1"))
	must(t, m.Close())
	manifest, err := os.Open(genPath(r.Dir(), m.Info(), layout.ManifestExt))
	must(t, err)
	defer manifest.Close()
	must(t, unix.Flock(int(manifest.Fd()), unix.LOCK_EX))
	table, err := os.Open(v1(r.Dir(), layout.LocksDir, layout.TableLock))
	must(t, err)
	defer table.Close()
	must(t, unix.Flock(int(table.Fd()), unix.LOCK_EX))
	result := make(chan *Model, 1)
	go func() {
		defer close(result)
		again, err := r.GetOrLoad(ctxb, "k", small("1"))
		if err != nil {
			t.Error(err)
			return
		}
		result <- again
	}()
	// Two looks, of four tries each; after the second one it wants the table lock.
	for r.stats.retries.Load() < 6 {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(50 * time.Millisecond) // the last try; should it come later, it succeeds
	must(t, unix.Flock(int(manifest.Fd()), unix.LOCK_UN))
	must(t, unix.Flock(int(table.Fd()), unix.LOCK_UN))
	again, ok := <-result
	if !ok {
		return
	}
	if again.Generation() != m.Generation() {
		t.Errorf("replaced by generation %d", again.Generation())
	}
	must(t, again.Close())
}
