package layout

import "fmt"

// State is the state of a slot.
type State uint8

// The states. A zeroed slot is FREE with generation 0.
const (
	Free State = iota
	Loading
	Ready
	Evicting
)

var stateNames = [...]string{"free", "loading", "ready", "evicting"}

func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// Valid reports whether s is one of the four states.
func (s State) Valid() bool { return int(s) < len(stateNames) }

// Transition is one allowed change of a slot's word.
type Transition struct {
	From, To State
	NewGen   bool   // the generation changes
	Owner    string // the lock that its maker holds besides T
	Why      string
}

// Transitions are all changes of a word that any program may make, all under T.
// CompareAndSwap refuses every other one.
var Transitions = []Transition{
	{Free, Loading, true, "K", "a loader claims the slot"},
	{Loading, Ready, false, "K", "the loader publishes"},
	{Loading, Free, false, "K", "the loader failed, or died and the holder of K cleans up"},
	{Ready, Ready, true, "K", "a replacer publishes, or a rollout is undone"},
	{Free, Ready, true, "K", "a replacer publishes after its old generation was evicted"},
	{Ready, Evicting, false, "manifest LOCK_EX", "the generation is being removed"},
	{Evicting, Free, false, "", "the generation is removed"},
	{Evicting, Ready, false, "", "its remover died and live leases exist"},
	{Ready, Free, false, "", "its manifest is gone: a third party deleted it"},
}

func allowed(from, to Word) bool {
	for _, t := range Transitions {
		if t.From == from.State() && t.To == to.State() && t.NewGen == (from.Generation() != to.Generation()) {
			return true
		}
	}
	return false
}

// Word is a slot's word: state and generation, changed together or not at all.
type Word uint64

// MakeWord packs a state and a generation.
func MakeWord(s State, gen uint64) Word { return Word(uint64(s)<<56 | gen&MaxGen) }

// State of the word; it may be invalid when the bytes are hostile.
func (w Word) State() State { return State(w >> 56) }

// Generation of the word.
func (w Word) Generation() uint64 { return uint64(w) & MaxGen }

// With returns the word with another state.
func (w Word) With(s State) Word { return MakeWord(s, w.Generation()) }

func (w Word) String() string { return fmt.Sprintf("%s|%d", w.State(), w.Generation()) }
