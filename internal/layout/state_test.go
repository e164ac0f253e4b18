package layout

import "testing"

// TestTransitions: exactly the listed changes are possible. Every pair of words
// of the four states, two unknown ones and three generations is tried.
func TestTransitions(t *testing.T) {
	type change struct {
		from, to State
		newGen   bool
	}
	want := map[change]bool{
		{Free, Loading, true}:    true,
		{Loading, Ready, false}:  true,
		{Loading, Free, false}:   true,
		{Ready, Ready, true}:     true,
		{Free, Ready, true}:      true,
		{Ready, Evicting, false}: true,
		{Evicting, Free, false}:  true,
		{Evicting, Ready, false}: true,
		{Ready, Free, false}:     true,
	}
	if len(want) != len(Transitions) {
		t.Errorf("%d transitions are listed, %d expected", len(Transitions), len(want))
	}
	e := newEditor(t, 8)
	states := []State{Free, Loading, Ready, Evicting, 4, 255}
	gens := []uint64{1, 2, MaxGen}
	word := &e.slot[0][slotWord/8]
	for _, from := range states {
		for _, to := range states {
			for _, g := range gens {
				for _, h := range gens {
					old, new := MakeWord(from, g), MakeWord(to, h)
					word.Store(uint64(old))
					got := e.CompareAndSwap(0, old, new)
					if got != want[change{from, to, g != h}] {
						t.Errorf("%v to %v: %v", old, new, got)
					}
					if now := e.Word(0); got && now != new || !got && now != old {
						t.Errorf("%v to %v: the word is %v", old, new, now)
					}
				}
			}
		}
	}
}

// TestCompareAndSwapLoses when the word is not what the caller read.
func TestCompareAndSwapLoses(t *testing.T) {
	e := newEditor(t, 8)
	w := publish(t, e, 0, "key")
	if e.CompareAndSwap(0, MakeWord(Ready, w.Generation()+1), MakeWord(Evicting, w.Generation()+1)) || e.Word(0) != w {
		t.Errorf("the word is %v", e.Word(0))
	}
}

func TestWord(t *testing.T) {
	w := MakeWord(Evicting, MaxGen+5)
	if w.State() != Evicting || w.Generation() != 4 {
		t.Errorf("a generation too long changed the state: %v", w)
	}
	if w := MakeWord(Ready, 7).With(Free); w.String() != "free|7" || State(9).String() != "state 9" || State(4).Valid() || !Evicting.Valid() {
		t.Errorf("%v %v", w, State(9))
	}
}
