package registry

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/onecopy/onecopy/internal/invariants"
	"github.com/onecopy/onecopy/internal/layout"
)

func TestLoadThenGet(t *testing.T) {
	r := newRegistry(t, nil)
	want := randomBytes(1, 12345)
	m := mustLoad(t, r, "org/model", fileSource(t, "w.bin", want))
	if m.Info().AlreadyPresent {
		t.Error("the loading call says AlreadyPresent")
	}
	got := mustGet(t, r, "org/model")
	if !got.Info().AlreadyPresent {
		t.Error("Get does not say AlreadyPresent")
	}
	wantFiles(t, got, map[string][]byte{"w.bin": want})
	if got.Key() != "org/model" || got.Generation() != m.Generation() || got.Stale() {
		t.Errorf("key %q, generation %d of %d, stale %v", got.Key(), got.Generation(), m.Generation(), got.Stale())
	}
	if got.Info().Name != "model" {
		t.Errorf("folder name %q, want the key's last component", got.Info().Name)
	}
}

func TestSecondLoadIsThere(t *testing.T) {
	r := newRegistry(t, nil)
	src := fileSource(t, "w.bin", []byte("bytes"))
	first := mustLoad(t, r, "k", src)
	second := mustLoad(t, r, "k", src)
	if !second.Info().AlreadyPresent || second.Generation() != first.Generation() {
		t.Errorf("the second call loaded again: %+v", second.Info())
	}
	if s := stats(t, r); s.Loads != 1 {
		t.Errorf("%d loads, want 1", s.Loads)
	}
}

func TestGetOfUnknownKey(t *testing.T) {
	r := newRegistry(t, nil)
	_, err := r.Get("nobody/loaded-it")
	wantErr(t, err, ErrNotFound)
	wantText(t, err, "get", "nobody/loaded-it")
	wantErr(t, r.Use("k", func(*Model) error { return nil }), ErrNotFound)
	wantErr(t, r.Remove(ctxb, "k"), ErrNotFound)
	_, err = r.Entry("k")
	wantErr(t, err, ErrNotFound)
}

func TestInvalidKeys(t *testing.T) {
	r := newRegistry(t, nil)
	for _, key := range []string{"", strings.Repeat("x", layout.MaxKey+1), "a\x00b", "a\nb", "\xff", "a\u0085b"} {
		_, err := r.Get(key)
		wantErr(t, err, ErrKey)
		_, err = r.GetOrLoad(ctxb, key, small("1"))
		wantErr(t, err, ErrKey)
		wantErr(t, r.Use(key, func(*Model) error { return nil }), ErrKey)
	}
}

func TestKeysThatLookLikePaths(t *testing.T) {
	r := newRegistry(t, nil)
	for _, key := range []string{"../../etc/passwd", "/", ".", "..", "a/..", "日本語/模型", strings.Repeat("k", layout.MaxKey), "a b:c"} {
		m := mustLoad(t, r, key, small(key))
		wantFiles(t, m, map[string][]byte{"w.bin": []byte("weights " + key)})
	}
}

func TestUseBorrows(t *testing.T) {
	r := newRegistry(t, nil)
	m := mustLoad(t, r, "k", small("1"))
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	var kept *Model
	err := r.Use("k", func(m *Model) error {
		kept = m
		wantBytes(t, m, "w.bin", []byte("weights 1"))
		return m.Close() // no effect: the model is only lent
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := kept.Bytes("w.bin"); err != nil {
		t.Errorf("after Use, which keeps the model attached: %v", err)
	}
	failed := errors.New("as told")
	if err := r.Use("k", func(*Model) error { return failed }); !errors.Is(err, failed) {
		t.Errorf("Use returned %v, want what fn returned", err)
	}
	r.Release("k")
	r.Release("k")
	r.Release("never used")
	if err := r.Remove(ctxb, "k"); err != nil {
		t.Errorf("after Release: %v", err)
	}
}

func TestUseKeepsTheModel(t *testing.T) {
	r := newRegistry(t, nil)
	mustLoad(t, r, "k", small("1")).Close()
	if err := r.Use("k", func(*Model) error { return nil }); err != nil {
		t.Fatal(err)
	}
	wantErr(t, r.Remove(ctxb, "k"), ErrInUse)
	r.Release("k")
	if err := r.Remove(ctxb, "k"); err != nil {
		t.Fatal(err)
	}
}

func TestUseSeesANewGeneration(t *testing.T) {
	r := newRegistry(t, nil)
	old := mustLoad(t, r, "k", small("1"))
	read := func() (text string) {
		err := r.Use("k", func(m *Model) error {
			b, err := m.Bytes("w.bin")
			text = string(b)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	if got := read(); got != "weights 1" {
		t.Errorf("got %q", got)
	}
	src := small("2")
	src.OnChange = ChangeReplace
	mustLoad(t, r, "k", src)
	if got := read(); got != "weights 2" {
		t.Errorf("after a replacement got %q", got)
	}
	wantBytes(t, old, "w.bin", []byte("weights 1"))
}

func TestUseThatPanics(t *testing.T) {
	r := newRegistry(t, nil)
	mustLoad(t, r, "k", small("1")).Close()
	func() {
		defer func() {
			if x := recover(); x != "as told" {
				t.Errorf("recovered %v", x)
			}
		}()
		_ = r.Use("k", func(*Model) error { panic("as told") })
	}()
	r.Release("k")
	if err := r.Remove(ctxb, "k"); err != nil {
		t.Errorf("the model that a panic left behind: %v", err)
	}
}

func TestUseFromManyGoroutines(t *testing.T) {
	r := newRegistry(t, nil)
	mustLoad(t, r, "k", small("1")).Close()
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 200 {
				err := r.Use("k", func(m *Model) error {
					b, err := m.Bytes("w.bin")
					if string(b) != "weights 1" {
						t.Errorf("got %q", b)
					}
					return err
				})
				if err != nil {
					t.Error(err)
				}
				if i == 0 {
					r.Release("k")
				}
			}
		})
	}
	wg.Wait()
	r.Release("k")
}

func TestModelCloseIsIdempotent(t *testing.T) {
	r := newRegistry(t, nil)
	m := mustLoad(t, r, "k", small("1"))
	other := mustGet(t, r, "k")
	for range 3 {
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
	wantBytes(t, other, "w.bin", []byte("weights 1"))
}

func TestModelAfterClose(t *testing.T) {
	r := newRegistry(t, nil)
	m := mustLoad(t, r, "k", small("1"))
	m.Close()
	_, err := m.Bytes("w.bin")
	wantErr(t, err, ErrClosed)
	_, err = m.Lease()
	wantErr(t, err, ErrClosed)
	wantErr(t, m.Verify(ctxb), ErrClosed)
	if m.Key() != "k" || len(m.Files()) != 1 {
		t.Error("a closed Model has forgotten what it was")
	}
}

func TestBytesOfUnknownFile(t *testing.T) {
	r := newRegistry(t, nil)
	m := mustLoad(t, r, "k", small("1"))
	for _, name := range []string{"", "other", "../w.bin", "/w.bin", "w.bin/"} {
		_, err := m.Bytes(name)
		wantErr(t, err, ErrPath)
	}
}

func TestBytesAreSharedWithinTheProcess(t *testing.T) {
	r := newRegistry(t, nil)
	a := mustLoad(t, r, "k", small("1"))
	b := mustGet(t, r, "k")
	x, err := a.Bytes("w.bin")
	if err != nil {
		t.Fatal(err)
	}
	y, err := b.Bytes("w.bin")
	if err != nil {
		t.Fatal(err)
	}
	if &x[0] != &y[0] {
		t.Error("two Models of one process have two mappings")
	}
}

func TestCloseReportsForgottenModels(t *testing.T) {
	r := newRegistry(t, nil)
	a, b := mustLoad(t, r, "k/2", small("2")), mustGet(t, r, "k/2")
	c := mustLoad(t, r, "k/1", small("1"))
	closed := mustLoad(t, r, "k/3", small("3"))
	closed.Close()
	err := r.Close()
	var leak *LeakError
	if !errors.As(err, &leak) {
		t.Fatalf("Close: %v, want a *LeakError", err)
	}
	if diff := cmp.Diff([]string{"k/1", "k/2", "k/2"}, leak.Keys); diff != "" {
		t.Errorf("keys of the forgotten models: -want +got\n%s", diff)
	}
	if invariants.Enabled {
		if len(leak.Stacks) != 3 {
			t.Errorf("%d stacks, want 3", len(leak.Stacks))
		}
		for _, s := range leak.Stacks {
			if !strings.Contains(s, "TestCloseReportsForgottenModels") {
				t.Errorf("a stack that does not lead here:\n%s", s)
			}
		}
		wantText(t, err, "TestCloseReportsForgottenModels")
	} else if len(leak.Stacks) != 0 {
		t.Errorf("stacks without the invariants tag: %q", leak.Stacks)
	}
	wantText(t, err, "3 models", "k/1", "k/2")
	// They stay valid until they are closed.
	wantBytes(t, a, "w.bin", []byte("weights 2"))
	for _, m := range []*Model{a, b, c} {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestRegistryDoubleClose(t *testing.T) {
	r := newRegistry(t, nil)
	mustLoad(t, r, "k", small("1")).Close()
	for range 3 {
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRegistryAfterClose(t *testing.T) {
	r := newRegistry(t, nil)
	mustLoad(t, r, "k", small("1")).Close()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := r.Get("k")
	wantErr(t, err, ErrClosed)
	_, err = r.GetOrLoad(ctxb, "k", small("1"))
	wantErr(t, err, ErrClosed)
	wantErr(t, r.Use("k", func(*Model) error { t.Error("called"); return nil }), ErrClosed)
	r.Release("k")
}

func TestManyModels(t *testing.T) {
	r := newRegistry(t, nil)
	for i := range 100 {
		mustLoad(t, r, fmt.Sprintf("k/%d", i), small(fmt.Sprint(i)))
	}
	for i := range 100 {
		wantBytes(t, mustGet(t, r, fmt.Sprintf("k/%d", i)), "w.bin", fmt.Append(nil, "weights ", i))
	}
	entries, err := r.Entries()
	if err != nil || len(entries) != 100 {
		t.Fatalf("%d entries, %v", len(entries), err)
	}
	for i := 1; i < len(entries); i++ {
		if entries[i-1].Key >= entries[i].Key {
			t.Errorf("entries are not in the order of their keys: %q, %q", entries[i-1].Key, entries[i].Key)
		}
	}
}

func TestInfoOfAPath(t *testing.T) {
	r := newRegistry(t, nil)
	src := folderSource(t, map[string][]byte{"a.json": []byte("{}"), "sub/w.bin": randomBytes(1, 5000)})
	m := mustLoad(t, r, "k", src)
	i := m.Info()
	if i.Key != "k" || i.Bytes != 5002 || i.Origin.Kind != layout.OriginPath || i.LoadedAt.IsZero() || i.Generation == 0 {
		t.Errorf("%+v", i)
	}
	for _, f := range i.Files {
		fi, err := os.Stat(src.Path + "/" + f.Path)
		if err != nil {
			t.Fatal(err)
		}
		if !f.ModTime.Equal(fi.ModTime()) || f.Size != fi.Size() || !strings.HasPrefix(f.Digest, "xxh3-128:") {
			t.Errorf("%+v, source has %v, %d", f, fi.ModTime(), fi.Size())
		}
	}
}

func TestInfoOfAFunction(t *testing.T) {
	r := newRegistry(t, nil)
	src := small("v7")
	src.Environment = map[string]string{"torch": "2.9", "cuda": ""}
	m := mustLoad(t, r, "k", src)
	want := Origin{Kind: layout.OriginFunc, Version: "v7", Environment: src.Environment}
	if diff := cmp.Diff(want, m.Info().Origin); diff != "" {
		t.Errorf("origin: -want +got\n%s", diff)
	}
}

func TestStatsOfThisProcess(t *testing.T) {
	r := newRegistry(t, nil)
	b := randomBytes(1, 10_000)
	src := fileSource(t, "w.bin", b)
	mustLoad(t, r, "k", src)
	for range 4 {
		mustLoad(t, r, "k", src)
	}
	_, _ = r.Get("other")
	s := stats(t, r)
	if s.Loads != 1 || s.BytesLoaded != 10_000 || s.BytesSaved != 40_000 || s.Hits != 4 || s.Misses < 1 || s.LoadTime <= 0 {
		t.Errorf("%+v", s)
	}
	if s.Models != 1 || s.Used < 10_000 {
		t.Errorf("the registry: %+v", s)
	}
}

func TestRemove(t *testing.T) {
	r := newRegistry(t, nil)
	m := mustLoad(t, r, "k", small("1"))
	wantErr(t, r.Remove(ctxb, "k"), ErrInUse)
	wantBytes(t, m, "w.bin", []byte("weights 1"))
	m.Close()
	if err := r.Remove(ctxb, "k"); err != nil {
		t.Fatal(err)
	}
	_, err := r.Get("k")
	wantErr(t, err, ErrNotFound)
	wantErr(t, r.Remove(ctxb, "k"), ErrNotFound)
	if again := mustLoad(t, r, "k", small("1")); again.Generation() == m.Generation() {
		t.Error("a generation number was used twice")
	}
}

func TestVerifyHonoursItsContext(t *testing.T) {
	r := newRegistry(t, nil)
	m := mustLoad(t, r, "k", small("1"))
	ctx, cancel := context.WithCancel(ctxb)
	cancel()
	wantErr(t, m.Verify(ctx), context.Canceled)
}

func TestTwoRegistriesAreIndependent(t *testing.T) {
	a, b := newRegistry(t, nil), newRegistry(t, nil)
	mustLoad(t, a, "k", small("1"))
	_, err := b.Get("k")
	wantErr(t, err, ErrNotFound)
}
