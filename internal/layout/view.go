package layout

// The only unsafe code of this package: atomic views of a mapped table. What is
// viewed was cut out of the mapping by a slice expression, so a bad number
// panics in Go and never reaches memory outside of it.

import (
	"sync/atomic"
	"unsafe"
)

// slotView is one slot as words; slotWord/8 is the position of its first field.
type slotView [SlotSize / 8]atomic.Uint64

func aligned(b []byte) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(b)))%8 == 0
}

func viewIndex(b []byte) []atomic.Uint32 {
	return unsafe.Slice((*atomic.Uint32)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/4)
}

func viewPairs(b []byte) []atomic.Uint64 {
	return unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/8)
}

func viewSlots(b []byte) []slotView {
	return unsafe.Slice((*slotView)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/SlotSize)
}

// word64 views a word of the header.
func (t *Table) word64(off int) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(unsafe.SliceData(t.b[off : off+8 : HeaderSize])))
}
