package layout

import (
	"encoding/binary"
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// update rewrites testdata/layout/v1 from code. A difference means that the
// format changed, which needs a new Version: see CONTRIBUTING.md.
var update = flag.Bool("update", false, "rewrite testdata/layout/v1")

// goldenDir holds the files that every implementation of version 1 must read.
var goldenDir = filepath.Join("..", "..", "testdata", "layout", "v1")

// golden compares b with a golden file, or writes it under -update.
func golden(t *testing.T, name string, b []byte) {
	t.Helper()
	path := filepath.Join(goldenDir, name)
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(want) != string(b) {
		t.Errorf("%s differs from what the code makes: the format changed, or a change of it must be stated with -update", name)
	}
}

// testIdentity is the same in every test and golden image.
func testIdentity(slots int) Identity {
	return Identity{
		Epoch:   0x0123456789abcdef,
		BootID:  [16]byte{0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x1b, 0x1c, 0x1d, 0x1e, 0x1f},
		Slots:   slots,
		Created: 1_800_000_000_000_000_000,
	}
}

func newEditor(t testing.TB, slots int) Editor {
	t.Helper()
	b, err := NewImage(testIdentity(slots), 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	e, err := NewEditor(b)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// swap makes a transition that must be allowed and must win.
func swap(t testing.TB, e Editor, slot int, to Word) {
	t.Helper()
	if from := e.Word(slot); !e.CompareAndSwap(slot, from, to) {
		t.Fatalf("slot %d: %v to %v refused", slot, from, to)
	}
}

// claim takes a FREE slot for key, as a loader does.
func claim(t testing.TB, e Editor, slot int, key string) Word {
	t.Helper()
	w := MakeWord(Loading, e.NextGeneration())
	e.SetKey(slot, key)
	if !e.IndexInsert(slot, key) {
		t.Fatalf("slot %d: no room in the index", slot)
	}
	swap(t, e, slot, w)
	return w
}

// publish makes key READY in a FREE slot.
func publish(t testing.TB, e Editor, slot int, key string) Word {
	t.Helper()
	w := claim(t, e, slot, key).With(Ready)
	swap(t, e, slot, w)
	return w
}

// remove frees a READY slot.
func remove(t testing.TB, e Editor, slot int) {
	t.Helper()
	key, ok := e.Key(slot)
	if !ok {
		t.Fatalf("slot %d has no key", slot)
	}
	swap(t, e, slot, e.Word(slot).With(Evicting))
	swap(t, e, slot, e.Word(slot).With(Free))
	e.IndexDelete(slot, key)
}

// wantSound fails the test if the table has problems or its index could be
// repaired.
func wantSound(t testing.TB, e Editor) {
	t.Helper()
	for _, p := range e.Problems() {
		t.Errorf("slot %d: %s", p.Slot, p.Text)
	}
	if n := e.RepairIndex(); n != 0 {
		t.Errorf("RepairIndex changed %d entries of a sound table", n)
	}
}

// putHeader stores a header word and fixes up the checksum.
func putHeader(b []byte, off int, v uint64) {
	binary.LittleEndian.PutUint64(b[off:], v)
	binary.LittleEndian.PutUint64(b[offChecksum:], checksum(b[:offChecksum]))
}

// putWord stores a word behind the editor's back.
func putWord(b []byte, off int, v uint64) { binary.LittleEndian.PutUint64(b[off:], v) }

// exampleManifest is a valid manifest of two files that every test may change.
func exampleManifest() *Manifest {
	return &Manifest{
		Schema: SchemaVersion, Key: "sentence-transformers/all-MiniLM-L6-v2", Name: "all-MiniLM-L6-v2",
		Epoch: 0x0123456789abcdef, Generation: 42, Bytes: 4<<20 + 1 + 612, Backing: BackingShm, ChunkBytes: 4 << 20,
		Origin:   Origin{Kind: OriginPath, Path: "/models/all-MiniLM-L6-v2"},
		LoadedAt: time.Date(2027, 1, 15, 8, 0, 0, 123456789, time.UTC), LoadSeconds: 0.25,
		Fill: Fill{Collapsed: 4 << 20, Copied: 613},
		Files: []ManifestFile{
			{Path: "config.json", Size: 612, Digest: "xxh3-128:0123456789abcdef0123456789abcdef", ModTime: 1_800_000_000_123_456_789},
			{Path: "onnx/model.onnx", Size: 4<<20 + 1, Digest: "xxh3-128:fedcba9876543210fedcba9876543210", ModTime: 1_800_000_000_000_000_000},
		},
	}
}

func slotOffset(e Editor, slot int) int { return SlotsOffset(e.Slots()) + slot*SlotSize }
