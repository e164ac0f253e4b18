// Package procfs reads the few facts about processes and locks that onecopy
// shows to people: who maps or holds a file, what that costs in memory, and
// who holds a lock.
//
// Nothing here may decide anything. A process can exit, and its number be used
// again, between two reads; a process of another user or outside our pid
// namespace cannot be seen at all; and /proc/locks names the process that
// called flock, which may be dead while a child keeps the lock. Whether a model
// is in use is known from the kernel lock alone.
//
// A file is found by the device and inode number that the kernel prints. On
// tmpfs they are those of stat. On file systems that show stat something else
// (overlayfs, btrfs) a file may not be found.
//
// All parsers are total: a line that does not have the expected form is left
// out, never an error and never a panic. On systems other than Linux every
// function returns errors.ErrUnsupported.
package procfs

import (
	"cmp"
	"time"
)

// FileID identifies a file on this machine while it exists.
type FileID struct {
	Dev   uint64 // as st_dev
	Inode uint64
}

func (id FileID) compare(other FileID) int {
	return cmp.Or(cmp.Compare(id.Dev, other.Dev), cmp.Compare(id.Inode, other.Inode))
}

// Lock is one line of /proc/locks.
type Lock struct {
	Type         string // FLOCK, POSIX, OFDLCK, LEASE, DELEG, ...
	Exclusive    bool
	Waiting      bool // blocked behind the lock printed before it
	PID          int  // who asked for it; -1 for OFDLCK, 0 outside our pid namespace
	Major, Minor uint32
	Inode        uint64
}

// File returns the locked file in the form in which stat names it.
func (l Lock) File() FileID { return FileID{Dev: makeDev(l.Major, l.Minor), Inode: l.Inode} }

// Unlinked is a deleted file that a process still maps.
type Unlinked struct {
	File  FileID
	Path  string // that it had, as the process sees it
	Bytes int64  // mapped, at most
}

// Residency is what one process's mappings of one file cost, in bytes.
type Residency struct {
	Size           int64 // address space
	RSS            int64
	PSS            int64 // every page divided by the number of its mappings
	SharedClean    int64
	SharedDirty    int64
	PrivateClean   int64
	PrivateDirty   int64
	Swap           int64
	Locked         int64
	ShmemPMDMapped int64 // the part of RSS mapped with huge pages
}

// Proc describes one process.
type Proc struct {
	PID        int
	Command    string    // printable, at most 4 KiB; "[name]" where there is no command line
	UID        int       // effective
	Start      time.Time // exact to about a second
	CgroupPath string    // of the memory controller if that is on v1, else of v2
	VmRSS      int64     // bytes, as are the next two; the kernel's figures are approximate
	VmPTE      int64
	RssShmem   int64
}

// makeDev is the C library's makedev, the inverse of what the kernel prints as
// major:minor.
func makeDev(major, minor uint32) uint64 {
	return uint64(major&0xfffff000)<<32 | uint64(major&0xfff)<<8 |
		uint64(minor&0xffffff00)<<12 | uint64(minor&0xff)
}
