//go:build amd64 || arm64

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
)

// space is where a trial puts its registry: a tmpfs of its own if one can be
// mounted, so that the kernel's figures are those of the registry alone.
type space struct {
	dir string // of the registry
	own bool
	end func()
}

// newSpace mounts a tmpfs that only this process and its children reach: it is
// detached at once, and goes with the last of them.
func newSpace(size int64) (*space, error) {
	at, err := os.MkdirTemp("", "onecopy-campaign-")
	if err != nil {
		return nil, err
	}
	defer os.Remove(at)
	if err := unix.Mount("tmpfs", at, "tmpfs", 0, fmt.Sprintf("size=%d,mode=0755", size)); err == nil {
		fd, err := unix.Open(at, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if e := unix.Unmount(at, unix.MNT_DETACH); err == nil {
			err = e
		}
		if err != nil {
			return nil, err
		}
		dir := fmt.Sprintf("/proc/%d/fd/%d/registry", os.Getpid(), fd)
		return &space{dir: dir, own: true, end: func() { unix.Close(fd) }}, nil
	}
	dir, err := os.MkdirTemp("/dev/shm", "onecopy-test-campaign-")
	if err != nil {
		return nil, err
	}
	return &space{dir: filepath.Join(dir, "registry"), end: func() { os.RemoveAll(dir) }}, nil
}

// usage is what the file system says about a registry.
type usage struct {
	linked int64 // st_blocks of everything below m/
	table  int64 // st_blocks of the table
	all    int64 // used bytes of the tmpfs, with what has no name
}

// payload is the memory that the budget counts.
func (u usage) payload(own bool) int64 {
	if own {
		return u.all - u.table
	}
	return u.linked
}

// quickUsage leaves linked out, which takes a walk, unless there is nothing else.
func (s *space) quickUsage() (u usage, err error) {
	if !s.own {
		return measure(s.dir)
	}
	return statUsage(s.dir)
}

func statUsage(dir string) (u usage, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return u, &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	u.all = int64(st.Blocks-st.Bfree) * st.Bsize
	var t unix.Stat_t
	table := filepath.Join(dir, layout.Folder, layout.TableFile)
	if err := unix.Stat(table, &t); err != nil {
		return u, &fs.PathError{Op: "stat", Path: table, Err: err}
	}
	u.table = t.Blocks * 512
	return u, nil
}

// measure is not atomic: files come and go while it walks.
func measure(dir string) (u usage, err error) {
	err = filepath.WalkDir(filepath.Join(dir, layout.Folder, layout.ModelsDir), func(path string, d fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && !d.IsDir() {
			err = unix.Lstat(path, &st)
			u.linked += st.Blocks * 512
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	if err != nil {
		return u, err
	}
	quick, err := statUsage(dir)
	quick.linked = u.linked
	return quick, err
}

// machine describes where a report comes from.
func machine() string {
	cpu := "unknown processor"
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				cpu = strings.TrimSpace(value)
				break
			}
		}
	}
	var u unix.Utsname
	_ = unix.Uname(&u)
	var si unix.Sysinfo_t
	_ = unix.Sysinfo(&si)
	load := "?"
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		load = strings.Join(strings.Fields(string(b))[:3], " ")
	}
	var set unix.CPUSet
	_ = unix.SchedGetaffinity(0, &set)
	return fmt.Sprintf("%s, %d processors, %s of memory, Linux %s; load average at the end: %s",
		cpu, set.Count(), mib(int64(si.Totalram)*int64(si.Unit)), unix.ByteSliceToString(u.Release[:]), load)
}

func mib(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }
