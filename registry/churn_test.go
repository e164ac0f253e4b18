package registry

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
)

// Goroutines that get, use, replace, remove and bind the same few keys: whatever
// they get has the bytes of its own version, however often Go's collector runs.
func TestChurn(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(1))
	r := newRegistry(t, nil)
	rounds := 150
	if testing.Short() {
		rounds = 30
	}
	src := func(version string) Source {
		s := madeSource(version, map[string][]byte{
			"version": []byte(version), "w.bin": []byte(strings.Repeat(version+" ", 3000)), "sub/empty": {},
		})
		s.OnChange = ChangeReplace
		return s
	}
	right := func(m *Model) error {
		v, err := m.Bytes("version")
		if err != nil {
			return err
		}
		w, err := m.Bytes("w.bin")
		if err != nil {
			return err
		}
		if string(w) != strings.Repeat(string(v)+" ", 3000) || m.Info().Origin.Version != string(v) {
			return fmt.Errorf("version %q has other bytes", v)
		}
		return nil
	}
	expected := func(err error) bool {
		return err == nil || errors.Is(err, ErrNotFound) || errors.Is(err, ErrInUse) || errors.Is(err, ErrBusy)
	}
	bound := Bind(r, func(_ context.Context, m *Model) (string, error) {
		b, err := m.Bytes("version")
		return string(b), err
	}, nil)
	var wg sync.WaitGroup
	for g := range 6 {
		wg.Go(func() {
			for i := range rounds {
				key := fmt.Sprint("k", (g+i)%3)
				var err error
				switch (g + i) % 6 {
				case 0, 1:
					var m *Model
					if m, err = r.GetOrLoad(ctxb, key, src(fmt.Sprint("v", i%2))); err == nil {
						err = right(m)
						m.Close()
					}
				case 2:
					var m *Model
					if m, err = r.Get(key); err == nil {
						err = right(m)
						m.Close()
					}
				case 3:
					if err = r.Use(key, right); i%10 == 0 {
						r.Release(key)
					}
				case 4:
					err = r.Remove(ctxb, key)
				case 5:
					var ref *Ref[string]
					if ref, err = bound.GetOrLoad(ctxb, key, src("v0")); err == nil {
						if v, e := ref.Model.Bytes("version"); e != nil || string(v) != ref.Value {
							err = fmt.Errorf("%q, %q, %w", v, ref.Value, e)
						}
						ref.Close()
					}
				}
				if !expected(err) {
					t.Errorf("goroutine %d, round %d: %v", g, i, err)
				}
			}
		})
	}
	wg.Wait()
	for i := range 3 {
		r.Release(fmt.Sprint("k", i))
	}
}

func TestGetDoesNotWaitForALoad(t *testing.T) {
	r := newRegistry(t, nil)
	m := mustLoad(t, r, "k", one("w.bin", -1, func(f *FileWriter) error {
		_, err := r.Get("k")
		wantErr(t, err, ErrNotFound)
		wantErr(t, r.Use("k", func(*Model) error { return nil }), ErrNotFound)
		_, err = f.Write([]byte("x"))
		return err
	}))
	wantBytes(t, m, "w.bin", []byte("x"))
}

// While a generation is replaced everybody goes on with the one that is there.
func TestReadersGoOnDuringAReplacement(t *testing.T) {
	r := newRegistry(t, nil)
	mustLoad(t, r, "k", small("1"))
	src := one("w.bin", -1, func(f *FileWriter) error {
		m, err := r.Get("k")
		if err != nil {
			return err
		}
		defer m.Close()
		wantBytes(t, m, "w.bin", []byte("weights 1"))
		_, err = f.Write([]byte("weights 2"))
		return err
	})
	src.Replace = true
	m := mustLoad(t, r, "k", src)
	wantBytes(t, m, "w.bin", []byte("weights 2"))
}

func TestCloseDuringALoad(t *testing.T) {
	r := newRegistry(t, nil)
	running, goOn := make(chan struct{}), make(chan struct{})
	type result struct {
		m   *Model
		err error
	}
	done := make(chan result)
	go func() {
		m, err := r.GetOrLoad(ctxb, "k", one("w.bin", -1, func(f *FileWriter) error {
			close(running)
			<-goOn
			_, err := f.Write([]byte("late"))
			return err
		}))
		done <- result{m, err}
	}()
	<-running
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	close(goOn)
	switch res := <-done; {
	case res.err == nil:
		wantBytes(t, res.m, "w.bin", []byte("late"))
		res.m.Close()
	default:
		wantErr(t, res.err, ErrClosed)
	}
}
