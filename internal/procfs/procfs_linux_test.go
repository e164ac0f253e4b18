package procfs

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// The tests of this file look at the real /proc, or at a made-up one where a
// case cannot be had for real.

func tmpfsDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "onecopy-test-")
	if err != nil {
		t.Skipf("needs a tmpfs at /dev/shm: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func tmpfsFile(t *testing.T, size int) (*os.File, FileID) {
	t.Helper()
	f, err := os.Create(filepath.Join(tmpfsDir(t), "with blank"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	return f, fileID(t, f)
}

func fileID(t *testing.T, f *os.File) FileID {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return FileID{Dev: uint64(st.Dev), Inode: st.Ino}
}

// sleeper is a child that has f open as descriptor 3.
func sleeper(t *testing.T, f *os.File) int {
	t.Helper()
	cmd := exec.Command("sleep", "600")
	cmd.ExtraFiles = []*os.File{f}
	if err := cmd.Start(); err != nil {
		t.Skipf("needs sleep: %v", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd.Process.Pid
}

func TestLocks(t *testing.T) {
	f, id := tmpfsFile(t, 1)
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ours := func(l Lock) bool { return l.File() == id }
	locks, err := Locks()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(locks, ours)
	if i < 0 {
		t.Fatalf("our lock on %+v is not among %+v", id, locks)
	}
	want := Lock{Type: "FLOCK", Exclusive: true, PID: os.Getpid(), Major: locks[i].Major, Minor: locks[i].Minor, Inode: id.Inode}
	if diff := cmp.Diff(want, locks[i]); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	compareWithLslocks(t, want)

	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	if locks, err = Locks(); err != nil || slices.ContainsFunc(locks, ours) {
		t.Errorf("after unlocking: %+v, %v", locks, err)
	}
}

// compareWithLslocks asks util-linux, where it is installed, about the same lock.
func compareWithLslocks(t *testing.T, lock Lock) {
	t.Helper()
	out, err := exec.Command("lslocks", "--json", "--output", "PID,TYPE,MODE,MAJ:MIN,INODE", "--pid", strconv.Itoa(lock.PID)).Output()
	if err != nil {
		t.Logf("not compared with lslocks: %v", err)
		return
	}
	var listed struct {
		Locks []struct {
			PID   int             `json:"pid"`
			Type  string          `json:"type"`
			Mode  string          `json:"mode"`
			Dev   string          `json:"maj:min"`
			Inode json.RawMessage `json:"inode"` // a number or a string, by version
		} `json:"locks"`
	}
	if err := json.Unmarshal(out, &listed); err != nil {
		t.Logf("not compared with lslocks: %v", err)
		return
	}
	dev := strconv.Itoa(int(lock.Major)) + ":" + strconv.Itoa(int(lock.Minor))
	inode := strconv.FormatUint(lock.Inode, 10)
	for _, l := range listed.Locks {
		number := string(l.Inode)
		if s, err := strconv.Unquote(number); err == nil {
			number = s
		}
		if l.PID == lock.PID && l.Type == lock.Type && l.Mode == "WRITE" && l.Dev == dev && number == inode {
			return
		}
	}
	t.Errorf("lslocks does not show %+v: %s", lock, out)
}

func TestMappingsAndResidency(t *testing.T) {
	const size = 1 << 20
	f, id := tmpfsFile(t, size)
	data, err := syscall.Mmap(int(f.Fd()), 0, size, syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Munmap(data) }()
	sum := 0
	for i := 0; i < size/2; i += 4096 {
		sum += int(data[i])
	}
	if sum != 0 {
		t.Fatal("not zeros")
	}
	// Mapped is mapped, also when the name is gone.
	if err := os.Remove(f.Name()); err != nil {
		t.Fatal(err)
	}

	found, _, err := FindMappings(set(id))
	if err != nil || len(found) != 1 {
		t.Fatalf("FindMappings: %+v, %v", found, err)
	}
	m := found[0]
	if m.PID != os.Getpid() || m.File != id || m.End-m.Start != size || m.Perms != "r--s" {
		t.Errorf("FindMappings: %+v", m)
	}

	sums, err := Resident(os.Getpid(), set(id))
	if err != nil {
		t.Fatal(err)
	}
	r := sums[id]
	if r.Size != size || r.RSS < size/2 || r.RSS > size || r.PSS <= 0 || r.PSS > r.RSS {
		t.Errorf("Resident: %+v", r)
	}
	if dirty := r.SharedDirty + r.PrivateDirty + r.SharedClean + r.PrivateClean; dirty != r.RSS {
		t.Errorf("Resident: the kinds of pages sum up to %d, RSS is %d", dirty, r.RSS)
	}
}

func TestFindDescriptors(t *testing.T) {
	f, id := tmpfsFile(t, 1)
	child := sleeper(t, f)
	found, _, err := FindDescriptors(set(id, FileID{Dev: id.Dev, Inode: id.Inode + 1<<40}))
	if err != nil {
		t.Fatal(err)
	}
	want := []Descriptor{{PID: os.Getpid(), FD: int(f.Fd()), File: id}, {PID: child, FD: 3, File: id}}
	slices.SortFunc(want, func(a, b Descriptor) int { return a.PID - b.PID })
	if diff := cmp.Diff(want, found); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// Descriptors whose fdinfo lies, is of an old kernel, or is missing.
func TestFindDescriptorsByInfo(t *testing.T) {
	f, id := tmpfsFile(t, 1)
	root := t.TempDir()
	pid := filepath.Join(root, "714")
	for _, dir := range []string{"fd", "fdinfo"} {
		if err := os.MkdirAll(filepath.Join(pid, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	other := filepath.Join(root, "other")
	write(t, other, "")
	for fd, c := range map[string]struct{ target, info string }{
		"0":   {f.Name(), "pos:\t0\nino:\t" + strconv.FormatUint(id.Inode, 10) + "\n"},
		"1":   {f.Name(), "pos:\t0\nino:\t" + strconv.FormatUint(id.Inode+1, 10) + "\n"},
		"10":  {f.Name(), "pos:\t0\n"},
		"11":  {other, "pos:\t0\nino:\t" + strconv.FormatUint(id.Inode, 10) + "\n"},
		"12":  {"socket:[" + strconv.FormatUint(id.Inode, 10) + "]", "pos:\t0\n"},
		"13":  {f.Name() + " is gone", "pos:\t0\n"},
		"new": {f.Name(), "pos:\t0\n"},
	} {
		if err := os.Symlink(c.target, filepath.Join(pid, "fd", fd)); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(pid, "fdinfo", fd), c.info)
	}
	if err := os.Symlink(f.Name(), filepath.Join(pid, "fd", "14")); err != nil {
		t.Fatal(err)
	}

	found, unreadable, err := tree{root}.findDescriptors(set(id))
	want := []Descriptor{{PID: 714, FD: 0, File: id}, {PID: 714, FD: 10, File: id}}
	if diff := cmp.Diff(want, found); diff != "" || unreadable != 0 || err != nil {
		t.Errorf("%d unreadable, %v (-want +got):\n%s", unreadable, err, diff)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// Of the processes that cannot be read only those count which could have
// mapped something. A directory is what not even root can read.
func TestUnreadable(t *testing.T) {
	const rest = " 1 1 1 0 -1 "
	const more = " 0 0 0 0 1 2 0 0 20 0 1 0 5 0\n"
	root := t.TempDir()
	for pid, stat := range map[string]string{
		"11": "11 (hidden) S" + rest + "4194304" + more,
		"12": "12 (kernel) I" + rest + "69238880" + more,
		"13": "13 (zombie) Z" + rest + "4194304" + more,
		"14": "nonsense",
		"15": "", // ended before its stat could be read
		"16": "",
	} {
		if stat != "" {
			write(t, filepath.Join(root, pid, "stat"), stat)
		}
		if pid != "16" { // ended before anything could be read
			for _, dir := range []string{"maps", "fd"} {
				write(t, filepath.Join(root, pid, dir, "x"), "")
			}
		}
	}
	if err := os.Mkdir(filepath.Join(root, "16"), 0o755); err != nil {
		t.Fatal(err)
	}
	found, unreadable, err := tree{root}.findMappings(set(FileID{1, 1}))
	if len(found) != 0 || unreadable != 2 || err != nil {
		t.Errorf("findMappings = %v, %d, %v, want 2 unreadable", found, unreadable, err)
	}
}

func TestNoProc(t *testing.T) {
	none := tree{filepath.Join(t.TempDir(), "none")}
	_, err1 := none.locks()
	_, _, err2 := none.findMappings(set(FileID{1, 1}))
	_, _, err3 := none.findDescriptors(set(FileID{1, 1}))
	_, err4 := none.resident(1, nil)
	_, err5 := none.process(1)
	_, err6 := none.pids()
	_, err7 := none.bootID()
	_, err8 := none.memInfo()
	for i, err := range []error{err1, err2, err3, err4, err5, err6, err7, err8} {
		var path *fs.PathError
		if !errors.Is(err, fs.ErrNotExist) || !errors.As(err, &path) {
			t.Errorf("%d: %v, want fs.ErrNotExist with its path", i+1, err)
		}
	}
}

func TestProcess(t *testing.T) {
	f, _ := tmpfsFile(t, 1)
	child := sleeper(t, f)
	p, err := Process(child)
	if err != nil {
		t.Fatal(err)
	}
	if p.PID != child || p.Command != "sleep 600" || p.UID != os.Geteuid() {
		t.Errorf("%+v", p)
	}
	if p.VmRSS <= 0 || p.VmPTE <= 0 {
		t.Errorf("no memory: %+v", p)
	}
	// The clock may have been set meanwhile, but hardly by a day.
	if age := time.Since(p.Start); age < -24*time.Hour || age > 24*time.Hour {
		t.Errorf("started %v ago", age)
	}
	pids, err := PIDs()
	if err != nil || !slices.IsSorted(pids) || !slices.Contains(pids, child) || !slices.Contains(pids, os.Getpid()) {
		t.Errorf("PIDs: %v, %v", pids, err)
	}
}

func TestProcessGone(t *testing.T) {
	cmd := exec.Command("true")
	if err := cmd.Run(); err != nil {
		t.Skipf("needs true: %v", err)
	}
	for _, pid := range []int{cmd.Process.Pid, 0, -1} {
		if _, err := Process(pid); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Process(%d): %v, want fs.ErrNotExist", pid, err)
		}
		if _, err := Resident(pid, nil); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Resident(%d): %v, want fs.ErrNotExist", pid, err)
		}
	}
}

// A dead child that nobody has waited for still has a number and a name.
func TestProcessZombie(t *testing.T) {
	cmd := exec.Command("sleep", "600")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Skipf("needs sleep: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := stdout.Read(make([]byte, 1)); err == nil { // returns when the child's end is closed
		t.Fatal("sleep wrote something")
	}
	p, err := Process(cmd.Process.Pid)
	if err != nil || p.VmRSS != 0 {
		t.Errorf("%+v, %v", p, err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("a killed child ended well")
	}
}

func TestMachine(t *testing.T) {
	info, err := MemInfo()
	if err != nil {
		t.Fatal(err)
	}
	if total, free := info["MemTotal"], info["MemFree"]; free <= 0 || total < free {
		t.Errorf("MemTotal %d, MemFree %d", total, free)
	}
	first, err := BootID()
	if err != nil {
		t.Fatal(err)
	}
	if second, err := BootID(); second != first || err != nil {
		t.Errorf("BootID: %q, then %q, %v", first, second, err)
	}
}

// The scan must stay cheap however long the maps are.
func TestFindMappingsAllocatesPerProcessOnly(t *testing.T) {
	long := "7f0000000000-7f0000001000 r--s 00000000 00:19 7 /dev/shm/another\n"
	allocs := func(lines int) float64 {
		root := t.TempDir()
		text := make([]byte, 0, lines*len(long))
		for range lines {
			text = append(text, long...)
		}
		write(t, filepath.Join(root, "714", "maps"), string(text))
		return testing.AllocsPerRun(10, func() {
			if _, _, err := (tree{root}).findMappings(set(weights)); err != nil {
				t.Fatal(err)
			}
		})
	}
	if one, many := allocs(1), allocs(10_000); many > one {
		t.Errorf("%v allocations for one line, %v for 10,000", one, many)
	}
}

func BenchmarkFindMappings(b *testing.B)    { benchmarkScan(b, findMappingsOnce) }
func BenchmarkFindDescriptors(b *testing.B) { benchmarkScan(b, findDescriptorsOnce) }

func findMappingsOnce() error    { _, _, err := FindMappings(set(weights)); return err }
func findDescriptorsOnce() error { _, _, err := FindDescriptors(set(weights)); return err }

func benchmarkScan(b *testing.B, scan func() error) {
	pids, err := PIDs()
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := scan(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(len(pids)), "processes")
}
