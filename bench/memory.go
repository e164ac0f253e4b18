//go:build linux

package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// fileID names a file as /proc/PID/smaps does.
type fileID struct {
	dev   string // major:minor in hexadecimal
	inode uint64
}

func identify(path string) (fileID, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return fileID{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	dev := uint64(st.Dev)
	return fileID{fmt.Sprintf("%02x:%02x", unix.Major(dev), unix.Minor(dev)), st.Ino}, nil
}

// where says which mappings of a process count as the model's pages.
type where struct {
	model     fileID          // zero: the model is in anonymous memory
	modelPath string          // some file systems show another device in smaps than in stat
	registry  string          // mappings below this folder that are not the model are the registry's own
	libraries map[fileID]bool // what an idle worker maps, too: no part of the total
}

// pages is what one process or a fleet of them has mapped, in bytes.
type pages struct {
	model     int64 // PSS of the model's pages
	registry  int64 // PSS of the registry's own pages (table and manifest)
	anonymous int64 // PSS of all mappings of no file
	total     int64 // PSS of everything but libraries
	huge      int64 // of the model's resident pages, those mapped by 2 MiB entries
	tables    int64 // page tables, VmPTE
}

func (p *pages) add(q pages) {
	p.model += q.model
	p.registry += q.registry
	p.anonymous += q.anonymous
	p.total += q.total
	p.huge += q.huge
	p.tables += q.tables
}

// measure reads what a process has mapped.
func measure(pid int, at where) (pages, error) {
	smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return pages{}, err
	}
	p, err := parseSmaps(smaps, at)
	if err != nil {
		return p, fmt.Errorf("/proc/%d/smaps: %w", pid, err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return p, err
	}
	p.tables, err = kilobytes(status, "VmPTE")
	return p, err
}

// parseSmaps adds up a whole smaps file. A mapping starts with a line such as
//
//	7f0000000000-7f0000200000 r--s 00000000 00:1b 42    /dev/shm/some/file
//
// and goes on with lines such as "Pss:    4 kB".
func parseSmaps(text []byte, at where) (pages, error) {
	const (
		other = iota
		anonymous
		model
		registry
		library
	)
	var sum pages
	kind := other
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 {
			continue
		}
		name, isField := strings.CutSuffix(fields[0], ":")
		if !isField {
			if len(fields) < 5 {
				return sum, fmt.Errorf("unexpected line %q", lines.Text())
			}
			inode, err := strconv.ParseUint(fields[4], 10, 64)
			if err != nil {
				return sum, fmt.Errorf("unexpected line %q", lines.Text())
			}
			path := strings.Join(fields[5:], " ")
			switch {
			case inode == 0:
				kind = anonymous
			case at.model == fileID{fields[3], inode}, at.modelPath != "" && path == at.modelPath:
				kind = model
			case at.registry != "" && strings.HasPrefix(path, at.registry+"/"):
				kind = registry
			case at.libraries[fileID{fields[3], inode}]:
				kind = library
			default:
				kind = other
			}
			continue
		}
		switch name {
		case "Pss", "AnonHugePages", "ShmemPmdMapped", "FilePmdMapped":
		default:
			continue
		}
		kb, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			return sum, fmt.Errorf("unexpected line %q", lines.Text())
		}
		size := kb << 10
		if name == "Pss" && kind != library {
			sum.total += size
		}
		switch {
		case name == "Pss" && kind == anonymous:
			sum.anonymous += size
		case name == "Pss" && kind == model:
			sum.model += size
		case name == "Pss" && kind == registry:
			sum.registry += size
		case name == "AnonHugePages" && at.model == fileID{}:
			sum.huge += size
		case (name == "ShmemPmdMapped" || name == "FilePmdMapped") && kind == model:
			sum.huge += size
		}
	}
	return sum, nil
}

// mappedFiles are the files that a process has mapped.
func mappedFiles(pid int) (map[fileID]bool, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	all := map[fileID]bool{}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 5 {
			if inode, err := strconv.ParseUint(fields[4], 10, 64); err == nil && inode != 0 {
				all[fileID{fields[3], inode}] = true
			}
		}
	}
	return all, nil
}

// kilobytes returns a field such as "VmPTE:   44 kB" in bytes.
func kilobytes(text []byte, field string) (int64, error) {
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return kb << 10, err
		}
	}
	return 0, fmt.Errorf("no field %s", field)
}

// available returns how much memory can still be used, as far as the machine and the visible cgroups say.
func available() (int64, error) {
	meminfo, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	free, err := kilobytes(meminfo, "MemAvailable")
	if err != nil {
		return 0, err
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return free, nil // no cgroups, no limit
	}
	for line := range strings.Lines(string(own)) {
		// "0::/path" in version 2, "4:memory:/path" in version 1.
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		switch {
		case parts[1] == "":
			free = min(free, headroom("/sys/fs/cgroup", parts[2], "memory.max", "memory.current"))
		case strings.Contains(","+parts[1]+",", ",memory,"):
			free = min(free, headroom("/sys/fs/cgroup/memory", parts[2], "memory.limit_in_bytes", "memory.usage_in_bytes"))
		}
	}
	return free, nil
}

// headroom is the least room below the limits of a cgroup and its ancestors. What is not visible does not limit.
func headroom(root, path, limitFile, usageFile string) int64 {
	room := int64(1) << 62
	for dir := filepath.Clean("/" + path); ; dir = filepath.Dir(dir) {
		limit, err1 := number(filepath.Join(root, dir, limitFile))
		usage, err2 := number(filepath.Join(root, dir, usageFile))
		if err1 == nil && err2 == nil {
			room = min(room, max(limit-usage, 0)+evictable(filepath.Join(root, dir, "memory.stat")))
		}
		if dir == "/" {
			return room
		}
	}
}

// evictable is the page cache that a cgroup's usage includes.
func evictable(path string) int64 {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	var sum int64
	for line := range strings.Lines(string(text)) {
		if name, value, _ := strings.Cut(strings.TrimSpace(line), " "); name == "active_file" || name == "inactive_file" {
			n, _ := strconv.ParseInt(value, 10, 64) // what cannot be read is not counted
			sum += n
		}
	}
	return sum
}

func number(path string) (int64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64) // "max" is an error: no limit
}

// prewarm touches and frees memory. Without it a trial may measure a hypervisor that gives memory back.
func prewarm(size int64) error {
	release, err := hold(size)
	if err != nil {
		return err
	}
	return release()
}

// settle is longer than a guest waits before it reports free memory to its hypervisor (2 s in Linux).
const settle = 2200 * time.Millisecond

// prewarmSettled is prewarm for loads that take long enough to be hit by such a report: the memory is held until
// the reports of what was freed before are over, so that the next one comes after the trial.
func prewarmSettled(size int64) error {
	release, err := hold(size)
	if err != nil {
		return err
	}
	time.Sleep(settle)
	return release()
}

// hold touches memory and keeps it.
func hold(size int64) (release func() error, err error) {
	mem, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	// Both are wishes: huge pages make it fast, and a kernel before 5.14 cannot populate.
	_ = unix.Madvise(mem, unix.MADV_HUGEPAGE)
	if unix.Madvise(mem, unix.MADV_POPULATE_WRITE) != nil {
		for at := 0; at < len(mem); at += os.Getpagesize() {
			mem[at] = 1
		}
	}
	return func() error { return os.NewSyscallError("munmap", unix.Munmap(mem)) }, nil
}

// usage returns the bytes that the regular files below dir occupy.
func usage(dir string) (int64, error) {
	var sum int64
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return &fs.PathError{Op: "stat", Path: path, Err: err}
		}
		sum += st.Blocks * 512
		return nil
	})
	return sum, err
}

// freeBytes is what an unprivileged process can still write below dir, 0 if that is not known.
func freeBytes(dir string) int64 {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return 0
	}
	return int64(st.Bavail) * st.Bsize
}
