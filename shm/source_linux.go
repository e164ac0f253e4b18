//go:build amd64 || arm64

package shm

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/crashpoint"
	"github.com/onecopy/onecopy/internal/digest"
)

// How a source is read depends on whether it lies in the page cache. Out of the
// cache a copy is bound by memory, and one or two threads are enough. From a
// disk, reading past the cache straight into 2 MiB pages is fastest, with several
// small windows in flight, and leaves nothing behind in the cache.
const (
	warmWindow  = max(64<<20/crashpoint.Shrink, chunkBytes)
	coldWindow  = max(16<<20/crashpoint.Shrink, chunkBytes)
	coldThreads = 8
	directAlign = 4096
)

// source is an open file that segments are filled from.
type source struct {
	f      *os.File
	direct atomic.Pointer[os.File] // O_DIRECT; nil where the file system refuses
	own    *os.File                // to be closed
	cold   bool                    // most of it was not in the page cache
}

func newSource(f *os.File, size int64) *source {
	s := &source{f: f}
	switch {
	case size == 0:
	case size < smallFile:
		s.cold = s.uncached(0, size, 1)
	case s.uncached(0, size, 16):
		s.cold = true
		fd, err := openat(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(int(f.Fd())), unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
		if err == nil {
			s.own = os.NewFile(uintptr(fd), f.Name())
			s.direct.Store(s.own)
		}
	}
	return s
}

func (s *source) close() {
	if s.own != nil {
		s.own.Close()
	}
}

// uncached probes n places of [off, off+size) and reports whether most of them
// would have to be read from the disk.
func (s *source) uncached(off, size int64, n int64) bool {
	var b [1]byte
	missing := int64(0)
	for i := range n {
		at := off + size*i/n
		for {
			_, err := unix.Preadv2(int(s.f.Fd()), [][]byte{b[:]}, at, unix.RWF_NOWAIT)
			if errors.Is(err, unix.EAGAIN) {
				missing++
			} else if errors.Is(err, unix.EINTR) {
				continue
			}
			break
		}
	}
	return 2*missing > n
}

// forget drops what a buffered read of a cold range left in the page cache.
func (s *source) forget(off, n int64) {
	_ = unix.Fadvise(int(s.f.Fd()), off, n, unix.FADV_DONTNEED)
}

// hole reports whether [off, off+n) is a hole of a sparse file.
func (s *source) hole(off, n int64) bool {
	data, err := unix.Seek(int(s.f.Fd()), off, unix.SEEK_DATA)
	return errors.Is(err, unix.ENXIO) || err == nil && data >= off+n
}

// read fills b from off, past the page cache if direct; it reports whether it
// did so.
func (s *source) read(b []byte, off int64, direct bool) (bool, error) {
	d := s.direct.Load()
	if !direct || d == nil || off%directAlign != 0 || len(b)%directAlign != 0 {
		return false, readFull(s.f, b, off)
	}
	err := readFull(d, b, off)
	if errors.Is(err, unix.EINVAL) {
		// Some file systems take the open and refuse the read.
		s.direct.Store(nil)
		return false, readFull(s.f, b, off)
	}
	return true, err
}

// zeroSum is the digest of a chunk of zeros.
var zeroSum = sync.OnceValue(func() [digest.Size]byte { return digest.Sum(make([]byte, chunkBytes)) })

// readFull reads len(b) bytes at off; a file that ends before is ErrSource.
func readFull(src *os.File, b []byte, off int64) error {
	n, err := src.ReadAt(b, off)
	switch {
	case n == len(b):
		return nil
	case errors.Is(err, io.EOF):
		return pathErr("read", src.Name(), fmt.Errorf("%w: it ends at byte %d and was longer when the load began", ErrSource, off+int64(n)))
	default:
		var pe *os.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		return pathErr("read", src.Name(), fmt.Errorf("%w: %w", ErrSource, err))
	}
}
