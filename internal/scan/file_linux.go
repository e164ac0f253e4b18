package scan

import (
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/procfs"
)

func identify(path string) (procfs.FileID, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return procfs.FileID{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return procfs.FileID{Dev: st.Dev, Inode: st.Ino}, nil
}

// sharedMemory returns the devices of the tmpfs mounts that we see. The kernel's
// own, of memfd and of shared anonymous memory, is no mount: see isShm.
func sharedMemory() map[uint64]bool {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	return parseTmpfs(string(text))
}

// parseTmpfs takes lines such as
//
//	35 31 0:32 / /dev/shm rw,nosuid shared:9 - tmpfs tmpfs rw,size=24684092k
func parseTmpfs(text string) map[uint64]bool {
	devices := map[uint64]bool{}
	for line := range strings.Lines(text) {
		mount, system, _ := strings.Cut(line, " - ")
		f := strings.Fields(mount)
		if len(f) < 3 || !strings.HasPrefix(system, "tmpfs ") {
			continue
		}
		major, minor, _ := strings.Cut(f[2], ":")
		ma, err1 := strconv.ParseUint(major, 10, 32)
		mi, err2 := strconv.ParseUint(minor, 10, 32)
		if err1 == nil && err2 == nil {
			devices[unix.Mkdev(uint32(ma), uint32(mi))] = true
		}
	}
	return devices
}
