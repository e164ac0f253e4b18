//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// What others do to a registry behind the library's back.

func removeAll(t *testing.T, path string) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
}

func TestRegistryDeletedWhileInUse(t *testing.T) {
	for _, what := range []string{"", "v1", "v1/registry"} {
		t.Run("dir/"+what, func(t *testing.T) {
			r := newRegistry(t, nil)
			src := fileSource(t, "w.bin", randomBytes(1, 100_000))
			old := mustLoad(t, r, "k", src)
			epoch := old.Info().Epoch
			if old.Stale() {
				t.Error("stale already")
			}
			removeAll(t, filepath.Join(r.Dir(), what))
			if !old.Stale() {
				t.Error("Stale does not say so")
			}
			wantBytes(t, old, "w.bin", randomBytes(1, 100_000))
			if what == "" {
				_, err := r.Get("k") // opens a new one
				wantErr(t, err, ErrNotFound)
			}
			fresh := mustLoad(t, r, "k", src)
			if fresh.Info().Epoch == epoch || fresh.Stale() {
				t.Errorf("epoch %x, stale %v", fresh.Info().Epoch, fresh.Stale())
			}
			wantFiles(t, fresh, map[string][]byte{"w.bin": randomBytes(1, 100_000)})
			wantBytes(t, old, "w.bin", randomBytes(1, 100_000))
			if got := keysOf(t, r); got != "k" {
				t.Errorf("entries: %s", got)
			}
			old.Close()
			if err := old.Close(); err != nil {
				t.Error(err)
			}
			mustGet(t, r, "k")
		})
	}
}

// A cached hit notices the deletion in the end, without a system call each time.
func TestUseNoticesADeletedRegistry(t *testing.T) {
	r := newRegistry(t, nil)
	loadIdle(t, r, "k", small("1"))
	use := func() error { return r.Use("k", func(*Model) error { return nil }) }
	if err := use(); err != nil {
		t.Fatal(err)
	}
	removeAll(t, r.Dir())
	var err error
	for n := 0; err == nil; n++ {
		if n > 3000 {
			t.Fatal("3,000 calls have not noticed")
		}
		err = use()
	}
	wantErr(t, err, ErrNotFound)
	r.Release("k")
}

func TestRegistryDeletedUnderAnInspector(t *testing.T) {
	dir := proctest.TmpRegistry(t)
	w := openRegistry(t, dir, nil)
	loadIdle(t, w, "k", small("1"))
	r, err := Open(dir, &Options{MustExist: true})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	removeAll(t, dir)
	_, err = r.Get("k")
	for n := 0; err != nil && !errors.Is(err, ErrNoRegistry) && n < 2; n++ {
		_, err = r.Get("k")
	}
	wantErr(t, err, ErrNoRegistry)
	_, err = r.Entries()
	wantErr(t, err, ErrNoRegistry)
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an inspector made a registry: %v", err)
	}
}

func TestRegistryDeletedDuringALoad(t *testing.T) {
	r := newRegistry(t, nil)
	n := 0
	m := mustLoad(t, r, "k", one("w.bin", -1, func(f *FileWriter) error {
		if n++; n == 1 {
			removeAll(t, r.Dir())
		}
		_, err := f.Write([]byte("again"))
		return err
	}))
	if n != 2 {
		t.Errorf("loaded %d times, want once more for the new registry", n)
	}
	if m.Stale() {
		t.Error("published into the deleted registry")
	}
	wantFiles(t, mustGet(t, r, "k"), map[string][]byte{"w.bin": []byte("again")})
}

func TestRegistryDeletedWhileAnotherProcessLoads(t *testing.T) {
	r := newRegistry(t, nil)
	loader := startStuck(t, r.Dir(), "k", "")
	removeAll(t, r.Dir())
	mine := mustLoad(t, r, "k", small("mine"))
	loader.Stdin.Close()
	// It finds the registry that is there now, and in it a model of another version.
	if a := lastWord[herdAnswer](t, loader); !a.Err.is("ErrSourceChanged") {
		t.Errorf("%+v", a)
	}
	if mine.Stale() {
		t.Error("replaced")
	}
}

// thirdParty are the files that somebody may delete one by one. Afterwards
// GetOrLoad has to give the right bytes again.
func TestSingleFilesDeleted(t *testing.T) {
	files := map[string][]byte{"a": randomBytes(1, 5000), "sub/b": randomBytes(2, 3<<20)}
	for name, path := range map[string]func(dir string, i Info) string{
		"manifest":       func(dir string, i Info) string { return genPath(dir, i, layout.ManifestExt) },
		"digests":        func(dir string, i Info) string { return genPath(dir, i, layout.DigestsExt) },
		"payload file":   func(dir string, i Info) string { return filepath.Join(i.Path, "a") },
		"payload folder": func(dir string, i Info) string { return filepath.Join(i.Path, "sub") },
		"generation":     func(dir string, i Info) string { return genPath(dir, i, "") },
		"m":              func(dir string, i Info) string { return v1(dir, layout.ModelsDir) },
		"w":              func(dir string, i Info) string { return v1(dir, layout.LocksDir) },
		"load lock":      func(dir string, i Info) string { return keyLockPath(dir, "k") },
		"table lock":     func(dir string, i Info) string { return v1(dir, layout.LocksDir, layout.TableLock) },
	} {
		for _, held := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, held %v", name, held), func(t *testing.T) {
				r := newRegistry(t, nil)
				src := folderSource(t, files)
				old := mustLoad(t, r, "k", src)
				wantFiles(t, old, files)
				i := old.Info()
				if !held {
					old.Close()
				}
				removeAll(t, path(r.Dir(), i))

				// Nothing but typed errors from anybody who looks.
				if m, err := r.Get("k"); err == nil {
					for n, want := range files {
						b, err := m.Bytes(n)
						if err == nil && string(b) != string(want) {
							t.Errorf("Get: other bytes of %s", n)
						} else if err != nil {
							wantErr(t, err, ErrGone)
						}
					}
					if err := m.Verify(ctxb); err != nil {
						wantErr(t, err, ErrGone)
					}
					m.Close()
				} else if !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrGone) {
					t.Errorf("Get: %v", err)
				}
				if _, err := r.Entries(); err != nil {
					t.Errorf("Entries: %v", err)
				}
				if _, err := r.Stats(); err != nil {
					t.Errorf("Stats: %v", err)
				}
				problems, err := r.Check(ctxb, CheckOptions{Data: true})
				if err != nil {
					t.Errorf("Check: %v", err)
				}
				harmless := name == "w" || name == "load lock" || name == "table lock"
				if len(problems) == 0 && !harmless && !(held && name == "manifest") {
					t.Error("Check finds nothing")
				}

				// Another process has not mapped anything yet.
				again, err := Open(r.Dir(), nil)
				if err != nil {
					t.Fatal(err)
				}
				defer again.Close()
				if name == "digests" || strings.HasPrefix(name, "payload") || name == "generation" {
					// READY, but not whole: who only reads cannot know that
					// before he asks for the file. Removing and loading helps.
					if held {
						old.Close()
					}
					if err := again.Remove(ctxb, "k"); err != nil {
						t.Errorf("Remove: %v", err)
					}
				}
				m, err := again.GetOrLoad(ctxb, "k", src)
				if err != nil {
					t.Fatalf("GetOrLoad: %v", err)
				}
				wantFiles(t, m, files)
				m.Close()
				mine := mustLoad(t, r, "k", src)
				wantFiles(t, mine, files)
				mine.Close()
				if held {
					if b, err := old.Bytes("a"); err == nil && string(b) != string(files["a"]) {
						t.Error("the bytes that were in use have changed")
					}
					old.Close()
				}
			})
		}
	}
}

// What was mapped stays readable when its names are gone.
func TestMappedFilesOutliveTheirNames(t *testing.T) {
	r := newRegistry(t, nil)
	want := randomBytes(1, 3<<20)
	m := mustLoad(t, r, "k", fileSource(t, "w.bin", want))
	if _, err := m.Bytes("w.bin"); err != nil {
		t.Fatal(err)
	}
	removeAll(t, r.Dir())
	wantBytes(t, m, "w.bin", want)
}

func TestManifestOfAnotherKey(t *testing.T) {
	r := newRegistry(t, nil)
	src := small("1")
	m := mustLoad(t, r, "k", src)
	other := mustLoad(t, r, "other", small("other"))
	m.Close()
	b, err := os.ReadFile(genPath(r.Dir(), other.Info(), layout.ManifestExt))
	if err != nil {
		t.Fatal(err)
	}
	swap(t, genPath(r.Dir(), m.Info(), layout.ManifestExt), b)
	_, err = r.Get("k")
	wantErr(t, err, ErrCorrupt)
	wantText(t, err, "other")
	wantFiles(t, mustLoad(t, r, "k", src), map[string][]byte{"w.bin": []byte("weights 1")})
}

// swap puts another file of the right kind in a file's place.
func swap(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o444); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o444); err != nil {
		t.Fatal(err)
	}
}

func TestGarbageAsManifest(t *testing.T) {
	for name, b := range map[string][]byte{
		"empty": {}, "random": randomBytes(1, 500), "zeros": make([]byte, 500), "not an object": []byte("[]"),
		"another schema": []byte(`{"schema":2}`), "null": []byte("null"),
	} {
		t.Run(name, func(t *testing.T) {
			r := newRegistry(t, nil)
			m := mustLoad(t, r, "k", small("1"))
			m.Close()
			swap(t, genPath(r.Dir(), m.Info(), layout.ManifestExt), b)
			_, err := r.Get("k")
			version := name == "another schema" || name == "null" // of schema 0
			if version {
				wantErr(t, err, ErrVersion)
			} else {
				wantErr(t, err, ErrCorrupt)
			}
			if problems, err := r.Check(ctxb, CheckOptions{}); err != nil || len(problems) == 0 {
				t.Errorf("Check: %v, %v", problems, err)
			}
			if e, err := r.Entry("k"); err != nil || e.Info != nil {
				t.Errorf("%+v, %v", e, err)
			}
			if version {
				_, err := r.GetOrLoad(ctxb, "k", small("1"))
				wantErr(t, err, ErrVersion)
				if err := r.Remove(ctxb, "k"); err != nil {
					t.Fatal(err)
				}
			}
			wantFiles(t, mustLoad(t, r, "k", small("1")), map[string][]byte{"w.bin": []byte("weights 1")})
		})
	}
}

func TestGarbageAsDigests(t *testing.T) {
	for name, b := range map[string][]byte{"empty": {}, "random": randomBytes(1, 88), "long": randomBytes(1, 100_000)} {
		t.Run(name, func(t *testing.T) {
			r := newRegistry(t, nil)
			m := mustLoad(t, r, "k", small("1"))
			swap(t, genPath(r.Dir(), m.Info(), layout.DigestsExt), b)
			wantErr(t, m.Verify(ctxb), ErrCorrupt)
			problems, err := r.Check(ctxb, CheckOptions{Data: true})
			if err != nil || len(problems) != 1 || problems[0].Kind != "digest" || problems[0].Key != "k" {
				t.Errorf("Check: %+v, %v", problems, err)
			}
			m.Close()
			if err := r.Remove(ctxb, "k"); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A changed byte is found, and its file and chunk are named.
func TestVerifyNamesTheChunk(t *testing.T) {
	r := newRegistry(t, nil)
	files := map[string][]byte{"a": randomBytes(1, 100), "sub/b": randomBytes(2, 9<<20)}
	m := mustLoad(t, r, "k", folderSource(t, files))
	path := filepath.Join(m.Path(), "sub", "b")
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{files["sub/b"][5<<20] + 1}, 5<<20); err != nil {
		t.Fatal(err)
	}
	err = m.Verify(ctxb)
	wantErr(t, err, ErrCorrupt)
	wantText(t, err, "sub/b", "chunk 1")
	problems, err := r.Check(ctxb, CheckOptions{Data: true})
	if err != nil || len(problems) != 2 { // and the mode
		t.Errorf("%+v, %v", problems, err)
	}
	m.Close()
	if err := r.Remove(ctxb, "k"); err != nil {
		t.Fatal(err)
	}
}

func TestGarbageAsTable(t *testing.T) {
	good := func(t *testing.T) []byte {
		dir := proctest.TmpRegistry(t)
		r := openRegistry(t, dir, nil)
		loadIdle(t, r, "k", small("1"))
		b, err := os.ReadFile(tablePath(dir))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for name, c := range map[string]struct {
		bytes func(t *testing.T) []byte
		want  error
	}{
		"empty":            {func(*testing.T) []byte { return nil }, ErrCorrupt},
		"one byte":         {func(*testing.T) []byte { return []byte("x") }, ErrCorrupt},
		"random":           {func(*testing.T) []byte { return randomBytes(1, layout.TableSize(1024)) }, ErrCorrupt},
		"zeros":            {func(*testing.T) []byte { return make([]byte, layout.TableSize(1024)) }, ErrCorrupt},
		"truncated":        {func(t *testing.T) []byte { return good(t)[:layout.HeaderSize] }, ErrCorrupt},
		"one page short":   {func(t *testing.T) []byte { b := good(t); return b[:len(b)-4096] }, ErrCorrupt},
		"too long":         {func(t *testing.T) []byte { return append(good(t), make([]byte, 4096)...) }, ErrCorrupt},
		"huge":             {func(*testing.T) []byte { return make([]byte, layout.TableSize(layout.MaxSlots)+1) }, ErrCorrupt},
		"header bit":       {func(t *testing.T) []byte { b := good(t); b[24] ^= 1; return b }, ErrCorrupt},
		"magic":            {func(t *testing.T) []byte { b := good(t); b[0] ^= 1; return b }, ErrCorrupt},
		"another version":  {func(t *testing.T) []byte { b := good(t); b[8] = 2; return b }, ErrVersion},
		"other byte order": {func(t *testing.T) []byte { b := good(t); b[16] = 1; return b }, ErrVersion},
	} {
		t.Run(name, func(t *testing.T) {
			dir := proctest.TmpRegistry(t)
			r, err := Open(dir, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			b := c.bytes(t)
			if err := os.WriteFile(tablePath(dir), b, 0o644); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				r, err = Open(dir, nil)
				if err == nil {
					r.Close()
					t.Fatal("opened")
				}
				wantErr(t, err, c.want)
				wantText(t, err, "v1/registry")
				if Hint(err) == "" {
					t.Error("no hint")
				}
			}
			after, err := os.ReadFile(tablePath(dir))
			if err != nil || string(after) != string(b) {
				t.Errorf("a table that was refused has been changed: %v", err)
			}
			wantNothingOpen(t, dir)
		})
	}
}

// Random bytes behind a good header: no panic, and one collector run later the
// registry works.
func TestGarbageBehindTheHeader(t *testing.T) {
	rounds := 20
	if testing.Short() {
		rounds = 3
	}
	for seed := range rounds {
		dir := proctest.TmpRegistry(t)
		r := openRegistry(t, dir, &Options{Slots: 64})
		loadIdle(t, r, "k", small("1"))
		b, err := os.ReadFile(tablePath(dir))
		if err != nil {
			t.Fatal(err)
		}
		noise := randomBytes(byte(seed), len(b))
		lo, hi := layout.HeaderSize, len(b)
		switch seed % 3 {
		case 1:
			lo = layout.SlotsOffset(64)
		case 2:
			hi = layout.SlotsOffset(64)
		}
		for i := lo; i < hi; i++ {
			if seed%2 == 0 || noise[i]%16 == 0 {
				b[i] = noise[i]
			}
		}
		if err := os.WriteFile(tablePath(dir), b, 0); err != nil {
			t.Fatal(err)
		}
		// Readers first.
		if m, err := r.Get("k"); err == nil {
			wantBytes(t, m, "w.bin", []byte("weights 1"))
			m.Close()
		}
		_, _ = r.Get("other")
		if _, err := r.Entries(); err != nil {
			t.Errorf("seed %d: Entries: %v", seed, err)
		}
		if _, err := r.Stats(); err != nil {
			t.Errorf("seed %d: Stats: %v", seed, err)
		}
		if _, err := r.Holders(""); err != nil {
			t.Errorf("seed %d: Holders: %v", seed, err)
		}
		if _, err := r.Check(ctxb, CheckOptions{Data: true}); err != nil {
			t.Errorf("seed %d: Check: %v", seed, err)
		}
		if _, err := r.GC(ctxb); err != nil {
			t.Errorf("seed %d: GC: %v", seed, err)
		}
		if problems, err := r.Check(ctxb, CheckOptions{}); err != nil || len(problems) > 0 {
			t.Errorf("seed %d: after GC: %+v, %v", seed, problems, err)
		}
		wantFiles(t, mustLoad(t, r, "k", small("1")), map[string][]byte{"w.bin": []byte("weights 1")})
		mustLoad(t, r, "new", small("2"))
	}
}

// Whatever lies beside v1/ belongs to another version.
func TestOtherVersionsAreNotTouched(t *testing.T) {
	r := newRegistry(t, nil)
	for _, v := range []string{"v2", "v0"} {
		writeFile(t, filepath.Join(r.Dir(), v, "registry"), []byte("table of another version"))
		writeFile(t, filepath.Join(r.Dir(), v, "m", "0000000000000001-1.manifest"), []byte("{}"))
		writeFile(t, filepath.Join(r.Dir(), v, "m", "leftover"), randomBytes(1, 1000))
	}
	loadIdle(t, r, "k", small("1"))
	rep, err := r.GC(ctxb)
	if err != nil || len(rep.Removed) != 0 {
		t.Errorf("%+v, %v", rep, err)
	}
	again, err := Open(r.Dir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
	for _, v := range []string{"v2", "v0"} {
		for _, f := range []string{"registry", "m/0000000000000001-1.manifest", "m/leftover"} {
			if _, err := os.Stat(filepath.Join(r.Dir(), v, f)); err != nil {
				t.Error(err)
			}
		}
	}
	removeAll(t, filepath.Join(r.Dir(), "v2"))
	removeAll(t, filepath.Join(r.Dir(), "v0"))
}

// victimOfTruncation: dir, what is truncated, to how many bytes. All calls of the
// library have to come back.
var victimOfTruncation = child("truncation", func(args []string) error {
	dir, what := args[0], args[1]
	r, err := Open(dir, nil)
	if err != nil {
		return err
	}
	src := Source{Path: args[3]}
	held, err := r.GetOrLoad(ctxb, "k", src)
	if err != nil {
		return err
	}
	if err := r.Use("k", func(*Model) error { return nil }); err != nil {
		return err
	}
	if _, err := held.Bytes("w.bin"); err != nil {
		return err
	}
	path := tablePath(dir)
	switch what {
	case "segment":
		path = filepath.Join(held.Path(), "w.bin")
	case "manifest":
		path = genPath(dir, held.Info(), layout.ManifestExt)
	case "digests":
		path = genPath(dir, held.Info(), layout.DigestsExt)
	}
	var size int64
	if _, err := fmt.Sscan(args[2], &size); err != nil {
		return err
	}
	if err := os.Chmod(path, 0o644); err != nil {
		return err
	}
	if err := os.Truncate(path, size); err != nil {
		return err
	}
	if err := os.Chmod(path, 0o444); what != "table" && err != nil {
		return err
	}
	errs := map[string]report{}
	note := func(name string, err error) { errs[name] = reportOf(err) }
	note("Stale", nil)
	_ = held.Stale()
	note("Use", r.Use("k", func(*Model) error { return nil }))
	m, err := r.Get("k")
	note("Get", err)
	if m != nil {
		m.Close()
	}
	_, err = r.Get("other")
	note("Get other", err)
	_, err = r.Entries()
	note("Entries", err)
	_, err = r.Entry("k")
	note("Entry", err)
	_, err = r.Stats()
	note("Stats", err)
	_, err = r.Holders("k")
	note("Holders", err)
	_, err = r.Config()
	note("Config", err)
	_, err = r.Generations("k")
	note("Generations", err)
	problems, err := r.Check(ctxb, CheckOptions{Data: true})
	if err == nil && len(problems) > 0 {
		err = &Error{Op: "check", Err: fmt.Errorf("%w: %v", ErrCorrupt, problems)}
	}
	note("Check", err)
	note("Verify", held.Verify(ctxb))
	lease, err := held.Lease()
	note("Lease", err)
	if err == nil {
		lease.Close()
	}
	_, err = r.GC(ctxb)
	note("GC", err)
	m, err = r.GetOrLoad(ctxb, "other", Source{Path: args[3]})
	note("GetOrLoad", err)
	if m != nil {
		m.Close()
	}
	note("Touch", r.Touch(ctxb, "k"))
	r.Release("k")
	note("Remove", r.Remove(ctxb, "k"))
	note("Model.Close", held.Close())
	note("Close", r.Close())
	return say(errs)
})

func TestTruncationIsNoSignal(t *testing.T) {
	for _, c := range []struct {
		what    string
		size    string
		corrupt []string // the calls that have to say ErrCorrupt
	}{
		{"table", "0", []string{"Get", "Get other", "Entries", "Entry", "Stats", "Check", "GC", "GetOrLoad", "Remove"}},
		{"table", "4096", []string{"Get", "Entries", "Stats", "GetOrLoad"}},
		{"table", "20000", []string{"Get", "Entries", "Stats", "GetOrLoad"}},
		{"segment", "0", []string{"Verify", "Check"}},
		{"segment", "4097", []string{"Verify", "Check"}},
		{"manifest", "0", []string{"Check"}},
		{"manifest", "100", []string{"Check"}},
		{"digests", "0", []string{"Verify", "Check"}},
		{"digests", "70", []string{"Verify", "Check"}},
	} {
		t.Run(c.what+" to "+c.size, func(t *testing.T) {
			dir := proctest.TmpRegistry(t)
			src := fileSource(t, "w.bin", randomBytes(1, 5<<20))
			errs := runChild[map[string]report](t, victimOfTruncation, dir, c.what, c.size, src.Path)
			for name, rep := range errs {
				if rep.Text != "" && len(rep.Is) == 0 {
					t.Errorf("%s: an error of no known kind: %s", name, rep.Text)
				}
			}
			for _, name := range c.corrupt {
				if rep := errs[name]; !rep.is("ErrCorrupt") {
					t.Errorf("%s: %+v, want ErrCorrupt", name, rep)
				}
			}
			// All that has to do with segments can be healed.
			if c.what != "table" {
				r := openRegistry(t, dir, nil)
				if err := r.Remove(ctxb, "k"); err != nil && !errors.Is(err, ErrNotFound) {
					t.Fatal(err)
				}
				wantFiles(t, mustLoad(t, r, "k", src), map[string][]byte{"w.bin": randomBytes(1, 5<<20)})
			}
		})
	}
}

// busyReader calls everything again and again until the table is gone under it.
var busyReader = child("busy-reader", func(args []string) error {
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	m, err := r.GetOrLoad(ctxb, "k", small("1"))
	if err != nil {
		return err
	}
	defer m.Close()
	calls := []func() error{
		func() error {
			m, err := r.Get("k")
			if err == nil {
				m.Close()
			}
			return err
		},
		func() error { _, err := r.Get("other"); return err },
		func() error { _ = m.Stale(); return r.Use("k", func(*Model) error { return nil }) },
		func() error { _, err := r.Entries(); return err },
		func() error { _, err := r.Stats(); return err },
		func() error { _, err := r.Config(); return err },
		func() error { _, err := r.Check(ctxb, CheckOptions{}); return err },
		func() error { _, err := r.GC(ctxb); return err },
		func() error { return r.Touch(ctxb, "k") },
		func() error {
			m, err := r.GetOrLoad(ctxb, "new", small("1"))
			if err == nil {
				m.Close()
				err = r.Remove(ctxb, "new")
			}
			return err
		},
	}
	fmt.Println("reading")
	result := make(chan error, len(calls))
	for _, call := range calls {
		go func() {
			for {
				err := call()
				switch {
				case err == nil, errors.Is(err, ErrNotFound), errors.Is(err, ErrBusy), errors.Is(err, ErrInUse):
				case errors.Is(err, ErrCorrupt):
					result <- nil
					return
				default:
					result <- err
					return
				}
			}
		}()
	}
	err = nil
	for range calls {
		err = errors.Join(err, <-result)
	}
	r.Release("k")
	return errors.Join(err, say("done"))
})

// The same at any moment of any call.
func TestTruncationAtAnyMoment(t *testing.T) {
	if raceEnabled {
		t.Skip("under the race detector a fault cannot be recovered from")
	}
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	for i := range rounds {
		dir := proctest.TmpRegistry(t)
		p := proctest.Start(t, busyReader, dir)
		p.Line(t)
		time.Sleep(time.Duration(i) * time.Millisecond) // some moment
		if err := os.Truncate(tablePath(dir), int64(i%3)*layout.HeaderSize); err != nil {
			t.Fatal(err)
		}
		lastWord[string](t, p)
	}
}

// What killed processes leave in the table.
func TestCollectorFinishesWhatTheDeadLeft(t *testing.T) {
	load := func(t *testing.T, r *Registry) Info {
		m := mustLoad(t, r, "k", small("1"))
		m.Close()
		return m.Info()
	}
	slot := func(e layout.Editor) (int, layout.Word) {
		f, ok := e.Scan("k")
		if !ok {
			panic("no slot")
		}
		return f.Slot, f.Word
	}
	unlink := func(t *testing.T, path string) { removeFile(t, path) }
	for name, c := range map[string]struct {
		damage func(t *testing.T, r *Registry, i Info)
		ready  bool // the model is still there afterwards
		want   func(GCReport) bool
	}{
		"evicting, nothing removed yet": {func(t *testing.T, r *Registry, i Info) {
			editTable(t, r.Dir(), func(e layout.Editor) { s, w := slot(e); e.CompareAndSwap(s, w, w.With(layout.Evicting)) })
		}, false, func(rep GCReport) bool { return rep.Reclaimed == 1 }},
		"evicting, manifest removed": {func(t *testing.T, r *Registry, i Info) {
			editTable(t, r.Dir(), func(e layout.Editor) { s, w := slot(e); e.CompareAndSwap(s, w, w.With(layout.Evicting)) })
			unlink(t, genPath(r.Dir(), i, layout.ManifestExt))
		}, false, func(rep GCReport) bool { return rep.Reclaimed == 1 }},
		"freed, payload left": {func(t *testing.T, r *Registry, i Info) {
			unlink(t, genPath(r.Dir(), i, layout.ManifestExt))
			editTable(t, r.Dir(), func(e layout.Editor) {
				s, w := slot(e)
				e.CompareAndSwap(s, w, w.With(layout.Free))
				e.IndexDelete(s, "k")
			})
		}, false, func(rep GCReport) bool { return rep.Leftovers == 1 && rep.Freed > 0 }},
		"freed, all left": {func(t *testing.T, r *Registry, i Info) {
			editTable(t, r.Dir(), func(e layout.Editor) { s, w := slot(e); e.CompareAndSwap(s, w, w.With(layout.Free)) })
		}, false, func(rep GCReport) bool { return rep.Orphans == 1 && rep.Freed > 0 }},
		"index lost": {func(t *testing.T, r *Registry, i Info) {
			editTable(t, r.Dir(), func(e layout.Editor) { s, _ := slot(e); e.IndexDelete(s, "k") })
		}, true, func(rep GCReport) bool { return len(rep.Removed) == 0 }},
		"index entry too many": {func(t *testing.T, r *Registry, i Info) {
			editTable(t, r.Dir(), func(e layout.Editor) { e.IndexInsert(7, "nobody") })
		}, true, func(rep GCReport) bool { return len(rep.Removed) == 0 }},
		"orphans of another epoch": {func(t *testing.T, r *Registry, i Info) {
			for _, ext := range []string{layout.ManifestExt, layout.DigestsExt} {
				writeFile(t, v1(r.Dir(), layout.ModelsDir, layout.GenName(i.Epoch+1, 5)+ext), []byte("old"))
			}
			writeFile(t, v1(r.Dir(), layout.ModelsDir, layout.GenName(i.Epoch+1, 5), "m", "w.bin"), randomBytes(1, 5000))
		}, true, func(rep GCReport) bool { return rep.Orphans == 1 && rep.Freed >= 5000 }},
		"payload without manifest": {func(t *testing.T, r *Registry, i Info) {
			writeFile(t, v1(r.Dir(), layout.ModelsDir, layout.GenName(i.Epoch, 999), "m", "sub", "w.bin"), randomBytes(1, 5000))
		}, true, func(rep GCReport) bool { return rep.Leftovers == 1 && rep.Freed >= 5000 }},
		"digests without manifest": {func(t *testing.T, r *Registry, i Info) {
			writeFile(t, v1(r.Dir(), layout.ModelsDir, layout.GenName(i.Epoch, 999)+layout.DigestsExt), []byte("x"))
		}, true, func(rep GCReport) bool { return rep.Leftovers == 1 }},
		"names that mean nothing": {func(t *testing.T, r *Registry, i Info) {
			writeFile(t, v1(r.Dir(), layout.ModelsDir, "notes.txt"), []byte("x"))
			writeFile(t, v1(r.Dir(), layout.ModelsDir, "folder", "notes.txt"), []byte("x"))
			if err := os.Symlink("/etc", v1(r.Dir(), layout.ModelsDir, "link")); err != nil {
				t.Fatal(err)
			}
		}, true, func(rep GCReport) bool { return rep.Leftovers == 3 }},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRegistry(t, nil)
			i := load(t, r)
			c.damage(t, r, i)
			if problems, err := r.Check(ctxb, CheckOptions{}); err != nil || len(problems) == 0 {
				t.Errorf("Check finds nothing: %v", err)
			}
			rep, err := r.GC(ctxb)
			if err != nil || !c.want(rep) {
				t.Errorf("%+v, %v", rep, err)
			}
			m, err := r.Get("k")
			if (err == nil) != c.ready {
				t.Errorf("afterwards: %v", err)
			}
			if err == nil {
				wantFiles(t, m, map[string][]byte{"w.bin": []byte("weights 1")})
				m.Close()
			}
			if _, err := os.Stat("/etc"); err != nil {
				t.Fatal(err)
			}
			if problems, err := r.Check(ctxb, CheckOptions{Data: true}); err != nil || len(problems) > 0 {
				t.Errorf("left: %+v, %v", problems, err)
			}
		})
	}
}

func TestCollectorUndoesAnEvictionOfALeasedModel(t *testing.T) {
	r := newRegistry(t, nil)
	m := mustLoad(t, r, "k", small("1"))
	editTable(t, r.Dir(), func(e layout.Editor) {
		f, _ := e.Lookup("k")
		e.CompareAndSwap(f.Slot, f.Word, f.Word.With(layout.Evicting))
	})
	if rep, err := r.GC(ctxb); err != nil || len(rep.Removed) != 0 {
		t.Errorf("%+v, %v", rep, err)
	}
	wantFiles(t, mustGet(t, r, "k"), map[string][]byte{"w.bin": []byte("weights 1")})
	if m.Stale() {
		t.Error("stale")
	}
}

func TestCollectorReclaimsADeadLoad(t *testing.T) {
	r := newRegistry(t, nil)
	startStuck(t, r.Dir(), "k", "").Kill()
	if problems, err := r.Check(ctxb, CheckOptions{}); err != nil || len(problems) != 1 || problems[0].Kind != "loading" {
		t.Errorf("%+v, %v", problems, err)
	}
	rep, err := r.GC(ctxb)
	if err != nil || rep.Reclaimed != 1 {
		t.Errorf("%+v, %v", rep, err)
	}
	if got := keysOf(t, r); got != "" {
		t.Errorf("left: %s", got)
	}
}

// The lock of a running load is respected by everybody who cleans up.
func TestCollectorLeavesARunningLoadAlone(t *testing.T) {
	r := newRegistry(t, nil)
	loader := startStuck(t, r.Dir(), "k", "")
	for range 3 {
		if rep, err := r.GC(ctxb); err != nil || rep.Reclaimed+rep.Orphans+rep.Leftovers != 0 {
			t.Errorf("%+v, %v", rep, err)
		}
	}
	err := r.Remove(ctxb, "k")
	wantErr(t, err, ErrInUse)
	wantText(t, err, "loaded")
	loader.Stdin.Close()
	if a := lastWord[herdAnswer](t, loader); a.Err.Text != "" || !a.Loaded {
		t.Errorf("%+v", a)
	}
}

// A stopped holder of the table lock keeps nobody from reading, and a writer
// waits no longer than its context.
func TestTableLockThatIsHeld(t *testing.T) {
	r := newRegistry(t, nil)
	loadIdle(t, r, "k", small("1"))
	f, err := os.OpenFile(v1(r.Dir(), layout.LocksDir, layout.TableLock), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	m := mustGet(t, r, "k")
	wantBytes(t, m, "w.bin", []byte("weights 1"))
	m.Close()
	again, err := Open(r.Dir(), nil)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	mustGet(t, again, "k").Close()
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := contextFor(20)
	defer cancel()
	wantErr(t, r.Remove(ctx, "k"), ErrTimeout)
	_, err = r.GC(ctx)
	wantErr(t, err, ErrTimeout)
	_, err = r.GetOrLoad(ctx, "other", small("1"))
	wantErr(t, err, ErrTimeout)
	problems, err := r.Check(ctxb, CheckOptions{})
	if err != nil || len(problems) != 1 || problems[0].Kind != "lock" {
		t.Errorf("Check: %+v, %v", problems, err)
	}
}

// A model of one file is mapped when it is attached, so that a loss shows in time
// to load it again.
func TestLostFileOfAOneFileModelIsLoadedAgain(t *testing.T) {
	r := newRegistry(t, nil)
	src := small("1")
	m := mustLoad(t, r, "k", src)
	m.Close()
	removeFile(t, filepath.Join(m.Path(), "w.bin"))
	_, err := r.Get("k")
	wantErr(t, err, ErrGone)
	fresh := mustLoad(t, r, "k", src)
	wantFiles(t, fresh, map[string][]byte{"w.bin": []byte("weights 1")})
	if fresh.Generation() == m.Generation() {
		t.Error("the same generation")
	}
}
