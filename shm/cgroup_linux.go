//go:build amd64 || arm64

package shm

import (
	"math"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// CgroupHeadroom returns how many bytes this process can still allocate before
// a memory limit of its control group, or of a group around that, is reached,
// and the directory of the group whose limit that is. It is 0 when the limit is
// reached already, and ok is false when no limit is visible: then only the
// machine's memory ends an allocation, which is not looked at here.
//
// Page cache charged to a group counts as room, because the kernel gives it
// back before it kills. Limits around our cgroup namespace cannot be seen, and
// what others in the same groups allocate afterwards cannot be known: a process
// can still be killed. A group whose files cannot be read is passed over.
func CgroupHeadroom() (headroom int64, path string, ok bool) {
	own, err := readFile("/proc/self/cgroup")
	if err != nil {
		return 0, "", false
	}
	g := cgroups{memory: machineMemory()}
	return g.headroomOf(g.ownChains(string(own)))
}

// lastChains is what ownChains found for this process. A load asks for the room
// again and again, and for where its groups lie only when it was moved: the list
// of mounts is long in a container.
var lastChains struct {
	sync.Mutex
	own    string
	chains []cgroupChain
}

func (g cgroups) ownChains(own string) []cgroupChain {
	l := &lastChains
	l.Lock()
	defer l.Unlock()
	if l.own != own || l.chains == nil {
		l.own, l.chains = own, g.chainsOf(own)
	}
	return l.chains
}

var machineMemory = sync.OnceValue(func() int64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return math.MaxInt64
	}
	return int64(uint64(info.Totalram) * uint64(info.Unit))
})

// cgroups is where to look: the machine, or the fake tree of a test.
type cgroups struct {
	root   string // put before every path
	memory int64  // of the machine: a limit that is not below it is none
}

// cgroupChain is a group and, up to a mount point, those around it. With
// systemd's hybrid layout a process has one per version, of which one knows
// nothing of memory.
type cgroupChain struct {
	unified bool   // version 2
	mount   string // mount point: the outermost group that we can see
	rel     string // our group, below mount: "/a/b", or "/"
}

func (g cgroups) headroom() (headroom int64, dir string, ok bool) { return g.headroomOf(g.chains()) }

func (g cgroups) headroomOf(chains []cgroupChain) (headroom int64, dir string, ok bool) {
	for _, c := range chains {
		bound := g.boundV1
		if c.unified {
			bound = g.boundV2
		}
		for rel := c.rel; ; rel = path.Dir(rel) {
			level := path.Join(c.mount, rel)
			room, limited, charged := bound(level, rel == c.rel, rel == "/")
			if !charged {
				break
			}
			if limited && (!ok || room < headroom) {
				headroom, dir, ok = room, level, true
			}
			if rel == "/" {
				break
			}
		}
	}
	return headroom, dir, ok
}

// boundV1 returns the room in the group at dir, and whether what we allocate is
// charged to it at all.
func (g cgroups) boundV1(dir string, own, outermost bool) (room int64, limited, charged bool) {
	if outermost && g.exists(dir+"/release_agent") {
		return 0, false, true // the root of them all, which has no limit
	}
	limit, known := g.number(dir, "memory.limit_in_bytes")
	if !known {
		return 0, false, true
	}
	if outermost {
		// The one trace of the groups that we cannot see.
		stat, _ := g.stat(dir)
		if above, ok := stat["hierarchical_memory_limit"]; ok {
			limit = min(limit, above)
		}
	}
	if limit >= g.memory {
		return 0, false, true // opening each of these files takes long
	}
	// Before Linux 5.11 a group could decide not to be charged for those below. (If
	// it does, so do those around it.)
	hierarchy, known := g.number(dir, "memory.use_hierarchy")
	alone := known && hierarchy == 0
	if alone && !own {
		return 0, false, false
	}
	prefix := "total_"
	if alone {
		prefix = ""
	}
	room, limited = g.room(dir, limit, "memory.usage_in_bytes", prefix)
	return room, limited, true
}

// boundV2 is boundV1 for version 2, where every group is charged for those below.
func (g cgroups) boundV2(dir string, _, _ bool) (room int64, limited, charged bool) {
	limit, known := g.number(dir, "memory.max")
	if !known {
		return 0, false, true
	}
	room, limited = g.room(dir, limit, "memory.current", "")
	return room, limited, true
}

// room reads the rest only where there is a limit: loads ask again and again,
// and the kernel has to add up memory.stat each time.
func (g cgroups) room(dir string, limit int64, usageName, prefix string) (room int64, limited bool) {
	if limit >= g.memory {
		return 0, false
	}
	usage, ok1 := g.number(dir, usageName)
	stat, ok2 := g.stat(dir)
	if !ok1 || !ok2 {
		return 0, false
	}
	return roomWithin(limit, usage, stat[prefix+"inactive_file"], stat[prefix+"active_file"]), true
}

func roomWithin(limit, usage, inactiveFile, activeFile int64) int64 {
	// The files are not read at one moment: there is never more cache than usage.
	cache := min(inactiveFile, usage)
	cache += min(activeFile, usage-cache)
	return max(0, limit-(usage-cache))
}

// number reads a file with one number. "max" is more than any machine has.
func (g cgroups) number(dir, name string) (n int64, ok bool) {
	data, err := readFile(g.root + dir + "/" + name)
	if err != nil {
		return 0, false
	}
	text := strings.TrimSuffix(string(data), "\n")
	if text == "max" {
		return math.MaxInt64, true
	}
	return parseBytes(text)
}

// parseBytes clips what does not fit; version 1 of an old kernel writes
// 2^64-1 for "no limit".
func parseBytes(s string) (n int64, ok bool) {
	u, err := strconv.ParseUint(s, 10, 64)
	return int64(min(u, math.MaxInt64)), err == nil
}

func (g cgroups) stat(dir string) (map[string]int64, bool) {
	data, err := readFile(g.root + dir + "/memory.stat")
	return parseMemoryStat(string(data)), err == nil
}

func parseMemoryStat(text string) map[string]int64 {
	stat := make(map[string]int64, 64)
	for line := range strings.SplitSeq(text, "\n") {
		name, value, _ := strings.Cut(line, " ")
		if n, ok := parseBytes(value); ok {
			stat[name] = n
		}
	}
	return stat
}

// chains finds our groups below the mount points that show them. A mount that
// does not show our own group is used, at its mount point, only where no other
// does: in a container that is given the group's directory by a bind mount but
// no namespace, or another's namespace, the names do not fit.
func (g cgroups) chains() []cgroupChain {
	own, err := readFile(g.root + "/proc/self/cgroup")
	if err != nil {
		return nil
	}
	return g.chainsOf(string(own))
}

func (g cgroups) chainsOf(own string) []cgroupChain {
	v1, v2 := parseOwnCgroups(own)
	info, err := readFile(g.root + "/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	var shown, fallback []cgroupChain
	for _, m := range parseCgroupMounts(string(info)) {
		ours := v1
		if m.unified {
			ours = v2
		}
		if ours == "" {
			continue
		}
		rel, ok := belowMount(ours, m.root)
		if ok && g.isDir(path.Join(m.point, rel)) {
			shown = append(shown, cgroupChain{m.unified, m.point, rel})
		} else {
			fallback = append(fallback, cgroupChain{m.unified, m.point, "/"})
		}
	}
	for _, c := range fallback {
		same := func(other cgroupChain) bool { return other.unified == c.unified }
		if !slices.ContainsFunc(shown, same) {
			shown = append(shown, c)
		}
	}
	return shown
}

func (g cgroups) exists(path string) bool {
	var st unix.Stat_t
	return unix.Stat(g.root+path, &st) == nil
}

func (g cgroups) isDir(dir string) bool {
	info, err := os.Stat(g.root + dir)
	return err == nil && info.IsDir()
}

// parseOwnCgroups returns the paths in /proc/self/cgroup of the memory
// controller ("4:memory:/a") and of version 2 ("0::/a"); "" if there is none.
func parseOwnCgroups(text string) (v1, v2 string) {
	for line := range strings.SplitSeq(text, "\n") {
		id, rest, _ := strings.Cut(line, ":")
		controllers, name, ok := strings.Cut(rest, ":")
		switch {
		case !ok || !strings.HasPrefix(name, "/"):
		case id == "0" && controllers == "":
			v2 = name
		case slices.Contains(strings.Split(controllers, ","), "memory"):
			v1 = name
		}
	}
	return v1, v2
}

// cgroupMount is a mount of version 2, or of version 1's memory controller.
type cgroupMount struct {
	unified bool
	root    string // the group that it shows, named as in /proc/self/cgroup
	point   string
}

// parseCgroupMounts picks them from /proc/self/mountinfo:
//
//	35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
func parseCgroupMounts(text string) []cgroupMount {
	var mounts []cgroupMount
	for line := range strings.SplitSeq(text, "\n") {
		mount, system, _ := strings.Cut(line, " - ")
		if !strings.HasPrefix(system, "cgroup") {
			continue // before the costly part: a host of containers has thousands
		}
		fields, kind := strings.Fields(mount), strings.Fields(system)
		if len(fields) < 6 || len(kind) < 3 {
			continue
		}
		m := cgroupMount{unified: kind[0] == "cgroup2", root: unescapeMount(fields[3]), point: unescapeMount(fields[4])}
		memory := kind[0] == "cgroup" && slices.Contains(strings.Split(kind[2], ","), "memory")
		if (m.unified || memory) && path.IsAbs(m.root) && path.IsAbs(m.point) {
			mounts = append(mounts, m)
		}
	}
	return mounts
}

// unescapeMount undoes the kernel's \040 for a blank.
func unescapeMount(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	out := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out = append(out, byte(c))
				i += 3
				continue
			}
		}
		out = append(out, s[i])
	}
	return string(out)
}

// belowMount returns the path of group below the group that a mount shows.
// Both are relative to our cgroup namespace, and have ".." outside of it.
func belowMount(group, root string) (rel string, ok bool) {
	rel, ok = strings.CutPrefix(group, strings.TrimSuffix(root, "/"))
	if !ok || rel != "" && rel[0] != '/' {
		return "", false
	}
	if slices.Contains(strings.Split(rel, "/"), "..") {
		return "", false
	}
	return path.Clean("/" + rel), true
}
