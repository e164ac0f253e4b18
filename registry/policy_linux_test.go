//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// block is what a model of one small file uses: file, manifest and digests.
const block = 3 * 4096

// idle loads a model that nobody leases afterwards.
func idle(t testing.TB, r *Registry, key string) {
	t.Helper()
	m, err := r.GetOrLoad(ctxb, key, small(key))
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
}

// setHints changes hints of a model behind the library's back.
func setHints(t testing.TB, dir, key string, hints map[layout.Hint]uint64) {
	t.Helper()
	editTable(t, dir, func(e layout.Editor) {
		f, ok := e.Lookup(key)
		if !ok {
			t.Fatalf("no slot names %q", key)
		}
		for h, v := range hints {
			e.SetHint(f.Slot, h, v)
		}
	})
}

func modelKeys(t testing.TB, r *Registry) (keys []string) {
	t.Helper()
	es, err := r.Entries()
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range es {
		keys = append(keys, e.Key)
	}
	return keys
}

func wantKeys(t testing.TB, r *Registry, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, modelKeys(t, r)); diff != "" {
		t.Errorf("models (-want +got):\n%s", diff)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestBudgetEvictsLeastRecentlyUsed(t *testing.T) {
	r := newRegistry(t, &Options{Budget: 3 * block})
	idle(t, r, "a")
	idle(t, r, "b")
	idle(t, r, "c")
	mustGet(t, r, "a").Close()
	must(t, r.Touch(ctxb, "b"))
	idle(t, r, "d") // the budget is met exactly: one in, one out
	wantKeys(t, r, "a", "b", "d")
	must(t, r.Pin(ctxb, "a"))
	idle(t, r, "e")
	wantKeys(t, r, "a", "d", "e")
	if s := stats(t, r); s.Used > s.Budget {
		t.Errorf("%d bytes used of a budget of %d", s.Used, s.Budget)
	}
}

func TestNoSpaceNamesEverything(t *testing.T) {
	r := newRegistry(t, &Options{Budget: 3 * block})
	mustLoad(t, r, "leased", small("1"))
	idle(t, r, "pinned")
	must(t, r.Pin(ctxb, "pinned"))
	idle(t, r, "idle")
	_, err := r.GetOrLoad(ctxb, "big", Source{Size: 5 * block, Load: func(context.Context, *Writer) error { panic("not admitted") }})
	wantErr(t, err, ErrNoSpace)
	var no *NoSpaceError
	if !errors.As(err, &no) {
		t.Fatal(err)
	}
	if no.Leased != block || no.Pinned != block || no.Evictable != block || no.Used != 3*block || no.Budget != 3*block || no.Need < 5*block {
		t.Errorf("%+v", no)
	}
	if len(no.Holders) != 1 || no.Holders[0].PID != os.Getpid() || no.Holders[0].Key != "leased" {
		t.Errorf("holders %+v", no.Holders)
	}
	wantText(t, err, "are pinned", "in use by pid")
	wantKeys(t, r, "idle", "leased", "pinned") // nothing was evicted in vain
}

func TestSupersededGenerationsCount(t *testing.T) {
	r := newRegistry(t, &Options{Budget: 2 * block})
	old := mustLoad(t, r, "k", small("1"))
	m, err := r.GetOrLoad(ctxb, "k", Source{Load: small("2").Load, Version: "2", Replace: true})
	must(t, err)
	m.Close()
	_, err = r.GetOrLoad(ctxb, "k", Source{Load: small("3").Load, Version: "3", Replace: true})
	wantErr(t, err, ErrNoSpace)
	old.Close()
	idle(t, r, "other")
	wantKeys(t, r, "k", "other")
}

func TestPinEndsWithTheModel(t *testing.T) {
	r := newRegistry(t, nil)
	wantErr(t, r.Pin(ctxb, "k"), ErrNotFound)
	wantErr(t, r.Pin(ctxb, ""), ErrKey)
	idle(t, r, "k")
	must(t, r.Pin(ctxb, "k"))
	must(t, r.SetTTL(ctxb, "k", time.Hour))
	m, err := r.GetOrLoad(ctxb, "k", Source{Load: small("2").Load, Version: "2", Replace: true})
	must(t, err)
	m.Close()
	if e, err := r.Entry("k"); err != nil || !e.Pinned || e.TTL != time.Hour {
		t.Errorf("after a replacement: %+v, %v", e, err)
	}
	must(t, r.Remove(ctxb, "k"))
	idle(t, r, "k")
	if e, err := r.Entry("k"); err != nil || e.Pinned || e.TTL != 0 {
		t.Errorf("after a removal: %+v, %v", e, err)
	}
	must(t, r.Pin(ctxb, "k"))
	must(t, r.Unpin(ctxb, "k"))
	if e, _ := r.Entry("k"); e.Pinned {
		t.Error("pinned after Unpin")
	}
}

func TestTTL(t *testing.T) {
	const unit = uint64(10 * time.Second)
	if now() < 5*unit {
		t.Skip("this machine has just started: it has no past")
	}
	for _, c := range []struct {
		name    string
		ttl     time.Duration // of the model
		pin     bool
		hints   func(n uint64) map[layout.Hint]uint64
		expires bool
	}{
		{"released long ago", 0, false, func(n uint64) map[layout.Hint]uint64 {
			return map[layout.Hint]uint64{layout.HintLastAttach: n - 3*unit, layout.HintLastRelease: n - 2*unit}
		}, true},
		{"released just now, loaded long ago", 0, false, func(n uint64) map[layout.Hint]uint64 {
			return map[layout.Hint]uint64{layout.HintLastAttach: n - 3*unit, layout.HintLastRelease: n}
		}, false},
		{"attached after the last release: the holder was killed", 0, false, func(n uint64) map[layout.Hint]uint64 {
			return map[layout.Hint]uint64{layout.HintLastAttach: n - 2*unit, layout.HintLastRelease: n - 3*unit}
		}, false},
		{"... and found idle long ago", 0, false, func(n uint64) map[layout.Hint]uint64 {
			return map[layout.Hint]uint64{layout.HintLastAttach: n - 3*unit, layout.HintLastRelease: n - 4*unit, layout.HintIdleSince: n - 2*unit}
		}, true},
		{"found idle long ago, and used since", 0, false, func(n uint64) map[layout.Hint]uint64 {
			return map[layout.Hint]uint64{layout.HintIdleSince: n - 3*unit, layout.HintLastAttach: n - 2*unit, layout.HintLastRelease: n - unit/2}
		}, false},
		{"... by one who was killed", 0, false, func(n uint64) map[layout.Hint]uint64 {
			return map[layout.Hint]uint64{layout.HintIdleSince: n - 3*unit, layout.HintLastAttach: n - 2*unit, layout.HintLastRelease: n - 4*unit}
		}, false},
		{"found idle before the last of several was released", 0, false, func(n uint64) map[layout.Hint]uint64 {
			return map[layout.Hint]uint64{layout.HintLastAttach: n - 4*unit, layout.HintIdleSince: n - 3*unit, layout.HintLastRelease: n - unit/2}
		}, false},
		{"all times in the future", 0, false, func(n uint64) map[layout.Hint]uint64 {
			return map[layout.Hint]uint64{layout.HintLastAttach: n + 2*unit, layout.HintLastRelease: n + 3*unit, layout.HintIdleSince: n + 4*unit}
		}, false},
		{"pinned", 0, true, func(n uint64) map[layout.Hint]uint64 {
			return map[layout.Hint]uint64{layout.HintLastRelease: n - 2*unit, layout.HintLastAttach: n - 3*unit}
		}, false},
		{"its own TTL is longer", 30 * time.Second, false, func(n uint64) map[layout.Hint]uint64 {
			return map[layout.Hint]uint64{layout.HintLastRelease: n - 2*unit, layout.HintLastAttach: n - 3*unit}
		}, false},
		{"its own TTL is never", -1, false, func(n uint64) map[layout.Hint]uint64 {
			return map[layout.Hint]uint64{layout.HintLastRelease: n - 2*unit, layout.HintLastAttach: n - 3*unit}
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRegistry(t, nil)
			must(t, r.SetConfig(ctxb, Config{TTL: 10 * time.Second}))
			idle(t, r, "k")
			must(t, r.SetTTL(ctxb, "k", c.ttl))
			if c.pin {
				must(t, r.Pin(ctxb, "k"))
			}
			n := now()
			setHints(t, r.Dir(), "k", c.hints(n))
			planned, err := r.PlanGC(ctxb)
			must(t, err)
			rep, err := r.GC(ctxb)
			must(t, err)
			if (rep.Expired == 1) != c.expires {
				t.Errorf("expired: %+v", rep)
			}
			if planned.Expired != rep.Expired || len(planned.Keys) != len(rep.Keys) {
				t.Errorf("planned %+v, done %+v", planned, rep)
			}
		})
	}
}

// A lease that a collector has seen is a use, whoever noted a release before.
func TestALeaseRestartsTheTTL(t *testing.T) {
	const unit = uint64(10 * time.Second)
	if now() < 5*unit {
		t.Skip("this machine has just started: it has no past")
	}
	r := newRegistry(t, nil)
	must(t, r.SetConfig(ctxb, Config{TTL: 10 * time.Second}))
	m := mustLoad(t, r, "k", small("1"))
	lease, err := m.Lease()
	must(t, err)
	m.Close()
	n := now()
	setHints(t, r.Dir(), "k", map[layout.Hint]uint64{layout.HintLastAttach: n - 3*unit, layout.HintLastRelease: n - 2*unit})
	for _, leased := range []bool{true, false} {
		if rep, err := r.GC(ctxb); err != nil || rep.Expired != 0 {
			t.Errorf("leased %v: %+v, %v", leased, rep, err)
		}
		lease.Close()
	}
}

// Times to come are of a clock that was wrong: they age from now on.
func TestTimesToComeAge(t *testing.T) {
	r := newRegistry(t, nil)
	must(t, r.SetConfig(ctxb, Config{TTL: time.Hour}))
	idle(t, r, "k")
	far := now() + uint64(1000*time.Hour)
	setHints(t, r.Dir(), "k", map[layout.Hint]uint64{layout.HintLastAttach: far, layout.HintLastRelease: far, layout.HintIdleSince: far})
	_, err := r.GC(ctxb)
	must(t, err)
	editTable(t, r.Dir(), func(e layout.Editor) {
		f, _ := e.Lookup("k")
		for _, h := range []layout.Hint{layout.HintLastAttach, layout.HintLastRelease, layout.HintIdleSince} {
			if e.Hint(f.Slot, h) > now() {
				t.Errorf("hint %d is still to come", h)
			}
		}
	})
}

func TestOpenExpires(t *testing.T) {
	r := newRegistry(t, nil)
	if now() < uint64(time.Minute) {
		t.Skip("this machine has just started: it has no past")
	}
	idle(t, r, "k")
	must(t, r.SetTTL(ctxb, "k", time.Second))
	n := now()
	setHints(t, r.Dir(), "k", map[layout.Hint]uint64{layout.HintLastAttach: n - uint64(time.Minute), layout.HintLastRelease: n - uint64(time.Minute)})
	reopen := func(o *Options) {
		again, err := Open(r.Dir(), o)
		must(t, err)
		must(t, again.Close())
	}
	reopen(&Options{MustExist: true})
	wantKeys(t, r, "k") // inspectors remove nothing
	reopen(nil)
	wantKeys(t, r)
}

func TestTTLWaitsForTheLease(t *testing.T) {
	r := newRegistry(t, nil)
	m := mustLoad(t, r, "k", small("1"))
	must(t, r.SetTTL(ctxb, "k", 1)) // a nanosecond
	rep, err := r.GC(ctxb)
	must(t, err)
	if rep.Expired != 0 {
		t.Errorf("a leased model expired: %+v", rep)
	}
	m.Close() // with the release it is past its TTL
	wantKeys(t, r)
}

func TestTouchBeginsAnew(t *testing.T) {
	r := newRegistry(t, nil)
	idle(t, r, "k")
	must(t, r.SetTTL(ctxb, "k", time.Hour))
	setHints(t, r.Dir(), "k", map[layout.Hint]uint64{layout.HintLastAttach: 1, layout.HintLastRelease: 2, layout.HintIdleSince: 3})
	must(t, r.Touch(ctxb, "k"))
	rep, err := r.GC(ctxb)
	must(t, err)
	if rep.Expired != 0 {
		t.Errorf("%+v", rep)
	}
	if e, _ := r.Entry("k"); time.Since(e.LastRelease) > time.Minute {
		t.Errorf("last release %v", e.LastRelease)
	}
	wantErr(t, r.Touch(ctxb, "nobody"), ErrNotFound)
}

// A table from before the machine was started: no time in it means anything, and
// nothing is thrown away for it.
func TestOtherBoot(t *testing.T) {
	dir := proctest.TmpRegistry(t)
	image, err := layout.NewImage(layout.Identity{Epoch: 1, Slots: layout.MinSlots, BootID: [16]byte{1}}, 0, 0)
	must(t, err)
	must(t, os.MkdirAll(v1(dir), 0o700))
	must(t, os.WriteFile(tablePath(dir), image, 0o644))
	r := openRegistry(t, dir, nil)
	idle(t, r, "k")
	must(t, r.SetTTL(ctxb, "k", time.Second))
	setHints(t, dir, "k", map[layout.Hint]uint64{layout.HintLastAttach: 1, layout.HintLastRelease: 2, layout.HintIdleSince: 3})
	rep, err := r.GC(ctxb)
	must(t, err)
	if rep.Expired != 0 {
		t.Errorf("%+v", rep)
	}
	e, err := r.Entry("k")
	must(t, err)
	if !e.LastAttach.IsZero() || !e.LastRelease.IsZero() {
		t.Errorf("times of another boot are shown: %+v", e)
	}
}

func TestConfig(t *testing.T) {
	r := newRegistry(t, nil)
	c, err := r.Config()
	must(t, err)
	if diff := cmp.Diff(Config{BudgetShare: 0.8}, c); diff != "" {
		t.Errorf("defaults (-want +got):\n%s", diff)
	}
	for _, c := range []Config{
		{Budget: 1 << 20}, {Budget: 1 << 62, TTL: time.Minute}, {BudgetShare: 0.57}, {BudgetShare: 1}, {BudgetShare: 1e-6},
	} {
		must(t, r.SetConfig(ctxb, c))
		got, err := r.Config()
		must(t, err)
		if diff := cmp.Diff(c, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	must(t, r.SetConfig(ctxb, Config{}))
	if s := stats(t, r); s.Budget < s.Size*7/10 || s.Budget > s.Size*8/10 {
		t.Errorf("a budget of %d on %d bytes", s.Budget, s.Size)
	}
	for _, c := range []Config{{Budget: -1}, {BudgetShare: -0.1}, {BudgetShare: 1.1}, {BudgetShare: 1e-9}, {TTL: -1}} {
		wantErr(t, r.SetConfig(ctxb, c), ErrConfig)
	}
}

func TestBudgetBelowTheModel(t *testing.T) {
	r := newRegistry(t, &Options{Budget: 4096})
	_, err := r.GetOrLoad(ctxb, "k", fileSource(t, "w", make([]byte, 8192)))
	wantErr(t, err, ErrNoSpace)
	wantKeys(t, r)
}

func TestTrim(t *testing.T) {
	r := newRegistry(t, nil)
	for _, k := range []string{"a", "b", "c", "d"} {
		idle(t, r, k)
	}
	mustGet(t, r, "b")
	must(t, r.Pin(ctxb, "a"))
	plan, err := r.PlanTrim(ctxb, 3*block)
	must(t, err)
	wantKeys(t, r, "a", "b", "c", "d")
	rep, err := r.Trim(ctxb, 3*block)
	must(t, err)
	if diff := cmp.Diff([]string{"c"}, rep.Removed); diff != "" || rep.Used != 3*block || rep.Held != 0 {
		t.Errorf("%+v\n%s", rep, diff)
	}
	if diff := cmp.Diff(plan.Removed, rep.Removed); diff != "" || plan.Used != rep.Used || plan.Freed != rep.Freed {
		t.Errorf("planned %+v, done %+v", plan, rep)
	}
	rep, err = r.Trim(ctxb, 0)
	must(t, err)
	if diff := cmp.Diff(TrimReport{Removed: []string{"d"}, Freed: block, Used: 2 * block, Held: 2 * block}, rep); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	wantKeys(t, r, "a", "b")
	_, err = r.Trim(ctxb, -1)
	wantErr(t, err, ErrConfig)
}

// Two loaders, each of which would fit alone, at the same moment: the bytes are
// promised to one.
func TestLastBytesGoToOne(t *testing.T) {
	r := newRegistry(t, &Options{Budget: 2*block - 1})
	loading, proceed := make(chan struct{}), make(chan struct{})
	first := make(chan error, 1)
	src := small("1")
	load := src.Load
	src.Size = 4096
	src.Load = func(ctx context.Context, w *Writer) error {
		close(loading)
		<-proceed
		return load(ctx, w)
	}
	go func() {
		m, err := r.GetOrLoad(ctxb, "first", src)
		if err == nil {
			m.Close()
		}
		first <- err
	}()
	<-loading
	other, err := Open(r.Dir(), nil)
	must(t, err)
	defer other.Close()
	second := small("2")
	second.Size = 4096
	_, err = other.GetOrLoad(ctxb, "second", second)
	wantErr(t, err, ErrNoSpace)
	close(proceed)
	must(t, <-first)
	wantKeys(t, r, "first")
}

var holdProgram = child("policy-hold", func(args []string) error {
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	m, err := r.Get(args[1])
	if err != nil {
		return err
	}
	defer m.Close()
	if err := say(m.Generation()); err != nil {
		return err
	}
	select {}
})

func TestRollout(t *testing.T) {
	r := newRegistry(t, nil)
	old := mustLoad(t, r, "k", small("1"))
	proved := false
	m, err := r.Rollout(ctxb, "k", small("2"), func(_ context.Context, m *Model) error {
		proved = true
		wantBytes(t, m, "w.bin", []byte("weights 2"))
		if old.Stale() {
			t.Error("published before it was proven")
		}
		if b, err := os.ReadFile(filepath.Join(m.Path(), "w.bin")); err != nil || string(b) != "weights 2" {
			t.Errorf("%q, %v", b, err)
		}
		if m.Info().AlreadyPresent {
			t.Error("it is being loaded, and is said to have been present")
		}
		now := mustGet(t, r, "k")
		wantBytes(t, now, "w.bin", []byte("weights 1"))
		return now.Close()
	})
	must(t, err)
	defer m.Close()
	must(t, r.Use("k", func(m *Model) error {
		if !m.Info().AlreadyPresent {
			t.Error("Use does not say AlreadyPresent")
		}
		return nil
	}))
	r.Release("k")
	if !proved || !old.Stale() || m.Generation() == old.Generation() {
		t.Errorf("proved %v, stale %v", proved, old.Stale())
	}
	if i := m.Info(); i.Replaced != old.Generation() || old.Info().Replaced != 0 || mustGet(t, r, "k").Info().Replaced != 0 {
		t.Errorf("it replaced %d, and not %d", i.Replaced, old.Generation())
	}
	gens, err := r.Generations("k")
	must(t, err)
	if len(gens) != 2 || !gens[0].Published || gens[1].Published || gens[0].Generation != m.Generation() ||
		gens[0].Origin.Version != "2" || len(gens[1].Holders) != 1 {
		t.Errorf("%+v", gens)
	}
	old.Close()
	if gens, _ = r.Generations("k"); len(gens) != 1 {
		t.Errorf("the old generation stays: %+v", gens)
	}
	_, err = r.Generations("nobody")
	wantErr(t, err, ErrNotFound)
}

// A rollout that waited for another one replaces what that one published, not
// what was there when it came.
func TestRolloutAfterRollout(t *testing.T) {
	r := newRegistry(t, nil)
	mustLoad(t, r, "k", small("1"))
	later, err := Open(r.Dir(), nil)
	must(t, err)
	defer later.Close()
	second := make(chan *Model, 1)
	first, err := r.Rollout(ctxb, "k", small("2"), func(context.Context, *Model) error {
		go func() {
			m, err := later.Rollout(ctxb, "k", small("3"), nil)
			if err != nil {
				t.Error(err)
			}
			second <- m
		}()
		awaitWaits(t, later, 1)
		return nil
	})
	must(t, err)
	defer first.Close()
	m := <-second
	if m == nil {
		return
	}
	defer m.Close()
	if got := m.Info().Replaced; got != first.Generation() {
		t.Errorf("generation %d replaced, want %d", got, first.Generation())
	}
}

func TestRolloutThatFails(t *testing.T) {
	bad := errors.New("the canary sings no more")
	for name, c := range map[string]struct {
		prove func(context.Context, *Model) error
		want  []error
	}{
		"refused": {func(context.Context, *Model) error { return bad }, []error{ErrProof, bad}},
		"killed": {func(ctx context.Context, _ *Model) error {
			return exec.CommandContext(ctx, "sh", "-c", "kill -9 $$").Run()
		}, []error{ErrProof}},
		"times out": {func(context.Context, *Model) error {
			return fmt.Errorf("its own: %w", context.DeadlineExceeded)
		}, []error{ErrProof, context.DeadlineExceeded}},
		"hangs": {func(ctx context.Context, _ *Model) error {
			<-ctx.Done()
			return errors.New("killed")
		}, []error{ErrTimeout}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRegistry(t, nil)
			old := mustLoad(t, r, "k", small("1"))
			used := stats(t, r).Used
			ctx := ctxb
			if name == "hangs" {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 50*time.Millisecond)
				defer cancel()
			}
			_, err := r.Rollout(ctx, "k", small("2"), c.prove)
			wantErr(t, err, c.want...)
			if old.Stale() {
				t.Error("published all the same")
			}
			if s := stats(t, r); s.Used != used || s.Superseded != 0 || s.Reserved != 0 {
				t.Errorf("left: %+v", s)
			}
			_, err = r.Rollout(ctxb, "new", small("1"), func(context.Context, *Model) error { return bad })
			wantErr(t, err, ErrProof)
			wantKeys(t, r, "k")
			m, err := r.Rollout(ctxb, "k", small("3"), nil)
			must(t, err)
			m.Close()
		})
	}
}

func TestUndoAndRedo(t *testing.T) {
	r := newRegistry(t, nil)
	wantErr(t, undo(ctxb, r, "k"), ErrNotFound)
	idle(t, r, "k")
	wantErr(t, undo(ctxb, r, "k"), ErrNoPrevious)
	holder := proctest.Start(t, holdProgram, r.Dir(), "k")
	holder.Line(t)
	one := mustGet(t, r, "k").Generation()
	r.Release("k")
	two := mustLoad(t, r, "k", Source{Load: small("2").Load, Version: "2", Replace: true})
	published, replaced, err := r.Undo(ctxb, "k")
	must(t, err)
	if published != one || replaced != two.Generation() {
		t.Errorf("%d published, %d replaced", published, replaced)
	}
	if m := mustGet(t, r, "k"); m.Generation() != one {
		t.Errorf("generation %d after undo, want %d", m.Generation(), one)
	}
	if !two.Stale() {
		t.Error("what was undone is not stale")
	}
	must(t, undo(ctxb, r, "k")) // redo
	if m := mustGet(t, r, "k"); m.Generation() != two.Generation() {
		t.Errorf("generation %d after redo, want %d", m.Generation(), two.Generation())
	}
}

func TestUndoOfWhatIsGone(t *testing.T) {
	r := newRegistry(t, nil)
	idle(t, r, "k")
	m, err := r.GetOrLoad(ctxb, "k", Source{Load: small("2").Load, Version: "2", Replace: true})
	must(t, err)
	defer m.Close()
	wantErr(t, undo(ctxb, r, "k"), ErrNoPrevious) // nobody used it: it went at once
	if m.Stale() {
		t.Error("a failed undo changed something")
	}
}

// A removal that was killed halfway: the manifest is there, but not the payload.
// Undo takes the load lock, which a load, or a proof, already holds.
func TestUndoWithinALoad(t *testing.T) {
	r := newRegistry(t, &Options{LoadTimeout: time.Second})
	mustLoad(t, r, "k", small("1"))
	src := one("w.bin", 1, func(*FileWriter) error { return nil })
	src.Replace = true
	load := src.Load
	src.Load = func(ctx context.Context, w *Writer) error {
		_, _, err := r.Undo(ctx, "k")
		wantErr(t, err, ErrNestedLoad)
		return load(ctx, w)
	}
	m, err := r.Rollout(ctxb, "k", src, func(ctx context.Context, _ *Model) error {
		_, _, err := r.Undo(ctx, "k")
		wantErr(t, err, ErrNestedLoad)
		return nil
	})
	must(t, err)
	must(t, m.Close())
	_, _, err = r.Undo(ctxb, "k")
	must(t, err)
}

func TestUndoOfHalfAGeneration(t *testing.T) {
	r := newRegistry(t, nil)
	old := mustLoad(t, r, "k", small("1"))
	m := mustLoad(t, r, "k", Source{Load: small("2").Load, Version: "2", Replace: true})
	must(t, os.Remove(filepath.Join(old.Path(), "w.bin")))
	err := undo(ctxb, r, "k")
	wantErr(t, err, ErrNoPrevious)
	wantText(t, err, "incomplete", "w.bin")
	if m.Stale() {
		t.Error("a failed undo changed something")
	}
}

func TestPolicyOfForeignRegistry(t *testing.T) {
	needRoot(t)
	r := newRegistry(t, &Options{Mode: 0o755})
	idle(t, r, "k")
	for _, rep := range runChild[[]report](t, foreignPolicy, r.Dir()) {
		if !rep.is("ErrReadOnly") {
			t.Errorf("%+v", rep)
		}
	}
}

var foreignPolicy = child("policy-foreign", func(args []string) error {
	if err := become(foreignUID); err != nil {
		return err
	}
	r, err := Open(args[0], &Options{MustExist: true})
	if err != nil {
		return err
	}
	defer r.Close()
	_, trim := r.Trim(ctxb, 0)
	return say([]report{
		reportOf(r.Pin(ctxb, "k")), reportOf(r.Touch(ctxb, "k")), reportOf(r.SetTTL(ctxb, "k", 1)), reportOf(undo(ctxb, r, "k")),
		reportOf(r.SetConfig(ctxb, Config{})), reportOf(r.PlanConfig(ctxb, Config{})), reportOf(r.PlanRemove(ctxb, "k")), reportOf(trim),
	})
})

// A plan ends as the removal that follows it, and changes nothing.
func TestPlanRemove(t *testing.T) {
	for name, prepare := range map[string]func(*testing.T, *Registry){
		"missing": func(*testing.T, *Registry) {},
		"idle":    func(t *testing.T, r *Registry) { idle(t, r, "k") },
		"pinned":  func(t *testing.T, r *Registry) { idle(t, r, "k"); must(t, r.Pin(ctxb, "k")) },
		"leased":  func(t *testing.T, r *Registry) { mustLoad(t, r, "k", small("1")) },
		"without a manifest": func(t *testing.T, r *Registry) {
			idle(t, r, "k")
			e, err := r.Entry("k")
			must(t, err)
			must(t, os.Remove(genPath(r.Dir(), *e.Info, layout.ManifestExt)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRegistry(t, nil)
			prepare(t, r)
			before := pictureOf(t, r.Dir())
			planned := r.PlanRemove(ctxb, "k")
			if after := pictureOf(t, r.Dir()); after != before {
				t.Errorf("changed:\n%s\nfrom:\n%s", after, before)
			}
			done := r.Remove(ctxb, "k")
			if fmt.Sprint(planned) != fmt.Sprint(done) {
				t.Errorf("planned %v, done %v", planned, done)
			}
		})
	}
}
