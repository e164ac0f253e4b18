package registry

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// The helpers of the functional tests, for models that are shared and for those
// that are private to the process. newRegistry has one form for each.

var ctxb = context.Background()

// randomBytes are n bytes that only seed decides.
func randomBytes(seed byte, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// writeFile writes a file and the folders above it.
func writeFile(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// fileSource is a source of one file, in a folder of its own.
func fileSource(t testing.TB, name string, b []byte) Source {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	writeFile(t, path, b)
	return Source{Path: path}
}

// folderSource is a source of several files, by their paths.
func folderSource(t testing.TB, files map[string][]byte) Source {
	t.Helper()
	dir := t.TempDir()
	for name, b := range files {
		writeFile(t, filepath.Join(dir, filepath.FromSlash(name)), b)
	}
	return Source{Path: dir}
}

// madeSource is a load function that writes files of known sizes.
func madeSource(version string, files map[string][]byte) Source {
	return Source{Version: version, Load: func(ctx context.Context, w *Writer) error {
		for _, name := range sortedNames(files) {
			f, err := w.Create(name, int64(len(files[name])))
			if err != nil {
				return err
			}
			if _, err := f.Write(files[name]); err != nil {
				return err
			}
		}
		return nil
	}}
}

// small is the load function of tests that care for the call, not for the bytes.
func small(version string) Source {
	return madeSource(version, map[string][]byte{"w.bin": []byte("weights " + version)})
}

func sortedNames(files map[string][]byte) (names []string) {
	for n := range files {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// mustLoad loads or attaches; the model is closed with the test unless the test
// closes it.
func mustLoad(t testing.TB, r *Registry, key string, src Source) *Model {
	t.Helper()
	m, err := r.GetOrLoad(ctxb, key, src)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func mustGet(t testing.TB, r *Registry, key string) *Model {
	t.Helper()
	m, err := r.Get(key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// wantErr fails the test unless err is each of the targets, and an *Error.
func wantErr(t testing.TB, err error, targets ...error) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want %v", targets)
	}
	for _, target := range targets {
		if !errors.Is(err, target) {
			t.Fatalf("error %q, want %v", err, target)
		}
	}
	var e *Error
	if !errors.As(err, &e) {
		t.Errorf("error %q is %T, want it wrapped in an *Error", err, err)
	}
}

// wantText fails the test unless the text of err has all the parts.
func wantText(t testing.TB, err error, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if err == nil || !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not say %q", err, p)
		}
	}
}

// wantFiles fails the test unless the model has exactly these files, by Files,
// Bytes and Verify.
func wantFiles(t testing.TB, m *Model, want map[string][]byte) {
	t.Helper()
	var got []string
	for _, f := range m.Files() {
		got = append(got, f.Path)
		b, ok := want[f.Path]
		if !ok {
			continue
		}
		if f.Size != int64(len(b)) {
			t.Errorf("%s: Files says %d bytes, want %d", f.Path, f.Size, len(b))
		}
		wantBytes(t, m, f.Path, b)
	}
	slices.Sort(got)
	if names := sortedNames(want); !slices.Equal(got, names) {
		t.Errorf("files %q, want %q", got, names)
	}
	if err := m.Verify(ctxb); err != nil {
		t.Errorf("Verify: %v", err)
	}
}

func wantBytes(t testing.TB, m *Model, name string, want []byte) {
	t.Helper()
	b, err := m.Bytes(name)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, want) {
		t.Errorf("%s: %d bytes that differ from the %d of the source", name, len(b), len(want))
	}
}

func stats(t testing.TB, r *Registry) Stats {
	t.Helper()
	s, err := r.Stats()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// awaitWaits waits until n calls of this process have begun to wait for a load.
func awaitWaits(t testing.TB, r *Registry, n uint64) {
	t.Helper()
	for r.stats.waits.Load() < n {
		time.Sleep(time.Millisecond)
	}
}

// forget makes the process forget which sources it has compared already, as if it
// had just started.
func forget(t testing.TB, r *Registry) {
	t.Helper()
	for _, a := range *r.local.Load() {
		a.known.Store(nil)
	}
}

// undo is Undo for those who care for its error only.
func undo(ctx context.Context, r *Registry, key string) error {
	_, _, err := r.Undo(ctx, key)
	return err
}

// contextFor ends after some milliseconds.
func contextFor(ms int) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctxb, time.Duration(ms)*time.Millisecond)
}

// expires is a context whose time is over when the test says so.
type expires struct {
	context.Context
	over atomic.Bool
}

func (c *expires) Err() error {
	if c.over.Load() {
		return context.DeadlineExceeded
	}
	return nil
}
