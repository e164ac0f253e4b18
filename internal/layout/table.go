package layout

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"

	"github.com/cespare/xxhash/v2"
)

func checksum(b []byte) uint64 { return xxhash.Sum64(b) }

// hashKey is part of the format: it places keys in the index and on the load
// lock stripes.
func hashKey(key string) uint64 { return xxhash.Sum64String(key) }

// Stripe is the number of the load lock of a key.
func Stripe(key string) int { return int(hashKey(key) >> 32 % Stripes) }

// Table is a read-only view of a table. Its methods may be called by any number
// of goroutines while other processes change the table. They never fault on
// hostile contents; they do fault when the file behind the mapping is truncated,
// so the caller guards them (debug.SetPanicOnFault).
type Table struct {
	b     []byte
	id    Identity
	index []atomic.Uint32
	pairs []atomic.Uint64 // the index again, for who reads all of it
	mask  uint32          // len(index)-1
	slot  []slotView
}

// NewTable validates the header of b, whose length must be the size of the
// file, and returns a view of it. Errors: ErrVersion, ErrCorrupt.
func NewTable(b []byte) (*Table, error) {
	if len(b) < HeaderSize {
		return nil, corrupt("%d bytes are less than a header", len(b))
	}
	if !aligned(b) {
		return nil, corrupt("not mapped at a multiple of 8")
	}
	var h [offChecksum + 8]byte // one private copy, so that nothing is read twice
	copy(h[:], b)
	get := func(off int) uint64 { return binary.LittleEndian.Uint64(h[off:]) }
	if m := get(offMagic); m != Magic {
		return nil, corrupt("magic %#x, want %#x", m, uint64(Magic))
	}
	if v := get(offVersion); v != Version {
		return nil, fmt.Errorf("%w: version %d, this program knows %d", ErrVersion, v, Version)
	}
	if o := binary.NativeEndian.Uint64(h[offByteOrder:]); o != ByteOrder { // native: the views below are
		return nil, fmt.Errorf("%w: byte-order mark %#x, want %#x", ErrVersion, o, uint64(ByteOrder))
	}
	if c := get(offChecksum); c != checksum(h[:offChecksum]) {
		return nil, corrupt("header checksum %#x does not match", c)
	}
	n := get(offSlots)
	if n < MinSlots || n > MaxSlots {
		return nil, corrupt("%d slots, want %d to %d", n, MinSlots, MaxSlots)
	}
	id := Identity{Epoch: get(offEpoch), Slots: int(n), Created: int64(get(offCreated))}
	copy(id.BootID[:], h[offBootID:])
	switch {
	case id.Epoch == 0:
		return nil, corrupt("epoch 0")
	case len(b) != TableSize(id.Slots):
		return nil, corrupt("%d bytes, but %d slots need %d", len(b), n, TableSize(id.Slots))
	case get(offIndex) != uint64(indexEntries(id.Slots)), get(offStripes) != Stripes, get(offSlotSize) != SlotSize:
		return nil, corrupt("index %d, stripes %d, slot size %d do not belong to version %d", get(offIndex), get(offStripes), get(offSlotSize), Version)
	}
	entries := b[HeaderSize : HeaderSize+4*indexEntries(id.Slots)]
	index := viewIndex(entries)
	return &Table{b: b, id: id, index: index, pairs: viewPairs(entries), mask: uint32(len(index) - 1), slot: viewSlots(b[slotsOffset(id.Slots):])}, nil
}

// Identity of the table; it does not change while the table lives.
func (t *Table) Identity() Identity { return t.id }

// Slots is the table's capacity.
func (t *Table) Slots() int { return t.id.Slots }

// Generation is the last generation given out.
func (t *Table) Generation() uint64 { return t.word64(offGeneration).Load() }

// Budget is the configured number of bytes (0: not set) and the share of the
// tmpfs, in millionths, that counts when it is not set.
func (t *Table) Budget() (bytes uint64, ppm uint64) {
	ppm = t.word64(offBudgetPPM).Load()
	if ppm == 0 || ppm > 1_000_000 {
		ppm = DefaultBudgetPPM
	}
	return t.word64(offBudget).Load(), ppm
}

// DefaultTTL is the idle time in nanoseconds after which a model expires; 0 is
// never.
func (t *Table) DefaultTTL() uint64 { return t.word64(offTTL).Load() }

// Counter reads a statistic.
func (t *Table) Counter(c Counter) uint64 { return t.word64(offCounters + 8*int(c)).Load() }

// Word reads the word of a slot: one atomic load.
func (t *Table) Word(slot int) Word { return Word(t.slot[slot][slotWord/8].Load()) }

// Hint reads a hint of a slot.
func (t *Table) Hint(slot int, h Hint) uint64 { return t.slot[slot][slotHints/8+int(h)].Load() }

// Key copies the key of a slot; ok is false when its bytes are no valid key,
// as in a slot that was never used or is being written.
func (t *Table) Key(slot int) (key string, ok bool) {
	s := &t.slot[slot]
	n := s[slotKeyLen/8].Load()
	if n == 0 || n > MaxKey {
		return "", false
	}
	var buf [256]byte
	for i := 0; i < int(n); i += 8 {
		binary.LittleEndian.PutUint64(buf[i:], s[(slotKey+i)/8].Load())
	}
	key = string(buf[:n])
	return key, ValidKey(key) == nil
}

// keyEquals compares without copying. A length that is no key's equals nothing,
// whatever the slot says: the slot has no room for it.
func (s *slotView) keyEquals(key string) bool {
	n := len(key)
	if uint(n-1) >= MaxKey || s[slotKeyLen/8].Load() != uint64(n) {
		return false
	}
	i := 0
	for ; i+8 <= n; i += 8 {
		if s[(slotKey+i)/8].Load() != le64(key[i:i+8]) {
			return false
		}
	}
	if i == n {
		return true
	}
	var last uint64 // the rest of the key in its highest bytes
	if n >= 8 {
		last = le64(key[n-8:])
	} else {
		for j := range n {
			last = last>>8 | uint64(key[j])<<56
		}
	}
	pad := uint(8*(i+8-n)) & 63
	return (s[(slotKey+i)/8].Load()^last>>pad)<<pad == 0
}

func le64(s string) uint64 {
	_ = s[7]
	return uint64(s[0]) | uint64(s[1])<<8 | uint64(s[2])<<16 | uint64(s[3])<<24 |
		uint64(s[4])<<32 | uint64(s[5])<<40 | uint64(s[6])<<48 | uint64(s[7])<<56
}

// Index entries: tag<<16 | slot+1. Zero ends a probe; deleted does not.
const (
	indexEmpty   = 0
	indexDeleted = 0xffff
)

func indexTag(h uint64) uint32 { return uint32(h>>48) << 16 }

func (t *Table) indexAt(pos uint32) uint32 { return t.index[pos].Load() }

// Found is the answer of Lookup.
type Found struct {
	Slot   int
	Word   Word // as it was when the key matched
	Probes int  // index entries looked at
}

// Lookup finds the slot that names key and is not FREE. It takes no lock, makes
// no system call and allocates nothing; it ends after at most one pass over the
// index, whatever the bytes say.
func (t *Table) Lookup(key string) (f Found, ok bool) {
	h := hashKey(key)
	tag, pos := indexTag(h), uint32(h)&t.mask
	for n := uint32(0); n <= t.mask; n++ {
		e := t.indexAt(pos)
		f.Probes++
		if e == indexEmpty {
			return f, false
		}
		if slot := int(e&0xffff) - 1; e&0xffff0000 == tag && uint(slot) < uint(len(t.slot)) {
			s := &t.slot[slot]
			// A word that moves while the key is compared makes the comparison
			// worthless; a live writer moves it a few times at most.
			for range 8 {
				w := Word(s[slotWord/8].Load())
				if w.State() == Free || !s.keyEquals(key) {
					break
				}
				if Word(s[slotWord/8].Load()) == w {
					f.Slot, f.Word = slot, w
					return f, true
				}
			}
		}
		pos = (pos + 1) & t.mask
	}
	return f, false
}

// Named counts the index entries: about as many slots are not FREE. It reads
// only the index, which is a small part of the table.
func (t *Table) Named() (n int) {
	for i := range t.pairs {
		two := t.pairs[i].Load()
		if two == 0 { // most of them
			continue
		}
		for _, e := range [2]uint32{uint32(two), uint32(two >> 32)} {
			if e != indexEmpty && e != indexDeleted {
				n++
			}
		}
	}
	return n
}

// Used lists the slots that are, or ever were, somebody's: all others are zero.
// It reads one cache line of each slot.
func (t *Table) Used() []int {
	used := make([]int, 0, 64)
	for slot := range t.slot {
		if s := &t.slot[slot]; s[slotWord/8].Load() != 0 || s[slotKeyLen/8].Load() != 0 {
			used = append(used, slot)
		}
	}
	return used
}

// Scan is Lookup without the index, for a holder of T that must not believe a
// torn index: the slot that names key and is not FREE, else the FREE slot that
// named it last.
func (t *Table) Scan(key string) (f Found, ok bool) { return t.ScanOf(t.Used(), key) }

// ScanOf is Scan for who has the list of used slots already.
func (t *Table) ScanOf(slots []int, key string) (f Found, ok bool) {
	for _, slot := range slots {
		if !t.slot[slot].keyEquals(key) {
			continue
		}
		w := t.Word(slot)
		if w.State() != Free {
			return Found{Slot: slot, Word: w}, true
		}
		if !ok || w.Generation() > f.Word.Generation() {
			f, ok = Found{Slot: slot, Word: w}, true
		}
	}
	return f, ok
}
