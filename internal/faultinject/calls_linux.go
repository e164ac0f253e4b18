//go:build amd64 || arm64

package faultinject

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// call says what is to be known of a system call: which arguments tell what it
// asks for, and which one what it is about.
type call struct {
	name   string
	about  about
	arg    int // of what it is about
	detail func(args [6]uint64) string
}

// about is how an argument leads to a file.
type about int

const (
	descriptor about = iota
	pathAt           // a directory's descriptor; the path is the next argument
	path
	address
)

var calls = map[uint64]call{
	unix.SYS_OPENAT:     {name: "openat", about: pathAt, detail: openFlags},
	unix.SYS_CLOSE:      {name: "close"},
	unix.SYS_READ:       {name: "read"},
	unix.SYS_WRITE:      {name: "write"},
	unix.SYS_PREAD64:    {name: "pread64"},
	unix.SYS_PWRITE64:   {name: "pwrite64"},
	unix.SYS_PREADV:     {name: "preadv"},
	unix.SYS_PREADV2:    {name: "preadv2", detail: func(a [6]uint64) string { return flags(a[5], "NOWAIT", unix.RWF_NOWAIT) }},
	unix.SYS_GETDENTS64: {name: "getdents64"},
	unix.SYS_LSEEK: {name: "lseek", detail: func(a [6]uint64) string {
		return oneOf(a[2], "SET", unix.SEEK_SET, "DATA", unix.SEEK_DATA, "HOLE", unix.SEEK_HOLE)
	}},
	unix.SYS_FTRUNCATE:  {name: "ftruncate"},
	unix.SYS_FALLOCATE:  {name: "fallocate"},
	unix.SYS_FSYNC:      {name: "fsync"},
	unix.SYS_FCHMOD:     {name: "fchmod"},
	unix.SYS_FCHMODAT:   {name: "fchmodat", about: pathAt},
	unix.SYS_FSTAT:      {name: "fstat"},
	sysFstatat:          {name: "newfstatat", about: pathAt},
	unix.SYS_STATX:      {name: "statx", about: pathAt},
	unix.SYS_STATFS:     {name: "statfs", about: path},
	unix.SYS_FSTATFS:    {name: "fstatfs"},
	unix.SYS_READLINKAT: {name: "readlinkat", about: pathAt},
	unix.SYS_FACCESSAT2: {name: "faccessat2", about: pathAt},
	unix.SYS_MKDIRAT:    {name: "mkdirat", about: pathAt},
	unix.SYS_UNLINKAT: {name: "unlinkat", about: pathAt, detail: func(a [6]uint64) string {
		return flags(a[2], "REMOVEDIR", unix.AT_REMOVEDIR)
	}},
	unix.SYS_LINKAT: {name: "linkat", about: pathAt, arg: 2, detail: func(a [6]uint64) string {
		return flags(a[4], "EMPTY_PATH", unix.AT_EMPTY_PATH, "FOLLOW", unix.AT_SYMLINK_FOLLOW)
	}},
	unix.SYS_FLOCK: {name: "flock", detail: func(a [6]uint64) string {
		return flags(a[1], "SH", unix.LOCK_SH, "EX", unix.LOCK_EX, "UN", unix.LOCK_UN, "NB", unix.LOCK_NB)
	}},
	unix.SYS_FCNTL: {name: "fcntl", detail: func(a [6]uint64) string {
		return oneOf(a[1], "GETFL", unix.F_GETFL, "SETFL", unix.F_SETFL, "GETFD", unix.F_GETFD, "SETFD", unix.F_SETFD,
			"DUPFD", unix.F_DUPFD_CLOEXEC, "SETLEASE", unix.F_SETLEASE)
	}},
	unix.SYS_FADVISE64: {name: "fadvise64"},
	unix.SYS_MMAP: {name: "mmap", arg: 4, detail: func(a [6]uint64) string {
		return flags(a[2], "READ", unix.PROT_READ, "WRITE", unix.PROT_WRITE)
	}},
	unix.SYS_MUNMAP: {name: "munmap", about: address},
	unix.SYS_MADVISE: {name: "madvise", about: address, detail: func(a [6]uint64) string {
		return oneOf(a[2], "DONTDUMP", unix.MADV_DONTDUMP, "DONTFORK", unix.MADV_DONTFORK,
			"COLLAPSE", 25, "POPULATE_READ", 22, "POPULATE_WRITE", 23, "HUGEPAGE", unix.MADV_HUGEPAGE)
	}},
}

func init() { maps.Copy(calls, ofMachine) }

func openFlags(a [6]uint64) string {
	s := [...]string{"RDONLY", "WRONLY", "RDWR", "3"}[a[2]&unix.O_ACCMODE]
	if a[2]&unix.O_TMPFILE == unix.O_TMPFILE {
		return s + "|TMPFILE"
	}
	if f := flags(a[2], "CREAT", unix.O_CREAT, "DIRECTORY", unix.O_DIRECTORY, "DIRECT", unix.O_DIRECT, "PATH", unix.O_PATH); f != "" {
		s += "|" + f
	}
	return s
}

// flags names the bits of v, given as name, bit, name, bit...
func flags(v uint64, names ...any) string {
	var on []string
	for i := 0; i < len(names); i += 2 {
		if bit := uint64(names[i+1].(int)); v&bit == bit {
			on = append(on, names[i].(string))
		}
	}
	return strings.Join(on, "|")
}

func oneOf(v uint64, names ...any) string {
	for i := 0; i < len(names); i += 2 {
		if v == uint64(names[i+1].(int)) {
			return names[i].(string)
		}
	}
	return strconv.FormatUint(v, 10)
}

// describe says what a call is; ok is false for those that are nobody's business.
func (t *tracer) describe(nr uint64, args [6]uint64) (c Call, ok bool) {
	d, ok := calls[nr]
	if !ok || t.o.Classify == nil {
		return c, false
	}
	file := ""
	switch d.about {
	case descriptor:
		if fd := int32(args[d.arg]); fd >= 0 {
			file = t.fdPath(int(fd))
		} else if nr == unix.SYS_MMAP && args[3]&unix.MAP_NORESERVE != 0 && args[2] == unix.PROT_NONE && !heap(args[1]) {
			file = reserved // the Go runtime asks for its own memory otherwise
		}
	case pathAt:
		file = t.resolve(int(int32(args[d.arg])), t.text(args[d.arg+1]))
	case path:
		file = t.resolve(unix.AT_FDCWD, t.text(args[d.arg]))
	case address:
		file = t.mappedAt(args[0], args[1])
	}
	if file != reserved && !strings.HasPrefix(file, "/") {
		return c, false // a pipe, or something of the Go runtime's (eventfd)
	}
	c = Call{Name: d.name, Target: t.o.Classify(file)}
	if d.detail != nil {
		c.Detail = d.detail(args)
	}
	if nr == unix.SYS_PREAD64 && t.isDirect(int(int32(args[0]))) {
		c.Detail = "DIRECT"
	}
	return c, c.Target != ""
}

const reserved = "[reserved]"

// heap reports whether a reservation has the size with which the C library, where a
// program is linked with it, begins a thread's heap.
func heap(size uint64) bool { return size == 64<<20 || size == 128<<20 }

func (t *tracer) fdPath(fd int) string {
	to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", t.pid, fd))
	return to
}

// isDirect reports whether a descriptor reads past the page cache.
func (t *tracer) isDirect(fd int) bool {
	info, _ := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", t.pid, fd))
	_, rest, _ := strings.Cut(string(info), "flags:")
	line, _, _ := strings.Cut(rest, "\n")
	flags, _ := strconv.ParseUint(strings.TrimSpace(line), 8, 64)
	return flags&unix.O_DIRECT != 0
}

// resolve puts a path together from a directory's descriptor and the rest, and
// follows /proc/self/fd, by which locks are opened.
func (t *tracer) resolve(dir int, name string) string {
	switch {
	case name == "" && dir == unix.AT_FDCWD:
		return ""
	case name == "" || name == "." && dir != unix.AT_FDCWD:
		return t.fdPath(dir)
	case !strings.HasPrefix(name, "/") && dir != unix.AT_FDCWD:
		return t.fdPath(dir) + "/" + name
	}
	if rest, ok := strings.CutPrefix(name, "/proc/self/fd/"); ok {
		number, below, deeper := strings.Cut(rest, "/")
		if fd, err := strconv.Atoi(number); err == nil {
			if name = t.fdPath(fd); deeper {
				name += "/" + below
			}
		}
	}
	return name
}

// text reads a string of the program.
func (t *tracer) text(at uint64) string {
	var s []byte
	for len(s) < unix.PathMax {
		// Not beyond the page: the next one may not be there.
		b := make([]byte, min(256, 4096-at%4096))
		n, err := unix.ProcessVMReadv(t.pid, []unix.Iovec{{Base: &b[0], Len: uint64(len(b))}},
			[]unix.RemoteIovec{{Base: uintptr(at), Len: len(b)}}, 0)
		if err != nil || n <= 0 {
			return ""
		}
		if i := bytes.IndexByte(b[:n], 0); i >= 0 {
			return string(append(s, b[:i]...))
		}
		s, at = append(s, b[:n]...), at+uint64(n)
	}
	return ""
}

// mappedAt is the first file that is mapped in a range of addresses. Ranges
// without one belong to the Go runtime.
func (t *tracer) mappedAt(at, size uint64) string {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", t.pid))
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(maps)) {
		span, rest, _ := strings.Cut(line, " ")
		from, to, _ := strings.Cut(span, "-")
		begin, err1 := strconv.ParseUint(from, 16, 64)
		end, err2 := strconv.ParseUint(to, 16, 64)
		if err1 != nil || err2 != nil || begin >= at+size || end <= at {
			continue
		}
		if i := strings.IndexByte(rest, '/'); i >= 0 {
			return strings.TrimSuffix(rest[i:], "\n")
		}
	}
	return ""
}
