//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
)

// A library in our own process that opens and closes files of others, and locks
// them as POSIX does, takes nothing away: a lock of flock is the open description's.
func TestNoisyNeighbour(t *testing.T) {
	r := newRegistry(t, nil)
	other, err := Open(r.Dir(), &Options{LoadTimeout: time.Millisecond})
	must(t, err)
	defer other.Close()
	noise := func() {
		files := 0
		err := filepath.WalkDir(r.Dir(), func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			for _, kind := range []int16{unix.F_RDLCK, unix.F_UNLCK} {
				if err := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: kind}); err != nil {
					t.Errorf("%s: %v", path, err)
				}
			}
			files++
			return f.Close()
		})
		if err != nil || files < 2 {
			t.Errorf("%d files, %v", files, err)
		}
	}
	m := mustLoad(t, r, "k", one("w.bin", -1, func(f *FileWriter) error {
		noise()
		_, err := other.GetOrLoad(ctxb, "k", small("other"))
		wantErr(t, err, ErrTimeout) // the load lock
		_, err = f.Write([]byte("mine"))
		return err
	}))
	noise()
	wantErr(t, other.Remove(ctxb, "k"), ErrInUse) // the lease
	wantBytes(t, m, "w.bin", []byte("mine"))
	m.Close()
	must(t, other.Remove(ctxb, "k"))
}

// The generation counter is one word that no checksum covers. Whoever changes it
// costs nobody a model that is whole, and does not end all loads for ever.
func TestGenerationCounterThatAStrangerChanged(t *testing.T) {
	for _, to := range []uint64{0, 1, layout.MaxGen, 1 << 60, 1<<64 - 1} {
		for _, how := range []string{"gc", "load"} {
			t.Run(fmt.Sprintf("%d, %s", to, how), func(t *testing.T) {
				r := newRegistry(t, nil)
				for _, key := range []string{"a", "b", "c"} {
					loadIdle(t, r, key, small(key))
				}
				held := mustGet(t, r, "c")
				editTable(t, r.Dir(), func(e layout.Editor) { e.SetGeneration(to) })
				problems, err := r.Check(ctxb, CheckOptions{})
				if err != nil || !slices.ContainsFunc(problems, func(p Problem) bool { return p.Kind == "table" && p.Repair == repairGC }) {
					t.Errorf("Check: %+v, %v", problems, err)
				}
				if how == "gc" {
					rep, err := r.GC(ctxb)
					if err != nil || len(rep.Removed) != 0 {
						t.Errorf("GC: %+v, %v", rep, err)
					}
				} else {
					loadIdle(t, r, "new", small("new"))
				}
				if g := readTable(t, r.Dir()).Generation(); g < 3 || g > 4 {
					t.Errorf("the counter says %d", g)
				}
				if problems, err := r.Check(ctxb, CheckOptions{}); err != nil || len(problems) != 0 {
					t.Errorf("left: %+v, %v", problems, err)
				}
				for _, key := range []string{"a", "b", "c"} {
					mustGet(t, r, key).Close()
				}
				replace := small("2")
				replace.Replace = true
				m := mustLoad(t, r, "c", replace)
				if m.Generation() <= held.Generation() {
					t.Errorf("generation %d after %d", m.Generation(), held.Generation())
				}
				wantBytes(t, held, "w.bin", []byte("weights c"))
				m.Close()
				held.Close()
			})
		}
	}
}

// A slot that names another one's generation, or key, is nobody's.
func TestSlotsThatNameTheSame(t *testing.T) {
	for _, what := range []string{"generation", "loading", "evicting", "key"} {
		for _, held := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, held %v", what, held), func(t *testing.T) {
				r := newRegistry(t, nil)
				for _, key := range []string{"a", "b", "c"} {
					loadIdle(t, r, key, small(key))
				}
				if held {
					m := mustGet(t, r, "c")
					defer m.Close()
				}
				image, err := os.ReadFile(tablePath(r.Dir()))
				must(t, err)
				e, err := layout.NewEditor(image)
				must(t, err)
				at := func(key string) []byte {
					f, _ := e.Lookup(key)
					return image[layout.SlotsOffset(e.Slots())+f.Slot*layout.SlotSize:]
				}
				if what == "key" {
					at("a")[16] = 'c'
				} else {
					copy(at("a")[:7], at("c")[:7])
				}
				switch what {
				case "loading":
					at("a")[7] = byte(layout.Loading)
				case "evicting":
					at("a")[7] = byte(layout.Evicting)
				}
				f, err := os.OpenFile(tablePath(r.Dir()), os.O_WRONLY, 0)
				must(t, err)
				_, err = f.WriteAt(image, 0)
				must(t, err)
				must(t, f.Close())
				if problems, err := r.Check(ctxb, CheckOptions{}); err != nil || len(problems) == 0 {
					t.Errorf("Check: %+v, %v", problems, err)
				}
				if _, err := r.GC(ctxb); err != nil {
					t.Fatal(err)
				}
				if problems, err := r.Check(ctxb, CheckOptions{Data: true}); err != nil || len(problems) != 0 {
					t.Errorf("left: %+v, %v", problems, err)
				}
				if got := keysOf(t, r); got != "b c" {
					t.Errorf("left are %s", got)
				}
				for _, key := range []string{"a", "b", "c"} {
					wantFiles(t, mustLoad(t, r, key, small(key)), map[string][]byte{"w.bin": []byte("weights " + key)})
				}
			})
		}
	}
}

// A load whose name is taken fails, and leaves alone what has the name.
func TestGenerationWhoseNameIsTaken(t *testing.T) {
	r := newRegistry(t, nil)
	loadIdle(t, r, "a", small("a"))
	taken := Info{Epoch: readTable(t, r.Dir()).Identity().Epoch, Generation: 2}
	writeFile(t, genPath(r.Dir(), taken, layout.ManifestExt), []byte("a stranger's"))
	writeFile(t, filepath.Join(genPath(r.Dir(), taken, ""), "b", "w.bin"), []byte("a stranger's"))
	lease, err := os.Open(genPath(r.Dir(), taken, layout.ManifestExt))
	must(t, err)
	defer lease.Close()
	must(t, unix.Flock(int(lease.Fd()), unix.LOCK_SH))
	_, err = r.GetOrLoad(ctxb, "b", small("b"))
	wantErr(t, err, fs.ErrExist)
	for _, path := range []string{genPath(r.Dir(), taken, layout.ManifestExt), filepath.Join(genPath(r.Dir(), taken, ""), "b", "w.bin")} {
		if b, err := os.ReadFile(path); err != nil || string(b) != "a stranger's" {
			t.Errorf("%s: %q, %v", path, b, err)
		}
	}
	wantFiles(t, mustLoad(t, r, "b", small("b")), map[string][]byte{"w.bin": []byte("weights b")})
}

// A process that has a table open whose identity was damaged meanwhile says so.
func TestCheckNamesADamagedIdentity(t *testing.T) {
	r := newRegistry(t, nil)
	loadIdle(t, r, "a", small("a"))
	sound, err := os.ReadFile(tablePath(r.Dir()))
	must(t, err)
	for _, off := range []int{8, 24, 120} { // version, epoch, checksum
		b := slices.Clone(sound)
		b[off] ^= 0x10
		must(t, os.WriteFile(tablePath(r.Dir()), b, 0))
		problems, err := r.Check(ctxb, CheckOptions{})
		if err != nil || len(problems) != 1 || problems[0].Kind != "table" || problems[0].Repair != repairDelete {
			t.Errorf("byte %d: %+v, %v", off, problems, err)
		}
		mustGet(t, r, "a").Close() // what it knows already can still be had
	}
	must(t, os.WriteFile(tablePath(r.Dir()), sound, 0))
}
