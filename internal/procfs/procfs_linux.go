package procfs

import (
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

func (t tree) resident(pid int, want map[FileID]struct{}) (map[FileID]Residency, error) {
	r := residencies{want: want, sum: make(map[FileID]*Residency)}
	if err := lines(t.pidPath(pid, "smaps"), make([]byte, bufferSize), r.line); err != nil {
		return nil, err
	}
	return r.result(), nil
}

func (t tree) process(pid int) (Proc, error) {
	dir, err := openDirectory(t.path(strconv.Itoa(pid)))
	if err != nil {
		return Proc{}, err
	}
	defer dir.close()
	buf := make([]byte, bufferSize)
	p := Proc{PID: pid}
	if err := t.describe(dir, &p, buf, func() (time.Time, bool) { return t.bootTime(buf) }); err != nil {
		return Proc{}, err
	}
	return p, nil
}

// UID is the effective user of a process: the one thing that Process has to know of
// many processes before it is worth asking for the rest.
func UID(pid int) (int, error) { return host.uid(pid) }

func (t tree) uid(pid int) (int, error) {
	p := Proc{UID: -1}
	err := lines(t.pidPath(pid, "status"), make([]byte, 4096), func(line []byte) { parseStatus(&p, line) })
	return p.UID, err
}

// describe fills p from the process's directory.
func (t tree) describe(dir *file, p *Proc, buf []byte, boot func() (time.Time, bool)) error {
	stat, err := openAt(dir, "stat")
	if err != nil {
		return err
	}
	defer stat.close()
	s, err := stat.stat()
	if err != nil {
		return err
	}
	p.UID = -1
	if err := linesAt(dir, "status", buf, func(line []byte) { parseStatus(p, line) }); err != nil {
		return err
	}

	// What follows may be missing, and then the rest is still worth showing.
	if boot, ok := boot(); ok {
		p.Start = boot.Add(time.Duration(s.start) * (time.Second / ticksPerSecond))
	}
	p.CgroupPath = cgroupPath(dir, buf)
	var cmdline []byte
	if f, err := openAt(dir, "cmdline"); err == nil {
		cmdline, _ = f.head(buf[:maxCommand])
		f.close()
	}
	p.Command = commandText(cmdline, s.comm)
	return nil
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
