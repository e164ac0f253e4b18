//go:build !linux || !(amd64 || arm64) || onecopy_private

package registry

import "testing"

// newRegistry opens a registry of this process's own; it is closed with the
// test, and nothing may be left open then.
func newRegistry(t testing.TB, opts *Options) *Registry {
	t.Helper()
	r, err := Open(t.TempDir(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return r
}
