//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// A process of the same user writes random bytes over the table, the manifests and
// the digests of a registry that others use. Nothing keeps it from doing so; it can
// deny everything, and get nobody to take wrong bytes for right ones.

// The parts of a table that a scribbler knows. The identity is what the header's
// checksum covers, but for the magic.
const identityEnd = 128

func scribbleTable(rng *rand.Rand, b []byte) (lo, hi int) {
	slots := layout.SlotsOffset(scribbledSlots)
	slot := rng.IntN(scribbledSlots)
	word := slots + slot*layout.SlotSize
	hints := int(layout.HintOffset(scribbledSlots, slot, 0))
	switch rng.IntN(6) {
	case 0: // generation, limits, counters
		return identityEnd, 768
	case 1:
		return layout.HeaderSize, layout.HeaderSize + 4*layout.IndexEntries(scribbledSlots)
	case 2: // state and generation, length of the key
		return word, word + 16
	case 3:
		return word + 16, word + 48
	case 4:
		return hints, word + layout.SlotSize
	}
	return identityEnd, len(b)
}

const scribbledSlots = 16

// scribbler: dir, seed, how often, "identity" or "". With "identity" it leaves that
// damaged.
var scribbler = child("scribbler", func(args []string) error {
	dir := args[0]
	seed, err := strconv.ParseUint(args[1], 10, 64)
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	rng := rand.New(rand.NewPCG(seed, 2))
	table, err := os.OpenFile(tablePath(dir), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer table.Close()
	sound := make([]byte, layout.TableSize(scribbledSlots))
	if _, err := table.ReadAt(sound, 0); err != nil {
		return err
	}
	noise := func(f *os.File, lo, hi int) error {
		if hi <= lo {
			return nil
		}
		size := 1
		switch rng.IntN(3) {
		case 1:
			size = 8
		case 2:
			size = 1 + rng.IntN(64)
		}
		b := make([]byte, size)
		for i := range b {
			b[i] = byte(rng.Uint32() >> rng.IntN(32))
		}
		at := lo + rng.IntN(hi-lo)
		if size == 8 {
			at &^= 7
		}
		at = max(at, lo)
		_, err := f.WriteAt(b[:min(size, hi-at)], int64(at))
		return err
	}
	// What lies in another slot makes sense in this one, and so does another manifest.
	swap := func() error {
		all := make([]byte, len(sound))
		if _, err := table.ReadAt(all, 0); err != nil {
			return err
		}
		var words []int // of slots that are somebody's
		for at := layout.SlotsOffset(scribbledSlots); at < len(all); at += layout.SlotSize {
			if !bytes.Equal(all[at:at+8], make([]byte, 8)) {
				words = append(words, at)
			}
		}
		if len(words) == 0 {
			return nil
		}
		from, to := words[rng.IntN(len(words))], words[rng.IntN(len(words))]
		at, size := 0, 8 // the word, most of the time
		if rng.IntN(2) == 0 {
			size = 8 * (1 + rng.IntN(8))
			at = 8 * rng.IntN((layout.SlotSize-size)/8)
		}
		_, err := table.WriteAt(all[from+at:from+at+size], int64(to+at))
		return err
	}
	other := func() error {
		all, _ := filepath.Glob(v1(dir, layout.ModelsDir, "*"+layout.ManifestExt))
		if len(all) == 0 {
			return nil
		}
		b, err := os.ReadFile(all[rng.IntN(len(all))])
		if err != nil {
			return nil // removed meanwhile
		}
		to := all[rng.IntN(len(all))]
		_ = os.Chmod(to, 0o644)
		defer os.Chmod(to, 0o444)
		if f, err := os.OpenFile(to, os.O_WRONLY|os.O_TRUNC, 0); err == nil {
			_, err = f.Write(b)
			return errors.Join(err, f.Close())
		}
		return nil
	}
	file := func(ext string) error {
		all, _ := filepath.Glob(v1(dir, layout.ModelsDir, "*"+ext))
		if len(all) == 0 {
			return nil
		}
		path := all[rng.IntN(len(all))]
		_ = os.Chmod(path, 0o644) // it may be gone
		defer os.Chmod(path, 0o444)
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return nil
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return err
		}
		return noise(f, 0, int(st.Size()))
	}
	for i := range n {
		switch {
		case args[3] == "identity":
			// Whole again in between, or nobody would get any further.
			if err = noise(table, 8, identityEnd); err == nil && i%3 == 0 {
				_, err = table.WriteAt(sound[:identityEnd], 0)
			}
		case rng.IntN(8) == 0:
			err = swap()
		case rng.IntN(20) == 0:
			err = other()
		case rng.IntN(10) < 7:
			lo, hi := scribbleTable(rng, sound)
			err = noise(table, lo, hi)
		case rng.IntN(2) == 0:
			err = file(layout.ManifestExt)
		default:
			err = file(layout.DigestsExt)
		}
		if err != nil {
			return err
		}
		if rng.IntN(10) == 0 {
			time.Sleep(time.Duration(rng.IntN(3000)) * time.Microsecond)
		}
	}
	if args[3] != "identity" {
		return nil
	}
	if _, err := table.WriteAt(sound[:identityEnd], 0); err != nil {
		return err
	}
	_, err = table.WriteAt([]byte("not the epoch"), 24)
	return err
})

// pestered gets, loads, uses and checks until stdin ends: dir, seed. Every call has
// ten seconds; one that takes two minutes hangs.
type pestered struct {
	r     *Registry
	rng   *rand.Rand
	held  []heldModel
	story story
}

// story is what became of the calls of a process.
type story struct {
	Fine, Failed int
	Kinds        map[string]int
	Wrong        []string
}

var pesteredWorker = child("pestered", func(args []string) error {
	seed, err := strconv.ParseUint(args[1], 10, 64)
	if err != nil {
		return err
	}
	w := &pestered{rng: rand.New(rand.NewPCG(seed, 3)), story: story{Kinds: map[string]int{}}}
	if w.r, err = Open(args[0], nil); err != nil {
		return err
	}
	fmt.Println(`"ready"`)
	stop := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(stop)
	}()
	// Some rounds in any case, if only on what the scribbler has left.
	for going, n := true, 0; going || n < 30; n++ {
		select {
		case <-stop:
			going = false
		default:
		}
		watch := time.AfterFunc(2*time.Minute, func() {
			_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 2)
			fmt.Fprintln(os.Stderr, "a call hangs")
			os.Exit(3)
		})
		w.round(args[0])
		watch.Stop()
	}
	for _, key := range markedKeys {
		w.r.Release(key)
	}
	for _, h := range w.held {
		if run, err := readMarked(h.m, h.key); err != nil || run != h.run {
			w.story.Wrong = append(w.story.Wrong, fmt.Sprintf("in the end: %s of %s: %s, %v", h.run, h.key, run, err))
		}
		h.m.Close()
	}
	w.note("Close", w.r.Close())
	return say(w.story)
})

func (w *pestered) note(what string, err error) {
	switch {
	case err == nil:
		w.story.Fine++
	case errors.Is(err, errWrongBytes) || !typed(err):
		w.story.Wrong = append(w.story.Wrong, fmt.Sprintf("%s: %v", what, err))
	default:
		w.story.Failed++
		for _, kind := range reportOf(err).Is {
			w.story.Kinds[what+" "+kind]++
		}
	}
}

func (w *pestered) round(dir string) {
	r, rng := w.r, w.rng
	key := markedKeys[rng.IntN(len(markedKeys))]
	ctx, cancel := contextFor(10_000)
	defer cancel()
	keep := func(what string, m *Model, err error) {
		w.note(what, err)
		if m == nil {
			return
		}
		run, err := readMarked(m, key)
		w.note("reading what "+what+" gave", err)
		if err == nil && len(w.held) < 5 && rng.IntN(4) == 0 {
			w.held = append(w.held, heldModel{m, key, run})
			return
		}
		if rng.IntN(4) == 0 {
			w.note("Verify", m.Verify(ctx))
			l, err := m.Lease()
			if w.note("Lease", err); err == nil {
				l.Close()
			}
			_ = m.Stale()
		}
		w.note("Model.Close", m.Close())
	}
	src := markedSource(key)
	switch n := rng.IntN(100); {
	case n < 25:
		m, err := r.Get(key)
		keep("Get", m, err)
	case n < 50:
		m, err := r.GetOrLoad(ctx, key, src)
		keep("GetOrLoad", m, err)
	case n < 56:
		src.Replace = true
		m, err := r.GetOrLoad(ctx, key, src)
		keep("replacing", m, err)
	case n < 64:
		w.note("Use", r.Use(key, func(m *Model) error {
			_, err := readMarked(m, key)
			w.note("reading in Use", err)
			return nil
		}))
		if rng.IntN(3) == 0 {
			r.Release(key)
		}
	case n < 68:
		w.note("Remove", r.Remove(ctx, key))
	case n < 72:
		_, err := r.GC(ctx)
		w.note("GC", err)
	case n < 76:
		_, err := r.Check(ctx, CheckOptions{Data: rng.IntN(2) == 0})
		w.note("Check", err)
	case n < 78:
		_, err := r.Overview()
		w.note("Overview", err)
		_, err = r.PlanGC(ctx)
		w.note("PlanGC", err)
	case n < 80:
		_, err := r.HolderReport(key)
		w.note("HolderReport", err)
	case n < 82:
		_, err := r.Generations(key)
		w.note("Generations", err)
		_, err = r.Entry(key)
		w.note("Entry", err)
	case n < 84:
		_, err := r.Trim(ctx, 4<<20)
		w.note("Trim", err)
	case n < 86:
		w.note("Pin", r.Pin(ctx, key))
		w.note("Unpin", r.Unpin(ctx, key))
	case n < 88:
		w.note("Touch", r.Touch(ctx, key))
		w.note("SetTTL", r.SetTTL(ctx, key, time.Hour))
	case n < 91:
		w.note("Undo", undo(ctx, r, key))
	case n < 93:
		_, err := r.Config()
		w.note("Config", err)
		w.note("SetConfig", r.SetConfig(ctx, Config{}))
	case n < 96: // as a process that starts
		again, err := Open(dir, nil)
		if w.note("Open", err); err == nil {
			m, err := again.Get(key)
			keep("Get of a new process", m, err)
			w.note("Close", withoutLeaks(again.Close()))
		}
	default:
		if len(w.held) > 0 {
			h := w.held[0]
			w.held = w.held[1:]
			run, err := readMarked(h.m, h.key)
			if err == nil && run != h.run {
				err = fmt.Errorf("%w: run %s was %s", errWrongBytes, run, h.run)
			}
			w.note("reading under a lease", err)
			w.note("Model.Close", h.m.Close())
		}
	}
}

// withoutLeaks: models that were kept are meant to be.
func withoutLeaks(err error) error {
	var leak *LeakError
	if errors.As(err, &leak) {
		return nil
	}
	return err
}

// TestScribbler: ONECOPY_SCRIBBLES says how often it writes.
func TestScribbler(t *testing.T) {
	n := 4000
	if testing.Short() || raceEnabled {
		n = 1500
	}
	if s := os.Getenv("ONECOPY_SCRIBBLES"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil || n < 1 {
			t.Fatalf("ONECOPY_SCRIBBLES=%s: want a number", s)
		}
	}
	seed := seedOf(t)
	for _, where := range []string{"", "identity"} {
		t.Run("where/"+where, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, uint64(len(where))))
			dir := proctest.TmpRegistry(t)
			r := openRegistry(t, dir, &Options{Slots: scribbledSlots})
			for _, key := range markedKeys {
				loadIdle(t, r, key, markedSource(key))
			}
			var workers []*proctest.Proc
			for range 5 {
				p := proctest.Start(t, pesteredWorker, dir, fmt.Sprint(rng.Uint64()))
				nextWord[string](t, p)
				workers = append(workers, p)
			}
			s := proctest.Start(t, scribbler, dir, fmt.Sprint(rng.Uint64()), fmt.Sprint(n), where)
			if code := s.Wait(); code != 0 {
				t.Fatalf("the scribbler ended with code %d\n%s", code, s.Stderr())
			}
			for _, p := range workers {
				p.Stdin.Close()
			}
			var all story
			all.Kinds = map[string]int{}
			for _, p := range workers {
				a := lastWord[story](t, p)
				all.Fine, all.Failed = all.Fine+a.Fine, all.Failed+a.Failed
				for kind, n := range a.Kinds {
					all.Kinds[kind] += n
				}
				for _, wrong := range a.Wrong {
					t.Error(wrong)
				}
			}
			t.Logf("%d scribbles, %d calls were fine, %d failed: %v", n, all.Fine, all.Failed, all.Kinds)
			if all.Fine == 0 || all.Failed == 0 {
				t.Error("the test tests nothing")
			}
			if where == "identity" {
				wantTableRefused(t, r, dir)
				removeAll(t, v1(dir)) // as Check says
			} else {
				wantDamageNamed(t, r, dir)
				// Nothing tells a limit from another one, so that whoever set it sets
				// it again.
				if err := r.SetConfig(ctxb, Config{}); err != nil {
					t.Fatal(err)
				}
			}
			restore(t, r)
		})
	}
}

// wantTableRefused: nobody uses a table whose identity is damaged, and Check of a
// process that has it open says so.
func wantTableRefused(t *testing.T, r *Registry, dir string) {
	t.Helper()
	_, err := Open(dir, nil)
	wantErr(t, err, ErrCorrupt)
	wantText(t, err, "v1/registry")
	problems, err := r.Check(ctxb, CheckOptions{})
	if err != nil || !slices.ContainsFunc(problems, func(p Problem) bool {
		return p.Kind == "table" && p.Path == tablePath(dir) && p.Repair == repairDelete
	}) {
		t.Errorf("Check: %+v, %v", problems, err)
	}
	_, err = r.GC(ctxb)
	wantErr(t, err, ErrCorrupt)
}

// wantDamageNamed: once more, for certain, in a slot, a manifest and a digests
// file that were sound.
func wantDamageNamed(t *testing.T, r *Registry, dir string) {
	t.Helper()
	if err := r.SetConfig(ctxb, Config{}); err != nil {
		t.Fatal(err)
	}
	restore(t, r)
	infos := map[string]Info{}
	for _, key := range markedKeys[:3] {
		e, err := r.Entry(key)
		if err != nil || e.Info == nil {
			t.Fatalf("%s: %+v, %v", key, e, err)
		}
		infos[key] = *e.Info
	}
	overwrite := func(path string, at int64) {
		must(t, os.Chmod(path, 0o644))
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		must(t, err)
		_, err = f.WriteAt([]byte("\xff\xff\xff\xff\xff\xff\xff\xff"), at)
		must(t, err)
		must(t, f.Close())
		must(t, os.Chmod(path, 0o444))
	}
	overwrite(genPath(dir, infos[markedKeys[0]], layout.ManifestExt), 10)
	overwrite(genPath(dir, infos[markedKeys[1]], layout.DigestsExt), 70)
	found, ok := readTable(t, dir).Lookup(markedKeys[2])
	if !ok {
		t.Fatal("not in the table")
	}
	f, err := os.OpenFile(tablePath(dir), os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("\xff\xff\xff\xff\xff\xff\xff\xff"), int64(layout.SlotsOffset(scribbledSlots)+found.Slot*layout.SlotSize))
	must(t, err)
	_, err = f.WriteAt([]byte("\xff\xff\xff\xff\xff\xff\xff\xff"), identityEnd) // the generation counter
	must(t, err)
	must(t, f.Close())
	problems, err := r.Check(ctxb, CheckOptions{Data: true})
	must(t, err)
	got := map[string]bool{}
	for _, p := range problems {
		got[p.Kind+" "+p.Key] = true
	}
	for _, want := range []string{"manifest " + markedKeys[0], "digest " + markedKeys[1], "table " + markedKeys[2], "table "} {
		if !got[want] {
			t.Errorf("Check names %v, and not %q", slices.Sorted(maps.Keys(got)), want)
		}
	}
}
