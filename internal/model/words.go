package model

// What the protocol models share.

// A slotState is the high byte of the slot word. The registry's own constants are
// in internal/layout; the model needs the four names only.
type slotState uint8

const (
	free slotState = iota
	loading
	ready
	evicting
)

func (s slotState) String() string {
	return [...]string{"FREE", "LOADING", "READY", "EVICTING"}[s]
}

// A word is the slot word, which every visible change of a slot moves at once.
type word struct {
	St  slotState
	Gen uint8
}

// An outcome is what a finished process got.
type outcome uint8

const (
	gotModel   outcome = 1 // a hit, or its own job done
	gotNothing outcome = 2 // a miss, or nothing to do
	gotError   outcome = 3 // a clean, typed error
)

// outsideBit stands for an adversary in the bit sets of lock holders.
const outsideBit = 1 << 7

// faults counts the faults that have happened. It is part of every state.
type faults struct{ Crash, Rm, RmReg, Host, Restart uint8 }
