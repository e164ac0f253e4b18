package procfs

import (
	"bytes"
	"errors"
	"io/fs"
	"math"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestRegions(t *testing.T) {
	const text = `7f0e5c000000-7f0e5c200000 rw-p 00000000 00:00 0 
Size:               2048 kB
Rss:                1024 kB
Pss:                 512 kB
Anonymous:          1024 kB
Swap:                  4 kB
ShmemPmdMapped:        8 kB
VmFlags: rd wr
7f0e5d000000-7f0e5d001000 r--s 00002000 00:19 5                          /dev/shm/with blank (deleted)
Rss:                   4 kB
not a region-at all
Rss:                9999 kB
7f0e5e000000-7f0e5e001000 r--p 00000000 00:19 6                          /small
Rss:                   0 kB
`
	r := regions{least: 4096}
	if err := eachLine(strings.NewReader(text), make([]byte, 4096), r.line); err != nil {
		t.Fatal(err)
	}
	r.end()
	want := []Region{
		{Start: 0x7f0e5c000000, End: 0x7f0e5c200000, Perms: "rw-p", RSS: 1 << 20, PSS: 512 << 10, Anonymous: 1 << 20, Swap: 4096, Huge: 8192},
		{
			Start: 0x7f0e5d000000, End: 0x7f0e5d001000, Offset: 0x2000, Perms: "r--s",
			File: FileID{makeDev(0, 0x19), 5}, Path: "/dev/shm/with blank (deleted)", RSS: 4096,
		},
	}
	if d := cmp.Diff(want, r.found); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

// FuzzSmaps covers both readers of mappings, of their sums per file and of the mappings
// one by one.
func FuzzSmaps(f *testing.F) {
	addSamples(f, "*/maps")
	addSamples(f, "*/smaps")
	want := map[FileID]struct{}{{}: {}}
	for _, inode := range []uint64{5, 6, 2051, 4294967301} {
		want[FileID{Dev: makeDev(0, 0x19), Inode: inode}] = struct{}{}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		sums, single := residencies{want: want, sum: make(map[FileID]*Residency)}, regions{}
		feed(data, func(line []byte) {
			sums.line(line)
			single.line(line)
		})
		for id, sum := range sums.result() {
			if _, wanted := want[id]; !wanted {
				t.Errorf("%v was not asked for", id)
			}
			for _, n := range []int64{
				sum.Size, sum.RSS, sum.PSS, sum.SharedClean, sum.SharedDirty, sum.PrivateClean,
				sum.PrivateDirty, sum.Swap, sum.Locked, sum.ShmemPMDMapped,
			} {
				if n < 0 {
					t.Errorf("%v: %+v", id, sum)
				}
			}
		}
		single.end()
		for _, g := range single.found {
			if g.Start > g.End || g.End > math.MaxInt64 || len(g.Perms) != 4 || g.RSS < 0 || g.PSS < 0 || g.Anonymous < 0 {
				t.Errorf("%+v", g)
			}
		}
	})
}

// This process's own memory: some pages of a file, one of its own, one that is
// not there.
func TestMemory(t *testing.T) {
	page := os.Getpagesize()
	file, id := tmpfsFile(t, 4*page)
	if _, err := file.WriteAt([]byte("shared"), 0); err != nil {
		t.Fatal(err)
	}
	b, err := syscall.Mmap(int(file.Fd()), 0, 4*page, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Munmap(b)
	if string(b[:6]) != "shared" { // now it is there
		t.Fatal("wrong contents")
	}
	copy(b[2*page:], "private")

	m, err := OpenMemory(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	all, err := m.Regions(1)
	if err != nil {
		t.Fatal(err)
	}
	var at uint64
	for _, r := range all {
		if r.File == id {
			at = r.Start
			if r.Anonymous != int64(page) || r.RSS < int64(2*page) || !strings.HasSuffix(r.Path, "/with blank") {
				t.Errorf("%+v", r)
			}
		}
	}
	pages := make([]Page, 8)
	n, err := m.Pages(at, pages, make([]byte, 8*4))
	if err != nil || n != 4 {
		t.Fatalf("%d pages, %v", n, err)
	}
	if !pages[0].Present() || !pages[0].Shared() {
		t.Errorf("page of the file: %#x", pages[0])
	}
	if !pages[2].Present() || pages[2].Shared() {
		t.Errorf("page of its own: %#x", pages[2])
	}
	got := make([]byte, 7)
	if _, err := m.ReadAt(got, int64(at)+int64(2*page)); err != nil || !bytes.Equal(got, []byte("private")) {
		t.Errorf("read %q, %v", got, err)
	}
	if _, err := m.ReadAt(got, 1); err == nil {
		t.Error("read what is not mapped")
	}
}

func TestMemoryOfNobody(t *testing.T) {
	if _, err := OpenMemory(math.MaxInt32); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
	if Hidden(math.MaxInt32, fs.ErrPermission) {
		t.Error("a process that is not there is hidden")
	}
}
