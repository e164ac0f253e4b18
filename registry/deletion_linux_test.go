//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// Somebody deletes the registry, or parts of it, again and again, while
// processes load, get, replace, remove, and hold leases.

// sighting is a generation that a process got, and the run of the load function
// that its bytes name.
type sighting struct {
	Key               string
	Epoch, Generation uint64
	Run               string
	Loaded            bool
}

// shift is what a worker tells of the time between two of its test's lines.
type shift struct {
	Seen          []sighting
	Wrong         []string
	Rounds, Holds int
}

// bereaved is a worker that works while others delete: dir, seed.
type bereaved struct {
	r      *Registry
	rng    *rand.Rand
	shift  shift
	told   map[sighting]bool
	epochs map[string][]uint64 // by key, the present one last
	held   []heldModel
}

type heldModel struct {
	m   *Model
	key string
	run string
}

var bereavedWorker = child("bereaved", func(args []string) error {
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	seed, err := strconv.ParseUint(args[1], 10, 64)
	if err != nil {
		return err
	}
	w := &bereaved{r: r, rng: rand.New(rand.NewPCG(seed, 1)), told: map[sighting]bool{}, epochs: map[string][]uint64{}}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var d time.Duration
		if err := json.Unmarshal(in.Bytes(), &d); err != nil {
			return err
		}
		w.shift = shift{}
		for begun := time.Now(); w.shift.Rounds == 0 || time.Since(begun) < d; w.shift.Rounds++ {
			w.round()
		}
		w.shift.Holds = len(w.held)
		if err := say(w.shift); err != nil {
			return err
		}
	}
	for _, key := range markedKeys {
		r.Release(key)
	}
	for _, h := range w.held {
		if run, err := readMarked(h.m, h.key); err != nil || run != h.run {
			return fmt.Errorf("in the end, %s: run %q, %w", h.key, run, err)
		}
		if err := h.m.Close(); err != nil {
			return err
		}
	}
	return r.Close()
})

func (w *bereaved) wrong(format string, args ...any) {
	w.shift.Wrong = append(w.shift.Wrong, fmt.Sprintf(format, args...))
}

// allowed notes an error that no deletion explains.
func (w *bereaved) allowed(what string, err error, kinds ...error) {
	if err == nil || errors.Is(err, ErrGone) {
		return
	}
	for _, k := range kinds {
		if errors.Is(err, k) {
			return
		}
	}
	w.wrong("%s: %v", what, err)
}

func (w *bereaved) round() {
	key := markedKeys[w.rng.IntN(len(markedKeys))]
	ctx, cancel := contextFor(60_000)
	defer cancel()
	// Without its lock file a live loader looks dead to others, and what it
	// publishes is not what it claimed.
	loading := []error{ErrBusy, ErrLoadFailed, ErrCorrupt}
	switch n := w.rng.IntN(100); {
	case n < 50:
		m, err := w.r.GetOrLoad(ctx, key, markedSource(key))
		w.allowed("GetOrLoad", err, loading...)
		w.got(m, key)
	case n < 70:
		m, err := w.r.Get(key)
		w.allowed("Get", err, ErrNotFound, ErrBusy)
		w.got(m, key)
	case n < 78:
		src := markedSource(key)
		src.Replace = true
		m, err := w.r.GetOrLoad(ctx, key, src)
		w.allowed("replacing", err, loading...)
		w.got(m, key)
	case n < 84:
		w.allowed("Remove", w.r.Remove(ctx, key), ErrNotFound, ErrInUse, ErrBusy)
	case n < 90:
		w.allowed("Use", w.r.Use(key, func(m *Model) error { w.look(m, key); return nil }), ErrNotFound, ErrBusy)
		if w.rng.IntN(3) == 0 {
			w.r.Release(key)
		}
	case n < 93:
		_, err := w.r.GC(ctx)
		w.allowed("GC", err)
	case n < 96:
		_, err := w.r.Entries()
		w.allowed("Entries", err)
		_, err = w.r.Stats()
		w.allowed("Stats", err)
	default:
		_, err := w.r.Check(ctx, CheckOptions{Data: true})
		w.allowed("Check", err)
	}
	if len(w.held) == 0 {
		return
	}
	i := w.rng.IntN(len(w.held))
	h := w.held[i]
	if run, err := readMarked(h.m, h.key); err != nil || run != h.run {
		w.wrong("a lease on run %s of %s: run %s, %v", h.run, h.key, run, err)
	}
	if w.rng.IntN(20) == 0 {
		w.held = append(w.held[:i], w.held[i+1:]...)
		w.allowed("Model.Close", h.m.Close())
	}
}

// got looks at a model, and keeps some.
func (w *bereaved) got(m *Model, key string) {
	if m == nil {
		return
	}
	if run := w.look(m, key); run != "" && len(w.held) < 5 && w.rng.IntN(4) == 0 {
		w.held = append(w.held, heldModel{m, key, run})
		return
	}
	w.allowed("Model.Close", m.Close())
}

// look reads a model, and notes of which life of the registry it is: none that
// was over before may come back.
func (w *bereaved) look(m *Model, key string) (run string) {
	run, err := readMarked(m, key)
	if errors.Is(err, ErrGone) {
		return "" // asked for after its name was deleted
	}
	i := m.Info()
	if err != nil || m.Key() != key || !strings.Contains(m.Path(), "/"+layout.GenName(i.Epoch, i.Generation)+"/") {
		w.wrong("got for %s: %v, %s, %v", key, m.Key(), m.Path(), err)
		return ""
	}
	past := w.epochs[key]
	for n, e := range past {
		if e == i.Epoch && n < len(past)-1 {
			w.wrong("%s: generation %d of epoch %x, which was over", key, i.Generation, e)
		}
	}
	if len(past) == 0 || past[len(past)-1] != i.Epoch {
		w.epochs[key] = append(past, i.Epoch)
	}
	s := sighting{Key: key, Epoch: i.Epoch, Generation: i.Generation, Run: run, Loaded: !i.AlreadyPresent}
	if s.Loaded && !strings.HasPrefix(run, fmt.Sprintf("%d.", os.Getpid())) {
		w.wrong("%+v: not loaded by this process", s)
	}
	s.Loaded = false
	if !w.told[s] {
		w.told[s] = true
		w.shift.Seen = append(w.shift.Seen, s)
	}
	return run
}

// deletions are ways in which a registry goes, wholly or in part.
var deletions = []struct {
	name string
	do   func(rng *rand.Rand, dir string)
}{
	{"rm -r", func(_ *rand.Rand, dir string) { _ = os.RemoveAll(dir) }},
	{"RemoveIPC", func(_ *rand.Rand, dir string) { // all files, then the folders
		var folders []string
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
			case d.IsDir():
				folders = append(folders, path)
			default:
				_ = os.Remove(path)
			}
			return nil
		})
		for i := range folders {
			_ = os.Remove(folders[len(folders)-1-i])
		}
	}},
	{"rm -r v1", func(_ *rand.Rand, dir string) { _ = os.RemoveAll(v1(dir)) }},
	{"rm -r m", func(_ *rand.Rand, dir string) { _ = os.RemoveAll(v1(dir, layout.ModelsDir)) }},
	{"rm -r w", func(_ *rand.Rand, dir string) { _ = os.RemoveAll(v1(dir, layout.LocksDir)) }},
	{"rm registry", func(_ *rand.Rand, dir string) { _ = os.Remove(tablePath(dir)) }},
	{"a manifest", removeOne(layout.ModelsDir, "*"+layout.ManifestExt)},
	{"digests", removeOne(layout.ModelsDir, "*"+layout.DigestsExt)},
	{"a file", removeOne(layout.ModelsDir, "*/*/*.bin")},
	{"a generation", removeOne(layout.ModelsDir, "*-*")},
	{"a lock", removeOne(layout.LocksDir, "*")},
}

func removeOne(sub, pattern string) func(*rand.Rand, string) {
	return func(rng *rand.Rand, dir string) {
		if all, _ := filepath.Glob(v1(dir, sub, pattern)); len(all) > 0 {
			_ = os.RemoveAll(all[rng.IntN(len(all))])
		}
	}
}

// TestDeletedAgainAndAgain deletes the registry 22 times, or once a second as
// often as ONECOPY_DELETIONS says, under six processes.
func TestDeletedAgainAndAgain(t *testing.T) {
	n, every := 2*len(deletions), 60*time.Millisecond
	if testing.Short() {
		n = len(deletions)
	}
	if s := os.Getenv("ONECOPY_DELETIONS"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil || n < 1 {
			t.Fatalf("ONECOPY_DELETIONS=%s: want a number", s)
		}
		every = time.Second
	}
	seed := seedOf(t)
	rng := rand.New(rand.NewPCG(seed, 0))
	dir, used := countedTmpfs(t, 512*mib)
	var workers []*proctest.Proc
	for range 6 {
		workers = append(workers, proctest.Start(t, bereavedWorker, dir, fmt.Sprint(rng.Uint64())))
	}

	type made struct {
		epoch, generation uint64
	}
	runs := map[string]sighting{}
	gens := map[made]sighting{}
	epochs := map[uint64]bool{}
	rounds, holds := 0, 0
	var order []int
	for i := range n {
		if i%len(deletions) == 0 {
			order = rng.Perm(len(deletions))
		}
		way := deletions[order[i%len(deletions)]]
		for _, p := range workers {
			if _, err := fmt.Fprintln(p.Stdin, int64(every)); err != nil {
				t.Fatalf("%v\n%s", err, p.Stderr())
			}
		}
		time.Sleep(time.Duration(rng.Int64N(int64(every)))) // some moment
		way.do(rng, dir)
		for _, p := range workers {
			s := nextWord[shift](t, p)
			rounds, holds = rounds+s.Rounds, max(holds, s.Holds)
			for _, text := range s.Wrong {
				t.Errorf("deletion %d (%s): %s", i, way.name, text)
			}
			for _, seen := range s.Seen {
				epochs[seen.Epoch] = true
				is := made{seen.Epoch, seen.Generation}
				if was, ok := gens[is]; ok && was != seen {
					t.Errorf("deletion %d (%s): %x-%d was %+v, and is %+v", i, way.name, is.epoch, is.generation, was, seen)
				}
				if was, ok := runs[seen.Run]; ok && was != seen {
					t.Errorf("deletion %d (%s): run %s is %+v and %+v", i, way.name, seen.Run, was, seen)
				}
				gens[is], runs[seen.Run] = seen, seen
			}
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	for _, p := range workers {
		p.Stdin.Close()
		if code := p.Wait(); code != 0 {
			t.Errorf("a worker ended with code %d\n%s", code, p.Stderr())
		}
	}
	t.Logf("%d deletions, %d rounds, %d epochs, %d generations, up to %d leases of a process", n, rounds, len(epochs), len(gens), holds)
	if len(epochs) < 3 || holds == 0 {
		t.Errorf("%d epochs, %d leases: the test tests nothing", len(epochs), holds)
	}

	// One process puts it in order.
	r := openRegistry(t, dir, nil)
	restore(t, r)
	if used == nil {
		return
	}
	if n, linked := used(), treeBytes(dir); n != linked {
		t.Errorf("the tmpfs has %d bytes in use, its files have %d", n, linked)
	}
}

// restore does what Check says: one collector run, and each model that is still
// broken is removed and loaded again. Then each can be had, and the files of
// these models are all there is.
func restore(t *testing.T, r *Registry) {
	t.Helper()
	if _, err := r.GC(ctxb); err != nil {
		t.Fatal(err)
	}
	problems, err := r.Check(ctxb, CheckOptions{Data: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if p.Repair != repairReload || p.Key == "" {
			t.Errorf("after GC: %+v", p)
			continue
		}
		if err := r.Remove(ctxb, p.Key); err != nil && !errors.Is(err, ErrNotFound) {
			t.Errorf("%+v: Remove: %v", p, err)
		}
	}
	// A load whose end could not be noted counts as a death, and after three of them
	// the key is left alone for a while.
	must(t, pardon(ctxb, r))
	for _, key := range markedKeys {
		m, err := r.GetOrLoad(ctxb, key, markedSource(key))
		if err != nil {
			t.Errorf("%s: %v", key, err)
			continue
		}
		if _, err := readMarked(m, key); err != nil {
			t.Errorf("%s: %v", key, err)
		}
		if err := m.Verify(ctxb); err != nil {
			t.Errorf("%s: %v", key, err)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
	problems, err = r.Check(ctxb, CheckOptions{Data: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("left: %+v", p)
	}
	entries, err := r.Entries()
	if err != nil {
		t.Fatal(err)
	}
	need := int64(0)
	pages := func(n int64) int64 { return (n + 4095) &^ 4095 }
	for _, e := range entries {
		if markedFiles[e.Key] == nil || e.Info == nil {
			t.Errorf("left: %+v", e)
			continue
		}
		for _, f := range e.Info.Files {
			need += pages(f.Size)
		}
		need += 2 * 4096 // manifest and digests
	}
	if s := stats(t, r); s.Used != need {
		t.Errorf("%d bytes are used, the models need %d", s.Used, need)
	}
}

// seedOf is ONECOPY_SEED, or a new one; a test that fails says which.
func seedOf(t *testing.T) uint64 {
	t.Helper()
	seed := rand.Uint64()
	if s := os.Getenv("ONECOPY_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("ONECOPY_SEED=%s: %v", s, err)
		}
	}
	t.Logf("ONECOPY_SEED=%d", seed)
	return seed
}

// While a process has the registry open systemd-tmpfiles keeps out, told to delete
// everything below the registry, or below the folder that it lies in.
func TestSystemdTmpfiles(t *testing.T) {
	if _, err := exec.LookPath("systemd-tmpfiles"); err != nil {
		t.Skip(err)
	}
	above := proctest.TmpRegistry(t)
	must(t, os.Mkdir(above, 0o700))
	dir := filepath.Join(above, "r")
	r := openRegistry(t, dir, nil)
	must(t, mustLoad(t, r, "k", small("w")).Close())
	tree := func() (paths []string) {
		must(t, filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			paths = append(paths, path)
			return err
		}))
		return paths
	}
	before := tree()
	for _, aged := range []string{dir, above} {
		rule := filepath.Join(t.TempDir(), "rule.conf")
		must(t, os.WriteFile(rule, fmt.Appendf(nil, "e %s - - - 0\n", aged), 0o600))
		if out, err := exec.Command("systemd-tmpfiles", "--clean", rule).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if after := tree(); !slices.Equal(after, before) {
			t.Errorf("%s was aged: %q, it was %q", aged, after, before)
		}
	}
	wantBytes(t, mustGet(t, r, "k"), "w.bin", []byte("weights w"))
}
