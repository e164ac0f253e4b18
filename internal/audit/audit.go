//go:build linux

// Package audit looks at a registry from outside: at the bytes of its table, the
// names on the tmpfs and the kernel's list of locks. It takes no lock, maps
// nothing, and shares no code with what repairs a registry.
package audit

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/procfs"
)

// An Auditor remembers what it saw of one registry.
type Auditor struct {
	Dir     string
	Epoch   uint64
	Counter uint64
	Seen    map[uint64]ID // every generation that was ever READY
}

// ID is what a generation's number stands for.
type ID struct {
	Key   string
	Inode uint64 // of the manifest
}

// Picture is what an audit saw.
type Picture struct {
	Ready map[string]uint64 // generation by key
	Bytes int64             // memory of all models
}

// New returns an auditor that has seen nothing yet.
func New(dir string) *Auditor { return &Auditor{Dir: dir, Seen: map[uint64]ID{}} }

// Look says what is wrong with a registry that ought to be at rest: no transient
// state, no lock but the leases of the generations in leased, and exactly the
// files, and the memory, of the READY and the leased generations.
func (a *Auditor) Look(leased map[uint64]bool) (pic Picture, problems []string) {
	bad := func(text string, args ...any) { problems = append(problems, fmt.Sprintf(text, args...)) }
	v1 := filepath.Join(a.Dir, layout.Folder)
	image, err := os.ReadFile(filepath.Join(v1, layout.TableFile))
	if err != nil {
		bad("%v", err)
		return pic, problems
	}
	table, err := layout.NewTable(image)
	if err != nil {
		bad("%v", err)
		return pic, problems
	}
	for _, p := range table.Problems() {
		bad("table: slot %d: %s", p.Slot, p.Text)
	}
	epoch := table.Identity().Epoch
	if a.Epoch != 0 && a.Epoch != epoch {
		bad("the epoch was %x and is %x", a.Epoch, epoch)
	}
	a.Epoch = epoch
	if table.Generation() < a.Counter {
		bad("the generation counter went back from %d to %d", a.Counter, table.Generation())
	}
	a.Counter = table.Generation()

	// The table.
	pic.Ready = map[string]uint64{}
	owners := map[uint64]string{} // key by generation; "" of a superseded one
	for gen := range leased {
		owners[gen] = ""
	}
	for slot := range table.Slots() {
		w := table.Word(slot)
		key, _ := table.Key(slot)
		switch w.State() {
		case layout.Free:
		case layout.Ready:
			pic.Ready[key] = w.Generation()
			owners[w.Generation()] = key
		default:
			bad("slot %d, key %q: %s", slot, key, w)
		}
		for h, name := range map[layout.Hint]string{layout.HintReserved: "reserved", layout.HintPromised: "promised", layout.HintLoadStart: "load_start"} {
			if v := table.Hint(slot, h); v != 0 {
				bad("slot %d, key %q: %s is %d", slot, key, name, v)
			}
		}
	}

	// The names below m/, and what the models in them need.
	want := map[string]int64{} // size by path
	manifests := map[procfs.FileID]uint64{}
	m := filepath.Join(v1, layout.ModelsDir)
	for gen, key := range owners {
		name := filepath.Join(m, layout.GenName(epoch, gen))
		text, err := os.ReadFile(name + layout.ManifestExt)
		if err != nil {
			bad("generation %d of %q: %v", gen, key, err)
			continue
		}
		man, err := layout.DecodeManifest(text)
		if err != nil {
			bad("%s: %v", name, err)
			continue
		}
		if key != "" && man.Key != key || man.Generation != gen || uint64(man.Epoch) != epoch {
			bad("%s describes key %q, generation %d", name, man.Key, man.Generation)
		}
		var st unix.Stat_t
		if err := unix.Stat(name+layout.ManifestExt, &st); err != nil {
			bad("%v", err)
		}
		id := ID{man.Key, st.Ino}
		if old, ok := a.Seen[gen]; ok && old != id {
			bad("generation %d was %+v and is %+v", gen, old, id)
		}
		a.Seen[gen] = id
		manifests[procfs.FileID{Dev: uint64(st.Dev), Inode: st.Ino}] = gen
		want[name+layout.ManifestExt] = int64(len(text))
		chunks := int64(0)
		for _, f := range man.Files {
			want[filepath.Join(name, man.Name, f.Path)] = f.Size
			chunks += layout.ChunkCount(f.Size, man.ChunkBytes)
		}
		want[name+layout.DigestsExt] = 64 + chunks*layout.DigestSize + 8
	}
	var needed int64
	for _, size := range want {
		needed += (size + 4095) &^ 4095
	}
	folders := map[string]bool{}
	for path := range want {
		for p := filepath.Dir(path); p != m; p = filepath.Dir(p) {
			folders[p] = true
		}
	}
	err = filepath.WalkDir(m, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if path != m && !folders[path] {
				bad("%s belongs to no model", path)
			}
			delete(folders, path)
			return nil
		}
		size, ok := want[path]
		if !ok {
			bad("%s belongs to no model", path)
			return nil
		}
		delete(want, path)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		if st.Size != size || st.Mode != unix.S_IFREG|0o444 || st.Nlink != 1 {
			bad("%s: %d bytes, mode %#o, %d names; want %d bytes, 0444, one name", path, st.Size, st.Mode, st.Nlink, size)
		}
		pic.Bytes += st.Blocks * 512
		return nil
	})
	if err != nil {
		bad("%v", err)
	}
	for path := range want {
		bad("%s is missing", path)
	}
	if pic.Bytes != needed {
		bad("the models take %d bytes and need %d", pic.Bytes, needed)
	}
	for _, dir := range []string{a.Dir, v1, filepath.Join(v1, layout.LocksDir)} {
		for _, n := range names(dir) {
			known := dir == a.Dir && n == layout.Folder ||
				dir == v1 && (n == layout.TableFile || n == layout.ModelsDir || n == layout.LocksDir) ||
				strings.HasSuffix(dir, "/"+layout.LocksDir) && (n == layout.TableLock || strings.HasPrefix(n, "k-"))
			if !known {
				bad("%s belongs to nobody", filepath.Join(dir, n))
			}
		}
	}

	// The locks.
	locks, err := procfs.Locks()
	if err != nil {
		bad("%v", err)
	}
	files := map[procfs.FileID]string{}
	_ = filepath.WalkDir(v1, func(path string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && unix.Lstat(path, &st) == nil {
			files[procfs.FileID{Dev: uint64(st.Dev), Inode: st.Ino}] = path
		}
		return nil
	})
	for _, l := range locks {
		path, ours := files[l.File()]
		if path == v1 && !l.Exclusive {
			continue // of whoever has it open, against systemd-tmpfiles
		}
		if gen, ok := manifests[l.File()]; ours && (!ok || !leased[gen] || l.Exclusive || l.Waiting) {
			bad("lock on %s: %+v", path, l)
		}
	}
	return pic, problems
}

func names(dir string) (names []string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
