//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/invariants"
	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// An overview is a quick look; what it says is what a slow one finds.

// walked is the memory of everything below m/, by asking for every file.
func walked(t testing.TB, dir string) (sum int64) {
	t.Helper()
	err := filepath.WalkDir(v1(dir, layout.ModelsDir), func(path string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		if err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			sum += st.Blocks * 512
		}
		return err
	})
	must(t, err)
	return sum
}

func TestOverviewIsAllInOne(t *testing.T) {
	r := newRegistry(t, nil)
	mustLoad(t, r, "held", sized(3*mib))
	for i := range 40 { // enough for several threads
		loadIdle(t, r, fmt.Sprintf("idle/%d", i), small("1"))
	}
	all, err := r.Overview()
	must(t, err)
	entries, err := r.Entries()
	must(t, err)
	counters, err := r.Counters()
	must(t, err)
	near := cmp.Comparer(func(a, b time.Time) bool { return a.Sub(b).Abs() < time.Hour }) // computed from the clock of the boot
	if diff := cmp.Diff(entries, all.Entries, near); diff != "" || len(entries) != 41 {
		t.Errorf("%d entries: -Entries +Overview\n%s", len(entries), diff)
	}
	s := stats(t, r)
	s.Free = all.Stats.Free // others use the tmpfs, too
	if diff := cmp.Diff(s, all.Stats); diff != "" {
		t.Errorf("-Stats +Overview\n%s", diff)
	}
	if diff := cmp.Diff(counters, all.Counters); diff != "" {
		t.Errorf("-Counters +Overview\n%s", diff)
	}
	if want := walked(t, r.Dir()); all.Stats.Used != want || all.Stats.Models != 41 {
		t.Errorf("%d models use %d, found were %d", all.Stats.Models, all.Stats.Used, want)
	}
}

// Whatever is in the folders is counted, the manifest's or not.
func TestUseOfDamagedGenerations(t *testing.T) {
	r := newRegistry(t, nil)
	nested := map[string][]byte{"a/b/w.bin": randomBytes(1, 3*mib), "a/c": randomBytes(2, 5000), "top": []byte("x")}
	m := mustLoad(t, r, "nested", madeSource("1", nested))
	flat := mustLoad(t, r, "flat", madeSource("1", map[string][]byte{"w1": randomBytes(3, 1*mib), "w2": randomBytes(4, 9000), "w3": nil}))
	w := r.Watch()
	check := func(when string) {
		t.Helper()
		want := walked(t, r.Dir())
		if got := stats(t, r).Used; got != want {
			t.Errorf("%s: %d bytes used, found were %d", when, got, want)
		}
		if _, err := w.Overview(); err != nil { // it may believe what it saw; it must not fail
			t.Errorf("%s: %v", when, err)
		}
	}
	check("sound")
	writeFile(t, filepath.Join(flat.Path(), "foreign"), make([]byte, 70_000))
	check("one file more")
	removeFile(t, filepath.Join(flat.Path(), "w2"))
	check("another file in place of one")
	removeFile(t, filepath.Join(flat.Path(), "foreign"))
	check("one file less")
	writeFile(t, filepath.Join(filepath.Dir(flat.Path()), "beside"), make([]byte, 10_000))
	check("a file beside the folder")
	must(t, os.Mkdir(filepath.Join(flat.Path(), "w2"), 0o755))
	writeFile(t, filepath.Join(flat.Path(), "w2", "x"), make([]byte, 20_000))
	check("a folder in place of a file")
	writeFile(t, filepath.Join(m.Path(), "a", "b", "foreign"), make([]byte, 30_000))
	check("one more below")
	removeFile(t, filepath.Join(m.Path(), "a", "b", "foreign"))
	removeFile(t, genPath(r.Dir(), flat.Info(), layout.DigestsExt))
	check("no digests")
	removeFile(t, genPath(r.Dir(), flat.Info(), layout.ManifestExt))
	check("no manifest")
	writeFile(t, v1(r.Dir(), layout.ModelsDir, "nobody's"), make([]byte, 50_000))
	check("a file that belongs to nothing")
}

func TestEntriesWithADamagedManifest(t *testing.T) {
	r := newRegistry(t, nil)
	mustLoad(t, r, "sound", small("1"))
	m := mustLoad(t, r, "damaged", sized(2*mib))
	path := genPath(r.Dir(), m.Info(), layout.ManifestExt)
	sound, err := os.ReadFile(path)
	must(t, err)
	w := r.Watch()
	look := func(when string, readable bool) {
		t.Helper()
		all, err := w.Overview()
		must(t, err)
		fresh, err := r.Entries()
		must(t, err)
		for _, es := range [][]Entry{all.Entries, fresh} {
			if len(es) != 2 || es[0].Key != "damaged" || es[1].Info == nil {
				t.Fatalf("%s: %+v", when, es)
			}
			if e := es[0]; (e.Info != nil) != readable || e.Bytes != 2*mib || e.Generation != m.Generation() || !e.Leased {
				t.Errorf("%s: %+v", when, e)
			}
		}
		if want := walked(t, r.Dir()); stats(t, r).Used != want {
			t.Errorf("%s: %d bytes used, found were %d", when, stats(t, r).Used, want)
		}
	}
	// The file stays the same, and so does the lease.
	put := func(b []byte) {
		t.Helper()
		must(t, os.Chmod(path, 0o644))
		must(t, os.WriteFile(path, b, 0o644))
		must(t, os.Chmod(path, 0o444))
	}
	look("sound", true)
	put([]byte("{"))
	look("damaged", false)
	put(sound)
	look("whole again", true)
	must(t, os.Chmod(path, 0o666))
	look("writable for everybody", false)
	must(t, os.Chmod(path, 0o444))
	look("not any more", true)
}

// Each look at a registry in motion shows each key once, with what belongs
// together.
func TestOverviewDuringReplacements(t *testing.T) {
	r := newRegistry(t, nil)
	loadIdle(t, r, "still", small("1"))
	loadIdle(t, r, "moving", small("0"))
	other, err := Open(r.Dir(), nil)
	must(t, err)
	done := make(chan error, 1)
	go func() {
		for i := range 200 {
			src := small(fmt.Sprint(i))
			src.Replace = true
			m, err := other.GetOrLoad(ctxb, "moving", src)
			if err == nil {
				err = m.Close()
			}
			if err != nil {
				done <- err
				return
			}
		}
		done <- other.Close()
	}()
	w := r.Watch()
	for looks := 0; ; looks++ {
		var all Overview
		var rep HolderReport
		var err error
		if looks%16 == 0 { // takes longer
			all, rep, err = w.OverviewAndHolders()
		} else {
			all, err = w.Overview()
		}
		must(t, err)
		es := all.Entries
		if len(es) != 2 || es[0].Key != "moving" || es[1].Key != "still" || es[1].Info == nil || all.Stats.Models != 2 {
			t.Fatalf("look %d: %+v", looks, es)
		}
		if e := es[0]; e.Info != nil && (e.Info.Generation != e.Generation || e.Info.Key != "moving") {
			t.Fatalf("look %d: %+v, %+v", looks, e, e.Info)
		}
		for _, h := range rep.Holders {
			if h.Via != "unlinked" && h.Key != "moving" {
				t.Errorf("look %d: %+v", looks, h)
			}
		}
		select {
		case err := <-done:
			must(t, err)
			t.Logf("%d looks", looks+1)
			return
		default:
		}
	}
}

// A watch shows at once who came and who went.
func TestWatchOfHolders(t *testing.T) {
	if invariants.Enabled {
		t.Skip("in this build a closed mapping stays in the address space, which is what a watch goes by")
	}
	r := newRegistry(t, nil)
	loadIdle(t, r, "a", sized(2*mib))
	loadIdle(t, r, "b", small("1"))
	w := r.Watch()
	want := func(when string, keys ...string) {
		t.Helper()
		all, rep, err := w.OverviewAndHolders()
		must(t, err)
		var got []string
		for _, h := range rep.Holders {
			got = append(got, fmt.Sprintf("%s by %d", h.Key, h.PID))
			if h.Command == "" || !h.Visible || h.Via != "mapping" {
				t.Errorf("%s: %+v", when, h)
			}
		}
		if diff := cmp.Diff(keys, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", when, diff)
		}
		for _, e := range all.Entries {
			held := false
			for _, h := range rep.Holders {
				held = held || h.Key == e.Key
			}
			if e.Leased != held {
				t.Errorf("%s: %q: leased %v, holders %q", when, e.Key, e.Leased, got)
			}
		}
	}
	want("nobody")
	p := proctest.Start(t, holder, r.Dir(), "a")
	p.Line(t)
	at := func(key string, pid int) string { return fmt.Sprintf("%s by %d", key, pid) }
	want("one", at("a", p.PID()))
	want("still one", at("a", p.PID()))
	m := mustGet(t, r, "b")
	want("this process, too", at("a", p.PID()), at("b", os.Getpid()))
	q := proctest.Start(t, holder, r.Dir(), "b")
	q.Line(t)
	both := []string{at("b", min(q.PID(), os.Getpid())), at("b", max(q.PID(), os.Getpid()))}
	want("three", append([]string{at("a", p.PID())}, both...)...)
	p.Kill()
	want("one was killed", both...)
	must(t, m.Close())
	want("one let go", at("b", q.PID()))
	q.Kill()
	want("nobody again")
}

// Who loads a model maps files that had no name when they were opened. They have
// one now.
func TestTheLoaderMapsNothingUnlinked(t *testing.T) {
	r := newRegistry(t, nil)
	m := mustLoad(t, r, "k", sized(2*mib))
	_, err := m.Bytes("w.bin")
	must(t, err)
	rep, err := r.HolderReport("")
	must(t, err)
	if rep.Unlinked != 0 || len(rep.Holders) != 1 || rep.Holders[0].Via != "mapping" || rep.Holders[0].PID != os.Getpid() {
		t.Errorf("%+v", rep)
	}
}

// A watch outlives the registry that it was made for.
func TestWatchOfARegistryMadeAnew(t *testing.T) {
	r := newRegistry(t, nil)
	loadIdle(t, r, "old", small("1"))
	w := r.Watch()
	_, _, err := w.OverviewAndHolders()
	must(t, err)
	must(t, os.RemoveAll(r.Dir()))
	again, err := Open(r.Dir(), nil)
	must(t, err)
	loadIdle(t, again, "new", sized(mib))
	must(t, again.Close())
	all, err := w.Overview()
	must(t, err)
	if len(all.Entries) != 1 || all.Entries[0].Key != "new" || all.Entries[0].Info == nil || all.Stats.Used != walked(t, r.Dir()) {
		t.Errorf("%+v", all)
	}
}
