//go:build !linux || !(amd64 || arm64) || onecopy_private

package registry

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// What is different where models are private to the process; all else is in the
// tests without a build constraint.

func TestPrivateModelsSaySo(t *testing.T) {
	var log bytes.Buffer
	r := newRegistry(t, &Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if err := r.Sharing(); !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "private") {
		t.Errorf("Sharing: %v", err)
	}
	if !strings.Contains(log.String(), "level=WARN") || !strings.Contains(log.String(), "private") {
		t.Errorf("the log says %q", log.String())
	}
}

func TestPrivateRegistryCannotExist(t *testing.T) {
	_, err := Open(t.TempDir(), &Options{MustExist: true})
	wantErr(t, err, ErrNoRegistry, errors.ErrUnsupported)
}

func TestPrivateModelsHaveNoLease(t *testing.T) {
	r := newRegistry(t, nil)
	_, err := mustLoad(t, r, "k", small("1")).Lease()
	wantErr(t, err, errors.ErrUnsupported)
}

func TestPrivateModelsAreShownAndRemoved(t *testing.T) {
	r := newRegistry(t, nil)
	m := mustLoad(t, r, "k", small("1"))
	e, err := r.Entry("k")
	if err != nil || e.State != "ready" || !e.Leased || e.Bytes != int64(len("weights 1")) {
		t.Errorf("%+v, %v", e, err)
	}
	m.Close()
	if e, err := r.Entry("k"); err != nil || e.Leased {
		t.Errorf("%+v, %v", e, err)
	}
	if problems, err := r.Check(ctxb, CheckOptions{Data: true}); err != nil || len(problems) > 0 {
		t.Errorf("%+v, %v", problems, err)
	}
	if _, err := r.GC(ctxb); err != nil {
		t.Error(err)
	}
	if s := stats(t, r); s.Models != 1 || s.Used != int64(len("weights 1")) {
		t.Errorf("%+v", s)
	}
	if err := r.Remove(ctxb, "k"); err != nil {
		t.Error(err)
	}
}

// A model that was removed or replaced stays valid for its users.
func TestPrivateModelsOutliveTheirKey(t *testing.T) {
	r := newRegistry(t, nil)
	old := mustLoad(t, r, "k", small("1"))
	src := small("2")
	src.Replace = true
	fresh := mustLoad(t, r, "k", src)
	if !old.Stale() || fresh.Stale() {
		t.Errorf("Stale: old %v, new %v", old.Stale(), fresh.Stale())
	}
	wantBytes(t, old, "w.bin", []byte("weights 1"))
	wantBytes(t, fresh, "w.bin", []byte("weights 2"))
}

func TestPrivateFolderIsTheSource(t *testing.T) {
	r := newRegistry(t, nil)
	src := folderSource(t, map[string][]byte{"a": []byte("a"), "sub/b": []byte("b")})
	m := mustLoad(t, r, "k", src)
	if m.Path() == "" {
		t.Error("no path")
	}
}

// What makes no sense without sharing says so.
func TestPrivateRegistriesHaveNoPolicy(t *testing.T) {
	r := newRegistry(t, nil)
	mustLoad(t, r, "k", small("1"))
	for name, call := range map[string]func() error{
		"Pin":         func() error { return r.Pin(ctxb, "k") },
		"Unpin":       func() error { return r.Unpin(ctxb, "k") },
		"SetTTL":      func() error { return r.SetTTL(ctxb, "k", time.Hour) },
		"Touch":       func() error { return r.Touch(ctxb, "k") },
		"Config":      func() error { _, err := r.Config(); return err },
		"SetConfig":   func() error { return r.SetConfig(ctxb, Config{}) },
		"Trim":        func() error { _, err := r.Trim(ctxb, 0); return err },
		"PlanConfig":  func() error { return r.PlanConfig(ctxb, Config{}) },
		"PlanRemove":  func() error { return r.PlanRemove(ctxb, "k") },
		"PlanTrim":    func() error { _, err := r.PlanTrim(ctxb, 0); return err },
		"PlanGC":      func() error { _, err := r.PlanGC(ctxb); return err },
		"Rollout":     func() error { _, err := r.Rollout(ctxb, "k", small("2"), nil); return err },
		"Undo":        func() error { return undo(ctxb, r, "k") },
		"Generations": func() error { _, err := r.Generations("k"); return err },
		"Counters":    func() error { _, err := r.Counters(); return err },
		"HugePages":   func() error { _, err := r.HugePages("k"); return err },
		"Charges":     func() error { _, err := r.Charges("k"); return err },
	} {
		t.Run(name, func(t *testing.T) { wantErr(t, call(), errors.ErrUnsupported) })
	}
	if all, err := r.Overview(); err != nil || len(all.Entries) != 1 {
		t.Errorf("%+v, %v", all, err)
	}
}

func TestPrivateSourceThatChanges(t *testing.T) {
	for name, change := range map[string]func(path string, cancel func()) error{
		"removed": func(path string, _ func()) error { return os.Remove(path) },
		"shorter": func(path string, _ func()) error { return os.Truncate(path, 1) },
		"ended":   func(_ string, cancel func()) error { cancel(); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRegistry(t, nil)
			ctx, cancel := context.WithCancel(ctxb)
			defer cancel()
			src := folderSource(t, map[string][]byte{"a": []byte("one"), "b": []byte("two")})
			src.Progress = func(done, _ int64) {
				if done == 3 {
					if err := change(filepath.Join(src.Path, "b"), cancel); err != nil {
						t.Error(err)
					}
				}
			}
			want := ErrSource
			if name == "ended" {
				want = context.Canceled
			}
			_, err := r.GetOrLoad(ctx, "k", src)
			wantErr(t, err, want)
		})
	}
}

func TestPrivateBytesThatWereChanged(t *testing.T) {
	r := newRegistry(t, nil)
	m := mustLoad(t, r, "k", small("1"))
	b, err := m.Bytes("w.bin")
	if err != nil {
		t.Fatal(err)
	}
	b[0]++
	wantErr(t, m.Verify(ctxb), ErrCorrupt)
}

// Memory that no process gets is an error, not the end of this one.
func TestPrivateModelThatIsTooLarge(t *testing.T) {
	r := newRegistry(t, nil)
	for _, size := range []int64{-1, 1 << 46, 1 << 62} {
		_, err := r.GetOrLoad(ctxb, "k", one("w.bin", size, func(f *FileWriter) error {
			_, err := f.WriteAt([]byte("x"), 1<<45)
			return err
		}))
		wantErr(t, err, ErrLimit)
	}
	path := filepath.Join(t.TempDir(), "sparse")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 1<<41); err == nil { // not every file system has files so large
		_, err := r.GetOrLoad(ctxb, "k", Source{Path: path})
		wantErr(t, err, ErrLimit)
	}
	_, err := r.Get("k")
	wantErr(t, err, ErrNotFound)
}
