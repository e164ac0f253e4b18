package layout

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// fill makes n models READY and returns their keys by slot.
func fill(t testing.TB, e Editor, n int) []string {
	keys := make([]string, n)
	for slot := range keys {
		keys[slot] = fmt.Sprintf("org/model-%d", slot)
		publish(t, e, slot, keys[slot])
	}
	return keys
}

// probes looks up the keys and n that do not exist, and adds up the probes.
func probes(t *testing.T, e Editor, keys []string, n int) (hit, miss float64) {
	t.Helper()
	for slot, key := range keys {
		f, ok := e.Lookup(key)
		if !ok || f.Slot != slot {
			t.Fatalf("Lookup(%q) = slot %d, %v, want slot %d", key, f.Slot, ok, slot)
		}
		hit += float64(f.Probes)
	}
	for i := range n {
		f, ok := e.Lookup(fmt.Sprintf("org/missing-%d", i))
		if ok {
			t.Fatalf("a missing key is in slot %d", f.Slot)
		}
		miss += float64(f.Probes)
	}
	return hit / float64(len(keys)), miss / float64(n)
}

// TestProbes holds the promise of at most 1.5 index probes on average for a
// miss at 90 % occupancy, in a table that was just filled and in one that lives:
// there over 100,000 times that a model goes and another comes, half of which
// are spent before the counting begins.
func TestProbes(t *testing.T) {
	const slots = DefaultSlots
	e := newEditor(t, slots)
	keys := fill(t, e, slots*9/10)
	check := func(when string, hit, miss float64) {
		t.Helper()
		t.Logf("%s: %.3f probes a hit, %.3f a miss", when, hit, miss)
		if miss > 1.5 || hit > 1.5 {
			t.Errorf("%s: %.3f probes a hit, %.3f a miss, want at most 1.5", when, hit, miss)
		}
	}
	hit, miss := probes(t, e, keys, 50_000)
	check("filled", hit, miss)

	const churn, every = 100_000, 1000
	r := rand.New(rand.NewPCG(1, 2))
	samples := 0.0
	hit, miss = 0, 0
	for i := range churn {
		slot := r.IntN(len(keys))
		remove(t, e, slot)
		keys[slot] = fmt.Sprintf("org/later-%d", i)
		publish(t, e, slot, keys[slot])
		if i >= churn/2 && i%every == 0 {
			h, m := probes(t, e, keys, 2000)
			hit, miss, samples = hit+h, miss+m, samples+1
		}
	}
	check("living", hit/samples, miss/samples)
	wantSound(t, e)
}

// TestLookupAgainstMap runs random operations on a small table and on a map.
func TestLookupAgainstMap(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 7))
		e := newEditor(t, 8<<r.IntN(4))
		model := map[string]int{} // key -> slot
		bySlot := make([]string, e.Slots())
		for range 3000 {
			slot := r.IntN(e.Slots())
			key := fmt.Sprintf("key-%d", r.IntN(3*e.Slots()))
			switch _, taken := model[key]; {
			case bySlot[slot] != "":
				remove(t, e, slot)
				delete(model, bySlot[slot])
				bySlot[slot] = ""
			case !taken:
				publish(t, e, slot, key)
				model[key], bySlot[slot] = slot, key
			}
			key = fmt.Sprintf("key-%d", r.IntN(3*e.Slots()))
			want, taken := model[key]
			f, ok := e.Lookup(key)
			if ok != taken || ok && (f.Slot != want || f.Word != e.Word(want)) {
				t.Fatalf("seed %d: Lookup(%q) = %+v, %v, want slot %d, %v", seed, key, f, ok, want, taken)
			}
		}
		wantSound(t, e)
	}
}

// TestRepairIndex: whatever the index says, after a repair it says what the
// slots say, no more and no less, and another repair finds nothing to do.
func TestRepairIndex(t *testing.T) {
	damage := map[string]func(r *rand.Rand, e Editor){
		"some random entries": func(r *rand.Rand, e Editor) {
			for range 1 + r.IntN(20) {
				e.setIndex(r.Uint32()&e.mask, r.Uint32())
			}
		},
		"all random": func(r *rand.Rand, e Editor) {
			for pos := range e.mask + 1 {
				e.setIndex(pos, r.Uint32())
			}
		},
		"shuffled": func(r *rand.Rand, e Editor) {
			for range 200 {
				a, b := r.Uint32()&e.mask, r.Uint32()&e.mask
				va, vb := e.indexAt(a), e.indexAt(b)
				e.setIndex(a, vb)
				e.setIndex(b, va)
			}
		},
		"emptied": func(r *rand.Rand, e Editor) {
			for pos := range e.mask + 1 {
				e.setIndex(pos, indexEmpty)
			}
		},
		"all marks": func(r *rand.Rand, e Editor) {
			for pos := range e.mask + 1 {
				e.setIndex(pos, indexDeleted)
			}
		},
		"one entry everywhere": func(r *rand.Rand, e Editor) {
			key, _ := e.Key(0)
			for pos := range e.mask + 1 {
				e.setIndex(pos, indexTag(hashKey(key))|1)
			}
		},
	}
	for name, do := range damage {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(20) {
				r := rand.New(rand.NewPCG(seed, 11))
				e := newEditor(t, 64)
				keys := fill(t, e, 1+r.IntN(64))
				for slot := range keys {
					if slot > 0 && r.IntN(4) == 0 {
						remove(t, e, slot)
					}
				}
				do(r, e)
				if len(e.Problems()) == 0 {
					t.Logf("seed %d: the damage did none", seed)
				}
				e.RepairIndex()
				wantSound(t, e)
				for slot, key := range keys {
					f, ok := e.Lookup(key)
					if want := e.Word(slot).State() != Free; ok != want || ok && f.Slot != slot {
						t.Fatalf("seed %d: Lookup(%q) = slot %d, %v, want slot %d, %v", seed, key, f.Slot, ok, slot, want)
					}
				}
				if f, ok := e.Lookup("missing"); ok || f.Probes > 32 {
					t.Errorf("seed %d: a missing key took %d probes, found %v", seed, f.Probes, ok)
				}
			}
		})
	}
}

// TestRepairIndexAfterKills: what a writer leaves that dies between two stores.
func TestRepairIndexAfterKills(t *testing.T) {
	e := newEditor(t, 8)
	publish(t, e, 0, "kept")
	e.SetKey(1, "claimed/but/not/swapped")
	e.IndexInsert(1, "claimed/but/not/swapped")
	publish(t, e, 2, "freed/but/still/indexed")
	swap(t, e, 2, e.Word(2).With(Evicting))
	swap(t, e, 2, e.Word(2).With(Free))
	for _, key := range []string{"claimed/but/not/swapped", "freed/but/still/indexed"} {
		if f, ok := e.Lookup(key); ok {
			t.Errorf("Lookup(%q) = %+v before the repair", key, f)
		}
	}
	if n := e.RepairIndex(); n != 2 {
		t.Errorf("RepairIndex changed %d entries, want 2", n)
	}
	wantSound(t, e)
}

// TestIndexInsert: a second insert changes nothing, a mark is used again, and an
// index without room says so.
func TestIndexInsert(t *testing.T) {
	e := newEditor(t, 8)
	a, b := collidingKeys(e, "key")
	publish(t, e, 0, a)
	publish(t, e, 1, b)
	before := append([]byte(nil), e.b...)
	if !e.IndexInsert(1, b) || string(before) != string(e.b) {
		t.Error("a second insert changed the index")
	}
	remove(t, e, 0)
	home := uint32(hashKey(a)) & e.mask
	if e.indexAt(home) != indexDeleted {
		t.Fatalf("entry %#x where a mark should be", e.indexAt(home))
	}
	publish(t, e, 0, a)
	if e.indexAt(home) != indexTag(hashKey(a))|1 {
		t.Errorf("the mark was not used again: %#x", e.indexAt(home))
	}
	remove(t, e, 1)
	if v := e.indexAt((home + 1) & e.mask); v != indexEmpty {
		t.Errorf("the mark before an empty entry stayed: %#x", v)
	}
	for pos := range e.mask + 1 {
		e.setIndex(pos, 1) // slot 0 under a tag that fits nothing
	}
	if e.IndexInsert(2, "no/room") {
		t.Error("an index without room took an entry")
	}
	if f, ok := e.Lookup("no/room"); ok || f.Probes != len(e.index) {
		t.Errorf("a look-up in a full index: %+v, %v", f, ok)
	}
	e.IndexDelete(2, "no/room") // ends, changes nothing
	e.RepairIndex()
	wantSound(t, e)
}

// TestIndexAmongHostileEntries: inserting and deleting end and work where every
// other entry is nonsense, with an empty entry in reach and without.
func TestIndexAmongHostileEntries(t *testing.T) {
	for _, empties := range []int{0, 1} {
		e := newEditor(t, 8)
		publish(t, e, 0, "key")
		home := uint32(hashKey("key")) & e.mask
		for pos := range e.mask + 1 {
			if pos != home && (empties == 0 || pos != (home+5)&e.mask) {
				e.setIndex(pos, 0xabcd0000|pos<<8) // slots -1 and beyond the last
			}
		}
		for range 3 {
			e.IndexDelete(0, "key")
			if _, ok := e.Lookup("key"); ok {
				t.Errorf("%d empty: found after IndexDelete", empties)
			}
			if !e.IndexInsert(0, "key") {
				t.Errorf("%d empty: no room where the entry was", empties)
			}
			if f, ok := e.Lookup("key"); !ok || f.Slot != 0 {
				t.Errorf("%d empty: Lookup = %+v, %v", empties, f, ok)
			}
		}
	}
}
