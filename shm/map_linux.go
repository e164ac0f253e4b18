//go:build amd64 || arm64

package shm

// Mapping a file at a chosen address needs pointers: the only unsafe code of
// this package.

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/invariants"
)

// HugePage is the size of the pages that a load asks for. A mapping uses them
// only if its address is a multiple of it.
const HugePage = 2 << 20

const madvCollapse = 25

// Mapping is a mapped file. Bytes are valid until Unmap.
type Mapping struct {
	Bytes []byte
	addr  unsafe.Pointer // of the whole reservation
	size  uintptr
}

// Map maps size bytes of the file behind fd from the start, read-only, shared,
// left out of core dumps, at an address that allows 2 MiB pages. populate asks
// the kernel to enter all pages into the page table at once. The descriptor may
// be closed afterwards.
func Map(fd int, size int64, populate bool) (Mapping, error) {
	flags := unix.MAP_SHARED
	if populate {
		flags |= unix.MAP_POPULATE
	}
	return mapAt(fd, 0, size, unix.PROT_READ, flags)
}

// mapAt maps [off, off+size) of a file; off is a multiple of HugePage.
func mapAt(fd int, off, size int64, prot, flags int) (m Mapping, err error) {
	if size < 0 || size != int64(int(size)) {
		return m, fmt.Errorf("%w: %d bytes cannot be mapped", ErrLimit, size)
	}
	if size == 0 {
		return m, nil
	}
	length := uintptr(size)
	var base unsafe.Pointer
	if size < HugePage {
		base, err = unix.MmapPtr(fd, off, nil, length, prot, flags)
		m = Mapping{addr: base, size: length}
	} else {
		// The kernel does not align mappings of a tmpfs by itself unless it is
		// mounted with huge=: reserve more, then map at the boundary within.
		reserve := length + HugePage
		var room unsafe.Pointer
		room, err = unix.MmapPtr(-1, 0, nil, reserve, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
		if err == nil {
			up := (HugePage - uintptr(room)%HugePage) % HugePage
			base, err = unix.MmapPtr(fd, off, unsafe.Add(room, up), length, prot, flags|unix.MAP_FIXED)
			if err != nil {
				_ = unix.MunmapPtr(room, reserve)
			}
		}
		m = Mapping{addr: room, size: reserve}
	}
	if err != nil {
		return Mapping{}, MapError(err)
	}
	m.Bytes = unsafe.Slice((*byte)(base), length)
	_ = unix.Madvise(m.Bytes, unix.MADV_DONTDUMP) // weights do not belong into core dumps
	return m, nil
}

// Unmap ends the mapping; its bytes must not be used any more. Under the
// invariants tag the addresses stay reserved without access, so that a late read
// faults at once instead of reading something else.
func (m *Mapping) Unmap() error {
	if m.addr == nil {
		return nil
	}
	addr, size := m.addr, m.size
	*m = Mapping{}
	if invariants.Enabled {
		_, err := unix.MmapPtr(-1, 0, addr, size, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE|unix.MAP_FIXED)
		return err
	}
	return unix.MunmapPtr(addr, size)
}

// MapError names the limit behind a mapping that failed.
func MapError(err error) error {
	if errors.Is(err, unix.ENOMEM) {
		return fmt.Errorf("%w: no more mappings, or address space (sysctl vm.max_map_count, ulimit -v, vm.overcommit_memory): %w", ErrLimit, err)
	}
	return os.NewSyscallError("mmap", err)
}
