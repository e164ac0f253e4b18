//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/proctest"
)

var accountProgram = child("account-hold", func(args []string) error {
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	var sum byte
	for _, key := range args[1:] {
		m, err := r.Get(key)
		if err != nil {
			return err
		}
		for _, f := range m.Files() {
			b, err := m.Bytes(f.Path)
			if err != nil {
				return err
			}
			for i := 0; i < len(b); i += 4096 {
				sum += b[i]
			}
		}
	}
	if err := say(sum); err != nil {
		return err
	}
	select {}
})

// On a tmpfs of its own, everything that is used is somebody's, to the page:
// models, replaced generations, files without a name, and the table.
func TestAccountingAddsUp(t *testing.T) {
	needRoot(t)
	mount := t.TempDir()
	if err := unix.Mount("onecopy-test", mount, "tmpfs", 0, "size=64m,mode=0700"); err != nil {
		if errors.Is(err, unix.EPERM) {
			t.Skip("mount is not permitted here")
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mount, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	dir := filepath.Join(mount, "r")
	r := openRegistry(t, dir, nil)
	want := func(when string) HolderReport {
		t.Helper()
		rep, err := r.HolderReport("")
		must(t, err)
		var st unix.Statfs_t
		must(t, unix.Statfs(mount, &st))
		used := int64(st.Blocks-st.Bfree) * st.Bsize
		s := stats(t, r)
		if sum := s.ModelBytes + s.SupersededBytes + s.Overhead + rep.Unlinked; sum != used {
			t.Errorf("%s: models %d + replaced %d + table %d + without a name %d = %d, statfs says %d",
				when, s.ModelBytes, s.SupersededBytes, s.Overhead, rep.Unlinked, sum, used)
		}
		return rep
	}
	want("empty")
	load := func(key string, seed byte, n int, replace bool) {
		t.Helper()
		m, err := r.GetOrLoad(ctxb, key, Source{Version: string('a' + rune(seed)), Replace: replace,
			Load: madeSource("", map[string][]byte{"w": randomBytes(seed, n), "config": []byte("{}")}).Load})
		must(t, err)
		m.Close()
	}
	load("a", 1, 5_000_001, false)
	load("b", 2, 4096, false)
	load("c", 3, 3<<20, false)
	want("three models")

	var procs []*proctest.Proc
	for range 3 {
		p := proctest.Start(t, accountProgram, dir, "a", "c")
		p.Line(t)
		procs = append(procs, p)
	}
	load("a", 4, 6_000_000, true)
	rep := want("a replaced generation")
	var resident, proportional int64
	for _, h := range rep.Holders {
		if h.Key == "c" {
			resident += h.Resident
			proportional += h.Proportional
		}
		if h.Key == "a" && h.Generation != 1 {
			t.Errorf("%+v holds what nobody got", h)
		}
	}
	pages := int64(3<<20 + 4096) // and the config
	near := func(what string, got, want int64) {
		t.Helper()
		if got < want*99/100 || got > want*101/100 {
			t.Errorf("%s %d, want %d to 1 %%", what, got, want)
		}
	}
	near("resident", resident, 3*pages)
	near("proportional", proportional, pages)

	// A third party deletes c, which is in use: the memory stays and has no name.
	e, err := r.Entry("c")
	must(t, err)
	must(t, os.Remove(filepath.Join(e.Info.Path, "w")))
	rep = want("a deleted file that is mapped")
	if rep.Unlinked != 3<<20 {
		t.Errorf("%d bytes without a name, want %d", rep.Unlinked, 3<<20)
	}
	for _, p := range procs {
		p.Kill()
	}
	_, err = r.GC(ctxb)
	must(t, err)
	if rep = want("all holders killed"); len(rep.Holders) != 0 {
		t.Errorf("%+v", rep.Holders)
	}
	must(t, r.Remove(ctxb, "c"))
	must(t, r.Close())
}
