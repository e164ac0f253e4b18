package layout

import "fmt"

// Problem is one thing in a table that no correct writer leaves behind.
type Problem struct {
	Slot int // -1: the header or the index
	Text string
}

// Sane reports whether a slot's bytes make sense on their own: a known state, a
// generation that was given out, and, unless it is FREE, a valid key.
func (t *Table) Sane(slot int) error {
	w := t.Word(slot)
	if !w.State().Valid() {
		return fmt.Errorf("state %d is unknown", uint8(w.State()))
	}
	if g := t.Generation(); w.Generation() > g {
		return fmt.Errorf("generation %d was never given out (last %d)", w.Generation(), g)
	}
	if w.State() == Free {
		return nil
	}
	if w.Generation() == 0 {
		return fmt.Errorf("%s without a generation", w.State())
	}
	if _, ok := t.Key(slot); !ok {
		return fmt.Errorf("%s without a valid key", w.State())
	}
	return nil
}

// Validate lists everything wrong with the bytes of a table that nobody is
// changing. It takes any bytes, never panics and ends after a time linear in
// their length. The error is that of NewTable.
func Validate(b []byte) ([]Problem, error) {
	t, err := NewTable(b)
	if err != nil {
		return nil, err
	}
	return t.Problems(), nil
}

// Problems is Validate for an open table; while others change it, hold T.
func (t *Table) Problems() (ps []Problem) {
	add := func(slot int, format string, args ...any) {
		ps = append(ps, Problem{slot, fmt.Sprintf(format, args...)})
	}
	keys := map[string]int{}
	gens := map[uint64]int{}
	for slot := range t.id.Slots {
		if err := t.Sane(slot); err != nil {
			add(slot, "%v", err)
			continue
		}
		w := t.Word(slot)
		if w.State() == Free {
			continue
		}
		key, _ := t.Key(slot)
		if other, dup := keys[key]; dup {
			add(slot, "key %q is also in slot %d", key, other)
		}
		if other, dup := gens[w.Generation()]; dup {
			add(slot, "generation %d is also in slot %d", w.Generation(), other)
		}
		keys[key], gens[w.Generation()] = slot, slot
	}
	stale, missing := t.auditIndex()
	for _, slot := range missing {
		add(slot, "the index does not lead to it")
	}
	for _, pos := range stale {
		add(-1, "index entry %d (%#08x) leads to no slot in use", pos, t.indexAt(pos))
	}
	return ps
}

// auditIndex compares the index with the slots in one pass: the positions of
// entries by which no slot is found, a second entry of a slot included, and the
// slots in use that no entry leads to.
func (t *Table) auditIndex() (stale []uint32, missing []int) {
	hashes := make([]uint64, t.id.Slots)
	wanted := make([]bool, t.id.Slots)
	for slot := range t.id.Slots {
		if t.Word(slot).State() == Free {
			continue
		}
		if key, ok := t.Key(slot); ok {
			hashes[slot], wanted[slot] = hashKey(key), true
		}
	}
	run := uint32(0) // entries before pos, back to the next empty one
	for run <= t.mask && t.indexAt(t.mask-run) != indexEmpty {
		run++
	}
	for pos := uint32(0); pos <= t.mask; pos++ {
		switch e := t.indexAt(pos); e {
		case indexEmpty:
			run = 0
			continue
		case indexDeleted:
		default:
			slot := int(e&0xffff) - 1
			if slot < 0 || slot >= t.id.Slots || !wanted[slot] ||
				e&0xffff0000 != indexTag(hashes[slot]) || (pos-uint32(hashes[slot]))&t.mask > run {
				stale = append(stale, pos)
			} else {
				wanted[slot] = false
			}
		}
		run++
	}
	for slot, w := range wanted {
		if w {
			missing = append(missing, slot)
		}
	}
	return stale, missing
}
