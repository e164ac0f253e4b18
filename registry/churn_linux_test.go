//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/onecopy/onecopy/internal/layout"
)

// Somebody deletes the registry, or a part of it, at any moment of any call. A
// model in hand has its bytes, every error is one of those that are documented,
// and in the end everybody gets his model.
func TestDeletionAtAnyMoment(t *testing.T) {
	for _, part := range []string{"", "v1", "v1/registry", "v1/m", "v1/w"} {
		t.Run("dir/"+part, func(t *testing.T) {
			r := newRegistry(t, nil)
			text := strings.Repeat("x", 5000)
			src := madeSource("1", map[string][]byte{"w.bin": []byte(text)})
			stop := make(chan struct{})
			var wg sync.WaitGroup
			for g := range 4 {
				wg.Go(func() {
					for i := 0; ; i++ {
						select {
						case <-stop:
							return
						default:
						}
						key := fmt.Sprint("k", i%2)
						m, err := r.GetOrLoad(ctxb, key, src)
						switch {
						case err == nil:
							// A file that is asked for after its name is gone is lost.
							if b, err := m.Bytes("w.bin"); err != nil && !errors.Is(err, ErrGone) || err == nil && string(b) != text {
								t.Errorf("%d bytes, %v", len(b), err)
							}
							m.Close()
						case part == "v1/w" && (errors.Is(err, ErrLoadFailed) || errors.Is(err, ErrCorrupt)):
							// Without its lock file a live loader looks dead to others.
						case !errors.Is(err, ErrGone):
							t.Errorf("GetOrLoad: %v", err)
						}
						if g == 0 {
							err := r.Remove(ctxb, key)
							if err != nil && !errors.Is(err, ErrInUse) && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrBusy) {
								t.Errorf("Remove: %v", err)
							}
						}
						if _, err := r.Entries(); err != nil {
							t.Errorf("Entries: %v", err)
						}
					}
				})
			}
			rounds := 40
			if testing.Short() {
				rounds = 5
			}
			for range rounds {
				time.Sleep(2 * time.Millisecond) // some moment
				// It may be filled again while it is being emptied.
				_ = os.RemoveAll(filepath.Join(r.Dir(), part))
			}
			close(stop)
			wg.Wait()
			for i := range 2 {
				m, err := r.GetOrLoad(ctxb, fmt.Sprint("another/", i), src)
				if err != nil {
					t.Fatal(err)
				}
				wantBytes(t, m, "w.bin", []byte(text))
				m.Close()
			}
			if _, err := os.Stat(v1(r.Dir(), layout.TableFile)); err != nil {
				t.Error(err)
			}
		})
	}
}
