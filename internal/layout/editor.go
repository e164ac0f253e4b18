package layout

// Editor changes a table. It exists only while its owner holds T: create it on
// a writable mapping after locking, drop it before unlocking.
type Editor struct {
	*Table        // what is read
	w      *Table // what is written
}

// NewEditor validates b like NewTable, and reads through the same mapping.
func NewEditor(b []byte) (Editor, error) {
	t, err := NewTable(b)
	return Editor{t, t}, err
}

// Edit is NewEditor for a writable mapping of the very file that t is a mapping
// of: it goes on reading through t, whose pages are in the page table already,
// so that only pages that are written fault.
func (t *Table) Edit(b []byte) (Editor, error) {
	w, err := NewTable(b)
	if err == nil && w.id != t.id {
		err = corrupt("the header was changed")
	}
	return Editor{t, w}, err
}

// NextGeneration gives out a generation that was never used. It returns 0 when
// all 2^56-1 are spent.
func (e Editor) NextGeneration() uint64 {
	g := e.w.word64(offGeneration).Add(1)
	if g == 0 || g > MaxGen { // 0: the counter wrapped, which only a broken writer achieves
		e.w.word64(offGeneration).Store(MaxGen)
		return 0
	}
	return g
}

// SetGeneration makes g the last generation given out: a repair, for a counter that
// a stranger has changed.
func (e Editor) SetGeneration(g uint64) { e.w.word64(offGeneration).Store(g) }

// CompareAndSwap changes a slot's word if it still is old; it refuses a change
// that is not in Transitions. The word becomes visible to all processes at once.
func (e Editor) CompareAndSwap(slot int, old, new Word) bool {
	return allowed(old, new) && e.w.slot[slot][slotWord/8].CompareAndSwap(uint64(old), uint64(new))
}

// SetKey names a FREE slot and clears its hints. The length is stored last, so
// that a writer killed in between leaves a slot that names nothing.
func (e Editor) SetKey(slot int, key string) {
	s := &e.w.slot[slot]
	s[slotKeyLen/8].Store(0)
	for i := 0; i < 256; i += 8 {
		var w uint64
		for j := min(len(key), i+8) - 1; j >= i; j-- {
			w = w<<8 | uint64(key[j])
		}
		s[(slotKey+i)/8].Store(w)
	}
	for h := Hint(0); h < numHints; h++ {
		e.SetHint(slot, h, 0)
	}
	s[slotKeyLen/8].Store(uint64(len(key)))
}

// SetHint stores a hint.
func (e Editor) SetHint(slot int, h Hint, v uint64) { e.w.slot[slot][slotHints/8+int(h)].Store(v) }

// Count adds to a statistic.
func (e Editor) Count(c Counter, n uint64) { e.w.word64(offCounters + 8*int(c)).Add(n) }

// SetBudget stores the budget in bytes, or as a share of the tmpfs in millionths
// when bytes is 0.
func (e Editor) SetBudget(bytes, ppm uint64) {
	e.w.word64(offBudget).Store(bytes)
	e.w.word64(offBudgetPPM).Store(ppm)
}

// SetDefaultTTL stores the idle time in nanoseconds.
func (e Editor) SetDefaultTTL(ns uint64) { e.w.word64(offTTL).Store(ns) }

func (e Editor) setIndex(pos, v uint32) { e.w.index[pos].Store(v) }

// IndexInsert makes slot findable under key. Called before the slot's word
// leaves FREE: an entry for a FREE slot is harmless, a READY slot without one is
// a miss. It changes nothing if the entry is there.
func (e Editor) IndexInsert(slot int, key string) bool {
	h := hashKey(key)
	want, pos := indexTag(h)|uint32(slot+1), uint32(h)&e.mask
	var hole uint32
	found := false
	for n := uint32(0); n <= e.mask; n++ {
		switch v := e.indexAt(pos); {
		case v == want:
			return true
		case v == indexDeleted:
			if !found {
				hole, found = pos, true
			}
		case v == indexEmpty:
			if !found {
				hole = pos
			}
			e.setIndex(hole, want)
			return true
		}
		pos = (pos + 1) & e.mask
	}
	if found {
		e.setIndex(hole, want)
	}
	return found
}

// IndexDelete undoes IndexInsert. The entry becomes a mark that does not end a
// probe, or empty where no probe needs the mark.
func (e Editor) IndexDelete(slot int, key string) {
	h := hashKey(key)
	want, pos := indexTag(h)|uint32(slot+1), uint32(h)&e.mask
	for n := uint32(0); n <= e.mask; n++ {
		switch e.indexAt(pos) {
		case indexEmpty:
			return
		case want:
			e.setIndex(pos, indexDeleted)
			for ; n <= 2*e.mask; n++ { // to the end of the run
				if e.indexAt(pos) == indexEmpty {
					e.dropMarks(pos)
					return
				}
				pos = (pos + 1) & e.mask
			}
			return
		}
		pos = (pos + 1) & e.mask
	}
}

// dropMarks empties the marks of the run before the empty entry at end that the
// probe of no entry passes over. Emptying only the last ones of a run would let
// the others pile up: a miss then takes 2.2 probes instead of 1.5 in a table
// that is 90 % full and has lived for a while.
func (e Editor) dropMarks(end uint32) {
	passed := uint32(0) // entries from pos on backwards that a probe passes over
	for pos := (end - 1) & e.mask; pos != end; pos = (pos - 1) & e.mask {
		switch v := e.indexAt(pos); {
		case v == indexEmpty:
			return
		case v != indexDeleted:
			if home, ok := e.homeOf(v); ok {
				passed = max(passed, (pos-home)&e.mask+1)
			}
		case passed == 0:
			e.setIndex(pos, indexEmpty)
		}
		if passed > 0 {
			passed--
		}
	}
}

// homeOf is where the probe for the slot of an index entry begins; !ok if no
// probe for that slot's key believes the entry.
func (e Editor) homeOf(entry uint32) (pos uint32, ok bool) {
	slot := int(entry&0xffff) - 1
	if slot < 0 || slot >= e.id.Slots {
		return 0, false
	}
	key, ok := e.Key(slot)
	h := hashKey(key)
	return uint32(h) & e.mask, ok && entry&0xffff0000 == indexTag(h)
}

// RepairIndex makes the index say exactly what the slots say and returns how
// many entries it changed: a killed writer may leave an entry too many, hostile
// bytes anything.
func (e Editor) RepairIndex() (changed int) {
	stale, missing := e.auditIndex()
	for _, pos := range stale {
		e.setIndex(pos, indexDeleted)
	}
	full := true
	for pos := range e.mask + 1 {
		if e.indexAt(pos) == indexEmpty {
			full = false
			e.dropMarks(pos)
		}
	}
	if full { // no correct writer does that; readers miss until it is repaired
		for pos := range e.mask + 1 {
			e.setIndex(pos, indexEmpty)
		}
	}
	for slot := range e.id.Slots {
		if key, ok := e.Key(slot); ok && e.Word(slot).State() != Free {
			e.IndexInsert(slot, key)
		}
	}
	return len(stale) + len(missing)
}

// Reset empties a slot whose bytes make no sense (see Table.Sane): nothing but
// a hostile or broken writer leaves such a slot behind.
func (e Editor) Reset(slot int) {
	e.w.slot[slot][slotWord/8].Store(uint64(MakeWord(Free, e.Generation())))
	e.w.slot[slot][slotKeyLen/8].Store(0)
}
