package procfs

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// tree is a /proc; tests use others than the machine's.
type tree struct{ root string }

var host = tree{root: "/proc"}

// Locks returns the locks of all processes that our pid namespace shows.
func Locks() ([]Lock, error) { return host.locks() }

// FindMappings returns who maps the wanted files, in the order of process
// numbers, and how many processes it was not allowed to look at. A process
// that ends meanwhile is left out.
func FindMappings(want map[FileID]struct{}) (found []Mapping, unreadable int, err error) {
	return host.findMappings(want)
}

// FindUnlinked returns who maps files that were deleted from below the folder
// dir. The kernel shows the path as the process that maps sees it.
func FindUnlinked(dir string) (found []Unlinked, err error) { return host.findUnlinked(dir) }

// FindDescriptors returns who has the wanted files open; otherwise it is like
// FindMappings. A mapping keeps a file in use after its descriptor is closed.
func FindDescriptors(want map[FileID]struct{}) (found []Descriptor, unreadable int, err error) {
	return host.findDescriptors(want)
}

// Resident returns what the wanted files cost the process, for those that it
// maps. The kernel walks the page tables for it: ask when a person does.
func Resident(pid int, want map[FileID]struct{}) (map[FileID]Residency, error) {
	return host.resident(pid, want)
}

// Process describes one process. The error is fs.ErrNotExist when there is
// none of that number, or none that we may see.
func Process(pid int) (Proc, error) { return host.process(pid) }

// PIDs returns the numbers of all visible processes, ascending.
func PIDs() ([]int, error) { return host.pids() }

// BootID returns the random identifier of this boot, a UUID in text.
func BootID() (string, error) { return host.bootID() }

// MemInfo returns /proc/meminfo in bytes. The numbers of huge pages are counts.
func MemInfo() (map[string]int64, error) { return host.memInfo() }

func (t tree) path(name string) string { return t.root + "/" + name }

func (t tree) pidPath(pid int, name string) string {
	b := make([]byte, 0, 64)
	b = append(b, t.root...)
	b = append(b, '/')
	b = strconv.AppendInt(b, int64(pid), 10)
	b = append(b, '/')
	return string(append(b, name...))
}

func (t tree) locks() ([]Lock, error) {
	var found []Lock
	err := lines(t.path("locks"), make([]byte, bufferSize), func(line []byte) {
		if l, ok := parseLock(line); ok {
			found = append(found, l)
		}
	})
	return found, err
}

func (t tree) pids() ([]int, error) {
	names, err := names(t.root)
	if err != nil {
		return nil, err
	}
	pids := make([]int, 0, len(names))
	for _, name := range names {
		if pid, ok := parsePID([]byte(name)); ok && pid > 0 {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids, nil
}

// names lists a directory, unsorted.
func names(path string) ([]string, error) {
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return dir.Readdirnames(-1)
}

func (t tree) findMappings(want map[FileID]struct{}) (found []Mapping, unreadable int, err error) {
	pids, err := t.pids()
	if err != nil || len(want) == 0 {
		return nil, 0, err
	}
	buf := make([]byte, bufferSize)
	var pid int
	match := func(line []byte) {
		v, ok := parseVMA(line)
		if !ok || v.file.Inode == 0 {
			return
		}
		if _, wanted := want[v.file]; wanted {
			found = append(found, Mapping{
				PID: pid, File: v.file, Start: v.start, End: v.end, Perms: string(v.perms),
			})
		}
	}
	for _, pid = range pids {
		before := len(found)
		if err := lines(t.pidPath(pid, "maps"), buf, match); err != nil {
			found = found[:before]
			if t.hidden(pid, err) {
				unreadable++
			}
		}
	}
	return found, unreadable, nil
}

func (t tree) findUnlinked(dir string) (found []Unlinked, err error) {
	pids, err := t.pids()
	if err != nil {
		return nil, err
	}
	prefix := []byte(" " + strings.TrimSuffix(dir, "/") + "/")
	buf := make([]byte, bufferSize)
	for _, pid := range pids {
		_ = lines(t.pidPath(pid, "maps"), buf, func(line []byte) {
			if !bytes.Contains(line, prefix) {
				return
			}
			r, ok := parseRegion(line)
			path, deleted := strings.CutSuffix(r.Path, " (deleted)")
			if !ok || !deleted {
				return
			}
			n := int64(r.End - r.Start)
			if last := len(found) - 1; last >= 0 && found[last].PID == pid && found[last].File == r.File {
				found[last].Bytes += n
				return
			}
			found = append(found, Unlinked{PID: pid, File: r.File, Path: path, Bytes: n})
		})
	}
	return found, nil
}

// hidden reports whether err kept us from looking at a process that could have
// mapped or opened something.
func (t tree) hidden(pid int, err error) bool {
	if gone(err) {
		return false
	}
	f, err := open(t.pidPath(pid, "stat"))
	if err != nil {
		return !gone(err)
	}
	defer f.close()
	s, err := f.stat()
	if err != nil {
		return !gone(err)
	}
	return !s.withoutMemory()
}

func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH)
}

var errMalformed = errors.New("malformed")

// stat reads and parses f, which is a process's stat.
func (f *file) stat() (procStat, error) {
	data, err := f.head(make([]byte, 4096))
	if err != nil {
		return procStat{}, err
	}
	s, ok := parseStat(data)
	if !ok {
		return procStat{}, &fs.PathError{Op: "parse", Path: f.path, Err: errMalformed}
	}
	return s, nil
}

func (t tree) findDescriptors(want map[FileID]struct{}) (found []Descriptor, unreadable int, err error) {
	pids, err := t.pids()
	if err != nil || len(want) == 0 {
		return nil, 0, err
	}
	s := descriptorScan{want: want, inodes: make(map[uint64]struct{}, len(want)), buf: make([]byte, bufferSize)}
	for id := range want {
		s.inodes[id.Inode] = struct{}{}
	}
	for _, pid := range pids {
		fds, err := names(t.pidPath(pid, "fd"))
		if err != nil {
			if t.hidden(pid, err) {
				unreadable++
			}
			continue
		}
		for _, name := range fds {
			fd, ok := parsePID([]byte(name))
			if !ok {
				continue
			}
			if id, ok := s.file(t.pidPath(pid, "fd/"+name), t.pidPath(pid, "fdinfo/"+name)); ok {
				found = append(found, Descriptor{PID: pid, FD: fd, File: id})
			}
		}
	}
	slices.SortFunc(found, func(a, b Descriptor) int {
		if a.PID != b.PID {
			return a.PID - b.PID
		}
		return a.FD - b.FD
	})
	return found, unreadable, nil
}

type descriptorScan struct {
	want   map[FileID]struct{}
	inodes map[uint64]struct{}
	buf    []byte
}

// file returns which wanted file the descriptor is on, if any. stat is the
// last question because only it asks the file system, and one that is out of
// reach, such as a dead NFS server, does not answer.
func (s *descriptorScan) file(link, info string) (FileID, bool) {
	n, err := syscall.Readlink(link, s.buf)
	if err != nil || n == 0 || s.buf[0] != '/' {
		return FileID{}, false // a socket, a pipe, gone
	}
	candidate := true // also where the kernel (before 5.14) prints no inode
	err = lines(info, s.buf, func(line []byte) {
		if inode, ok := parseInode(line); ok {
			_, candidate = s.inodes[inode]
		}
	})
	if err != nil || !candidate {
		return FileID{}, false
	}
	var st syscall.Stat_t
	if err := syscall.Stat(link, &st); err != nil {
		return FileID{}, false
	}
	id := FileID{Dev: uint64(st.Dev), Inode: st.Ino}
	_, wanted := s.want[id]
	return id, wanted
}

func (t tree) resident(pid int, want map[FileID]struct{}) (map[FileID]Residency, error) {
	r := residencies{want: want, sum: make(map[FileID]*Residency)}
	if err := lines(t.pidPath(pid, "smaps"), make([]byte, bufferSize), r.line); err != nil {
		return nil, err
	}
	return r.result(), nil
}

func (t tree) process(pid int) (Proc, error) {
	dir, err := open(t.path(strconv.Itoa(pid)))
	if err != nil {
		return Proc{}, err
	}
	defer dir.close()
	stat, err := openAt(dir, "stat")
	if err != nil {
		return Proc{}, err
	}
	defer stat.close()
	s, err := stat.stat()
	if err != nil {
		return Proc{}, err
	}
	buf := make([]byte, bufferSize)
	p := Proc{PID: pid, UID: -1}
	if err := linesAt(dir, "status", buf, func(line []byte) { parseStatus(&p, line) }); err != nil {
		return Proc{}, err
	}

	// What follows may be missing, and then the rest is still worth showing.
	if boot, ok := t.bootTime(buf); ok {
		p.Start = boot.Add(time.Duration(s.start) * (time.Second / ticksPerSecond))
	}
	p.CgroupPath = cgroupPath(dir, buf)
	var cmdline []byte
	if f, err := openAt(dir, "cmdline"); err == nil {
		cmdline, _ = f.head(buf[:maxCommand])
		f.close()
	}
	p.Command = commandText(cmdline, s.comm)
	return p, nil
}

func cgroupPath(dir *file, buf []byte) string {
	var v1, v2 string
	err := linesAt(dir, "cgroup", buf, func(line []byte) {
		switch path, memory, unified := parseCgroup(line); {
		case memory:
			v1 = path
		case unified:
			v2 = path
		}
	})
	switch {
	case err != nil:
		return ""
	case v1 != "":
		return v1
	}
	return v2
}

func (t tree) bootTime(buf []byte) (boot time.Time, ok bool) {
	err := lines(t.path("stat"), buf, func(line []byte) {
		if seconds, isBoot := parseBootTime(line); isBoot {
			boot, ok = time.Unix(seconds, 0), true
		}
	})
	return boot, ok && err == nil
}

func (t tree) bootID() (string, error) {
	path := t.path("sys/kernel/random/boot_id")
	f, err := open(path)
	if err != nil {
		return "", err
	}
	defer f.close()
	data, err := f.head(make([]byte, 64))
	if err != nil {
		return "", err
	}
	id := strings.TrimSuffix(string(data), "\n")
	if !validBootID(id) {
		return "", &fs.PathError{Op: "parse", Path: path, Err: errMalformed}
	}
	return id, nil
}

func (t tree) memInfo() (map[string]int64, error) {
	info := make(map[string]int64, 64)
	err := lines(t.path("meminfo"), make([]byte, bufferSize), func(line []byte) { parseMemInfo(info, line) })
	if err != nil {
		return nil, err
	}
	return info, nil
}
