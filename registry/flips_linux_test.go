//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// flipped are files small enough to change every byte of.
var flipped = map[string]map[string][]byte{
	"org/folder": {"config.json": []byte(`{"layers":12}`), "w.bin": randomBytes(1, 5000), "sub/x.bin": randomBytes(4, 100)},
	"org/single": {"w.bin": randomBytes(2, 4097)},
	"replaced":   {"w.bin": randomBytes(3, 100), "x.bin": {}},
}

// TestEveryByteFlipped changes every byte of a table, its manifests and digests
// files, one at a time, in three ways, in a registry that a process has open. Who
// gets a model gets its bytes; when somebody does not, Check says why; and what
// Check says repairs it. ONECOPY_FLIPS=N takes every N-th byte.
func TestEveryByteFlipped(t *testing.T) {
	step := 211
	if testing.Short() || raceEnabled {
		step = 409
	}
	if s := os.Getenv("ONECOPY_FLIPS"); s != "" {
		if _, err := fmt.Sscan(s, &step); err != nil || step < 1 {
			t.Fatalf("ONECOPY_FLIPS=%s: want a number", s)
		}
	}
	src := func(key string) Source {
		s := madeSource("1", flipped[key])
		s.OnChange = ChangeIgnore
		return s
	}
	dir := proctest.TmpRegistry(t)
	r := openRegistry(t, dir, &Options{Slots: layout.MinSlots})
	again := src("replaced")
	again.Replace = true
	loadIdle(t, r, "replaced", again)
	loadIdle(t, r, "replaced", again)
	loadIdle(t, r, "removed", small("1")) // leaves its key in a FREE slot
	must(t, r.Remove(ctxb, "removed"))
	loadIdle(t, r, "org/folder", src("org/folder")) // 4 and 5: one bit apart
	loadIdle(t, r, "org/single", src("org/single"))

	flips, refused, reported := 0, 0, 0
	byteAt := func(path string, off int) byte {
		b, err := os.ReadFile(path)
		must(t, err)
		return b[off]
	}
	put := func(path string, off int, b byte) {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if os.IsPermission(err) {
			must(t, os.Chmod(path, 0o644))
			defer os.Chmod(path, 0o444)
			f, err = os.OpenFile(path, os.O_WRONLY, 0)
		}
		must(t, err)
		defer f.Close()
		_, err = f.WriteAt([]byte{b}, int64(off))
		must(t, err)
	}
	// look returns whether every model could be had, with its bytes.
	look := func(r *Registry) (whole bool) {
		whole = true
		for key, files := range flipped {
			m, err := r.Get(key)
			if err == nil {
				for name, want := range files {
					b, e := m.Bytes(name)
					if e == nil && string(b) != string(want) {
						t.Errorf("%s of %s has other bytes", name, key)
					}
					err = errors.Join(err, e)
				}
				m.Close()
			}
			if err != nil {
				whole = false
				refused++
				if !typed(err) {
					t.Errorf("%s: %v", key, err)
				}
			}
		}
		return whole
	}
	try := func(path string, off int, x byte) {
		flips++
		// Every look at the kernel's list of locks, as with Data, stops all locking for
		// milliseconds; the bytes of the models are read below in any case.
		table := path == tablePath(dir)
		limits := table && off >= 192 && off < 256 // a TTL makes models expire
		was := byteAt(path, off)
		put(path, off, was^x)
		whole := look(r)
		problems, err := r.Check(ctxb, CheckOptions{Data: !table})
		if err != nil {
			t.Errorf("Check: %v", err)
		}
		if len(problems) > 0 {
			reported++
		}
		if !whole && len(problems) == 0 && !limits {
			t.Error("a model cannot be had, and Check finds nothing")
		}
		if _, err := r.Stats(); err != nil {
			t.Errorf("Stats: %v", err)
		}
		if table && off < identityEnd {
			if len(problems) == 0 {
				t.Error("Check finds nothing")
			}
			if fresh, err := Open(dir, nil); err == nil {
				fresh.Close()
				t.Error("opened")
			} else if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrVersion) {
				t.Errorf("Open: %v", err)
			}
			put(path, off, was)
			return
		}
		before, err := os.Stat(path)
		must(t, err)
		must(t, r.SetConfig(ctxb, Config{}))
		if _, err := r.GC(ctxb); err != nil {
			t.Errorf("GC: %v", err)
		}
		problems, err = r.Check(ctxb, CheckOptions{Data: !table})
		must(t, err)
		for _, p := range problems {
			// A file's name in a manifest is a name too many in the folder.
			if p.Repair != repairReload && p.Kind != "payload" || p.Key == "" {
				t.Errorf("after GC: %+v", p)
			} else if err := r.Remove(ctxb, p.Key); err != nil && !errors.Is(err, ErrNotFound) {
				t.Errorf("Remove: %v", err)
			}
		}
		for key, files := range flipped {
			m, err := r.GetOrLoad(ctxb, key, src(key))
			if err != nil {
				t.Errorf("%s: %v", key, err)
				continue
			}
			wantFiles(t, m, files)
			m.Close()
		}
		if problems, err = r.Check(ctxb, CheckOptions{Data: !table}); err != nil || len(problems) > 0 {
			t.Errorf("left: %+v, %v", problems, err)
		}
		// What nobody had to repair is made whole, so that one byte differs at a time.
		after, err := os.Stat(path)
		hint := (off-layout.SlotsOffset(layout.MinSlots))%layout.SlotSize >= 320
		if err == nil && os.SameFile(before, after) && (!table || off >= 256 && off < layout.HeaderSize || hint) {
			put(path, off, was)
		}
	}
	one := func(path string, off int, x byte) {
		try(path, off, x)
		if t.Failed() {
			t.Fatalf("with byte %d xor %#x of %s", off, x, strings.TrimPrefix(path, dir))
		}
	}
	// The words of the slots first: one bit makes a generation that of another model.
	for slot := range layout.MinSlots {
		for i := range 8 {
			one(tablePath(dir), layout.SlotsOffset(layout.MinSlots)+slot*layout.SlotSize+i, 0x01)
		}
	}
	paths := func() []string {
		for key := range flipped { // what had a time to live for a moment may have expired
			m, err := r.GetOrLoad(ctxb, key, src(key))
			must(t, err)
			must(t, m.Close())
		}
		all, err := filepath.Glob(v1(dir, layout.ModelsDir, "*.*"))
		must(t, err)
		return append(all, tablePath(dir))
	}
	n := 0
	for i := range len(paths()) {
		size := int64(layout.HeaderSize)
		for off := 0; int64(off) < size; off++ {
			for _, x := range []byte{0x01, 0x80, 0xff} {
				if n++; n%step != 0 {
					continue
				}
				// The models may have been made anew, under other numbers.
				path := paths()[i]
				st, err := os.Stat(path)
				must(t, err)
				if size = st.Size(); int64(off) < size {
					one(path, off, x)
				}
			}
		}
	}
	t.Logf("%d flips: %d gets refused, %d times Check had something to say", flips, refused, reported)
	if refused == 0 || reported == 0 {
		t.Error("the test tests nothing")
	}
}
