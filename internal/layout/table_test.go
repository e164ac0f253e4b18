package layout

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestNewImageRefuses(t *testing.T) {
	for _, id := range []Identity{
		{Epoch: 1, Slots: 0}, {Epoch: 1, Slots: -1}, {Epoch: 1, Slots: MinSlots - 1},
		{Epoch: 1, Slots: MaxSlots + 1}, {Epoch: 0, Slots: 8},
	} {
		if _, err := NewImage(id, 0, 0); err == nil {
			t.Errorf("NewImage(%+v) succeeded", id)
		}
	}
}

// TestIdentity: what NewImage is given comes back, at every size.
func TestIdentity(t *testing.T) {
	for _, slots := range []int{MinSlots, 9, 64, 1000, DefaultSlots, MaxSlots} {
		b, err := NewImage(testIdentity(slots), 1<<40, 7)
		if err != nil {
			t.Fatal(err)
		}
		tab, err := NewTable(b)
		if err != nil {
			t.Fatalf("%d slots: %v", slots, err)
		}
		if tab.Identity() != testIdentity(slots) || tab.Slots() != slots {
			t.Errorf("%d slots: %+v", slots, tab.Identity())
		}
		if budget, ppm := tab.Budget(); budget != 1<<40 || ppm != DefaultBudgetPPM || tab.DefaultTTL() != 7 {
			t.Errorf("%d slots: budget %d, %d ppm, ttl %d", slots, budget, ppm, tab.DefaultTTL())
		}
		if ps := tab.Problems(); len(ps) != 0 {
			t.Errorf("%d slots: %v", slots, ps)
		}
	}
}

func TestUnalignedIsRefused(t *testing.T) {
	b := newEditor(t, 8).b
	shifted := make([]byte, len(b)+1)
	copy(shifted[1:], b)
	if _, err := NewTable(shifted[1:]); !errors.Is(err, ErrCorrupt) {
		t.Errorf("%v, want ErrCorrupt", err)
	}
}

func TestConfiguration(t *testing.T) {
	e := newEditor(t, 8)
	for _, c := range []struct{ set, want uint64 }{{0, DefaultBudgetPPM}, {1, 1}, {1_000_000, 1_000_000}, {1_000_001, DefaultBudgetPPM}} {
		e.SetBudget(5, c.set)
		if b, ppm := e.Budget(); b != 5 || ppm != c.want {
			t.Errorf("SetBudget(5, %d): %d, %d", c.set, b, ppm)
		}
	}
	e.SetDefaultTTL(9)
	e.Count(CountReclaimed, 2)
	e.Count(CountReclaimed, 3)
	if e.DefaultTTL() != 9 || e.Counter(CountReclaimed) != 5 || e.Counter(CountLeftovers) != 0 {
		t.Errorf("ttl %d, reclaimed %d", e.DefaultTTL(), e.Counter(CountReclaimed))
	}
	if _, err := NewEditor(e.b); err != nil {
		t.Errorf("configuration broke the header: %v", err)
	}
}

// TestGenerationsEnd: after the last generation there is none, and none comes
// twice, not even from a counter that a broken writer left.
func TestGenerationsEnd(t *testing.T) {
	for _, from := range []uint64{MaxGen - 1, MaxGen, MaxGen + 1, 1<<64 - 1} {
		e := newEditor(t, 8)
		e.word64(offGeneration).Store(from)
		if g := e.NextGeneration(); from == MaxGen-1 && g != MaxGen || from >= MaxGen && g != 0 {
			t.Errorf("after %#x comes %#x", from, g)
		}
		for range 3 {
			if g := e.NextGeneration(); g != 0 {
				t.Errorf("after %#x, later: %#x", from, g)
			}
		}
	}
}

// TestKeys: every length goes in and comes out, is found, and no prefix,
// extension or neighbour of it is.
func TestKeys(t *testing.T) {
	long := strings.Repeat("0123456789abcdef", 16)
	e := newEditor(t, 8)
	for n := 1; n <= MaxKey; n++ {
		key := long[:n]
		publish(t, e, 3, key)
		if got, ok := e.Key(3); !ok || got != key {
			t.Fatalf("Key = %q, %v, want %q", got, ok, key)
		}
		for _, other := range []string{long[:n-1], long[:n+1], key[:n-1] + "!", key + "\x00", strings.Repeat("x", 1000)} {
			if e.slot[3].keyEquals(other) {
				t.Errorf("slot with %q equals %q", key, other)
			}
		}
		if f, ok := e.Lookup(key); !ok || f.Slot != 3 || f.Word != e.Word(3) {
			t.Fatalf("Lookup(%q) = %+v, %v", key, f, ok)
		}
		remove(t, e, 3)
		if _, ok := e.Lookup(key); ok {
			t.Fatalf("Lookup(%q) found a FREE slot", key)
		}
	}
	wantSound(t, e)
}

// TestSetKeyClears: a shorter key leaves nothing of a longer one, and no hint.
func TestSetKeyClears(t *testing.T) {
	e := newEditor(t, 8)
	e.SetKey(0, strings.Repeat("x", MaxKey))
	for h := range Hint(numHints) {
		e.SetHint(0, h, 1<<63+uint64(h))
	}
	e.SetKey(0, "short")
	want := newEditor(t, 8)
	want.SetKey(0, "short")
	if string(e.b) != string(want.b) {
		t.Error("the slot holds more than its key")
	}
}

// TestHostileKeyLength: a length that no key has is never followed.
func TestHostileKeyLength(t *testing.T) {
	e := newEditor(t, 8)
	last := e.Slots() - 1 // behind it the mapping ends
	publish(t, e, last, "key")
	for _, n := range []uint64{0, 256, 1 << 20, 1 << 63, 1<<64 - 1} {
		e.slot[last][slotKeyLen/8].Store(n)
		if key, ok := e.Key(last); ok {
			t.Errorf("length %d: Key = %q", n, key)
		}
		for _, key := range []string{"", "key", strings.Repeat("k", 256), strings.Repeat("k", 1<<20)} {
			e.IndexInsert(last, key)
			if f, ok := e.Lookup(key); ok {
				t.Errorf("length %d: found %d bytes of key: %+v", n, len(key), f)
			}
			if _, ok := e.Scan(key); ok {
				t.Errorf("length %d: scanned %d bytes of key", n, len(key))
			}
		}
	}
}

// TestPaddingIsIgnored: Key and Lookup agree about a slot whose padding is not
// zero.
func TestPaddingIsIgnored(t *testing.T) {
	e := newEditor(t, 8)
	publish(t, e, 0, "abc")
	e.b[slotOffset(e, 0)+slotKey+3] = 'x'
	if key, ok := e.Key(0); !ok || key != "abc" {
		t.Errorf("Key = %q, %v", key, ok)
	}
	if _, ok := e.Lookup("abc"); !ok {
		t.Error("Lookup does not find what Key says")
	}
	wantSound(t, e)
}

// TestScan finds without the index, prefers a slot in use, else the one that
// named the key last.
func TestScan(t *testing.T) {
	e := newEditor(t, 8)
	for slot := range 3 {
		swap(t, e, 2-slot, claim(t, e, 2-slot, "key").With(Free))
	}
	if f, ok := e.Scan("key"); !ok || f.Slot != 0 || f.Word != MakeWord(Free, 3) {
		t.Errorf("of three FREE slots: %+v, %v, want slot 0 with generation 3", f, ok)
	}
	claim(t, e, 5, "key")
	for pos := range e.mask + 1 {
		e.setIndex(pos, indexEmpty)
	}
	if f, ok := e.Scan("key"); !ok || f.Slot != 5 || f.Word != e.Word(5) {
		t.Errorf("Scan = %+v, %v, want slot 5", f, ok)
	}
	if f, ok := e.Scan("other"); ok {
		t.Errorf("Scan of another key = %+v", f)
	}
}

// TestEdit writes through one mapping and reads through another.
func TestEdit(t *testing.T) {
	read := newEditor(t, 8)
	e, err := read.Table.Edit(read.b)
	if err != nil {
		t.Fatal(err)
	}
	w := publish(t, e, 3, "key")
	if f, ok := read.Lookup("key"); !ok || f.Word != w || e.Word(3) != w {
		t.Errorf("found %+v, %v, want %v", f, ok, w)
	}
	wantSound(t, e)
	if _, err := read.Table.Edit(newEditor(t, 16).b); !errors.Is(err, ErrCorrupt) {
		t.Errorf("another table: %v", err)
	}
}

// TestUsed lists what was ever named, and counts what is named now.
func TestUsed(t *testing.T) {
	e := newEditor(t, 64)
	check := func(named int, used ...int) {
		t.Helper()
		if got := e.Used(); !slices.Equal(got, used) {
			t.Errorf("Used = %v, want %v", got, used)
		}
		if n := e.Named(); n != named {
			t.Errorf("Named = %d, want %d", n, named)
		}
	}
	check(0)
	publish(t, e, 5, "a")
	claim(t, e, 63, "b")
	check(2, 5, 63)
	remove(t, e, 5)
	check(1, 5, 63)
	e.SetKey(7, "named and never claimed")
	check(1, 5, 7, 63)
}

// TestReset: a slot that makes no sense becomes one that can be claimed.
func TestReset(t *testing.T) {
	e := newEditor(t, 8)
	publish(t, e, 0, "key")
	e.slot[0][slotWord/8].Store(1<<64 - 1)
	if e.Sane(0) == nil {
		t.Fatal("a word of all ones is sane")
	}
	e.Reset(0)
	e.RepairIndex()
	wantSound(t, e)
	publish(t, e, 0, "another")
	wantSound(t, e)
}

func TestStripe(t *testing.T) {
	seen := map[int]int{}
	for i := range 100_000 {
		s := Stripe(fmt.Sprintf("org/model-%d", i))
		if s < 0 || s >= Stripes {
			t.Fatalf("stripe %d", s)
		}
		seen[s]++
	}
	if len(seen) != Stripes {
		t.Errorf("100,000 keys use %d of %d stripes", len(seen), Stripes)
	}
	if got := StripeLock(7) + " " + StripeLock(Stripes-1); got != "k-0007 k-1023" {
		t.Errorf("stripe locks: %s", got)
	}
}

// TestLookupAllocates nothing, on a hit and on a miss.
func TestLookupAllocates(t *testing.T) {
	e := newEditor(t, DefaultSlots)
	keys := fill(t, e, 64)
	if n := testing.AllocsPerRun(100, func() {
		for _, key := range keys {
			e.Lookup(key)
		}
		e.Lookup("missing")
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
