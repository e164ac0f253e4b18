package procfs

import (
	"encoding/binary"
	"io"
	"os"
	"strconv"
	"syscall"
)

// Memory looks into the memory of one process: never into that of a later one
// with the same number. It takes what ptrace takes: the same user, or
// CAP_SYS_PTRACE. The process is not stopped and its memory is not changed.
type Memory struct {
	smaps, pagemap, mem *file
	pageSize            uint64
}

// OpenMemory opens a process's memory. fs.ErrPermission: see [Hidden].
func OpenMemory(pid int) (*Memory, error) { return host.openMemory(pid) }

// Hidden reports whether err, from looking at a process, means that it has
// memory which we may not see: not that it is gone, or a kernel thread.
func Hidden(pid int, err error) bool { return host.hidden(pid, err) }

func (t tree) openMemory(pid int) (m *Memory, err error) {
	dir, err := open(t.path(strconv.Itoa(pid)))
	if err != nil {
		return nil, err
	}
	defer dir.close()
	m = &Memory{pageSize: uint64(os.Getpagesize())}
	for _, f := range []struct {
		to   **file
		name string
	}{{&m.smaps, "smaps"}, {&m.pagemap, "pagemap"}, {&m.mem, "mem"}} {
		if *f.to, err = openAt(dir, f.name); err != nil {
			m.Close()
			return nil, err
		}
	}
	return m, nil
}

// Close closes the view.
func (m *Memory) Close() {
	for _, f := range []*file{m.smaps, m.pagemap, m.mem} {
		if f != nil {
			f.close()
		}
	}
}

// Regions lists the mappings with at least the given number of bytes in memory.
// It can be called once. The kernel walks the page tables for it.
func (m *Memory) Regions(leastRSS int64) ([]Region, error) {
	r := regions{least: leastRSS}
	if err := m.smaps.lines(make([]byte, bufferSize), r.line); err != nil {
		return nil, err
	}
	r.end()
	return r.found, nil
}

// Pages fills what the kernel says about the pages from addr on, which is a
// multiple of the page size, and returns for how many it does.
func (m *Memory) Pages(addr uint64, pages []Page, buf []byte) (int, error) {
	want := min(len(pages), len(buf)/8)
	n, err := m.pagemap.readAt(buf[:want*8], int64(addr/m.pageSize*8))
	for i := range n / 8 {
		pages[i] = Page(binary.NativeEndian.Uint64(buf[i*8:]))
	}
	return n / 8, err
}

// ReadAt reads memory. Only what is [Page.Present] should be read: for anything
// else the kernel would bring it into memory first.
func (m *Memory) ReadAt(b []byte, addr int64) (int, error) {
	n, err := m.mem.readAt(b, addr)
	if err == nil && n < len(b) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// readAt is pread; a short result is no error.
func (f *file) readAt(b []byte, off int64) (int, error) {
	for {
		n, err := syscall.Pread(f.fd, b, off)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return 0, pathError("read", f.path, err)
		default:
			return n, nil
		}
	}
}
