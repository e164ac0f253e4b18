//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// Everything that could be waited for is held by somebody who never lets go. What
// has a context ends with it, what has none does not wait.

// everything is a registry with the models "free", and "busy", of which the
// manifest is locked exclusively; T and the load locks of all keys here are held.
func everything(t *testing.T) *Registry {
	r := newRegistry(t, &Options{LoadTimeout: time.Hour})
	for _, key := range []string{"free", "busy"} {
		loadIdle(t, r, key, small("1"))
	}
	busy, err := r.Entry("busy")
	must(t, err)
	paths := []string{v1(r.Dir(), layout.LocksDir, layout.TableLock), genPath(r.Dir(), *busy.Info, layout.ManifestExt)}
	for _, key := range []string{"free", "busy", "missing"} {
		path := keyLockPath(r.Dir(), key)
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o600) // of a key that nobody has loaded
		must(t, err)
		must(t, f.Close())
		paths = append(paths, path)
	}
	slices.Sort(paths)
	for _, path := range slices.Compact(paths) { // keys may share a stripe
		f, err := os.Open(path)
		must(t, err)
		must(t, unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB))
		t.Cleanup(func() { f.Close() })
	}
	return r
}

// use is how a test calls a method, with a context if it has one.
type use func(ctx context.Context) error

// usesOf are calls of every method of the API's types, some more than one.
func usesOf(t *testing.T, r *Registry) map[string][]use {
	t.Helper()
	m := mustGet(t, r, "free")
	w := r.Watch()
	b := Bind(r, func(context.Context, *Model) (int, error) { return 1, nil }, nil)
	keys := []string{"free", "busy", "missing"}
	each := func(fn func(ctx context.Context, key string) error) (us []use) {
		for _, k := range keys {
			us = append(us, func(ctx context.Context) error { return fn(ctx, k) })
		}
		return us
	}
	plain := func(fn func()) []use { return []use{func(context.Context) error { fn(); return nil }} }
	got := func(m *Model, err error) error {
		if err == nil {
			m.Close()
		}
		return err
	}
	replace := small("2")
	replace.Replace = true
	return map[string][]use{
		"Registry.Get": each(func(_ context.Context, k string) error { return got(r.Get(k)) }),
		"Registry.GetOrLoad": append(each(func(ctx context.Context, k string) error { return got(r.GetOrLoad(ctx, k, small("1"))) }),
			each(func(ctx context.Context, k string) error { return got(r.GetOrLoad(ctx, k, replace)) })...),
		"Registry.Rollout": each(func(ctx context.Context, k string) error { return got(r.Rollout(ctx, k, replace, nil)) }),
		"Registry.Use": each(func(_ context.Context, k string) error {
			defer r.Release(k)
			return r.Use(k, func(*Model) error { return nil })
		}),
		"Registry.Release":      each(func(_ context.Context, k string) error { r.Release(k); return nil }),
		"Registry.Remove":       each(r.Remove),
		"Registry.PlanRemove":   each(r.PlanRemove),
		"Registry.Undo":         each(func(ctx context.Context, k string) error { return undo(ctx, r, k) }),
		"Registry.Pin":          each(r.Pin),
		"Registry.Unpin":        each(r.Unpin),
		"Registry.Touch":        each(r.Touch),
		"Registry.SetTTL":       each(func(ctx context.Context, k string) error { return r.SetTTL(ctx, k, time.Hour) }),
		"Registry.SetConfig":    {func(ctx context.Context) error { return r.SetConfig(ctx, Config{}) }},
		"Registry.PlanConfig":   {func(ctx context.Context) error { return r.PlanConfig(ctx, Config{}) }},
		"Registry.Trim":         {func(ctx context.Context) error { _, err := r.Trim(ctx, 0); return err }},
		"Registry.PlanTrim":     {func(ctx context.Context) error { _, err := r.PlanTrim(ctx, 0); return err }},
		"Registry.GC":           {func(ctx context.Context) error { _, err := r.GC(ctx); return err }},
		"Registry.PlanGC":       {func(ctx context.Context) error { _, err := r.PlanGC(ctx); return err }},
		"Registry.Check":        {func(ctx context.Context) error { _, err := r.Check(ctx, CheckOptions{Data: true}); return err }},
		"Registry.Config":       {func(context.Context) error { _, err := r.Config(); return err }},
		"Registry.Counters":     {func(context.Context) error { _, err := r.Counters(); return err }},
		"Registry.Stats":        {func(context.Context) error { _, err := r.Stats(); return err }},
		"Registry.Entries":      {func(context.Context) error { _, err := r.Entries(); return err }},
		"Registry.Entry":        each(func(_ context.Context, k string) error { _, err := r.Entry(k); return err }),
		"Registry.Generations":  each(func(_ context.Context, k string) error { _, err := r.Generations(k); return err }),
		"Registry.Holders":      each(func(_ context.Context, k string) error { _, err := r.Holders(k); return err }),
		"Registry.HolderReport": each(func(_ context.Context, k string) error { _, err := r.HolderReport(k); return err }),
		"Registry.HugePages":    each(func(_ context.Context, k string) error { _, err := r.HugePages(k); return err }),
		"Registry.Charges":      each(func(_ context.Context, k string) error { _, err := r.Charges(k); return err }),
		"Registry.Overview":     {func(context.Context) error { _, err := r.Overview(); return err }},
		"Registry.Watch":        plain(func() { r.Watch() }),
		"Registry.Dir":          plain(func() { r.Dir() }),
		"Registry.Sharing":      {func(context.Context) error { return r.Sharing() }},
		"Registry.Close": {func(context.Context) error {
			again, err := Open(r.Dir(), nil)
			if err != nil {
				return err
			}
			return again.Close()
		}},
		"Watch.Overview":           {func(context.Context) error { _, err := w.Overview(); return err }},
		"Watch.OverviewAndHolders": {func(context.Context) error { _, _, err := w.OverviewAndHolders(); return err }},
		"Binding.GetOrLoad": each(func(ctx context.Context, k string) error {
			ref, err := b.GetOrLoad(ctx, k, small("1"))
			if err == nil {
				err = ref.Close()
			}
			return err
		}),
		"Binding.Stats":    plain(func() { b.Stats() }),
		"Model.Key":        plain(func() { m.Key() }),
		"Model.Generation": plain(func() { m.Generation() }),
		"Model.Path":       plain(func() { m.Path() }),
		"Model.Files":      plain(func() { m.Files() }),
		"Model.Info":       plain(func() { m.Info() }),
		"Model.Bytes":      {func(context.Context) error { _, err := m.Bytes("w.bin"); return err }},
		"Model.Stale":      plain(func() { m.Stale() }),
		"Model.Verify":     {m.Verify},
		"Model.Lease": {func(context.Context) error {
			f, err := m.Lease()
			if err == nil {
				err = f.Close()
			}
			return err
		}},
		"Model.Close": {func(context.Context) error { return got(r.Get("free")) }},
	}
}

func TestEveryWaitHasAContext(t *testing.T) {
	r := everything(t)
	uses := usesOf(t, r)
	takesContext := map[string]bool{}
	for _, v := range []any{r, (*Model)(nil), (*Watch)(nil), (*Binding[int])(nil)} {
		typ := reflect.TypeOf(v)
		name, _, _ := strings.Cut(typ.Elem().Name(), "[")
		for i := range typ.NumMethod() {
			m := typ.Method(i)
			full := name + "." + m.Name
			if uses[full] == nil {
				t.Errorf("%s is not in usesOf: does it wait?", full)
			}
			takesContext[full] = m.Type.NumIn() > 1 && m.Type.In(1) == reflect.TypeFor[context.Context]()
		}
	}
	timeouts := 0
	for _, name := range slices.Sorted(maps.Keys(uses)) {
		for _, call := range uses[name] {
			ctx := ctxb
			if takesContext[name] {
				var cancel context.CancelFunc
				ctx, cancel = contextFor(20)
				defer cancel()
			}
			// What waits without a context never comes back, and the test says where.
			switch err := call(ctx); {
			case errors.Is(err, ErrTimeout):
				timeouts++
				if !takesContext[name] {
					t.Errorf("%s: %v, without a context", name, err)
				}
			case err != nil && !errors.Is(err, ErrBusy) && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrInUse):
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	if timeouts < 20 {
		t.Errorf("%d calls waited: the test tests nothing", timeouts)
	}
	// Nor do readers wait who come later.
	m := mustGet(t, r, "free")
	wantBytes(t, m, "w.bin", []byte("weights 1"))
}

// A load function's own calls have no context: they end with that of the load, or
// with the registry's time-out, which is one also when the function passes it on.
func TestWriterWaitsNoLongerThanItsLoad(t *testing.T) {
	r := newRegistry(t, &Options{LoadTimeout: time.Hour})
	hasty, err := Open(r.Dir(), &Options{LoadTimeout: 50 * time.Millisecond})
	must(t, err)
	defer hasty.Close()
	f, err := os.Open(v1(r.Dir(), layout.LocksDir, layout.TableLock))
	must(t, err)
	defer f.Close()
	ctx, cancel := context.WithCancel(ctxb)
	defer cancel()
	_, err = r.GetOrLoad(ctx, "k", one("w.bin", -1, func(w *FileWriter) error {
		must(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
		time.AfterFunc(20*time.Millisecond, cancel)
		err := fillUp(w, 40*mib) // has to ask for more than was admitted
		must(t, unix.Flock(int(f.Fd()), unix.LOCK_UN))
		return err
	}))
	wantErr(t, err, context.Canceled)
	_, err = hasty.GetOrLoad(ctxb, "k", one("w.bin", -1, func(w *FileWriter) error {
		must(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
		err := fillUp(w, 40*mib)
		must(t, unix.Flock(int(f.Fd()), unix.LOCK_UN))
		return err
	}))
	wantErr(t, err, ErrTimeout)
}

// impatient: dir, key. As another user it waits for a load, for a moment.
var impatient = child("impatient", func(args []string) error {
	if err := become(foreignUID); err != nil {
		return err
	}
	r, err := Open(args[0], &Options{LoadTimeout: 50 * time.Millisecond})
	if err != nil {
		return err
	}
	_, err = r.GetOrLoad(ctxb, args[1], small("mine"))
	return errors.Join(say(reportOf(err)), r.Close())
})

// Whoever gives up waiting for a loader that hangs is told which process it is:
// whether his own time is over or that of the registry, whether he is the first of
// his process to wait or another one, and whether he could load at all.
func TestHungLoaderIsNamed(t *testing.T) {
	needRoot(t)
	r := openRegistry(t, proctest.TmpRegistry(t), &Options{Mode: 0o755})
	loader := startStuck(t, r.Dir(), "k", "")
	loader.Stop()
	says := fmt.Sprintf("pid %d", loader.PID())
	named := func(who string, err error) {
		t.Helper()
		wantErr(t, err, ErrTimeout, context.DeadlineExceeded)
		if !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %q does not say %q", who, err, says)
		}
	}
	ctx, cancel := contextFor(50)
	defer cancel()
	errs := make(chan error, 4)
	for range cap(errs) {
		go func() {
			_, err := r.GetOrLoad(ctx, "k", small("mine"))
			errs <- err
		}()
	}
	for range cap(errs) {
		named("a goroutine", <-errs)
	}
	limited, err := Open(r.Dir(), &Options{LoadTimeout: 20 * time.Millisecond})
	must(t, err)
	defer limited.Close()
	_, err = limited.GetOrLoad(ctxb, "k", small("mine"))
	named("the registry's limit", err)
	_, err = limited.Rollout(ctxb, "k", small("mine"), nil)
	named("a rollout", err)
	named("undo", undo(ctxb, limited, "k"))
	if rep := runChild[report](t, impatient, r.Dir(), "k"); !rep.is("ErrTimeout") || !strings.Contains(rep.Text, says) {
		t.Errorf("a reader: %+v", rep)
	}
	err = r.Remove(ctxb, "k")
	wantErr(t, err, ErrInUse)
	loader.Kill()
	mustLoad(t, r, "k", small("mine")) // after all who have left the queue
}

// A stopped holder of the table lock is named by Check.
func TestCheckNamesWhoHoldsTheTable(t *testing.T) {
	r := newRegistry(t, nil)
	p := proctest.Start(t, lockHolder, v1(r.Dir(), layout.LocksDir, layout.TableLock))
	p.Line(t)
	p.Stop()
	problems, err := r.Check(ctxb, CheckOptions{})
	if err != nil || len(problems) != 1 || problems[0].Kind != "lock" || !strings.Contains(problems[0].Text, fmt.Sprintf("pid %d ", p.PID())) {
		t.Errorf("%+v, %v", problems, err)
	}
	p.Kill()
}

// lockHolder: path. It locks a file exclusively until it is killed.
var lockHolder = child("lock-holder", func(args []string) error {
	f, err := os.Open(args[0])
	if err != nil {
		return err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	fmt.Println("locked")
	select {}
})

// waitingCrowd: dir, how many, count file. So many registries, each of which waits
// for itself, as so many processes would.
var waitingCrowd = child("waiting-crowd", func(args []string) error {
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	answers := make([]herdAnswer, n)
	for i := range n {
		r, err := Open(args[0], nil)
		if err != nil {
			return err
		}
		wg.Go(func() {
			answers[i] = answerOf(r.GetOrLoad(ctxb, "k", countedSource(args[2], func(f *FileWriter) error {
				_, err := f.Write([]byte("of the crowd"))
				return err
			})))
			if err := r.Close(); err != nil {
				answers[i].Err = reportOf(err)
			}
		})
	}
	wg.Wait()
	return say(answers)
})

// Two hundred who wait for one loader: nobody runs meanwhile, and when it is killed
// one of them loads and all have the model. The kernel queues them; what is asked
// for here is that every one of them comes to an end.
func TestTwoHundredWaiters(t *testing.T) {
	const crowds, each = 8, 25
	r := newRegistry(t, nil)
	count := t.TempDir() + "/count"
	loader := startStuck(t, r.Dir(), "k", "")
	var ps []*proctest.Proc
	for range crowds {
		ps = append(ps, proctest.Start(t, waitingCrowd, r.Dir(), fmt.Sprint(each), count))
	}
	proctest.AwaitBlocked(t, keyLockPath(r.Dir(), "k"), crowds*each)
	loader.Stop() // whether it does anything or not
	for _, p := range ps {
		wantIdle(t, p.PID())
	}
	loader.Kill()
	loaded := 0
	for _, p := range ps {
		for _, a := range lastWord[[]herdAnswer](t, p) {
			if a.Err.Text != "" || a.Text != "of the crowd" {
				t.Errorf("%+v", a)
			}
			if a.Loaded {
				loaded++
			}
		}
	}
	if c := calls(t, count); c != 1 || loaded != 1 {
		t.Errorf("%d of the waiters loaded, %d calls, want 1", loaded, c)
	}
}

// wantIdle demands that a process comes to do nothing: that there is a while in
// which none of its threads runs. One that polls is never found like that.
func wantIdle(t *testing.T, pid int) {
	t.Helper()
	const while = 100 * time.Millisecond
	var last uint64
	for range 100 {
		before := switches(t, pid)
		time.Sleep(while)
		if last = switches(t, pid) - before; last <= 1 {
			return
		}
	}
	t.Errorf("pid %d: its threads were switched to %d times within %v", pid, last, while)
}

// switches is how often threads of a process have begun to wait, or were taken off
// a processor.
func switches(t *testing.T, pid int) (n uint64) {
	t.Helper()
	tasks := fmt.Sprintf("/proc/%d/task", pid)
	names, err := os.ReadDir(tasks)
	must(t, err)
	for _, name := range names {
		b, err := os.ReadFile(tasks + "/" + name.Name() + "/status")
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue
		}
		must(t, err)
		for line := range strings.Lines(string(b)) {
			if k, v, _ := strings.Cut(line, ":"); strings.HasSuffix(k, "voluntary_ctxt_switches") {
				c, err := strconv.ParseUint(strings.TrimSpace(v), 10, 64)
				must(t, err)
				n += c
			}
		}
	}
	return n
}
