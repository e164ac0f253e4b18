//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// Several processes that want one model.

const herdKey = "org/herd"

// countedSource writes a line to a file each time it is called.
func countedSource(countFile string, fn func(*FileWriter) error) Source {
	return one("w.bin", -1, func(f *FileWriter) error {
		c, err := os.OpenFile(countFile, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := fmt.Fprintln(c, os.Getpid()); err != nil {
			return err
		}
		return fn(f)
	})
}

func calls(t *testing.T, countFile string) int {
	t.Helper()
	b, err := os.ReadFile(countFile)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return strings.Count(string(b), "\n")
}

// herdAnswer is what a process of a herd got.
type herdAnswer struct {
	Loaded     bool
	Generation uint64
	Text       string
	Err        report
}

func answerOf(m *Model, err error) (a herdAnswer) {
	if err != nil {
		a.Err = reportOf(err)
		return a
	}
	defer m.Close()
	b, err := m.Bytes("w.bin")
	return herdAnswer{Loaded: !m.Info().AlreadyPresent, Generation: m.Generation(), Text: string(b[:min(len(b), 100)]), Err: reportOf(err)}
}

// herdMember: dir, count file, barrier dir, size of the herd.
var herdMember = child("herd-member", func(args []string) error {
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(args[3])
	if err != nil {
		return err
	}
	proctest.Barrier(args[2], n)
	a := answerOf(r.GetOrLoad(ctxb, herdKey, countedSource(args[1], func(f *FileWriter) error {
		_, err := f.Write([]byte("herd"))
		return err
	})))
	if err := say(a); err != nil {
		return err
	}
	return r.Close()
})

func TestOneLoadForManyProcesses(t *testing.T) {
	n := 64
	if testing.Short() {
		n = 16
	}
	dir, tmp := proctest.TmpRegistry(t), t.TempDir()
	var herd []*proctest.Proc
	for range n {
		herd = append(herd, proctest.Start(t, herdMember, dir, tmp+"/calls", tmp, fmt.Sprint(n)))
	}
	loaders := 0
	gens := map[uint64]bool{}
	for _, p := range herd {
		a := lastWord[herdAnswer](t, p)
		if a.Err.Text != "" || a.Text != "herd" {
			t.Errorf("%+v", a)
		}
		if a.Loaded {
			loaders++
		}
		gens[a.Generation] = true
	}
	if c := calls(t, tmp+"/calls"); c != 1 || loaders != 1 || len(gens) != 1 {
		b, _ := os.ReadFile(tmp + "/calls")
		t.Errorf("the load function was called %d times, %d say that they loaded, %d generations; want one each\n%s", c, loaders, len(gens), b)
	}
	wantSound(t, dir)
}

// stuckLoader: dir, key. It says "loading" within its load function and goes on
// when its stdin ends; args[2] is an error to end with.
var stuckLoader = child("stuck-loader", func(args []string) error {
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	a := answerOf(r.GetOrLoad(ctxb, args[1], one("w.bin", -1, func(f *FileWriter) error {
		if _, err := f.Write([]byte("of the stuck loader")); err != nil {
			return err
		}
		fmt.Println("loading")
		_, _ = io.Copy(io.Discard, os.Stdin)
		if args[2] != "" {
			return errors.New(args[2])
		}
		return nil
	})))
	if err := say(a); err != nil {
		return err
	}
	return r.Close()
})

func startStuck(t *testing.T, dir, key, fail string) *proctest.Proc {
	t.Helper()
	p := proctest.Start(t, stuckLoader, dir, key, fail)
	if line := p.Line(t); line != "loading" {
		t.Fatalf("%s\n%s", line, p.Stderr())
	}
	return p
}

// waitingLoader: dir, key, count file. It wants the model, whoever loads it.
var waitingLoader = child("waiting-loader", func(args []string) error {
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	a := answerOf(r.GetOrLoad(ctxb, args[1], countedSource(args[2], func(f *FileWriter) error {
		_, err := f.Write([]byte("of a waiter"))
		return err
	})))
	if err := say(a); err != nil {
		return err
	}
	return r.Close()
})

func TestWaiterTakesOverFromAKilledLoader(t *testing.T) {
	r := newRegistry(t, nil)
	loader := startStuck(t, r.Dir(), "k", "")
	count := t.TempDir() + "/count"
	const n = 8
	var waiters []*proctest.Proc
	for range n {
		waiters = append(waiters, proctest.Start(t, waitingLoader, r.Dir(), "k", count))
	}
	proctest.AwaitBlocked(t, keyLockPath(r.Dir(), "k"), n)
	if e, err := r.Entry("k"); err != nil || e.State != "loading" || e.LoaderPID != loader.PID() {
		t.Errorf("while it loads: %+v, %v", e, err)
	}
	loader.Kill()
	loaded := 0
	for _, p := range waiters {
		a := lastWord[herdAnswer](t, p)
		if a.Err.Text != "" || a.Text != "of a waiter" {
			t.Errorf("%+v", a)
		}
		if a.Loaded {
			loaded++
		}
	}
	if c := calls(t, count); c != 1 || loaded != 1 {
		t.Errorf("%d of the waiters loaded, %d calls, want 1", loaded, c)
	}
	// One death is not forgotten by the success.
	if e, err := r.Entry("k"); err != nil || e.Deaths != 0 || e.State != "ready" {
		t.Errorf("%+v, %v", e, err)
	}
}

func TestWaitersGetWhatTheLoaderMade(t *testing.T) {
	r := newRegistry(t, nil)
	loader := startStuck(t, r.Dir(), "k", "")
	count := t.TempDir() + "/count"
	var waiters []*proctest.Proc
	for range 4 {
		waiters = append(waiters, proctest.Start(t, waitingLoader, r.Dir(), "k", count))
	}
	proctest.AwaitBlocked(t, keyLockPath(r.Dir(), "k"), 4)
	loader.Stdin.Close()
	if a := lastWord[herdAnswer](t, loader); !a.Loaded {
		t.Errorf("%+v", a)
	}
	for _, p := range waiters {
		if a := lastWord[herdAnswer](t, p); a.Loaded || a.Text != "of the stuck loader" {
			t.Errorf("%+v", a)
		}
	}
	if c := calls(t, count); c != 0 {
		t.Errorf("%d waiters loaded as well", c)
	}
}

// The loader's error is its own; the next one tries his source.
func TestLoaderErrorGoesToItsOwnProcess(t *testing.T) {
	r := newRegistry(t, nil)
	loader := startStuck(t, r.Dir(), "k", "as told")
	count := t.TempDir() + "/count"
	waiter := proctest.Start(t, waitingLoader, r.Dir(), "k", count)
	proctest.AwaitBlocked(t, keyLockPath(r.Dir(), "k"), 1)
	loader.Stdin.Close()
	if a := lastWord[herdAnswer](t, loader); !a.Err.is("ErrSource") || !strings.Contains(a.Err.Text, "as told") {
		t.Errorf("the loader: %+v", a)
	}
	if a := lastWord[herdAnswer](t, waiter); a.Err.Text != "" || a.Text != "of a waiter" {
		t.Errorf("the waiter: %+v", a)
	}
	if e, err := r.Entry("k"); err != nil || e.Deaths != 0 {
		t.Errorf("an error counts as a death: %+v, %v", e, err)
	}
}

func TestKilledWaitersLeaveNothing(t *testing.T) {
	r := newRegistry(t, nil)
	loader := startStuck(t, r.Dir(), "k", "")
	count := t.TempDir() + "/count"
	var waiters []*proctest.Proc
	for range 6 {
		waiters = append(waiters, proctest.Start(t, waitingLoader, r.Dir(), "k", count))
	}
	proctest.AwaitBlocked(t, keyLockPath(r.Dir(), "k"), 6)
	for _, p := range waiters[:3] {
		p.Kill()
	}
	loader.Stdin.Close()
	for _, p := range append(waiters[3:], loader) {
		if a := lastWord[herdAnswer](t, p); a.Text != "of the stuck loader" {
			t.Errorf("%+v", a)
		}
	}
}

func TestCancelledWaiterOfAnotherProcess(t *testing.T) {
	r := newRegistry(t, nil)
	loader := startStuck(t, r.Dir(), "k", "")
	ctx, cancel := context.WithCancel(ctxb)
	result := make(chan error)
	go func() {
		_, err := r.GetOrLoad(ctx, "k", small("mine"))
		result <- err
	}()
	proctest.AwaitBlocked(t, keyLockPath(r.Dir(), "k"), 1)
	cancel()
	wantErr(t, <-result, context.Canceled)
	// He who left in time does not load when the lock comes.
	loader.Kill()
	if m, err := r.Get("k"); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v, %v", m, err)
	}
}

func TestLoadTimeout(t *testing.T) {
	dir := proctest.TmpRegistry(t)
	r := openRegistry(t, dir, &Options{LoadTimeout: 20 * time.Millisecond})
	loader := startStuck(t, dir, "k", "")
	_, err := r.GetOrLoad(ctxb, "k", small("mine"))
	wantErr(t, err, ErrTimeout, context.DeadlineExceeded)
	wantText(t, err, "pid "+fmt.Sprint(loader.PID()))
	ctx, cancel := context.WithTimeout(ctxb, time.Millisecond)
	defer cancel()
	_, err = r.GetOrLoad(ctx, "k", small("mine"))
	wantErr(t, err, ErrTimeout, context.DeadlineExceeded)
	loader.Stdin.Close()
	lastWord[herdAnswer](t, loader)
	wantBytes(t, mustGet(t, r, "k"), "w.bin", []byte("of the stuck loader"))
}

// The limit holds as well for those who wait for a goroutine of their own process,
// and for a load function that asks for its own key with a context that hides it.
func TestLoadTimeoutWithinTheProcess(t *testing.T) {
	r := newRegistry(t, &Options{LoadTimeout: 20 * time.Millisecond})
	m := mustLoad(t, r, "k", one("w.bin", -1, func(f *FileWriter) error {
		_, err := r.GetOrLoad(ctxb, "k", small("inner"))
		if !errors.Is(err, ErrTimeout) {
			return fmt.Errorf("the inner call: %w", err)
		}
		_, err = f.Write([]byte("outer"))
		return err
	}))
	wantBytes(t, m, "w.bin", []byte("outer"))
}

// A stopped loader is waited for, and does no harm to others.
func TestStoppedLoader(t *testing.T) {
	dir := proctest.TmpRegistry(t)
	r := openRegistry(t, dir, &Options{LoadTimeout: 20 * time.Millisecond})
	other := mustLoad(t, r, "other", small("o"))
	loader := startStuck(t, dir, "k", "")
	loader.Stop()
	_, err := r.GetOrLoad(ctxb, "k", small("mine"))
	wantErr(t, err, ErrTimeout)
	wantErr(t, r.Remove(ctxb, "k"), ErrInUse)
	wantBytes(t, mustGet(t, r, "other"), "w.bin", []byte("weights o"))
	if rep, err := r.GC(ctxb); err != nil || rep.Reclaimed != 0 {
		t.Errorf("the collector took a load that is only stopped for dead: %+v, %v", rep, err)
	}
	loader.Cont()
	loader.Stdin.Close()
	if a := lastWord[herdAnswer](t, loader); a.Err.Text != "" {
		t.Errorf("%+v", a)
	}
	if other.Stale() {
		t.Error("stale")
	}
}

func killLoaders(t *testing.T, dir, key string, n int) {
	t.Helper()
	for range n {
		startStuck(t, dir, key, "").Kill()
	}
}

func TestThreeDeathsAreEnough(t *testing.T) {
	r := newRegistry(t, nil)
	killLoaders(t, r.Dir(), "k", 3)
	called := false
	src := one("w.bin", 1, func(*FileWriter) error { called = true; return nil })
	for range 2 {
		_, err := r.GetOrLoad(ctxb, "k", src)
		wantErr(t, err, ErrLoadFailed)
		var failed *LoadFailedError
		if !errors.As(err, &failed) || failed.Deaths != 3 || failed.RetryAfter <= 0 || failed.RetryAfter > firstPause {
			t.Errorf("%+v", failed)
		}
		wantText(t, err, "3 were killed")
	}
	if called {
		t.Error("a fourth loader was let in")
	}
	// Other keys are not concerned.
	mustLoad(t, r, "other", small("1"))

	// When the pause is over, one more may try, and its success resets the count.
	passPause(t, r.Dir(), "k")
	mustLoad(t, r, "k", src).Close()
	if !called {
		t.Error("not loaded")
	}
	if e, err := r.Entry("k"); err != nil || e.Deaths != 0 || !e.RetryAfter.IsZero() {
		t.Errorf("after a success: %+v, %v", e, err)
	}
	if err := r.Remove(ctxb, "k"); err != nil {
		t.Fatal(err)
	}
	killLoaders(t, r.Dir(), "k", 2)
	mustLoad(t, r, "k", src)
}

// passPause lets the back-off of a key end.
func passPause(t *testing.T, dir, key string) {
	t.Helper()
	editTable(t, dir, func(e layout.Editor) {
		f, ok := e.Scan(key)
		if !ok {
			t.Fatalf("no slot knows %q", key)
		}
		e.SetHint(f.Slot, layout.HintRetryAfter, now())
	})
}

func TestPauseGrowsWithEveryDeath(t *testing.T) {
	r := newRegistry(t, nil)
	src := small("1")
	killLoaders(t, r.Dir(), "k", 3)
	var last time.Duration
	for deaths := 3; deaths <= 5; deaths++ {
		_, err := r.GetOrLoad(ctxb, "k", src)
		var failed *LoadFailedError
		if !errors.As(err, &failed) || failed.Deaths != deaths || failed.RetryAfter <= last {
			t.Fatalf("%d deaths: %v (before: %v)", deaths, err, last)
		}
		last = failed.RetryAfter
		passPause(t, r.Dir(), "k")
		killLoaders(t, r.Dir(), "k", 1)
	}
}

// A hint from a broken writer keeps nobody away for ever.
func TestPauseInTheFarFutureIsNotBelieved(t *testing.T) {
	r := newRegistry(t, nil)
	killLoaders(t, r.Dir(), "k", 3)
	_, err := r.GetOrLoad(ctxb, "k", small("1"))
	wantErr(t, err, ErrLoadFailed)
	editTable(t, r.Dir(), func(e layout.Editor) {
		f, _ := e.Scan("k")
		e.SetHint(f.Slot, layout.HintRetryAfter, 1<<63)
	})
	mustLoad(t, r, "k", small("1"))
}

// holder: dir, key. It says the generation, holds the model until stdin ends, and
// says what it reads then.
var holder = child("holder", func(args []string) error {
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	m, err := r.Get(args[1])
	if err != nil {
		return err
	}
	fmt.Println(m.Generation())
	_, _ = io.Copy(io.Discard, os.Stdin)
	b, err := m.Bytes("w.bin")
	if err != nil {
		return err
	}
	if err := say(herdAnswer{Text: string(b), Loaded: m.Stale()}); err != nil {
		return err
	}
	return errors.Join(m.Close(), r.Close())
})

func TestRemoveNamesTheHolder(t *testing.T) {
	r := newRegistry(t, nil)
	mustLoad(t, r, "k", small("1")).Close()
	p := proctest.Start(t, holder, r.Dir(), "k")
	p.Line(t)
	err := r.Remove(ctxb, "k")
	wantErr(t, err, ErrInUse)
	wantText(t, err, fmt.Sprintf("pid %d", p.PID()))
	var in *InUseError
	if !errors.As(err, &in) || len(in.Holders) != 1 || in.Holders[0].PID != p.PID() || in.Holders[0].Key != "k" {
		t.Errorf("%+v", in)
	}
	p.Kill() // its lease dies with it
	if err := r.Remove(ctxb, "k"); err != nil {
		t.Error(err)
	}
}

func TestReplaceWhileAnotherProcessHolds(t *testing.T) {
	r := newRegistry(t, nil)
	mustLoad(t, r, "k", small("1")).Close()
	p := proctest.Start(t, holder, r.Dir(), "k")
	p.Line(t)
	src := small("2")
	src.OnChange = ChangeReplace
	fresh := mustLoad(t, r, "k", src)
	if s := stats(t, r); s.Superseded != 1 || s.SupersededBytes <= 0 || s.Models != 1 || s.Replaced != 1 {
		t.Errorf("%+v", s)
	}
	o, _, err := r.Watch().OverviewAndHolders()
	must(t, err)
	if s := stats(t, r); o.Stats.Superseded != 1 || o.Stats.SupersededBytes != s.SupersededBytes || o.Stats.ModelBytes != s.ModelBytes {
		t.Errorf("with holders %+v, without %+v", o.Stats, s)
	}
	if rep, err := r.GC(ctxb); err != nil || rep.Orphans != 0 {
		t.Errorf("the collector removes what is in use: %+v, %v", rep, err)
	}
	p.Stdin.Close()
	if a := lastWord[herdAnswer](t, p); a.Text != "weights 1" || !a.Loaded {
		t.Errorf("the old user: %+v, want the old bytes, and Stale", a)
	}
	// Its memory went with its last Close, by a process of the writing user.
	if s := stats(t, r); s.Superseded != 0 || s.SupersededBytes != 0 {
		t.Errorf("%+v", s)
	}
	wantBytes(t, fresh, "w.bin", []byte("weights 2"))
}

func TestOldGenerationOfAKilledHolder(t *testing.T) {
	r := newRegistry(t, nil)
	mustLoad(t, r, "k", small("1")).Close()
	p := proctest.Start(t, holder, r.Dir(), "k")
	p.Line(t)
	src := small("2")
	src.Replace = true
	mustLoad(t, r, "k", src)
	p.Kill()
	if s := stats(t, r); s.Superseded != 1 {
		t.Errorf("%+v", s)
	}
	if rep, err := r.GC(ctxb); err != nil || rep.Orphans != 1 || rep.Freed <= 0 {
		t.Errorf("%+v, %v", rep, err)
	}
	if s := stats(t, r); s.Superseded != 0 {
		t.Errorf("%+v", s)
	}
}

func TestOpenCollectsOldGenerations(t *testing.T) {
	r := newRegistry(t, nil)
	mustLoad(t, r, "k", small("1")).Close()
	p := proctest.Start(t, holder, r.Dir(), "k")
	p.Line(t)
	src := small("2")
	src.Replace = true
	mustLoad(t, r, "k", src)
	p.Kill()
	again, err := Open(r.Dir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if s := stats(t, r); s.Superseded != 0 {
		t.Errorf("%+v", s)
	}
}

// leaseKeeper is a program that does nothing but end with its stdin; it inherits a
// lease as descriptor 3.
var leaseKeeper = child("lease-keeper", func([]string) error {
	fmt.Println("started")
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
})

func TestLeaseOfAChildThatInheritedIt(t *testing.T) {
	r := newRegistry(t, nil)
	m := mustLoad(t, r, "k", small("1"))
	lease, err := m.Lease()
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), "ONECOPY_PROCTEST_PROGRAM="+leaseKeeper)
	cmd.ExtraFiles = []*os.File{lease}
	p := proctest.StartCmd(t, leaseKeeper, cmd)
	p.Line(t)
	lease.Close()
	path := m.Path()
	m.Close()

	err = r.Remove(ctxb, "k")
	wantErr(t, err, ErrInUse)
	wantText(t, err, fmt.Sprintf("pid %d", p.PID()))
	if b, err := os.ReadFile(path + "/w.bin"); err != nil || string(b) != "weights 1" {
		t.Errorf("%q, %v", b, err)
	}
	hs, err := r.Holders("k")
	if err != nil || len(hs) != 1 || hs[0].Via != "descriptor" || hs[0].PID != p.PID() {
		t.Errorf("%+v, %v", hs, err)
	}
	p.Stdin.Close()
	if code := p.Wait(); code != 0 {
		t.Errorf("code %d", code)
	}
	if err := r.Remove(ctxb, "k"); err != nil {
		t.Error(err)
	}
}

func TestLeaseIsCloseOnExec(t *testing.T) {
	r := newRegistry(t, nil)
	m := mustLoad(t, r, "k", small("1"))
	lease, err := m.Lease()
	if err != nil {
		t.Fatal(err)
	}
	defer lease.Close()
	flags, err := unix.FcntlInt(lease.Fd(), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("flags %#x, %v", flags, err)
	}
	m.Close()
	wantErr(t, r.Remove(ctxb, "k"), ErrInUse) // by the descriptor alone
	lease.Close()
	if err := r.Remove(ctxb, "k"); err != nil {
		t.Error(err)
	}
}

// Children between fork and exec have a copy of every descriptor for a moment:
// that of a lock, and those of segments that are to be sealed.
func TestForkStormDuringLoads(t *testing.T) {
	r := newRegistry(t, nil)
	sh, err := exec.LookPath("true")
	if err != nil {
		t.Skip(err)
	}
	defer proctest.Storm(t, 4, func() error { return exec.Command(sh).Run() })()
	rounds := 30
	if testing.Short() {
		rounds = 5
	}
	big := randomBytes(1, 5<<20)
	src := fileSource(t, "w.bin", big)
	for i := range rounds {
		for _, s := range []Source{src, madeSource("1", map[string][]byte{"w.bin": big[:3<<20], "x": []byte("x")})} {
			m, err := r.GetOrLoad(ctxb, "k", s)
			if err != nil {
				t.Errorf("round %d: %v", i, err)
				continue
			}
			m.Close()
			// A child may keep the lease alive for a moment, not longer.
			for err = r.Remove(ctxb, "k"); errors.Is(err, ErrInUse); err = r.Remove(ctxb, "k") {
				time.Sleep(time.Millisecond)
			}
			if err != nil {
				t.Errorf("round %d: %v", i, err)
			}
		}
	}
}

// Signals that hit every thread again and again, as a profiler's do, spoil no load:
// neither of a file, through the page cache or past it, nor of a function.
func TestSignalStormDuringLoads(t *testing.T) {
	r := newRegistry(t, nil)
	defer proctest.Storm(t, 1, proctest.SignalThreads)()
	big := randomBytes(1, 20<<20)
	file := fileSource(t, "w.bin", big)
	for i, s := range []Source{file, file, madeSource("1", map[string][]byte{"w.bin": big, "x": []byte("x")})} {
		if i == 0 {
			dropFromCache(t, file.Path)
		}
		m := mustLoad(t, r, "k", s)
		wantBytes(t, m, "w.bin", big)
		if err := m.Verify(ctxb); err != nil {
			t.Errorf("round %d: %v", i, err)
		}
		m.Close()
		if err := r.Remove(ctxb, "k"); err != nil {
			t.Errorf("round %d: %v", i, err)
		}
	}
}

// Nothing runs on when the calls are over, but who waits for a load lock.
func TestNoGoroutineOutlivesItsCall(t *testing.T) {
	r := newRegistry(t, nil)
	mustLoad(t, r, "k", fileSource(t, "w.bin", randomBytes(1, 70<<20))).Close()
	if _, err := r.GC(ctxb); err != nil {
		t.Error(err)
	}
	if got := goroutines(); len(got) > 0 {
		t.Errorf("left after a load:\n%s", strings.Join(got, "\n\n"))
	}
	loader := startStuck(t, r.Dir(), "slow", "")
	ctx, cancel := context.WithCancel(ctxb)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			_, err := r.GetOrLoad(ctx, "slow", small("mine"))
			wantErr(t, err, context.Canceled)
		})
	}
	proctest.AwaitBlocked(t, keyLockPath(r.Dir(), "slow"), 1)
	cancel()
	wg.Wait()
	if got := goroutines(); len(got) > 1 {
		t.Errorf("%d goroutines wait for one lock:\n%s", len(got), strings.Join(got, "\n\n"))
	}
	loader.Kill()
	for range 5000 {
		if len(goroutines()) == 0 {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Errorf("left although the lock was granted:\n%s", strings.Join(goroutines(), "\n\n"))
}
