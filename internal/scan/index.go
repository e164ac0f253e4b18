package scan

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"math/bits"
	"os"

	"github.com/onecopy/onecopy/internal/procfs"
)

const (
	pageBytes = 4096 // compared at a time, at the start of a page of the machine
	window    = 32   // bytes that are hashed
	head      = 240  // of a block: where its window may start
	// Blocks are so long that wherever a copy of pageBytes bytes begins, the
	// whole window of one block lies in it.
	blockBytes = pageBytes - head - window

	leastDistinct = 4  // byte values in a window that is worth an entry
	goodDistinct  = 12 // ... that needs no better
	entryBytes    = 32 // two words in a table that is half full
	filterFactor  = 32 // bits of the filter per entry, at least
	maxFiles      = 1 << 20
	offsetBits    = 44
)

// modelFile is an open file of a model.
type modelFile struct {
	model int
	f     *os.File
	size  int64
	id    procfs.FileID
}

// index finds places of the models by 32 bytes of their contents.
type index struct {
	files  []modelFile
	attach map[procfs.FileID]int // files of a registry: model
	own    map[procfs.FileID]int // files that were named: model
	stride int64                 // one block in so many has an entry
	keys   []uint64              // hash, 0 = free
	places []uint64              // file and offset
	filter []uint64              // bit set by hash: most look-ups end here
	shift  int                   // of a hash, to get the number of its bit
}

// newIndex opens and reads the files of the models.
func newIndex(ctx context.Context, models []Model, memory int64) (x *index, err error) {
	x = &index{attach: map[procfs.FileID]int{}, own: map[procfs.FileID]int{}}
	defer func() {
		if err != nil {
			x.close()
		}
	}()
	var blocks int64
	for i, m := range models {
		for _, path := range m.Files {
			f, err := openFile(i, path)
			if err != nil {
				return x, fileError(m, err)
			}
			x.files = append(x.files, f)
			if m.Registered {
				x.attach[f.id] = i
			} else {
				x.own[f.id] = i
			}
			blocks += f.size/blockBytes + 1
		}
	}
	if len(x.files) == 0 || len(x.files) > maxFiles {
		return x, ErrNothing
	}
	x.stride = max(1, (blocks*entryBytes+memory-1)/memory)
	x.make(blocks/x.stride + 1)
	for i := range x.files {
		if err := x.add(ctx, i); err != nil {
			return x, fileError(models[x.files[i].model], err)
		}
	}
	return x, nil
}

func openFile(model int, path string) (modelFile, error) {
	// Before the open, which would wait on a FIFO.
	st, err := os.Stat(path)
	if err != nil {
		return modelFile{}, err
	}
	if !st.Mode().IsRegular() {
		return modelFile{}, &fs.PathError{Op: "open", Path: path, Err: errors.New("not a regular file")}
	}
	f, err := os.Open(path)
	if err != nil {
		return modelFile{}, err
	}
	id, err := identify(path)
	if err != nil {
		f.Close()
		return modelFile{}, err
	}
	return modelFile{model, f, st.Size(), id}, nil
}

func (x *index) close() {
	for _, f := range x.files {
		f.f.Close()
	}
}

// make makes room for n entries.
func (x *index) make(n int64) {
	size := 1 << bits.Len64(uint64(2*n))
	x.keys, x.places = make([]uint64, size), make([]uint64, size)
	x.filter = make([]uint64, max(1, size/2*filterFactor/64))
	x.shift = 64 - bits.TrailingZeros(uint(len(x.filter)*64))
}

// add reads one window of every block of a file.
func (x *index) add(ctx context.Context, file int) error {
	f := x.files[file]
	b := make([]byte, head+window)
	for n, off := 0, int64(0); off < f.size; n, off = n+1, off+blockBytes*x.stride {
		if n%1024 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		got, err := f.f.ReadAt(b, off)
		if err != nil && err != io.EOF {
			return err
		}
		if at, ok := distinctive(b[:got]); ok {
			x.put(hash(b[at:]), uint64(file)<<offsetBits|uint64(off+int64(at)))
		}
	}
	return nil
}

// distinctive returns where the window begins that is least like others.
func distinctive(b []byte) (at int, ok bool) {
	most := leastDistinct - 1
	for p := 0; p+window <= len(b); p += 16 {
		var seen [4]uint64
		for _, c := range b[p : p+window] {
			seen[c>>6] |= 1 << (c & 63)
		}
		n := 0
		for _, s := range seen {
			n += bits.OnesCount64(s)
		}
		if n > most {
			most, at, ok = n, p, true
		}
		if n >= goodDistinct {
			break
		}
	}
	return at, ok
}

// hash of the first 32 bytes of b; never 0.
func hash(b []byte) uint64 {
	b = b[:window]
	const k0, k1, k2, k3 = 0x9e3779b97f4a7c15, 0xc2b2ae3d27d4eb4f, 0x165667b19e3779f9, 0xd6e8feb86659fd93
	h := binary.LittleEndian.Uint64(b)*k0 ^
		bits.RotateLeft64(binary.LittleEndian.Uint64(b[8:])*k1, 17) ^
		bits.RotateLeft64(binary.LittleEndian.Uint64(b[16:])*k2, 31) ^
		bits.RotateLeft64(binary.LittleEndian.Uint64(b[24:])*k3, 47)
	h ^= h >> 29
	h *= k1
	return h ^ h>>32 | 1<<63
}

// put keeps one place of a hash for each model: which of several equal places
// of a model it is does not matter.
func (x *index) put(h, place uint64) {
	model := func(place uint64) int { return x.files[place>>offsetBits].model }
	mask := uint64(len(x.keys) - 1)
	i := h & mask
	for ; x.keys[i] != 0; i = (i + 1) & mask {
		if x.keys[i] == h && model(x.places[i]) == model(place) {
			return
		}
	}
	x.keys[i], x.places[i] = h, place
	bit := h << 1 >> x.shift // the top bit is always set
	x.filter[bit/64] |= 1 << (bit % 64)
}

// lookUp calls fn for each place of a model that b, memory of a process, could
// be a copy of: off is where b[0] would be in the file and may be negative. fn
// returns whether to go on; it sees what all models have at one place.
func (x *index) lookUp(b []byte, fn func(file int, off int64) bool) {
	mask := uint64(len(x.keys) - 1)
	for p := 0; p+window <= len(b); p++ {
		h := hash(b[p:])
		if bit := h << 1 >> x.shift; x.filter[bit/64]>>(bit%64)&1 == 0 {
			continue
		}
		more := true
		for i := h & mask; x.keys[i] != 0; i = (i + 1) & mask {
			if x.keys[i] == h {
				place := x.places[i]
				more = fn(int(place>>offsetBits), int64(place&(1<<offsetBits-1))-int64(p)) && more
			}
		}
		if !more {
			return
		}
	}
}

// leastEqual bytes of a page, in one piece, must be the model's.
const leastEqual = pageBytes / 4

// compare returns how many bytes of b, from its start or to its end, are those
// of the file at off, 0 for less than leastEqual. buf has the size of b.
func (x *index) compare(file int, off int64, b, buf []byte) int {
	f := x.files[file]
	from, to := max(0, -off), min(int64(len(b)), f.size-off)
	if to-from < leastEqual {
		return 0
	}
	want := buf[:to-from]
	if _, err := f.f.ReadAt(want, off+from); err != nil {
		return 0 // truncated meanwhile
	}
	got := b[from:to]
	front := equalFront(got, want)
	if front == len(got) {
		if blank(got) {
			return 0
		}
		return front
	}
	n := front
	equal := got[:front]
	if back := equalBack(got, want); back > front {
		n, equal = back, got[len(got)-back:]
	}
	if n < leastEqual || blank(equal) {
		return 0
	}
	return n
}

func equalFront(a, b []byte) int {
	n := 0
	for ; n+8 <= len(a) && binary.LittleEndian.Uint64(a[n:]) == binary.LittleEndian.Uint64(b[n:]); n += 8 {
	}
	for ; n < len(a) && a[n] == b[n]; n++ {
	}
	return n
}

func equalBack(a, b []byte) int {
	n := len(a)
	for ; n >= 8 && binary.LittleEndian.Uint64(a[n-8:]) == binary.LittleEndian.Uint64(b[n-8:]); n -= 8 {
	}
	for ; n > 0 && a[n-1] == b[n-1]; n-- {
	}
	return len(a) - n
}

// blank reports that b repeats one value of up to 8 bytes, such as zero.
func blank(b []byte) bool {
	if len(b) <= 8 {
		return true
	}
	return string(b[8:]) == string(b[:len(b)-8])
}
