//go:build !linux || !(amd64 || arm64) || onecopy_private

package registry

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
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
