//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
	"github.com/onecopy/onecopy/lockfile"
)

// What the hot paths cost. The figures in README come from
//
//	go test -run '^$' -bench . -benchmem ./registry

func benchRegistry(b *testing.B) *Registry {
	b.Helper()
	r, err := Open(proctest.TmpRegistry(b), nil)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := r.Close(); err != nil {
			b.Error(err)
		}
	})
	return r
}

// benchModel loads a model of a number of small files.
func benchModel(b *testing.B, r *Registry, key string, files int) *Model {
	b.Helper()
	m, err := r.GetOrLoad(context.Background(), key, Source{Load: func(_ context.Context, w *Writer) error {
		for i := range files {
			f, err := w.Create(fmt.Sprintf("model-%05d.safetensors", i), 4096)
			if err != nil {
				return err
			}
			if _, err := f.Write(make([]byte, 4096)); err != nil {
				return err
			}
		}
		return nil
	}})
	if err != nil {
		b.Fatal(err)
	}
	return m
}

// stretch makes the one file of a model that nobody uses as long as no machine
// has memory for: what is added is a hole. No load does that.
func stretch(b *testing.B, r *Registry, key string, size int64) {
	b.Helper()
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	e, err := r.Entry(key)
	must(err)
	payload := filepath.Join(e.Info.Path, e.Info.Files[0].Path)
	must(os.Chmod(payload, 0o644))
	must(os.Truncate(payload, size))
	must(os.Chmod(payload, 0o444))

	manifest := filepath.Join(r.Dir(), layout.Folder, layout.ModelsDir, layout.GenName(e.Info.Epoch, e.Info.Generation)+layout.ManifestExt)
	text, err := os.ReadFile(manifest)
	must(err)
	man, err := layout.DecodeManifest(text)
	must(err)
	man.Bytes, man.Files[0].Size = size, size
	text, err = man.Encode()
	must(err)
	must(os.Chmod(manifest, 0o644))
	must(os.WriteFile(manifest, text, 0o644))
	must(os.Chmod(manifest, 0o444))
}

// BenchmarkLookup finds one key after the other in a table that is 90 % full.
func BenchmarkLookup(b *testing.B) {
	r := benchRegistry(b)
	p := r.host.place
	keys := make([]string, p.table.Slots()*9/10)
	err := p.withTable(context.Background(), "edit.lock-table", func(t *tx) error {
		for slot := range keys {
			keys[slot] = fmt.Sprintf("organisation/model-%d-instruct", slot)
			t.SetKey(slot, keys[slot])
			t.IndexInsert(slot, keys[slot])
			g := t.NextGeneration()
			if !t.CompareAndSwap(slot, t.Word(slot), layout.MakeWord(layout.Loading, g)) ||
				!t.CompareAndSwap(slot, t.Word(slot), layout.MakeWord(layout.Ready, g)) {
				b.Fatal("the slot is not free")
			}
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Run("hit", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if i == len(keys) {
				i = 0
			}
			if _, ok, err := p.find(keys[i]); !ok || err != nil {
				b.Fatal(ok, err)
			}
		}
	})
	b.Run("same", func(b *testing.B) {
		for b.Loop() {
			if _, ok, err := p.find(keys[7]); !ok || err != nil {
				b.Fatal(ok, err)
			}
		}
	})
	b.Run("miss", func(b *testing.B) {
		for i := range keys {
			keys[i] += "-q4"
		}
		for i := 0; b.Loop(); i++ {
			if i == len(keys) {
				i = 0
			}
			if _, ok, err := p.find(keys[i]); ok || err != nil {
				b.Fatal(ok, err)
			}
		}
	})
}

func BenchmarkUseCached(b *testing.B) {
	r := benchRegistry(b)
	benchModel(b, r, "org/model", 1).Close()
	fn := func(*Model) error { return nil }
	b.ReportAllocs()
	for b.Loop() {
		if err := r.Use("org/model", fn); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkGetCloseCached(b *testing.B) {
	r := benchRegistry(b)
	defer benchModel(b, r, "org/model", 1).Close()
	b.ReportAllocs()
	for b.Loop() {
		m, err := r.Get("org/model")
		if err != nil {
			b.Fatal(err)
		}
		m.Close()
	}
}

func BenchmarkGetOrLoadCached(b *testing.B) {
	r := benchRegistry(b)
	path := filepath.Join(b.TempDir(), "model.bin")
	if err := os.WriteFile(path, make([]byte, 4096), 0o644); err != nil {
		b.Fatal(err)
	}
	ctx, src := context.Background(), Source{Path: path}
	m, err := r.GetOrLoad(ctx, "org/model", src)
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	b.ReportAllocs()
	for b.Loop() {
		m, err := r.GetOrLoad(ctx, "org/model", src)
		if err != nil {
			b.Fatal(err)
		}
		m.Close()
	}
}

// BenchmarkAttach maps a model that this process does not use yet, and lets go of
// it again: lease, manifest, all files.
func BenchmarkAttach(b *testing.B) {
	attach := func(b *testing.B, r *Registry) {
		b.ReportAllocs()
		for b.Loop() {
			m, err := r.Get("org/model")
			if err != nil {
				b.Fatal(err)
			}
			m.Close() // the last one
		}
	}
	for _, files := range []int{1, 10, 60} {
		b.Run(fmt.Sprintf("files=%d", files), func(b *testing.B) {
			r := benchRegistry(b)
			benchModel(b, r, "org/model", files).Close()
			attach(b, r)
		})
	}
	for _, size := range []int64{1536 << 20, 70 << 30} {
		b.Run(fmt.Sprintf("sparse=%.1fGiB", float64(size)/(1<<30)), func(b *testing.B) {
			r := benchRegistry(b)
			benchModel(b, r, "org/model", 1).Close()
			stretch(b, r, "org/model", size)
			attach(b, r)
		})
	}
}

func BenchmarkStale(b *testing.B) {
	r := benchRegistry(b)
	m := benchModel(b, r, "org/model", 1)
	defer m.Close()
	b.ReportAllocs()
	for b.Loop() {
		if m.Stale() {
			b.Fatal("stale")
		}
	}
}

// BenchmarkFlock compares the kernel's part of a lock with what taking T costs.
func BenchmarkFlock(b *testing.B) {
	r := benchRegistry(b)
	path := filepath.Join(r.Dir(), layout.Folder, layout.LocksDir, layout.TableLock)
	b.Run("syscalls", func(b *testing.B) {
		held, err := lockfile.At(path).TryLock() // makes the file
		if err != nil {
			b.Fatal(err)
		}
		if err := held.Unlock(); err != nil {
			b.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		fd := int(f.Fd())
		for b.Loop() {
			if unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) != nil || unix.Flock(fd, unix.LOCK_UN) != nil {
				b.Fatal("not locked")
			}
		}
	})
	b.Run("lockfile", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			held, err := lockfile.At(path).TryLock()
			if err != nil {
				b.Fatal(err)
			}
			if err := held.Unlock(); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("table", func(b *testing.B) {
		p := r.host.place
		b.ReportAllocs()
		for b.Loop() {
			if err := p.withTable(context.Background(), "edit.lock-table", func(*tx) error { return nil }); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkRemoveIdle(b *testing.B) {
	r := benchRegistry(b)
	ctx := context.Background()
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		benchModel(b, r, "org/model", 1).Close()
		b.StartTimer()
		if err := r.Remove(ctx, "org/model"); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkLoadSmall is the fixed cost of a load.
func BenchmarkLoadSmall(b *testing.B) {
	r := benchRegistry(b)
	b.ReportAllocs()
	for b.Loop() {
		benchModel(b, r, "org/model", 1).Close()
		b.StopTimer()
		if err := r.Remove(context.Background(), "org/model"); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
