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

	uses, _, err := new(Surveyor).Run(Query{Want: set(id), Weigh: set(id), Deleted: filepath.Dir(f.Name())})
	if err != nil || len(uses) != 1 {
		t.Fatalf("Run: %+v, %v", uses, err)
	}
	u := uses[0]
	if u.PID != os.Getpid() || !slices.Equal(u.Mapped, []FileID{id}) || !slices.Equal(u.Open, []FileID{id}) || u.Command == "" {
		t.Errorf("Run: %+v", u)
	}
	if diff := cmp.Diff([]Unlinked{{File: id, Path: f.Name(), Bytes: size}}, u.Unlinked); diff != "" {
		t.Errorf("unlinked (-want +got):\n%s", diff)
	}

	sums, err := Resident(os.Getpid(), set(id))
	if err != nil {
		t.Fatal(err)
	}
	r := sums[id]
	if r.Size != size || r.RSS < size/2 || r.RSS > size || r.PSS <= 0 || r.PSS > r.RSS {
		t.Errorf("Resident: %+v", r)
	}
	if len(u.Weights) != 1 || u.Weights[0] != (Weight{id, r.RSS, r.PSS}) {
		t.Errorf("Run says %+v, Resident %+v", u.Weights, r)
	}
	if dirty := r.SharedDirty + r.PrivateDirty + r.SharedClean + r.PrivateClean; dirty != r.RSS {
		t.Errorf("Resident: the kinds of pages sum up to %d, RSS is %d", dirty, r.RSS)
	}
}

func TestSurveyOfDescriptors(t *testing.T) {
	f, id := tmpfsFile(t, 1)
	child := sleeper(t, f)
	uses, _, err := new(Surveyor).Run(Query{Want: set(id, FileID{Dev: id.Dev, Inode: id.Inode + 1<<40})})
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, u := range uses {
		pids = append(pids, u.PID)
		if !slices.Equal(u.Open, []FileID{id}) || len(u.Mapped)+len(u.Weights)+len(u.Unlinked) != 0 {
			t.Errorf("%+v", u)
		}
	}
	want := []int{os.Getpid(), child}
	slices.Sort(want)
	if diff := cmp.Diff(want, pids); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// Descriptors of all kinds, with names that the kernel would not give.
func TestSurveyOfStrangeDescriptors(t *testing.T) {
	f, id := tmpfsFile(t, 1)
	root := t.TempDir()
	pid := filepath.Join(root, "714")
	other := filepath.Join(root, "other")
	write(t, other, "")
	write(t, filepath.Join(pid, "maps"), "")
	write(t, filepath.Join(pid, "status"), "")
	write(t, filepath.Join(pid, "stat"), "714 (x) S 1 1 1 0 -1 4194304 0 0 0 0 1 2 0 0 20 0 1 0 5 0\n")
	link := func(fd, target string) {
		if err := os.MkdirAll(filepath.Join(pid, "fd"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, filepath.Join(pid, "fd", fd)); err != nil {
			t.Fatal(err)
		}
	}
	open := func() int {
		t.Helper()
		uses, hidden, err := new(Surveyor).run(tree{root}, Query{Want: set(id)})
		if err != nil || len(hidden) > 0 {
			t.Fatalf("%v, %v", hidden, err)
		}
		if len(uses) == 0 {
			return 0
		}
		return len(uses[0].Open)
	}
	link("1", other)
	link("2", "socket:["+strconv.FormatUint(id.Inode, 10)+"]")
	link("3", f.Name()+" is gone")
	link("new", f.Name())
	if n := open(); n != 0 {
		t.Errorf("%d wanted files open, want none", n)
	}
	link("0", f.Name())
	link("10", f.Name())
	if n := open(); n != 1 {
		t.Errorf("%d wanted files open, want 1", n)
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
			for _, dir := range []string{"maps", "smaps", "fd"} {
				write(t, filepath.Join(root, pid, dir, "x"), "")
			}
		}
	}
	if err := os.Mkdir(filepath.Join(root, "16"), 0o755); err != nil {
		t.Fatal(err)
	}
	uses, hidden, err := new(Surveyor).run(tree{root}, Query{Want: set(FileID{1, 1}), Likely: map[int]struct{}{11: {}}})
	if len(uses) != 0 || !slices.Equal(hidden, []int{11, 14}) || err != nil {
		t.Errorf("%v, hidden %v, %v, want 11 and 14 hidden", uses, hidden, err)
	}
}

func TestNoProc(t *testing.T) {
	none := tree{filepath.Join(t.TempDir(), "none")}
	_, err1 := none.locks()
	_, _, err2 := new(Surveyor).run(none, Query{Want: set(FileID{1, 1})})
	_, err4 := none.resident(1, nil)
	_, err5 := none.process(1)
	_, err6 := none.pids()
	_, err7 := none.bootID()
	_, err3 := none.memInfo()
	for i, err := range []error{err1, err2, err3, err4, err5, err6, err7} {
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
	if uid, err := UID(child); err != nil || uid != p.UID {
		t.Errorf("UID: %d, %v", uid, err)
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
		if _, err := UID(pid); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("UID(%d): %v, want fs.ErrNotExist", pid, err)
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

// A survey must stay cheap however long the maps are.
func TestSurveyAllocatesPerProcessOnly(t *testing.T) {
	long := "7f0000000000-7f0000001000 r--s 00000000 00:19 7 /dev/shm/another\n"
	allocs := func(lines int) float64 {
		root := t.TempDir()
		text := make([]byte, 0, lines*len(long))
		for range lines {
			text = append(text, long...)
		}
		write(t, filepath.Join(root, "714", "maps"), string(text))
		return testing.AllocsPerRun(10, func() {
			if _, _, err := new(Surveyor).run(tree{root}, Query{Want: set(weights), Deleted: "/dev/shm"}); err != nil {
				t.Fatal(err)
			}
		})
	}
	const threads = 20 // what starting some may differ by
	if one, many := allocs(1), allocs(10_000); many > one+threads {
		t.Errorf("%v allocations for one line, %v for 10,000", one, many)
	}
}

// What a process weighs is believed while its shared memory stays as it is, and
// no longer than that.
func TestSurveyBelieves(t *testing.T) {
	root := t.TempDir()
	pid := filepath.Join(root, "714")
	const vma = "7f0000000000-7f0000001000 r--s 00000000 00:19 4294967301 /dev/shm/x\n"
	put := func(name string, kb string) {
		t.Helper()
		if name == "smaps" {
			write(t, filepath.Join(pid, name), vma+"Rss: "+kb+" kB\nPss: 1 kB\n")
			return
		}
		write(t, filepath.Join(pid, name), "9 5 "+kb+" 1 0 1 0\n")
	}
	write(t, filepath.Join(pid, "maps"), vma)
	write(t, filepath.Join(pid, "status"), "Uid:\t0\t0\t0\t0\n")
	write(t, filepath.Join(pid, "stat"), "714 (x) S 1 1 1 0 -1 4194304 0 0 0 0 1 2 0 0 20 0 1 0 5 0\n")
	s := &Surveyor{Believe: time.Hour}
	resident := func() int64 {
		t.Helper()
		uses, _, err := s.run(tree{root}, Query{Want: set(weights), Weigh: set(weights), Likely: map[int]struct{}{714: {}}})
		if err != nil || len(uses) != 1 || len(uses[0].Weights) != 1 {
			t.Fatalf("%+v, %v", uses, err)
		}
		return uses[0].Weights[0].RSS / 1024
	}
	want := func(kb int64, when string) {
		t.Helper()
		if got := resident(); got != kb {
			t.Errorf("%s: %d kB, want %d", when, got, kb)
		}
	}
	put("statm", "4")
	put("smaps", "4")
	want(4, "first")
	put("smaps", "8")
	want(4, "unchanged, it seems")
	put("statm", "8")
	want(8, "changed")
	put("smaps", "12")
	s.Believe = time.Nanosecond
	put("statm", "9")
	want(12, "changed again")
	put("smaps", "13")
	want(13, "too old")
	put("smaps", "16")
	write(t, filepath.Join(pid, "stat"), "714 (y) S 1 1 1 0 -1 4194304 0 0 0 0 1 2 0 0 20 0 1 0 6 0\n")
	s.Believe = time.Hour
	want(16, "another process with the same number")
	put("smaps", "20")
	s.Believe = 0
	want(20, "nothing is believed")
}

func BenchmarkSurvey(b *testing.B) {
	pids, err := PIDs()
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := new(Surveyor).Run(Query{Want: set(weights)}); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(len(pids)), "processes")
}
