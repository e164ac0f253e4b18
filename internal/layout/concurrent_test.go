package layout

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// TestReadersDuringChanges: while one writer, as the holder of T, moves many
// keys through few slots, lock-free readers
//
//   - get only pairs of key and generation that existed,
//   - always find a key that is READY all the time, be it left alone or
//     replaced again and again,
//   - never find a key that is never there.
//
// The table is on the heap, so that the race detector sees every access.
func TestReadersDuringChanges(t *testing.T) {
	const (
		slots  = 8
		nkeys  = 12
		rounds = 30_000
		alone  = 0 // key and slot
		often  = 1
	)
	// Keys of one length that differ in their first and last word only: a torn
	// comparison would confuse them.
	keys := make([]string, nkeys)
	for i := range keys {
		keys[i] = fmt.Sprintf("%08d%s%08d", i, strings.Repeat("model/", 30), i)
	}
	e := newEditor(t, slots)
	owner := make([]atomic.Int32, 4*rounds) // generation -> key number + 1
	next := func(key int) uint64 {
		g := e.NextGeneration()
		owner[g].Store(int32(key + 1)) // before any word can show g
		return g
	}
	load := func(slot, key int) {
		e.SetKey(slot, keys[key])
		e.IndexInsert(slot, keys[key])
		w := MakeWord(Loading, next(key))
		swap(t, e, slot, w)
		swap(t, e, slot, w.With(Ready))
	}
	load(alone, alone)
	load(often, often)

	var done atomic.Bool
	var readers sync.WaitGroup
	var hits atomic.Int64
	for n := range 4 {
		readers.Go(func() {
			tab, err := NewTable(e.b)
			if err != nil {
				t.Error(err)
				return
			}
			r := rand.New(rand.NewPCG(uint64(n), 5))
			for !done.Load() && !t.Failed() {
				key := r.IntN(nkeys)
				f, ok := tab.Lookup(keys[key])
				switch {
				case ok && owner[f.Word.Generation()].Load() != int32(key+1):
					t.Errorf("key %d: generation %d belongs to key %d", key, f.Word.Generation(), owner[f.Word.Generation()].Load()-1)
				case ok && (f.Word.State() == Free || !f.Word.State().Valid()):
					t.Errorf("key %d: %v", key, f.Word)
				case !ok && key <= often:
					t.Errorf("key %d, which is READY all the time, was missed", key)
				case ok:
					hits.Add(1)
				}
				if _, ok := tab.Lookup("never/there"); ok {
					t.Error("found a key that was never there")
				}
			}
		})
	}

	r := rand.New(rand.NewPCG(9, 9))
	inSlot := [slots]int{often + 1: -1}
	for slot := often + 1; slot < slots; slot++ {
		inSlot[slot] = -1
	}
	taken := map[int]bool{}
	for range rounds {
		slot := r.IntN(slots)
		key := often + 1 + r.IntN(nkeys-often-1)
		switch {
		case slot == alone:
		case slot == often:
			swap(t, e, often, MakeWord(Ready, next(often)))
		case inSlot[slot] >= 0:
			remove(t, e, slot)
			delete(taken, inSlot[slot])
			inSlot[slot] = -1
		case !taken[key]:
			load(slot, key)
			inSlot[slot], taken[key] = key, true
		}
		if t.Failed() {
			break
		}
	}
	done.Store(true)
	readers.Wait()
	wantSound(t, e)
	if hits.Load() == 0 {
		t.Error("no reader found anything")
	}
}

// TestGenerationsAreUnique among writers that race, as those of two registries
// over one mapping would if a lock were lost.
func TestGenerationsAreUnique(t *testing.T) {
	e := newEditor(t, 8)
	const each = 2000
	got := make([][]uint64, 4)
	var writers sync.WaitGroup
	for n := range got {
		writers.Go(func() {
			for range each {
				got[n] = append(got[n], e.NextGeneration())
			}
		})
	}
	writers.Wait()
	seen := map[uint64]bool{}
	for _, gs := range got {
		for _, g := range gs {
			if g == 0 || seen[g] {
				t.Fatalf("generation %d twice", g)
			}
			seen[g] = true
		}
	}
	if e.Generation() != 4*each {
		t.Errorf("the counter says %d", e.Generation())
	}
}
