package procfs

import (
	"bytes"
	"math"
)

// Region is one mapping of a process and what of it is in memory, in bytes.
type Region struct {
	Start, End uint64
	Offset     uint64 // of Start in the file
	Perms      string // as in maps: "r--s"
	File       FileID // Inode 0: no file
	Path       string // printable, as in maps; "[heap]" and the like, or "", without a file
	RSS        int64
	PSS        int64 // every page divided by the number of its mappings
	Anonymous  int64 // the part of RSS that no file backs
	Swap       int64
	Huge       int64 // the part of RSS in shared memory that is mapped with huge pages
}

// Page is what the kernel says about one page of a process.
type Page uint64

// Present reports whether the page is in memory and in the page table: reading
// it changes nothing for the process.
func (p Page) Present() bool { return p>>63 != 0 }

// Shared reports whether a present page belongs to a file or to shared memory,
// and not to the process alone.
func (p Page) Shared() bool { return p>>61&1 != 0 }

// regions collects smaps.
type regions struct {
	least int64 // RSS
	found []Region
	cur   Region
	open  bool
}

func (r *regions) line(line []byte) {
	name, rest := cutField(line)
	field, isField := bytes.CutSuffix(name, []byte(":"))
	if !isField {
		r.end()
		r.cur, r.open = parseRegion(line)
		return
	}
	var to *int64
	switch string(field) {
	case "Rss":
		to = &r.cur.RSS
	case "Pss":
		to = &r.cur.PSS
	case "Anonymous":
		to = &r.cur.Anonymous
	case "Swap":
		to = &r.cur.Swap
	case "ShmemPmdMapped":
		to = &r.cur.Huge
	default:
		return
	}
	if n, ok := parseSize(rest); ok {
		*to = n
	}
}

// end completes the entry that is being read.
func (r *regions) end() {
	if r.open && r.cur.RSS >= r.least {
		r.found = append(r.found, r.cur)
	}
	r.open = false
}

// parseRegion takes the first line of an entry of smaps, like parseVMA, and
// more of it.
func parseRegion(line []byte) (Region, bool) {
	v, ok := parseVMA(line)
	if !ok || v.start > v.end || v.end > math.MaxInt64 {
		return Region{}, false
	}
	rest := line
	var offset []byte
	for range 2 {
		_, rest = cutField(rest)
	}
	offset, rest = cutField(rest)
	for range 2 {
		_, rest = cutField(rest)
	}
	r := Region{Start: v.start, End: v.end, Perms: string(v.perms), File: v.file}
	if r.Offset, ok = parseUint(offset, 16); !ok {
		return Region{}, false
	}
	r.Path = printable(bytes.TrimLeft(rest, " \t"))
	return r, true
}
