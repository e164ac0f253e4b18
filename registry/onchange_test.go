package registry

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// changes are all the ways in which a loaded folder {a, sub/b} can differ from its
// source, and the field that the error names.
var changes = map[string]struct {
	change func(t *testing.T, src *Source)
	field  string
}{
	"size":        {func(t *testing.T, s *Source) { writeFile(t, filepath.Join(s.Path, "a"), []byte("longer")) }, "size of a"},
	"mtime":       {func(t *testing.T, s *Source) { setTime(t, filepath.Join(s.Path, "sub", "b")) }, "mtime of sub/b"},
	"new file":    {func(t *testing.T, s *Source) { writeFile(t, filepath.Join(s.Path, "c"), nil) }, "file c"},
	"removed":     {func(t *testing.T, s *Source) { removeFile(t, filepath.Join(s.Path, "sub", "b")) }, "file sub/b"},
	"renamed":     {func(t *testing.T, s *Source) { rename(t, filepath.Join(s.Path, "a"), filepath.Join(s.Path, "z")) }, "file z"},
	"other path":  {func(t *testing.T, s *Source) { *s = copyOf(t, *s) }, "path"},
	"vanished":    {func(t *testing.T, s *Source) { rename(t, s.Path, s.Path+"-moved") }, "path"},
	"a function":  {func(t *testing.T, s *Source) { *s = small("1") }, "kind"},
	"single file": {func(t *testing.T, s *Source) { s.Path = filepath.Join(s.Path, "a") }, "path"},
}

func setTime(t *testing.T, path string) {
	t.Helper()
	when := time.Date(2001, 2, 3, 4, 5, 6, 789, time.UTC)
	if err := os.Chtimes(path, when, when); err != nil {
		t.Fatal(err)
	}
}

func removeFile(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func copyOf(t *testing.T, s Source) Source {
	t.Helper()
	dst := t.TempDir()
	if err := os.CopyFS(dst, os.DirFS(s.Path)); err != nil {
		t.Fatal(err)
	}
	return Source{Path: dst}
}

func twoFiles(t *testing.T) Source {
	return folderSource(t, map[string][]byte{"a": []byte("aaa"), "sub/b": []byte("bbb")})
}

func TestChangedSourceIsAnError(t *testing.T) {
	for name, c := range changes {
		t.Run(name, func(t *testing.T) {
			r, src := newRegistry(t, nil), twoFiles(t)
			m := mustLoad(t, r, "k", src)
			m.Close()
			forget(t, r)
			c.change(t, &src)
			_, err := r.GetOrLoad(ctxb, "k", src)
			wantErr(t, err, ErrSourceChanged)
			var changed *SourceChangedError
			if !errors.As(err, &changed) || changed.Field != c.field {
				t.Errorf("%v: field %+v, want %q", err, changed, c.field)
			}
			wantText(t, err, c.field)
			if Hint(err) == "" {
				t.Error("no hint")
			}
			// What is loaded stays.
			if got := mustGet(t, r, "k"); got.Generation() != m.Generation() {
				t.Error("another generation")
			}
		})
	}
}

func TestChangedSourceIsReplaced(t *testing.T) {
	for name, c := range changes {
		t.Run(name, func(t *testing.T) {
			r, src := newRegistry(t, nil), twoFiles(t)
			old := mustLoad(t, r, "k", src)
			forget(t, r)
			c.change(t, &src)
			src.OnChange = ChangeReplace
			m, err := r.GetOrLoad(ctxb, "k", src)
			if name == "vanished" {
				wantErr(t, err, ErrSource, os.ErrNotExist)
				wantFiles(t, mustGet(t, r, "k"), map[string][]byte{"a": []byte("aaa"), "sub/b": []byte("bbb")})
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			if m.Generation() == old.Generation() || m.Info().AlreadyPresent {
				t.Error("not replaced")
			}
			if !old.Stale() || m.Stale() {
				t.Errorf("Stale: old %v, new %v", old.Stale(), m.Stale())
			}
			wantFiles(t, old, map[string][]byte{"a": []byte("aaa"), "sub/b": []byte("bbb")})
			if got := mustGet(t, r, "k"); got.Generation() != m.Generation() {
				t.Error("Get has another generation")
			}
		})
	}
}

func TestChangedSourceIsIgnored(t *testing.T) {
	for name, c := range changes {
		t.Run(name, func(t *testing.T) {
			r, src := newRegistry(t, nil), twoFiles(t)
			mustLoad(t, r, "k", src).Close()
			forget(t, r)
			c.change(t, &src)
			src.OnChange = ChangeIgnore
			m := mustLoad(t, r, "k", src)
			wantFiles(t, m, map[string][]byte{"a": []byte("aaa"), "sub/b": []byte("bbb")})
		})
	}
}

func TestUnchangedSource(t *testing.T) {
	r, src := newRegistry(t, nil), twoFiles(t)
	first := mustLoad(t, r, "k", src)
	first.Close()
	for _, on := range []OnChange{ChangeError, ChangeReplace, ChangeIgnore} {
		forget(t, r)
		src.OnChange = on
		if m := mustLoad(t, r, "k", src); m.Generation() != first.Generation() || m.Stale() {
			t.Errorf("OnChange %d: loaded again", on)
		}
	}
}

// The bytes of a path need not be UTF-8, those of a version do.
func TestSourceThatIsNotUTF8(t *testing.T) {
	r := newRegistry(t, nil)
	path := filepath.Join(t.TempDir(), "a\xff\xe2\x82")
	writeFile(t, filepath.Join(path, "w.bin"), []byte("weights"))
	writeFile(t, path+".bin", []byte("one file"))
	m := mustLoad(t, r, "k", Source{Path: path})
	forget(t, r)
	if again := mustLoad(t, r, "k", Source{Path: path}); again.Generation() != m.Generation() {
		t.Error("loaded again")
	}
	_, err := r.GetOrLoad(ctxb, "file", Source{Path: path + ".bin"})
	wantErr(t, err, ErrSource, ErrPath)
	for _, src := range []Source{{Version: "\xff"}, {Environment: map[string]string{"\xff": ""}}, {Environment: map[string]string{"lib": "\xff"}}} {
		src.Load = small("1").Load
		_, err := r.GetOrLoad(ctxb, "f", src)
		wantErr(t, err, ErrSource)
		wantText(t, err, `\xff`)
	}
}

func TestChangedFunction(t *testing.T) {
	base := func() Source {
		s := small("1")
		s.Environment = map[string]string{"lib": "1.0"}
		return s
	}
	for name, c := range map[string]struct {
		change func(*Source)
		field  string
	}{
		"version":               {func(s *Source) { s.Version = "2" }, "version"},
		"environment value":     {func(s *Source) { s.Environment = map[string]string{"lib": "1.1"} }, "environment lib"},
		"environment gone":      {func(s *Source) { s.Environment = nil }, "environment lib"},
		"environment with more": {func(s *Source) { s.Environment = map[string]string{"lib": "1.0", "cuda": ""} }, "environment cuda"},
		"environment renamed":   {func(s *Source) { s.Environment = map[string]string{"lob": "1.0"} }, "environment lib"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRegistry(t, nil)
			old := mustLoad(t, r, "k", base())
			same := base()
			same.Load = func(context.Context, *Writer) error { t.Error("loaded again"); return nil }
			if mustLoad(t, r, "k", same).Generation() != old.Generation() {
				t.Error("another generation for the same version")
			}
			src := base()
			c.change(&src)
			_, err := r.GetOrLoad(ctxb, "k", src)
			wantErr(t, err, ErrSourceChanged)
			wantText(t, err, c.field)
			src.OnChange = ChangeIgnore
			if mustLoad(t, r, "k", src).Generation() != old.Generation() {
				t.Error("another generation although changes are ignored")
			}
			src.OnChange = ChangeReplace
			if mustLoad(t, r, "k", src).Generation() == old.Generation() {
				t.Error("not replaced")
			}
			// The old one is the changed one now.
			_, err = r.GetOrLoad(ctxb, "k", base())
			wantErr(t, err, ErrSourceChanged)
		})
	}
}

// Two deployments that share a key by mistake.
// The caller's map is the caller's again after the call, also if the load function
// changes it: it is neither what was loaded nor what the next call compares with.
func TestEnvironmentIsCopied(t *testing.T) {
	r := newRegistry(t, nil)
	env := map[string]string{"quant": "int8"}
	src := small("1")
	src.Environment = env
	load := src.Load
	src.Load = func(ctx context.Context, w *Writer) error {
		env["seen"] = "yes"
		return load(ctx, w)
	}
	m := mustLoad(t, r, "k", src)
	delete(env, "seen")
	for range 2 { // loaded by this call; and compared with what is loaded
		mustLoad(t, r, "k", src)
		env["quant"] = "fp16"
		if got := m.Info().Origin.Environment; len(got) != 1 || got["quant"] != "int8" {
			t.Errorf("a model loaded with int8 says %v", got)
		}
		_, err := r.GetOrLoad(ctxb, "k", src)
		wantErr(t, err, ErrSourceChanged)
		env["quant"] = "int8"
		forget(t, r)
	}
	env["quant"] = "fp16"
	src.OnChange = ChangeReplace
	if again := mustLoad(t, r, "k", src); again.Generation() == m.Generation() {
		t.Error("nothing was replaced")
	}
}

func TestInfoIsACopy(t *testing.T) {
	r := newRegistry(t, nil)
	src := small("1")
	src.Environment = map[string]string{"quant": "int8"}
	m := mustLoad(t, r, "k", src)
	m.Info().Origin.Environment["quant"] = "mine"
	if got := m.Info().Origin.Environment["quant"]; got != "int8" {
		t.Errorf("it says %s", got)
	}
	forget(t, r)
	mustLoad(t, r, "k", src)
}

// One goroutine has its map back while others compare with what was loaded: the
// race detector, or a fatal error of the map itself, tells.
func TestEnvironmentInTwoGoroutines(t *testing.T) {
	r := newRegistry(t, nil)
	mine := map[string]string{"a": "1"}
	src := small("1")
	src.Environment = mine
	mustLoad(t, r, "k", src)
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 1000 {
			mine["b"] = "2"
			delete(mine, "b")
		}
	})
	src.Environment = map[string]string{"a": "1"}
	for range 1000 {
		m, err := r.GetOrLoad(ctxb, "k", src)
		if err != nil {
			t.Error(err)
			break
		}
		m.Close()
	}
	wg.Wait()
}

func TestTwoSourcesOfOneKeyDoNotThrash(t *testing.T) {
	r := newRegistry(t, nil)
	mine, yours := fileSource(t, "w.bin", []byte("mine")), fileSource(t, "w.bin", []byte("yours"))
	mustLoad(t, r, "k", mine)
	for range 3 {
		_, err := r.GetOrLoad(ctxb, "k", yours)
		wantErr(t, err, ErrSourceChanged)
		wantText(t, err, yours.Path)
		wantBytes(t, mustLoad(t, r, "k", mine), "w.bin", []byte("mine"))
	}
	if s := stats(t, r); s.Loads != 1 {
		t.Errorf("%d loads", s.Loads)
	}
}

func TestReplaceInAnyCase(t *testing.T) {
	r, src := newRegistry(t, nil), twoFiles(t)
	old := mustLoad(t, r, "k", src)
	src.Replace = true
	m := mustLoad(t, r, "k", src)
	if m.Generation() == old.Generation() || !old.Stale() {
		t.Error("not replaced")
	}
	if s := stats(t, r); s.Loads != 2 {
		t.Errorf("%+v", s)
	}
}

func TestReplaceOfNothing(t *testing.T) {
	r, src := newRegistry(t, nil), twoFiles(t)
	src.Replace = true
	m := mustLoad(t, r, "k", src)
	wantFiles(t, m, map[string][]byte{"a": []byte("aaa"), "sub/b": []byte("bbb")})
}

func TestFailedReplacementChangesNothing(t *testing.T) {
	r, src := newRegistry(t, nil), twoFiles(t)
	old := mustLoad(t, r, "k", src)
	failed := errors.New("as told")
	_, err := r.GetOrLoad(ctxb, "k", Source{Replace: true, Load: func(ctx context.Context, w *Writer) error {
		f, err := w.Create("w.bin", -1)
		if err != nil {
			return err
		}
		if _, err := f.Write(randomBytes(1, 1<<20)); err != nil {
			return err
		}
		return failed
	}})
	wantErr(t, err, failed)
	if got := mustGet(t, r, "k"); got.Generation() != old.Generation() || old.Stale() {
		t.Error("a failed replacement replaced")
	}
}
