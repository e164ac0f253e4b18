//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

var (
	tortureTime  = flag.Duration("torture", 3*time.Second, "how long TestTorture kills")
	tortureSeed  = flag.Uint64("torture.seed", 0, "seed of TestTorture; 0: a new one")
	tortureProcs = flag.Int("torture.procs", 6, "processes of TestTorture")
)

func init() { proctest.Program("torture", tortureMain) }

// The models of a torture: more than the budget has room for.
const tortureBudget = 6 << 20

var tortureKeys = func() (keys []string) {
	for i := range 12 {
		keys = append(keys, fmt.Sprintf("org%d/model-%d", i%3, i))
	}
	return keys
}()

// tortureSource is one of four versions of a key's weights.
func tortureSource(key string, version int) string {
	n := 10<<10 + int(layout.HashKey(key)%7)*150<<10 + version*4097
	if key == tortureKeys[0] {
		n += 4 << 20 // windows of 2 MiB pages
	}
	return fmt.Sprintf("func:%s v%d:%d", key, version, n)
}

// TestTorture kills and stops processes at random while they get, load, replace,
// remove and collect a dozen models. Every byte that any of them got has to be
// right, no process may end but by our hand, and no key may have two loaders;
// afterwards one collector run leaves nothing of the dead, and each model can be
// had.
func TestTorture(t *testing.T) {
	seed := *tortureSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	rng := rand.New(rand.NewPCG(seed, 0))
	dir, witness := proctest.TmpRegistry(t), t.TempDir()
	r, err := Open(dir, &Options{Budget: tortureBudget, Slots: 10})
	if err != nil {
		t.Fatal(err)
	}
	r.Close()

	start := func() *proctest.Proc {
		return proctest.Start(t, "torture", dir, witness, fmt.Sprint(rng.Uint64()))
	}
	var procs []*proctest.Proc
	for range *tortureProcs {
		procs = append(procs, start())
	}
	kills, stops := 0, 0
	for end := time.Now().Add(*tortureTime); time.Now().Before(end) && !t.Failed(); {
		time.Sleep(time.Duration(rng.ExpFloat64() * float64(8*time.Millisecond)))
		i := rng.IntN(len(procs))
		select {
		case <-procs[i].Exited():
			t.Errorf("process %d ended by itself: code %d\n%s", i, procs[i].Wait(), procs[i].Stderr())
			continue
		default:
		}
		if rng.IntN(10) == 0 {
			procs[i].Stop()
			time.Sleep(time.Duration(rng.ExpFloat64() * float64(5*time.Millisecond)))
			procs[i].Cont()
			stops++
			continue
		}
		procs[i].Kill()
		procs[i] = start()
		kills++
	}
	for i, p := range procs {
		p.Signal(syscall.SIGKILL)
		if code := p.Wait(); code != 128+9 {
			t.Errorf("process %d ended by itself: code %d\n%s", i, code, p.Stderr())
		}
	}

	// One process puts everything in order, and gets every model.
	audit, helper := newAuditor(dir), startCrew(t, dir)
	helper.must(t, order{Do: "gc"})
	if a := helper.must(t, order{Do: "check"}); len(a.Problems) > 0 {
		t.Errorf("check: %+v", a.Problems)
	}
	audit.audit(t, nil)
	helper.must(t, order{Do: "pardon"})
	for _, key := range tortureKeys {
		source := tortureSource(key, 0)
		a := helper.must(t, order{Do: "load", Key: key, Source: source})
		if want := sumFiles(contents(a.Origin)); a.Sum != want {
			t.Errorf("%s, generation %d: bytes %s, want %s", key, a.Generation, a.Sum, want)
		}
		helper.must(t, order{Do: "close", Key: key})
	}
	audit.audit(t, nil)

	image, err := os.ReadFile(filepath.Join(dir, layout.Folder, layout.TableFile))
	if err != nil {
		t.Fatal(err)
	}
	table, err := layout.NewTable(image)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("seed %d: %d kills and %d stops of %d processes; %d generations begun, %d published, %d replaced, %d taken over, %d reclaimed, %d leftovers, %d removed, %d evicted",
		seed, kills, stops, len(procs), table.Generation(), table.Counter(layout.CountLoads), table.Counter(layout.CountReplaced),
		table.Counter(layout.CountTakeovers), table.Counter(layout.CountReclaimed), table.Counter(layout.CountLeftovers),
		table.Counter(layout.CountRemoved), table.Counter(layout.CountEvictedSpace)+table.Counter(layout.CountEvictedTable))
}

// tortureMain works until it is killed, or finds something wrong.
func tortureMain(args []string) int {
	seed, _ := strconv.ParseUint(args[2], 10, 64)
	w := &torturer{dir: args[0], witness: args[1], rng: rand.New(rand.NewPCG(seed, 1)), want: map[string]map[string][]byte{}}
	go func() { // our test is gone
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(2)
	}()
	for {
		if err := w.session(); err != nil {
			fmt.Fprintf(os.Stderr, "seed %d: %v\n", seed, err)
			return 3
		}
	}
}

type torturer struct {
	dir, witness string
	rng          *rand.Rand
	want         map[string]map[string][]byte // contents by source
	bad          error                        // found within a load function
}

// session opens the registry and does a few dozen things.
func (w *torturer) session() error {
	r, err := Open(w.dir, nil)
	if err != nil {
		return err
	}
	var held []*Model
	for range 20 + w.rng.IntN(60) {
		if err := w.act(r, &held); err != nil && !w.fine(err) {
			return err
		}
		if w.bad != nil {
			return w.bad
		}
	}
	for _, m := range held {
		if err := w.verify(m); err != nil {
			return err
		}
		m.Close()
	}
	return r.Close()
}

// fine are the errors that others may cause.
func (w *torturer) fine(err error) bool {
	for _, e := range []error{ErrNotFound, ErrInUse, ErrNoSpace, ErrTableFull, ErrLoadFailed, context.DeadlineExceeded, ErrBusy, ErrNoPrevious} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (w *torturer) act(r *Registry, held *[]*Model) error {
	key := tortureKeys[w.rng.IntN(len(tortureKeys))]
	timeout := 10 * time.Second
	if w.rng.IntN(4) == 0 {
		timeout = time.Duration(w.rng.IntN(20_000)) * time.Microsecond
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	var m *Model
	var err error
	switch n := w.rng.IntN(100); {
	case n < 50:
		m, err = r.GetOrLoad(ctx, key, w.source(key, OnChange(w.rng.IntN(3))))
		if errors.Is(err, ErrSourceChanged) {
			err = nil
		}
	case n < 70:
		m, err = r.Get(key)
	case n < 75:
		return r.Use(key, w.verify)
	case n < 85:
		src := w.source(key, ChangeError)
		src.Replace = true
		m, err = r.GetOrLoad(ctx, key, src)
	case n < 88:
		return r.Undo(ctx, key)
	case n < 93:
		return r.Remove(ctx, key)
	case n < 96:
		_, err = r.GC(ctx)
	case n < 98: // most keys would soon be paused
		return pardon(ctx, r)
	default:
		r.Release(key)
	}
	if m == nil || err != nil {
		return err
	}
	if err := w.verify(m); err != nil {
		return err
	}
	if *held = append(*held, m); len(*held) > 3 {
		m, *held = (*held)[0], (*held)[1:]
		if err := w.verify(m); err != nil { // after all that has happened since
			return err
		}
		m.Close()
	}
	return nil
}

// verify compares all bytes of a model with those of the source that it names.
func (w *torturer) verify(m *Model) error {
	source := m.Info().Origin.Version
	want := w.want[source]
	if want == nil {
		if !strings.HasPrefix(source, "func:"+m.Key()+" ") {
			return fmt.Errorf("%s, generation %d has the source %q", m.Key(), m.Generation(), source)
		}
		want = contents(source)
		w.want[source] = want
	}
	if len(m.Files()) != len(want) {
		return fmt.Errorf("%s, generation %d: %d files, want %d", m.Key(), m.Generation(), len(m.Files()), len(want))
	}
	for name, b := range want {
		got, err := m.Bytes(name)
		if err != nil {
			return err
		}
		if !bytes.Equal(got, b) {
			return fmt.Errorf("%s, generation %d: wrong bytes in %s", m.Key(), m.Generation(), name)
		}
	}
	return nil
}

func (w *torturer) source(key string, change OnChange) Source {
	src := sourceOf(tortureSource(key, w.rng.IntN(4)))
	src.OnChange = change
	load := src.Load
	src.Load = func(ctx context.Context, out *Writer) error {
		alone, err := w.alone(key)
		if err != nil {
			w.bad = err
			return err
		}
		defer alone.Close()
		return load(ctx, out)
	}
	return src
}

// alone takes a lock that has nothing to do with the registry, and that must be
// free, because whoever calls it is the only loader of key.
func (w *torturer) alone(key string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(w.witness, strings.ReplaceAll(key, "/", "-")), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		// The kernel closes the files of a dead process one after the other: his
		// load lock may be gone before this one. But then he is dying.
		b := make([]byte, 32)
		n, _ := f.ReadAt(b, 0)
		pid, _ := strconv.Atoi(strings.TrimSpace(string(b[:n])))
		if running(pid) {
			return nil, fmt.Errorf("process %d is loading %s too", pid, key)
		}
		time.Sleep(100 * time.Microsecond)
	}
	_, err = f.WriteAt(fmt.Appendf(nil, "%-31d\n", os.Getpid()), 0)
	return f, err
}

// running reports whether a process exists and is not about to end.
func running(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	rest := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(rest) < 7 || rest[0] == "Z" || rest[0] == "X" {
		return false
	}
	const exiting = 4 // PF_EXITING
	flags, _ := strconv.Atoi(rest[6])
	return flags&exiting == 0
}
