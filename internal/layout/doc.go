// Package layout is the binary layout of a registry, version 1: the header
// table, the manifest and the digests file. It is the only place in the module
// that states an offset. It does no I/O, reads no clock and makes no system
// call; it works on bytes that somebody else mapped or read.
//
// # The table
//
// The file v1/registry is
//
//	+--------------------+ 0
//	| header             |   4096 bytes: identity (checksummed), generation
//	|                    |   counter, configuration, counters
//	+--------------------+ 4096
//	| index              |   4 x slots (rounded up to a power of two) uint32
//	|                    |   entries of tag<<16 | slot+1, linear probing
//	+--------------------+ rounded up to 4096
//	| slots              |   SlotSize bytes each
//	+--------------------+ TableSize(slots) = the size of the file
//
// Every field is listed once, with its offset, its writer and its meaning, in
// fields.go; docs/FORMAT.md and the constants of other languages are generated
// from that list (go generate).
//
// # Words
//
// All numbers are little-endian and naturally aligned; a big-endian machine
// refuses the byte-order mark. Every word that changes after creation is read
// and written atomically, and only through the views of this package.
//
// A slot's word is state<<56 | generation. Every visible change of a slot is
// one compare-and-swap (or, by a writer that has none, one plain aligned 8-byte
// store under the table lock T) of that word. Generations count per table, are
// never reused, and never return to zero; the word keeps the generation when
// its slot becomes FREE.
//
// # Who may read and write
//
// Anybody who can map the table reads it, without any lock. Every write happens
// under T, except the hints that are documented as unlocked in fields.go. The
// key of a slot changes only while the slot is FREE, so a reader that finds the
// same READY word before and after it compared the key has compared the key of
// that generation. Nothing else that must agree with a generation lives in the
// slot: it is in the generation's manifest, read under the lease.
//
// The index is a hint. A reader that misses because of a torn index misses; a
// writer under T scans the slots before it believes a miss.
//
// # Lifetime
//
// A table lives on a tmpfs and is gone at reboot. Another layout version lives
// under another folder and is neither read, converted nor collected. Changing
// anything here that a reader of version 1 could notice needs a new Version:
// see CONTRIBUTING.md.
package layout

//go:generate go run ./gen
