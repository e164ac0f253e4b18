//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"errors"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/shm"
)

// What is measured is what the load says it did, and nothing for files that are
// too small for a 2 MiB page.
func TestHugePages(t *testing.T) {
	r := newRegistry(t, nil)
	_, err := r.HugePages("k")
	wantErr(t, err, ErrNotFound)
	_, err = r.HugePages("")
	wantErr(t, err, ErrKey)

	m := mustLoad(t, r, "small", fileSource(t, "w", make([]byte, 300_000)))
	m.Close()
	rep, err := r.HugePages("small")
	must(t, err)
	if rep != (PageReport{Bytes: 300_000}) {
		t.Errorf("%+v", rep)
	}

	m = mustLoad(t, r, "k", fileSource(t, "w", randomBytes(1, 9<<20+5)))
	defer m.Close() // a mapping of its own must not be counted twice
	if _, err := m.Bytes("w"); err != nil {
		t.Fatal(err)
	}
	before, err := r.Entry("k")
	must(t, err)
	rep, err = r.HugePages("k")
	must(t, err)
	if fill := m.Info().Fill; rep.Bytes != 9<<20+5 || rep.Huge != fill.Collapsed {
		t.Errorf("%+v, and the load says %+v", rep, fill)
	}
	if rep.Huge == 0 && rep.PathReaders != nil {
		t.Error("path readers get pages that are not there")
	}
	after, err := r.Entry("k")
	must(t, err)
	if after.Attaches != before.Attaches {
		t.Errorf("looking counts as a use: %+v", after)
	}
}

// Whether a program that maps a path gets 2 MiB pages is the mount's option,
// which works at once on what is loaded already.
func TestHugePagesOfPathReaders(t *testing.T) {
	needRoot(t)
	mount := t.TempDir()
	const options = "size=64m,mode=0700"
	if err := unix.Mount("onecopy-test", mount, "tmpfs", 0, options+",huge=never"); err != nil {
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) {
			t.Skipf("mount: %v", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mount, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	r := openRegistry(t, filepath.Join(mount, "r"), nil)
	defer r.Close()
	m := mustLoad(t, r, "k", fileSource(t, "w", randomBytes(2, 4*shm.HugePage)))
	m.Close()
	if m.Info().Fill.Collapsed == 0 {
		t.Skip("the kernel gives no 2 MiB pages")
	}
	for _, huge := range []string{"never", "advise", "never"} {
		must(t, unix.Mount("onecopy-test", mount, "tmpfs", unix.MS_REMOUNT, options+",huge="+huge))
		rep, err := r.HugePages("k")
		must(t, err)
		if rep.Huge != 4*shm.HugePage {
			t.Errorf("huge=%s: %+v", huge, rep)
		}
		if rep.PathReaders == nil || *rep.PathReaders != (huge == "advise") {
			t.Errorf("huge=%s: path readers %v", huge, rep.PathReaders)
		}
	}
}
