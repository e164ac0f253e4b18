package scan_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/procfs"
	"github.com/onecopy/onecopy/internal/proctest"
	"github.com/onecopy/onecopy/internal/scan"
)

func init() { proctest.Program("hold", hold) }

func TestMain(m *testing.M) { proctest.Main(m) }

// hold keeps memory as its arguments say, until stdin is closed:
//
//	copy OFFSET FILE      anonymous memory with the file's bytes from OFFSET on
//	pieces SIZE GAP FILE  the same in pieces, each at a place of its own
//	random SIZE, zero SIZE
//	reserve SIZE          memory of which nothing but every 64th page is there
//	map FILE              the file itself, shared
//	cow FILE              the file, private, every page written to
//	memfd FILE            shared memory with the file's bytes
func hold(args []string) int {
	if err := holdAll(args); err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

var kept [][]byte

func holdAll(args []string) error {
	next := func() string {
		s := args[0]
		args = args[1:]
		return s
	}
	number := func() int {
		n, err := strconv.Atoi(next())
		if err != nil {
			panic(err)
		}
		return n
	}
	anonymous := func(n int) ([]byte, error) {
		b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		kept = append(kept, b)
		return b, err
	}
	file := func(path string, prot, flags int) ([]byte, error) {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return nil, err
		}
		b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), prot, flags|unix.MAP_POPULATE)
		kept = append(kept, b)
		return b, err
	}
	read := func(path string, into []byte) error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		// Straight into the memory: no second copy of it lies in the heap.
		_, err = io.ReadFull(f, into)
		return err
	}
	size := func(path string) int {
		st, err := os.Stat(path)
		if err != nil {
			panic(err)
		}
		return int(st.Size())
	}
	for len(args) > 0 {
		var err error
		switch what := next(); what {
		case "copy":
			off, path := number(), next()
			var b []byte
			if b, err = anonymous(off + size(path)); err == nil {
				err = read(path, b[off:])
			}
		case "pieces":
			piece, gap, path := number(), number(), next()
			n := size(path)
			var b []byte
			if b, err = anonymous(n + (n/piece+1)*gap); err != nil {
				break
			}
			var f *os.File
			if f, err = os.Open(path); err != nil {
				break
			}
			for off, at := 0, gap; off < n && err == nil; off, at = off+piece, at+piece+gap {
				_, err = io.ReadFull(f, b[at:at+min(piece, n-off)])
			}
			f.Close()
		case "random", "zero":
			var b []byte
			if b, err = anonymous(number()); err == nil && what == "random" {
				fill(b, uint64(os.Getpid()))
			} else {
				for i := 0; i < len(b); i += 4096 {
					b[i] = 0
				}
			}
		case "reserve":
			var b []byte
			if b, err = anonymous(number()); err == nil {
				// Pages of 2 MiB would be there as a whole.
				err = unix.Madvise(b, unix.MADV_NOHUGEPAGE)
			}
			for i := 0; i < len(b); i += 64 * 4096 {
				b[i] = 1
			}
		case "map":
			_, err = file(next(), unix.PROT_READ, unix.MAP_SHARED)
		case "cow":
			var b []byte
			if b, err = file(next(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE); err == nil {
				for i := 0; i < len(b); i += 4096 {
					b[i]++
					b[i]--
				}
			}
		case "memfd":
			path := next()
			var fd int
			if fd, err = unix.MemfdCreate("copy", unix.MFD_CLOEXEC); err != nil {
				break
			}
			var b []byte
			if err = unix.Ftruncate(fd, int64(size(path))); err != nil {
				break
			}
			if b, err = unix.Mmap(fd, 0, size(path), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
				kept = append(kept, b)
				err = read(path, b)
			}
		default:
			err = errors.New("unknown: " + what)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// fill makes what looks like weights: 16-bit floats around zero.
func fill(b []byte, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 0))
	for i := 0; i+2 <= len(b); i += 2 {
		v := uint16(0x3c00 + r.IntN(0x0300))
		if r.IntN(2) == 0 {
			v |= 0x8000
		}
		binary.LittleEndian.PutUint16(b[i:], v)
	}
}

// weights writes a file of weights.
func weights(t *testing.T, path string, size int, seed uint64) string {
	t.Helper()
	b := make([]byte, size)
	fill(b, seed)
	return write(t, path, b)
}

func write(t *testing.T, path string, b []byte) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func start(t *testing.T, args ...string) *proctest.Proc {
	t.Helper()
	p := proctest.Start(t, "hold", args...)
	if line := p.Line(t); line != "ready" {
		t.Fatalf("hold %v: %s", args, line)
	}
	return p
}

// run scans the given processes.
func run(t *testing.T, models []scan.Model, o scan.Options, ps ...*proctest.Proc) *scan.Report {
	t.Helper()
	for _, p := range ps {
		o.PIDs = append(o.PIDs, p.PID())
	}
	r, err := scan.Run(context.Background(), models, o)
	if err != nil {
		t.Fatal(err)
	}
	if !r.Complete || r.Examined != len(ps) || r.NotVisible != 0 {
		t.Errorf("complete %v, %d examined of %d, %d not visible", r.Complete, r.Examined, len(ps), r.NotVisible)
	}
	return r
}

// near reports that got is within a hundredth of want.
func near(got, want int64) bool {
	d := got - want
	return max(d, -d)*100 <= want
}

func use(r *scan.Report, p *proctest.Proc, model int) scan.Use {
	for _, q := range r.Processes {
		for _, u := range q.Uses {
			if q.PID == p.PID() && u.Model == model {
				return u
			}
		}
	}
	return scan.Use{Model: model}
}

const mib = 1 << 20

func TestPrivateCopies(t *testing.T) {
	dir := t.TempDir()
	const size = 12*mib + 12345
	model := weights(t, dir+"/model", size, 1)
	other := weights(t, dir+"/other", size, 2)
	models := []scan.Model{{Name: "model", Files: []string{model}}}
	var ps []*proctest.Proc
	for _, args := range [][]string{
		{"copy", "0", model}, {"copy", "16", model}, {"copy", "32", model}, {"copy", "4097", model},
		{"copy", "16", model, "random", "9000000", "zero", "9000000", "copy", "3", other},
		{"pieces", "300001", "24", model}, {"cow", model},
	} {
		ps = append(ps, start(t, args...))
	}
	innocent := []*proctest.Proc{start(t, "copy", "16", other), start(t, "zero", "20000000"), start(t, "random", "20000000")}
	r := run(t, models, scan.Options{Threads: 2}, append(innocent, ps...)...)
	for i, p := range ps {
		u := use(r, p, 0)
		if !near(u.Private, size) {
			t.Errorf("process %d: private %d, want %d; %+v", i, u.Private, size, u)
		}
	}
	for i, p := range innocent {
		if u := use(r, p, 0); u.Private+u.OtherShm+u.PageCache != 0 {
			t.Errorf("innocent process %d: %+v", i, u)
		}
	}
	got := r.Models[0]
	if got.Copies != len(ps) || got.Bytes != size || !near(got.Private, int64(len(ps))*size) ||
		got.Reclaimable != got.Private-size || got.Attached+got.Both != 0 || got.OtherShm != 0 {
		t.Errorf("total: %+v", got)
	}
}

// A small index finds the same, only later.
func TestSmallIndex(t *testing.T) {
	const size = 24 * mib
	model := weights(t, t.TempDir()+"/model", size, 1)
	p := start(t, "copy", "16", model)
	r := run(t, []scan.Model{{Name: "model", Files: []string{model}}}, scan.Options{IndexMemory: 8 << 10, Samples: 1024}, p)
	if u := use(r, p, 0); !near(u.Private, size) {
		t.Errorf("%+v", u)
	}
}

func TestShared(t *testing.T) {
	tmpfs := proctest.TmpRegistry(t)
	const size = 8 * mib
	loaded := weights(t, tmpfs+"/m/loaded", size, 1)
	lease := write(t, tmpfs+"/m.manifest", []byte("lease"))
	disk := weights(t, t.TempDir()+"/source", size, 1)
	models := []scan.Model{{Name: "key", Registered: true, Files: []string{loaded}, Leases: []string{lease}}}

	attached := start(t, "map", loaded)
	leased := start(t, "map", lease)
	both := start(t, "map", loaded, "copy", "16", loaded)
	pageCache := start(t, "map", disk)
	shm := start(t, "memfd", disk)
	r := run(t, models, scan.Options{}, attached, leased, both, pageCache, shm)

	if u := use(r, attached, 0); !u.Attached || u.Resident != size || u.Private+u.OtherShm+u.PageCache != 0 {
		t.Errorf("attached: %+v", u)
	}
	if u := use(r, leased, 0); !u.Attached || u.Private != 0 {
		t.Errorf("with a lease: %+v", u)
	}
	if u := use(r, both, 0); !u.Attached || !near(u.Private, size) {
		t.Errorf("attached and copied: %+v", u)
	}
	if u := use(r, pageCache, 0); u.Attached || u.Private != 0 || !near(u.PageCache, size) {
		t.Errorf("page cache: %+v", u)
	}
	if u := use(r, shm, 0); u.Attached || u.Private != 0 || !near(u.OtherShm, size) {
		t.Errorf("other shared memory: %+v", u)
	}
	got := r.Models[0]
	if got.Attached != 3 || got.Both != 1 || got.Copies != 1 || got.PageCache != 1 || !near(got.Reclaimable, 2*size) {
		t.Errorf("total: %+v", got)
	}

	// As files they are the thing itself.
	r = run(t, []scan.Model{{Name: "file", Files: []string{loaded}}}, scan.Options{}, attached)
	if u := use(r, attached, 0); u.Attached || !near(u.PageCache, size) || u.OtherShm != 0 {
		t.Errorf("the file itself: %+v", u)
	}
}

// Two models with half of their contents in common: a copy is of the one that it
// matches altogether.
func TestCommonContents(t *testing.T) {
	dir := t.TempDir()
	const size = 8 * mib
	a := make([]byte, size)
	fill(a, 1)
	b := append(a[:size/2:size/2], make([]byte, size/2)...)
	fill(b[size/2:], 2)
	models := []scan.Model{
		{Name: "a", Files: []string{write(t, dir+"/a", a)}},
		{Name: "b", Files: []string{write(t, dir+"/b", b)}},
	}
	pa, pb := start(t, "copy", "16", dir+"/a"), start(t, "pieces", "1000000", "16", dir+"/b")
	r := run(t, models, scan.Options{}, pa, pb)
	for i, p := range []*proctest.Proc{pa, pb} {
		if u := use(r, p, i); !near(u.Private, size) {
			t.Errorf("copy of %s: %+v", models[i].Name, u)
		}
		if u := use(r, p, 1-i); u.Private != 0 {
			t.Errorf("copy of %s, taken for the other: %+v", models[i].Name, u)
		}
	}
}

// A model of equal or of zero bytes matches nothing, not even itself.
func TestBlank(t *testing.T) {
	path := write(t, t.TempDir()+"/model", make([]byte, 4*mib))
	p := start(t, "copy", "0", path, "zero", "4000000")
	if r := run(t, []scan.Model{{Name: "model", Files: []string{path}}}, scan.Options{}, p); len(r.Processes) != 0 {
		t.Errorf("%+v", r.Processes)
	}
}

func TestNotVisible(t *testing.T) {
	path := weights(t, t.TempDir()+"/model", 4*mib, 1)
	p := start(t, "copy", "0", path)
	if os.Geteuid() != 0 {
		t.Skip("needs root, to become somebody who may not look")
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	for dir := filepath.Dir(path); dir != "/" && dir != os.TempDir(); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	watcher := proctest.Start(t, "nobody", path, strconv.Itoa(p.PID()))
	got := watcher.Line(t)
	if want := "0 examined, 1 not visible, 0 of them mine, 0 found"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func init() { proctest.Program("nobody", nobody) }

func nobody(args []string) int {
	const id = 65534
	for _, err := range []error{syscall.Setgroups(nil), syscall.Setgid(id), syscall.Setuid(id)} {
		if err != nil {
			fmt.Println(err)
			return 1
		}
	}
	pid, _ := strconv.Atoi(args[1])
	r, err := scan.Run(context.Background(), []scan.Model{{Name: "model", Files: args[:1]}}, scan.Options{PIDs: []int{pid}})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Printf("%d examined, %d not visible, %d of them mine, %d found\n", r.Examined, r.NotVisible, r.SameUser, len(r.Processes))
	return 0
}

func TestGoneAndCancelled(t *testing.T) {
	path := weights(t, t.TempDir()+"/model", 4*mib, 1)
	models := []scan.Model{{Name: "model", Files: []string{path}}}
	p := start(t, "copy", "0", path)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := scan.Run(ctx, models, scan.Options{PIDs: []int{p.PID()}}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	r, err := scan.Run(context.Background(), models, scan.Options{PIDs: []int{p.PID()}, Time: 1})
	if err != nil || r.Complete || r.SkippedFor != 1 {
		t.Errorf("without time: %v, %+v", err, r)
	}
	p.Kill()
	r, err = scan.Run(context.Background(), models, scan.Options{PIDs: []int{p.PID()}})
	if err != nil || r.Examined+r.NotVisible+len(r.Processes) != 0 || !r.Complete {
		t.Errorf("dead process: %v, %+v", err, r)
	}
}

// The process is neither stopped nor does it get a page that it had not.
func TestDoesNotDisturb(t *testing.T) {
	path := weights(t, t.TempDir()+"/model", 8*mib, 1)
	models := []scan.Model{{Name: "model", Files: []string{path}}}
	p := start(t, "copy", "16", path, "reserve", "100000000")
	status := func(name string) string {
		f, err := os.Open(fmt.Sprintf("/proc/%d/status", p.PID()))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for sc := bufio.NewScanner(f); sc.Scan(); {
			if n, value, _ := strings.Cut(sc.Text(), ":"); n == name {
				return strings.TrimSpace(value)
			}
		}
		return ""
	}
	// Its runtime allocates a little by itself; what the scan could add are many
	// more pages, if it read those that are not there.
	rss := func() int64 {
		pr, err := procfs.Process(p.PID())
		if err != nil {
			t.Fatal(err)
		}
		return pr.VmRSS
	}
	size := rss()
	run(t, models, scan.Options{}, p)
	if tracer, state := status("TracerPid"), status("State"); tracer != "0" || strings.ContainsAny(state[:1], "tT") {
		t.Errorf("tracer %s, state %s", tracer, state)
	}
	if grown := rss() - size; grown > 2*mib {
		t.Errorf("the process has %d bytes more", grown)
	}
}

func TestBadFiles(t *testing.T) {
	dir := t.TempDir()
	fifo := dir + "/fifo"
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]error{dir + "/none": fs.ErrNotExist, fifo: nil, dir: nil} {
		_, err := scan.Run(context.Background(), []scan.Model{{Name: "model", Files: []string{path}}}, scan.Options{PIDs: []int{}})
		if err == nil || want != nil && !errors.Is(err, want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := scan.Run(context.Background(), nil, scan.Options{}); !errors.Is(err, scan.ErrNothing) {
		t.Errorf("no models: %v", err)
	}
}
