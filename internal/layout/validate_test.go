package layout

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// lived is a small table in which every state, a mark and a stale entry occur.
func lived(t testing.TB) (Editor, []string) {
	e := newEditor(t, 8)
	keys := []string{"ready", strings.Repeat("long", 60), "loading", "evicting", "freed", "моделі/模型"}
	for slot, key := range keys {
		publish(t, e, slot, key)
	}
	remove(t, e, 2)
	claim(t, e, 2, "loading")
	swap(t, e, 3, e.Word(3).With(Evicting))
	swap(t, e, 4, e.Word(4).With(Free))
	return e, keys
}

// exercise calls everything that reads a table and checks what must hold
// whatever its bytes are.
func exercise(t testing.TB, b []byte, keys []string) {
	t.Helper()
	if _, err := Validate(b); err != nil {
		if !errors.Is(err, ErrVersion) && !errors.Is(err, ErrCorrupt) {
			t.Errorf("Validate: %v", err)
		}
		return
	}
	e, err := NewEditor(b)
	if err != nil {
		t.Fatalf("Validate accepts what NewEditor refuses: %v", err)
	}
	for slot := range e.Slots() {
		if key, ok := e.Key(slot); ok {
			keys = append(keys, key)
			if e.Sane(slot) == nil && e.Word(slot).State() != Free {
				if f, ok := e.Scan(key); !ok || f.Word.State() == Free {
					t.Errorf("slot %d names %q, Scan = %+v, %v", slot, key, f, ok)
				}
			}
		}
	}
	lookup := func() {
		for _, key := range keys {
			f, ok := e.Lookup(key)
			if f.Probes > IndexEntries(e.Slots()) {
				t.Errorf("Lookup(%q): %d probes", key, f.Probes)
			}
			if got, valid := e.Key(f.Slot); ok && (e.Word(f.Slot) != f.Word || f.Word.State() == Free || valid && got != key) {
				t.Errorf("Lookup(%q) = %+v: the slot is %v %q", key, f, e.Word(f.Slot), got)
			}
			e.Scan(key)
		}
	}
	lookup()
	for slot := range e.Slots() {
		if e.Sane(slot) != nil {
			e.Reset(slot)
		}
	}
	e.RepairIndex()
	lookup()
	for slot := range e.Slots() {
		if key, ok := e.Key(slot); ok && e.Word(slot).State() != Free {
			if f, ok := e.Lookup(key); !ok {
				t.Errorf("after the repair %q of slot %d is not found", key, slot)
			} else if got, _ := e.Key(f.Slot); got != key {
				t.Errorf("after the repair %q leads to %q", key, got)
			}
		}
	}
	if n := e.RepairIndex(); n != 0 {
		t.Errorf("a second repair changed %d entries", n)
	}
	for _, p := range e.Problems() {
		if p.Slot < 0 || strings.Contains(p.Text, "index") {
			t.Errorf("after the repair: slot %d: %s", p.Slot, p.Text)
		}
	}
}

// TestEveryFlip changes every byte of a table, those that mean something in
// three ways.
func TestEveryFlip(t *testing.T) {
	e, keys := lived(t)
	b := make([]byte, len(e.b))
	for off := range b {
		flips := []byte{0xff}
		if off < offCounters || off >= HeaderSize && off < HeaderSize+4*len(e.index) || off >= SlotsOffset(e.Slots()) {
			flips = []byte{0x01, 0x80, 0xff}
		}
		for _, x := range flips {
			copy(b, e.b)
			b[off] ^= x
			exercise(t, b, keys)
			if t.Failed() {
				t.Fatalf("with byte %d xor %#x", off, x)
			}
			if off < offGeneration {
				if _, err := NewTable(b); err != nil {
					continue
				}
				t.Fatalf("byte %d xor %#x passed the checksum", off, x)
			}
		}
	}
}

// TestEveryLength: a table of any other length is refused.
func TestEveryLength(t *testing.T) {
	e, _ := lived(t)
	long := append(e.b[:len(e.b):len(e.b)], make([]byte, SlotSize)...)
	for n := range len(long) + 1 {
		if _, err := NewTable(long[:n]); (err == nil) != (n == len(e.b)) {
			t.Fatalf("%d bytes: %v", n, err)
		}
	}
}

// TestRandomTables: random bytes behind a sound header.
func TestRandomTables(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	e, keys := lived(t)
	for range 300 {
		b := append([]byte(nil), e.b...)
		for off := offGeneration; off < len(b); off += 8 {
			if r.IntN(3) == 0 {
				putWord(b, off, r.Uint64()>>r.IntN(64))
			}
		}
		exercise(t, b, keys)
	}
}

// TestProblems: each kind of damage is reported for the slot that has it.
func TestProblems(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(e Editor)
		slot int
		text string
	}{
		{"unknown state", func(e Editor) { putWord(e.b, slotOffset(e, 0), uint64(MakeWord(4, 1))) }, 0, "state 4 is unknown"},
		{"generation not given out", func(e Editor) { putWord(e.b, slotOffset(e, 0), uint64(MakeWord(Ready, 100))) }, 0, "generation 100 was never given out"},
		{"FREE generation not given out", func(e Editor) { putWord(e.b, slotOffset(e, 7), uint64(MakeWord(Free, 100))) }, 7, "generation 100 was never given out"},
		{"no generation", func(e Editor) { putWord(e.b, slotOffset(e, 0), uint64(MakeWord(Ready, 0))) }, 0, "ready without a generation"},
		{"no key", func(e Editor) { putWord(e.b, slotOffset(e, 2)+slotKeyLen, 0) }, 2, "loading without a valid key"},
		{"key too long", func(e Editor) { putWord(e.b, slotOffset(e, 0)+slotKeyLen, 256) }, 0, "without a valid key"},
		{"control character", func(e Editor) { e.b[slotOffset(e, 0)+slotKey] = '\n' }, 0, "without a valid key"},
		{"not UTF-8", func(e Editor) { e.b[slotOffset(e, 0)+slotKey] = 0xff }, 0, "without a valid key"},
		{"key twice", func(e Editor) { publish(t, e, 6, "ready") }, 6, `key "ready" is also in slot 0`},
		{"generation twice", func(e Editor) {
			publish(t, e, 6, "other")
			putWord(e.b, slotOffset(e, 6), uint64(e.Word(0)))
		}, 6, "generation 1 is also in slot 0"},
		{"not in the index", func(e Editor) { e.IndexDelete(0, "ready") }, 0, "the index does not lead to it"},
		{"behind an empty entry", func(e Editor) {
			e.IndexDelete(0, "ready")
			h := hashKey("ready")
			pos := uint32(h)
			for e.indexAt(pos&e.mask) != indexEmpty {
				pos++
			}
			e.setIndex((pos+1)&e.mask, indexTag(h)|1)
		}, 0, "the index does not lead to it"},
		{"entry out of range", func(e Editor) { e.setIndex(freeEntry(e), 100) }, -1, "leads to no slot in use"},
		{"entry of slot -1", func(e Editor) { e.setIndex(freeEntry(e), 0x10000) }, -1, "leads to no slot in use"},
		{"entry of a FREE slot", func(e Editor) { e.IndexInsert(7, "free") }, -1, "leads to no slot in use"},
		{"entry under another tag", func(e Editor) { e.setIndex(freeEntry(e), 0x12340001) }, -1, "leads to no slot in use"},
	} {
		t.Run(c.name, func(t *testing.T) {
			e, _ := lived(t)
			e.RepairIndex()
			if ps := e.Problems(); len(ps) != 0 {
				t.Fatalf("before the damage: %v", ps)
			}
			c.do(e)
			ps, err := Validate(e.b)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range ps {
				if p.Slot == c.slot && strings.Contains(p.Text, c.text) {
					return
				}
			}
			t.Errorf("want slot %d: %s, have %v", c.slot, c.text, ps)
		})
	}
}

// freeEntry is an empty index entry with an empty one before it.
func freeEntry(e Editor) uint32 {
	for pos := range e.mask {
		if e.indexAt(pos) == indexEmpty && e.indexAt(pos+1) == indexEmpty {
			return pos + 1
		}
	}
	panic("no room")
}

// TestValidateIsLinear: the biggest table, with an index that sends every probe
// around the whole of it, is validated without following any probe. A validation
// that looked every key up would take 4 billion steps here and the test its
// deadline.
func TestValidateIsLinear(t *testing.T) {
	e := newEditor(t, MaxSlots)
	for slot := range e.Slots() {
		publish(t, e, slot, fmt.Sprint(slot))
	}
	for pos := range e.mask + 1 {
		e.setIndex(pos, indexDeleted)
	}
	if ps := e.Problems(); len(ps) != MaxSlots {
		t.Errorf("%d problems, want one for each of %d slots", len(ps), MaxSlots)
	}
	if n := e.RepairIndex(); n != MaxSlots {
		t.Errorf("RepairIndex changed %d entries", n)
	}
	wantSound(t, e)
}
