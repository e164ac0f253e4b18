//go:build amd64 || arm64

package shm

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	mib = 1 << 20

	mountV1     = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
	mountV2     = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
	otherMounts = "23 1 254:0 / / rw,relatime - ext4 /dev/root rw\n" +
		"31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n" +
		"32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n" +
		"37 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=memory\n"

	unlimitedV1 = 9223372036854771712
)

// fakeTree maps paths to texts. A text of "/" makes a directory, which nobody
// can read as a file.
type fakeTree map[string]string

func (f fakeTree) with(others ...fakeTree) fakeTree {
	for _, other := range others {
		for name, text := range other {
			f[name] = text
		}
	}
	return f
}

func (f fakeTree) write(t *testing.T) cgroups {
	t.Helper()
	root := t.TempDir()
	for name, text := range f {
		full := filepath.Join(root, name)
		dir := filepath.Dir(full)
		if text == "/" {
			dir = full
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if text == "/" {
			continue
		}
		if err := os.WriteFile(full, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return cgroups{root: root, memory: 64 << 30}
}

func self(cgroup, mountinfo string) fakeTree {
	return fakeTree{"/proc/self/cgroup": cgroup, "/proc/self/mountinfo": mountinfo}
}

// groupV1 uses what groupV2 would, all in MiB, and has other numbers where a
// reader could take the wrong line.
func groupV1(dir string, limit, usage, inactive, active int) fakeTree {
	mem := strconv.Itoa(limit * mib)
	if limit < 0 {
		mem = strconv.Itoa(unlimitedV1)
	}
	return fakeTree{
		dir + "/memory.limit_in_bytes": mem + "\n",
		dir + "/memory.usage_in_bytes": strconv.Itoa(usage*mib) + "\n",
		dir + "/memory.use_hierarchy":  "1\n",
		dir + "/memory.stat": "cache 1\ninactive_file 1\nactive_file 2\n" +
			"hierarchical_memory_limit " + mem + "\n" +
			"total_inactive_file " + strconv.Itoa(inactive*mib) + "\n" +
			"total_active_file " + strconv.Itoa(active*mib) + "\ntotal_unevictable 3\n",
	}
}

func groupV2(dir string, limit, usage, inactive, active int) fakeTree {
	mem := strconv.Itoa(limit * mib)
	if limit < 0 {
		mem = "max"
	}
	return fakeTree{
		dir + "/memory.max":     mem + "\n",
		dir + "/memory.current": strconv.Itoa(usage*mib) + "\n",
		dir + "/memory.stat": "anon 1\nfile 2\nshmem 3\ninactive_anon 4\ninactive_file " + strconv.Itoa(inactive*mib) +
			"\nactive_file " + strconv.Itoa(active*mib) + "\nworkingset_refault_file 5\n",
	}
}

func TestCgroupHeadroomOfTrees(t *testing.T) {
	const v1, v2 = "/sys/fs/cgroup/memory", "/sys/fs/cgroup"
	file := func(name, text string) fakeTree { return fakeTree{name: text} }
	for name, c := range map[string]struct {
		tree fakeTree
		want int64 // MiB; -1: none
		path string
	}{
		"nothing":     {fakeTree{}, -1, ""},
		"no cgroups":  {self("", otherMounts), -1, ""},
		"not mounted": {self("4:memory:/a\n0::/\n", otherMounts), -1, ""},
		"no mountinfo": {
			file("/proc/self/cgroup", "0::/a\n").with(groupV2(v2+"/a", 100, 40, 0, 0)), -1, "",
		},

		"v1": {
			self("4:memory:/a\n", otherMounts+mountV1).
				with(groupV1(v1+"/a", 100, 60, 10, 5), groupV1(v1, -1, 900, 0, 0)),
			55, v1 + "/a",
		},
		"v1 unlimited": {
			self("4:memory:/a\n", otherMounts+mountV1).
				with(groupV1(v1+"/a", -1, 60, 10, 5), groupV1(v1, -1, 900, 0, 0)),
			-1, "",
		},
		"v1 in the root group": {
			self("4:memory:/\n", otherMounts+mountV1).with(groupV1(v1, -1, 900, 0, 0)), -1, "",
		},
		"v1 mounted together with cpu": {
			self("4:cpu,memory:/a\n", "35 31 0:32 / /cg rw - cgroup cgroup rw,cpu,memory\n").
				with(groupV1("/cg/a", 100, 60, 0, 0)),
			40, "/cg/a",
		},
		"v1 nested, the outer limit is closer": {
			self("4:memory:/a/b/c\n", mountV1).
				with(groupV1(v1+"/a/b/c", 100, 10, 0, 0), groupV1(v1+"/a/b", -1, 10, 0, 0), groupV1(v1+"/a", 120, 100, 5, 5)),
			30, v1 + "/a",
		},
		"v1 nested, the inner limit is closer": {
			self("4:memory:/a/b\n", mountV1).
				with(groupV1(v1+"/a/b", 50, 10, 0, 0), groupV1(v1+"/a", 120, 60, 0, 0)),
			40, v1 + "/a/b",
		},
		"v1 outer group is not charged": {
			self("4:memory:/a/b/c\n", mountV1).
				with(groupV1(v1+"/a/b/c", 100, 10, 0, 0), groupV1(v1+"/a/b", 20, 10, 0, 0), groupV1(v1+"/a", 15, 10, 0, 0)).
				with(file(v1+"/a/b/memory.use_hierarchy", "0\n")),
			90, v1 + "/a/b/c",
		},
		"v1 own group without hierarchy": {
			self("4:memory:/a\n", mountV1).with(groupV1(v1+"/a", 100, 60, 0, 0)).
				with(file(v1+"/a/memory.use_hierarchy", "0\n")).
				with(file(v1+"/a/memory.stat", "inactive_file 1048576\nactive_file 1048576\ntotal_inactive_file 9\ntotal_active_file 9\n")),
			42, v1 + "/a",
		},
		"v1 no use_hierarchy": {
			self("4:memory:/a\n", mountV1).with(groupV1(v1+"/a", 100, 60, 10, 0)).
				with(file(v1+"/a/memory.use_hierarchy", "/")),
			50, v1 + "/a",
		},

		"v2": {
			self("0::/a\n", mountV2).with(groupV2(v2+"/a", 100, 60, 10, 5)), 55, v2 + "/a",
		},
		"v2 unlimited": {
			self("0::/a\n", mountV2).with(groupV2(v2+"/a", -1, 60, 10, 5)), -1, "",
		},
		"v2 limit of the machine's memory": {
			self("0::/a\n", mountV2).with(groupV2(v2+"/a", 64<<10, 60, 10, 5)), -1, "",
		},
		"v2 nested, the outer limit is closer": {
			self("0::/user.slice/app.slice/x.service\n", mountV2).
				with(groupV2(v2+"/user.slice/app.slice/x.service", 4000, 10, 0, 0)).
				with(groupV2(v2+"/user.slice/app.slice", -1, 500, 0, 0)).
				with(groupV2(v2+"/user.slice", 1000, 900, 30, 20)),
			150, v2 + "/user.slice",
		},
		"v2 threaded group without memory files": {
			self("0::/a/threads\n", mountV2).
				with(file(v2+"/a/threads/cgroup.type", "threaded\n"), groupV2(v2+"/a", 100, 60, 0, 0)),
			40, v2 + "/a",
		},
		"limit reached": {
			self("0::/a\n", mountV2).with(groupV2(v2+"/a", 100, 100, 0, 0)), 0, v2 + "/a",
		},
		"limit lowered below the usage": {
			self("0::/a\n", mountV2).with(groupV2(v2+"/a", 100, 150, 20, 20)), 0, v2 + "/a",
		},
		"more cache than usage": {
			self("0::/a\n", mountV2).with(groupV2(v2+"/a", 100, 60, 50, 50)), 100, v2 + "/a",
		},
		"blank in the names": {
			self("0::/a b\n", `31 23 0:28 / /cg\040x rw - cgroup2 cgroup2 rw`+"\n").with(groupV2("/cg x/a b", 100, 60, 0, 0)),
			40, "/cg x/a b",
		},

		"hybrid": {
			self("4:memory:/a\n1:name=systemd:/u\n0::/u\n", otherMounts+mountV1+"41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n").
				with(groupV1(v1+"/a", 100, 60, 0, 0), file("/sys/fs/cgroup/unified/u/cgroup.procs", "1\n")),
			40, v1 + "/a",
		},
		"hybrid, memory on v2": {
			self("3:cpu:/a\n0::/u\n", otherMounts+"41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n").
				with(groupV2("/sys/fs/cgroup/unified/u", 100, 60, 0, 0)),
			40, "/sys/fs/cgroup/unified/u",
		},

		"container with a namespace, v2": {
			self("0::/\n", mountV2).with(groupV2(v2, 100, 60, 0, 0)), 40, v2,
		},
		"container with a namespace, v1": {
			self("4:memory:/\n", mountV1).with(groupV1(v1, 100, 60, 0, 0)), 40, v1,
		},
		"container without a namespace, v1": {
			self("4:memory:/docker/0123\n", "35 31 0:32 /docker/0123 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n").
				with(groupV1(v1, 100, 60, 0, 0)),
			40, v1,
		},
		"container without a namespace, group within it": {
			self("4:memory:/docker/0123/job\n", "35 31 0:32 /docker/0123 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n").
				with(groupV1(v1, 100, 60, 0, 0), groupV1(v1+"/job", 50, 20, 0, 0)),
			30, v1 + "/job",
		},
		"container whose mount shows another group": {
			self("4:memory:/docker/0123456\n", "35 31 0:32 /docker/0123 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n").
				with(groupV1(v1, 100, 60, 0, 0)),
			40, v1,
		},
		"container whose group is not below the mount": {
			self("4:memory:/docker/0123\n", mountV1).with(groupV1(v1, 100, 60, 0, 0)), 40, v1,
		},
		"group outside of the namespace": {
			self("0::/../other\n", mountV2).with(groupV2(v2, 100, 60, 0, 0), groupV2("/sys/fs/other", 100, 90, 0, 0)), 40, v2,
		},
		"mount from outside of the namespace": {
			self("0::/\n", "31 23 0:28 /../.. /host rw - cgroup2 cgroup2 rw\n"+mountV2).
				with(groupV2("/host", 50, 45, 0, 0), groupV2(v2, 100, 60, 0, 0)),
			40, v2,
		},
		"the host's tree is mounted too": {
			self("0::/pod/box\n", "31 23 0:28 /pod/box /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n32 23 0:28 / /host/cgroup rw - cgroup2 cgroup2 rw\n").
				with(groupV2(v2, 100, 60, 0, 0), groupV2("/host/cgroup/pod/box", 100, 60, 0, 0), groupV2("/host/cgroup/pod", 100, 80, 0, 0)),
			20, "/host/cgroup/pod",
		},
		"a limit that only the statistics betray": {
			self("4:memory:/\n", mountV1).with(groupV1(v1, -1, 60, 0, 0)).
				with(file(v1+"/memory.stat", "hierarchical_memory_limit 104857600\ntotal_inactive_file 0\ntotal_active_file 0\n")),
			40, v1,
		},

		"unreadable usage": {
			self("0::/a/b\n", mountV2).
				with(groupV2(v2+"/a/b", 100, 99, 0, 0), groupV2(v2+"/a", 100, 60, 0, 0)).
				with(file(v2+"/a/b/memory.current", "/")),
			40, v2 + "/a",
		},
		"unreadable statistics": {
			self("4:memory:/a/b\n", mountV1).
				with(groupV1(v1+"/a/b", 100, 99, 0, 0), groupV1(v1+"/a", 100, 60, 0, 0)).
				with(file(v1+"/a/b/memory.stat", "/")),
			40, v1 + "/a",
		},
		"nonsense": {
			self("0::/a/b\n", mountV2).
				with(groupV2(v2+"/a/b", 100, 99, 0, 0), groupV2(v2+"/a", 100, 60, 0, 0)).
				with(file(v2+"/a/b/memory.max", "-5\n")),
			40, v2 + "/a",
		},
		"everything unreadable": {
			self("0::/a\n", mountV2).with(file(v2+"/a/memory.max", "/"), file(v2+"/memory.max", "/")), -1, "",
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, path, ok := c.tree.write(t).headroom()
			if c.want < 0 {
				if got != 0 || path != "" || ok {
					t.Errorf("%d, %q, %t, want none", got, path, ok)
				}
				return
			}
			if got != c.want*mib || path != c.path || !ok {
				t.Errorf("%d bytes (%d MiB), %q, %t, want %d MiB, %q", got, got/mib, path, ok, c.want, c.path)
			}
		})
	}
}

func TestBelowMount(t *testing.T) {
	for _, c := range []struct {
		group, root, rel string
		ok               bool
	}{
		{"/", "/", "/", true},
		{"/a/b", "/", "/a/b", true},
		{"/a/b", "/a", "/b", true},
		{"/a/b", "/a/b", "/", true},
		{"/ab", "/a", "", false},
		{"/", "/a", "", false},
		{"/../x", "/", "", false},
		{"/../x", "/..", "/x", true},
		{"/", "/..", "", false},
		{"/a/../../x", "/a", "", false},
	} {
		if rel, ok := belowMount(c.group, c.root); rel != c.rel || ok != c.ok {
			t.Errorf("belowMount(%q, %q) = %q, %t, want %q, %t", c.group, c.root, rel, ok, c.rel, c.ok)
		}
	}
}

func FuzzCgroupFiles(f *testing.F) {
	f.Add("4:memory:/a/b\n1:name=systemd:/\n0::/u\n", otherMounts+mountV1+mountV2, "total_inactive_file 9\n", "100")
	f.Add("0::/../x\n", `31 23 0:28 /a\040b /c\134 rw - cgroup2 cgroup2 rw`, "a 18446744073709551616\n", "max")
	f.Fuzz(func(t *testing.T, own, mountinfo, stat, number string) {
		v1, v2 := parseOwnCgroups(own)
		for _, m := range parseCgroupMounts(mountinfo) {
			for _, group := range []string{v1, v2} {
				rel, ok := belowMount(group, m.root)
				if ok && (rel == "" || rel[0] != '/' || strings.Contains(rel+"/", "/../")) {
					t.Errorf("belowMount(%q, %q) = %q", group, m.root, rel)
				}
			}
		}
		values := parseMemoryStat(stat)
		limit, _ := parseBytes(number)
		for name, n := range values {
			if n < 0 {
				t.Errorf("%q = %d", name, n)
			}
			if room := roomWithin(limit, n, n, values["active_file"]); room < 0 || room > limit {
				t.Errorf("roomWithin(%d, %d, %d, %d) = %d", limit, n, n, values["active_file"], room)
			}
		}
	})
}

// The rest asks the kernel: a process in a group of its own, limited to
// 256 MiB, reports its headroom as it fills shared memory and page cache.

const insideEnv = "ONECOPY_TEST_CGROUP" // the group to join, for the child

type insideReport struct {
	Path                  string
	Start, Shared, Cached int64 // headroom at first, after each of the files
	NoDisk                bool  // Cached was not tried
}

func TestCgroupHeadroomReal(t *testing.T) {
	const limit, written = 256 * mib, 32 * mib
	group := limitedGroup(t, limit)
	cmd := exec.Command(os.Args[0], "-test.run=^TestCgroupHeadroomInside$", "-test.v")
	cmd.Env = append(os.Environ(), insideEnv+"="+group)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	_, text, _ := strings.Cut(string(out), "report ")
	text, _, _ = strings.Cut(text, "\n")
	var got insideReport
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Logf("%+v", got)

	// Besides the files the child's own memory is charged, a few MiB.
	const slack = 16 * mib
	if got.Path != group || got.Start <= limit/2 || got.Start > limit {
		t.Errorf("%d bytes in %s at the start, want up to %d in %s", got.Start, got.Path, limit, group)
	}
	if used := got.Start - got.Shared; used < written-slack || used > written+slack {
		t.Errorf("%d bytes of shared memory took %d of the headroom", written, used)
	}
	if used := got.Shared - got.Cached; !got.NoDisk && used > slack {
		t.Errorf("%d bytes of page cache took %d of the headroom", written, used)
	}
}

// limitedGroup makes a group below our own, or skips the test.
func limitedGroup(t *testing.T, limit int) string {
	t.Helper()
	for _, c := range (cgroups{}).chains() {
		name := "memory.limit_in_bytes"
		if c.unified {
			name = "memory.max"
		}
		group := filepath.Join(c.mount, c.rel, "onecopy-test-"+strconv.Itoa(os.Getpid()))
		if err := os.Mkdir(group, 0o755); err != nil {
			t.Log(err)
			continue
		}
		t.Cleanup(func() { removeGroup(t, group) })
		// Not os.WriteFile, which would create the file if it could.
		if err := writeExisting(filepath.Join(group, name), strconv.Itoa(limit)); err != nil {
			t.Log(err)
			continue
		}
		return group
	}
	t.Skip("needs the right to make a memory control group below this process's own")
	return ""
}

func writeExisting(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// removeGroup waits: the kernel may need a moment after the last process.
func removeGroup(t *testing.T, group string) {
	var err error
	for range 200 {
		if err = os.Remove(group); !errors.Is(err, syscall.EBUSY) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		t.Error(err)
	}
}

// TestCgroupHeadroomInside is the child of TestCgroupHeadroomReal.
func TestCgroupHeadroomInside(t *testing.T) {
	group := os.Getenv(insideEnv)
	if group == "" {
		t.Skip("runs as a child of TestCgroupHeadroomReal only")
	}
	if err := writeExisting(filepath.Join(group, "cgroup.procs"), "0"); err != nil {
		t.Fatal(err)
	}
	headroom := func() int64 {
		n, path, ok := CgroupHeadroom()
		if !ok || path != group {
			t.Fatalf("CgroupHeadroom() = %d, %q, %t", n, path, ok)
		}
		return n
	}
	report := insideReport{Path: group, Start: headroom()}

	shared, err := os.MkdirTemp("/dev/shm", "onecopy-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(shared) })
	fillFile(t, shared)
	report.Shared = headroom()

	disk := t.TempDir()
	var fs unix.Statfs_t
	if err := unix.Statfs(disk, &fs); err != nil {
		t.Fatal(err)
	}
	if report.NoDisk = fs.Type == unix.TMPFS_MAGIC; !report.NoDisk {
		fillFile(t, disk)
		report.Cached = headroom()
	}
	text, err := json.Marshal(report)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stdout.WriteString("report " + string(text) + "\n"); err != nil {
		t.Fatal(err)
	}
}

func fillFile(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "filling"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	chunk := make([]byte, mib)
	for range 32 {
		if _, err := f.Write(chunk); err != nil {
			t.Fatal(err)
		}
	}
}

func BenchmarkCgroupHeadroom(b *testing.B) {
	for b.Loop() {
		CgroupHeadroom()
	}
}
