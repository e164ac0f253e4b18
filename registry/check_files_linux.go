//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
)

// Further repairs that Check proposes: those that no command does.
const (
	repairName   = "remove it if nobody needs it"
	repairUnlink = "remove this name, then shmctl gc"
	repairMode   = "chmod a-w"
	repairHolder = "let the process that holds it go on, or end it: fuser PATH names it"
	repairLock   = "end the processes that use the registry, then remove this name"
)

// lockFiles looks for lock files that nobody can lock: a load of their keys would
// fail.
func (c *checker) lockFiles() error {
	w := c.p.w
	if w == nil {
		return nil
	}
	names, err := w.Names()
	for _, n := range names {
		st, err := w.Stat(n)
		switch {
		case err != nil: // gone since
		case st.Mode&unix.S_IFMT != unix.S_IFREG:
			c.add("lock", "", w.Join(n), repairLock, "is no regular file: nobody can lock it")
		case st.Uid != w.Owner():
			c.add("lock", "", w.Join(n), repairLock, "belongs to uid %d, the registry to uid %d", st.Uid, w.Owner())
		}
	}
	return err
}

// strangers looks for files in a generation's folder that are none of the model's:
// memory that nobody uses.
func (c *checker) strangers(key, gen string, man *layout.Manifest) {
	if outer, err := c.p.m.Stat(gen); err == nil && len(c.problems) == 0 { // every file of the model is there
		if inner, err := c.p.m.Stat(gen + "/" + man.Name); err == nil && holdsOnly(&outer, &inner, man) {
			return
		}
	}
	ours, folders := map[string]bool{}, map[string]bool{gen: true, gen + "/" + man.Name: true}
	for _, f := range man.Files {
		path := gen + "/" + man.Name + "/" + f.Path
		ours[path] = true
		for i := len(gen) + len(man.Name) + 2; i < len(path); i++ {
			if path[i] == '/' {
				folders[path[:i]] = true
			}
		}
	}
	for folder := range folders {
		dir, err := c.p.m.Sub(folder, 0, false)
		if err != nil {
			continue // its files are missing, and listed already
		}
		names, _ := dir.Names()
		dir.Close()
		for _, n := range names {
			if path := folder + "/" + n; !ours[path] && !folders[path] {
				c.add("payload", key, c.p.m.Join(path), repairName, "is none of the model's files")
			}
		}
	}
}
