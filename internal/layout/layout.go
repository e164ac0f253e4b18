package layout

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Identity of the format. Changing any constant of this file changes the
// format: it needs a new Version, a new folder name and new golden images.
const (
	Version   = 1
	Folder    = "v1"                      // everything of this version lies under it
	Magic     = 0x0a_79_70_6f_63_65_6e_6f // the bytes "onecopy\n"
	ByteOrder = 0x0102030405060708
)

// Sizes and limits.
const (
	HeaderSize   = 4096
	SlotSize     = 448
	indexAlign   = 4096
	indexFactor  = 4 // index entries per slot, at least
	DefaultSlots = 1024
	MinSlots     = 8
	MaxSlots     = 32768
	Stripes      = 1024 // load locks

	MaxKey      = 255
	MaxFiles    = 16384
	MaxPath     = 1024
	MaxManifest = 8 << 20
	MaxGen      = 1<<56 - 1

	// DefaultBudgetPPM is the share of the tmpfs that a registry may use when
	// its header states no budget: 80 %.
	DefaultBudgetPPM = 800_000
)

// Header fields. Identity, written once before the table is linked.
const (
	offMagic     = 0
	offVersion   = 8
	offByteOrder = 16
	offEpoch     = 24
	offBootID    = 32 // 16 bytes
	offSlots     = 48
	offIndex     = 56
	offStripes   = 64
	offSlotSize  = 72
	offCreated   = 80
	offChecksum  = 120 // XXH64 of bytes 0..119

	// Own cache line: bumped by every load.
	offGeneration = 128

	// Configuration, changed under T.
	offBudget    = 192
	offBudgetPPM = 200
	offTTL       = 208

	// Counters, changed under T.
	offCounters = 256
	numCounters = 64
)

// Slot fields, relative to the slot.
const (
	slotWord   = 0
	slotKeyLen = 8
	slotKey    = 16 // 256 bytes, zero-padded
	slotHints  = 320
	numHints   = 16
)

// Every 8-byte word at a multiple of 8, every slot at a multiple of 64, nothing
// overlaps: asserted when this file compiles (a negative array length fails).
var (
	_ [-(offGeneration % 64)]struct{}
	_ [-(offBudget % 64)]struct{}
	_ [-(offCounters % 64)]struct{}
	_ [-(HeaderSize % indexAlign)]struct{}
	_ [-(SlotSize % 64)]struct{}
	_ [-(slotKey % 8)]struct{}
	_ [-(slotHints % 64)]struct{}
	_ [offBootID + 16 - offSlots]struct{}
	_ [offSlots - offBootID - 16]struct{}
	_ [offChecksum - offCreated - 8]struct{}
	_ [offGeneration - offChecksum - 8]struct{}
	_ [HeaderSize - offCounters - 8*numCounters]struct{}
	_ [slotHints - slotKey - 256]struct{}
	_ [SlotSize - slotHints - 8*numHints]struct{}
	_ [slotHints + 8*numHints - SlotSize]struct{}
	_ [numHints - int(hintEnd)]struct{}
	_ [numCounters - int(counterEnd)]struct{}
	_ [MaxSlots - DefaultSlots]struct{}
	_ [65534 - MaxSlots]struct{} // slot+1 fits 16 bits, 0xffff is the mark for deleted
)

// A Hint is a word of a slot that never decides about integrity.
type Hint int

// The hints of a slot, in order; see fields.go for who writes each and when it
// counts.
const (
	HintBytes Hint = iota
	HintTTL
	HintPin
	HintLastAttach
	HintLastRelease
	HintIdleSince
	HintReserved
	HintDeaths
	HintRetryAfter
	HintAttaches
	HintLoaderPID
	HintLoadStart
	HintPrevious
	HintPromised
	hintEnd
)

// A Counter is a statistic of the registry; it only grows.
type Counter int

// The counters of the header, in order.
const (
	CountLoads Counter = iota
	CountLoadNanos
	CountLoadBytes
	CountCollapsedBytes
	CountTakeovers
	CountReplaced
	CountRemoved
	CountEvictedSpace
	CountEvictedTable
	CountEvictedTTL
	CountReclaimed
	CountLeftovers
	CountLoadErrors
	CountFallbacks
	counterEnd
)

// Errors of NewTable and of every other decoder of this package.
var (
	ErrVersion = errors.New("another layout version")
	ErrCorrupt = errors.New("not a valid table")
)

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))
}

// indexEntries is the number of index entries of a table of n slots.
func indexEntries(slots int) int {
	n := 1
	for n < indexFactor*slots {
		n *= 2
	}
	return n
}

func slotsOffset(slots int) int {
	n := HeaderSize + 4*indexEntries(slots)
	return (n + indexAlign - 1) / indexAlign * indexAlign
}

// TableSize is the size in bytes of the file of a table of n slots.
func TableSize(slots int) int { return slotsOffset(slots) + slots*SlotSize }

// HintOffset is the offset in the file of a hint, for writers that store an
// unlocked hint with one aligned 8-byte write.
func HintOffset(tableSlots, slot int, h Hint) int64 {
	return int64(slotsOffset(tableSlots) + slot*SlotSize + slotHints + 8*int(h))
}

// Identity is what the checksummed part of the header says.
type Identity struct {
	Epoch   uint64
	BootID  [16]byte
	Slots   int
	Created int64 // nanoseconds since 1970, for display
}

// NewImage returns the bytes of a fresh table.
func NewImage(id Identity, budget, ttl uint64) ([]byte, error) {
	if id.Slots < MinSlots || id.Slots > MaxSlots {
		return nil, fmt.Errorf("layout: %d slots: want %d to %d", id.Slots, MinSlots, MaxSlots)
	}
	if id.Epoch == 0 {
		return nil, errors.New("layout: epoch 0")
	}
	b := make([]byte, TableSize(id.Slots))
	put := binary.LittleEndian.PutUint64
	put(b[offMagic:], Magic)
	put(b[offVersion:], Version)
	put(b[offByteOrder:], ByteOrder)
	put(b[offEpoch:], id.Epoch)
	copy(b[offBootID:], id.BootID[:])
	put(b[offSlots:], uint64(id.Slots))
	put(b[offIndex:], uint64(indexEntries(id.Slots)))
	put(b[offStripes:], Stripes)
	put(b[offSlotSize:], SlotSize)
	put(b[offCreated:], uint64(id.Created))
	put(b[offChecksum:], checksum(b[:offChecksum]))
	put(b[offBudget:], budget)
	put(b[offTTL:], ttl)
	return b, nil
}
