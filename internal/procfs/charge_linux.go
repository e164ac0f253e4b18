package procfs

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// ChargedTo returns to which control groups the pages of this process at the
// addresses are charged, as numbers of pages: for shared memory that is the group
// of whoever touched a page first. The pages must be in memory and in the page
// table. Group names are paths below the cgroup file system, "" for pages of
// none, "?" for groups that are gone or not visible from here.
//
// It takes CAP_SYS_ADMIN: the error is fs.ErrPermission without, and
// errors.ErrUnsupported on kernels that do not tell.
func ChargedTo(addrs []uintptr) (map[string]int64, error) {
	pagemap, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return nil, err
	}
	defer pagemap.Close()
	owners, err := os.Open("/proc/kpagecgroup")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errors.ErrUnsupported
	}
	if err != nil {
		return nil, err
	}
	defer owners.Close()
	pages := map[uint64]int64{} // by inode of the group
	var word [8]byte
	for _, addr := range addrs {
		if _, err := pagemap.ReadAt(word[:], int64(addr)/int64(os.Getpagesize())*8); err != nil {
			return nil, err
		}
		entry := binary.NativeEndian.Uint64(word[:])
		frame := entry & (1<<55 - 1)
		if !Page(entry).Present() {
			continue
		}
		if frame == 0 { // hidden from us
			return nil, fs.ErrPermission
		}
		if _, err := owners.ReadAt(word[:], int64(frame)*8); err != nil {
			return nil, err
		}
		pages[binary.NativeEndian.Uint64(word[:])]++
	}
	return groupNames(pages), nil
}

// groupNames finds the groups by their inodes.
func groupNames(pages map[uint64]int64) map[string]int64 {
	named := map[string]int64{}
	left := len(pages)
	if n := pages[0]; n > 0 {
		named[""] = n
		left--
	}
	seen := map[uint64]bool{0: true}
	for _, root := range []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup"} {
		_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return nil
			}
			if left == 0 {
				return fs.SkipAll
			}
			fi, err := d.Info()
			if err != nil {
				return nil
			}
			st, ok := fi.Sys().(*syscall.Stat_t)
			if n := pages[st.Ino]; ok && n > 0 && !seen[st.Ino] {
				seen[st.Ino] = true
				rel, _ := filepath.Rel(root, path)
				named[filepath.Join("/", rel)] += n
				left--
			}
			return nil
		})
	}
	for ino, n := range pages {
		if !seen[ino] {
			named["?"] += n
		}
	}
	return named
}
