package scan

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
)

func randomBytes(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 0))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func indexOf(t testing.TB, memory int64, contents ...[]byte) *index {
	t.Helper()
	var models []Model
	for _, b := range contents {
		path := t.TempDir() + "/file"
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		models = append(models, Model{Name: path, Files: []string{path}})
	}
	x, err := newIndex(context.Background(), models, memory)
	if err != nil {
		t.Skipf("no index: %v", err)
	}
	t.Cleanup(x.close)
	return x
}

// Wherever a page of a copy begins, its place is found.
func TestEveryAlignment(t *testing.T) {
	model := randomBytes(1, 64<<10)
	x := indexOf(t, defaultIndex, model)
	if x.stride != 1 {
		t.Fatalf("stride %d", x.stride)
	}
	for off := 0; off+pageBytes <= len(model); off += 7 {
		found := false
		x.lookUp(model[off:off+pageBytes], func(file int, at int64) bool {
			found = file == 0 && at == int64(off)
			return !found
		})
		if !found {
			t.Fatalf("offset %d is not found", off)
		}
	}
	x.lookUp(randomBytes(2, pageBytes), func(_ int, at int64) bool {
		t.Errorf("other bytes are found at %d", at)
		return true
	})
}

// Two models that share contents are both seen.
func TestBothModels(t *testing.T) {
	common := randomBytes(1, 32<<10)
	x := indexOf(t, defaultIndex, common, append(randomBytes(2, 1000*blockBytes), common...))
	var files []int
	x.lookUp(common[8192:8192+pageBytes], func(file int, _ int64) bool {
		files = append(files, file)
		return true
	})
	slices.Sort(files)
	if files = slices.Compact(files); len(files) != 2 {
		t.Errorf("files %v", files)
	}
}

func TestStrideBoundsMemory(t *testing.T) {
	model := randomBytes(1, 1<<20)
	x := indexOf(t, 2048, model)
	if got := int64(len(x.keys)+len(x.places)) * 8; x.stride < 2 || got > 4*2048 {
		t.Errorf("stride %d, %d bytes", x.stride, got)
	}
}

func TestCompare(t *testing.T) {
	model := randomBytes(1, 10000)
	copy(model[4096:], make([]byte, 2048)) // a hole
	x := indexOf(t, defaultIndex, model)
	at := func(off int) []byte {
		page := randomBytes(9, pageBytes)
		from := max(0, -off)
		copy(page[from:], model[max(0, off):])
		return page
	}
	changed := func(b []byte, i int) []byte {
		b[i]++
		return b
	}
	for _, tt := range []struct {
		name string
		off  int64
		page []byte
		want int
	}{
		{"the start", 0, at(0), pageBytes},
		{"any place", 3, at(3), pageBytes},
		{"before the start", -1000, at(-1000), pageBytes - 1000},
		{"mostly before it", -3500, at(-3500), 0},
		{"beyond the end", 7000, at(7000), 3000},
		{"nearly at it", 9900, at(9900), 0},
		{"far away", 1 << 40, at(0), 0},
		{"the front part", 0, changed(at(0), 3000), 3000},
		{"the back part", 0, changed(at(0), 1000), pageBytes - 1001},
		{"too little of both", 0, changed(changed(at(0), 1000), 3500), 0},
		{"another place", 1, at(0), 0},
	} {
		if got := x.compare(0, tt.off, tt.page, make([]byte, pageBytes)); got != tt.want {
			t.Errorf("%s: %d bytes, want %d", tt.name, got, tt.want)
		}
	}
	zero := indexOf(t, defaultIndex, make([]byte, 8192))
	if got := zero.compare(0, 100, make([]byte, pageBytes), make([]byte, pageBytes)); got != 0 {
		t.Errorf("zero matches: %d bytes", got)
	}
}

func TestBlank(t *testing.T) {
	pair := bytes.Repeat([]byte{0x80, 0x3f}, 100)
	for _, tt := range []struct {
		b    []byte
		want bool
	}{
		{nil, true}, {make([]byte, 4096), true}, {pair, true}, {append(pair, 1), false},
		{append(make([]byte, 99), 1), false}, {randomBytes(1, 64), false},
	} {
		if got := blank(tt.b); got != tt.want {
			t.Errorf("blank(%d bytes) = %v", len(tt.b), got)
		}
	}
}

func TestSpread(t *testing.T) {
	for _, n := range []int{1, 2, 3, 64, 100, 2048} {
		seen := map[int]bool{}
		for i, at := range spread(n) {
			if i != len(seen) || at < 0 || at >= n {
				t.Fatalf("spread(%d): %d, %d", n, i, at)
			}
			seen[at] = true
		}
		if len(seen) != n {
			t.Errorf("spread(%d) has %d", n, len(seen))
		}
	}
	for range spread(0) {
		t.Error("spread(0) is not empty")
	}
}

func TestNearest(t *testing.T) {
	var ps []place
	for _, seen := range []uint64{100, 900, 500, 480, 520, 10, 505} {
		ps = append(ps, place{seen: seen})
	}
	if got, want := near(ps, 501), []int{2, 6, 4, 3}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got := near(nil, 1); len(got) != 0 {
		t.Errorf("of nothing: %v", got)
	}
}

// Any bytes can be a model and a page of a process.
func FuzzLookUp(f *testing.F) {
	f.Add(randomBytes(1, 9000), randomBytes(1, 9000)[5000:])
	f.Add([]byte{}, make([]byte, 40))
	f.Fuzz(func(t *testing.T, model, page []byte) {
		page = page[:min(len(page), pageBytes)]
		x := indexOf(t, defaultIndex, model)
		x.lookUp(page, func(file int, off int64) bool {
			n := x.compare(file, off, page, make([]byte, pageBytes))
			if n != 0 && (n < leastEqual || n > len(page)) {
				t.Errorf("%d bytes equal", n)
			}
			return true
		})
	})
}

func BenchmarkLookUp(b *testing.B) {
	x := indexOf(b, defaultIndex, randomBytes(1, 64<<20))
	page := randomBytes(2, pageBytes)
	b.SetBytes(pageBytes)
	for b.Loop() {
		x.lookUp(page, func(int, int64) bool { return true })
	}
}
