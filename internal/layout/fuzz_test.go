package layout

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// seeds gives the golden files whose names match to a fuzz target.
func seeds(f *testing.F, pattern string, add func(b []byte)) {
	f.Helper()
	paths, err := filepath.Glob(filepath.Join(goldenDir, pattern))
	if err != nil || len(paths) == 0 {
		f.Fatalf("%s: no seeds, %v", pattern, err)
	}
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		add(b)
	}
}

// alignedCopy copies b to where a table may lie; the fuzzer's own bytes may lie
// anywhere.
func alignedCopy(b []byte) []byte { return append(make([]byte, 0, len(b)+8), b...) }

// FuzzValidate: any bytes at all, as they are and with a header that makes them
// a table.
func FuzzValidate(f *testing.F) {
	seeds(f, "*.bin", func(b []byte) { f.Add(b) })
	f.Fuzz(func(t *testing.T, b []byte) {
		b = alignedCopy(b)
		exercise(t, b, []string{"key"})
		if len(b) >= TableSize(MinSlots) {
			b = b[:TableSize(MinSlots)]
			exercise(t, withHeader(t, b), []string{"key"})
		}
	})
}

// withHeader puts a sound identity before the rest of b.
func withHeader(t testing.TB, b []byte) []byte {
	copy(b[:offGeneration], newEditor(t, MinSlots).b)
	return b
}

// FuzzLookup fills a small table with the input from its index on, where every
// byte matters, so that the fuzzer need not find its way past header and gaps.
func FuzzLookup(f *testing.F) {
	short := func(b []byte) []byte {
		const index, slots = HeaderSize, HeaderSize + indexAlign // of a table of 8 slots
		return append(append([]byte(nil), b[index:index+4*indexEntries(MinSlots)]...), b[slots:slots+MinSlots*SlotSize]...)
	}
	for _, name := range []string{"empty-8.bin", "full-8.bin", "problems-8.bin"} {
		seeds(f, name, func(b []byte) { f.Add(short(b), uint64(8), "org/model-3") })
	}
	e, keys := lived(f)
	f.Add(short(e.b), e.Generation(), keys[1])
	f.Add([]byte(strings.Repeat("\xff", 4*indexEntries(MinSlots))), uint64(0), "")
	f.Fuzz(func(t *testing.T, data []byte, generation uint64, key string) {
		b := newEditor(t, MinSlots).b
		n := copy(b[HeaderSize:HeaderSize+4*indexEntries(MinSlots)], data)
		copy(b[slotsOffset(MinSlots):], data[n:])
		putWord(b, offGeneration, generation)
		exercise(t, b, []string{key})
	})
}

// FuzzManifest: what is accepted can be written and means the same.
func FuzzManifest(f *testing.F) {
	seeds(f, "manifests/*.json", func(b []byte) { f.Add(b) })
	f.Fuzz(reencode)
}

// FuzzDigests: what is accepted is exactly what EncodeDigests makes, for models
// of any two files.
func FuzzDigests(f *testing.F) {
	seeds(f, "example.digests", func(b []byte) { f.Add(b, int64(612), int64(4<<20+1), uint8(10)) })
	f.Add([]byte{}, int64(0), int64(0), uint8(0))
	f.Add([]byte(strings.Repeat("d", 256)), int64(4096), int64(8192), uint8(0))
	f.Fuzz(func(t *testing.T, b []byte, size0, size1 int64, shift uint8) {
		m := exampleManifest()
		m.ChunkBytes = 4096 << (shift % 19)
		m.Files[0].Size, m.Files[1].Size = size0, size1
		check := func(b []byte) {
			got, err := DecodeDigests(b, m, testAlgorithm)
			if err != nil {
				return
			}
			var chunks [][DigestSize]byte
			for i, file := range got {
				if want := ChunkCount(m.Files[i].Size, m.ChunkBytes) * DigestSize; int64(len(file)) != want {
					t.Fatalf("file %d: %d bytes of digests, want %d", i, len(file), want)
				}
				for ; len(file) > 0; file = file[DigestSize:] {
					chunks = append(chunks, [DigestSize]byte(file))
				}
			}
			if d := cmp.Diff(b, EncodeDigests(m, testAlgorithm, chunks)); d != "" {
				t.Error(d)
			}
		}
		check(b)
		if len(b) < offDigests+8 {
			return
		}
		// The same with a header and a checksum that belong to the manifest.
		b = append([]byte(nil), b...)
		copy(b, EncodeDigests(m, testAlgorithm, nil)[:offDigests])
		binary.LittleEndian.PutUint64(b[offDigCount:], uint64(len(b)-offDigests-8)/DigestSize)
		binary.LittleEndian.PutUint64(b[len(b)-8:], checksum(b[:len(b)-8]))
		check(b)
	})
}

// FuzzNames: a valid key gives a folder's name that is one safe path element,
// and a generation's name is only what GenName writes.
func FuzzNames(f *testing.F) {
	for _, s := range []string{"a", "org/model", "..", "/", "\x00", "\xff", "0123456789abcdef-42.manifest", "0123456789abcdef-042", "a/../b", `a\b`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if ValidKey(s) == nil {
			if name := SafeName(s); ValidPath(name) != nil || strings.Contains(name, "/") || len(name) > 100 {
				t.Errorf("SafeName(%q) = %q", s, name)
			}
		}
		if epoch, gen, ext, ok := ParseGenName(s); ok && GenName(epoch, gen)+ext != s {
			t.Errorf("ParseGenName(%q) = %x, %d, %q", s, epoch, gen, ext)
		}
		if ValidPath(s) == nil && (filepath.IsAbs(s) || filepath.ToSlash(filepath.Clean(s)) != s || strings.HasPrefix(s, "..") && (len(s) == 2 || s[2] == '/')) {
			t.Errorf("ValidPath(%q) accepts it", s)
		}
	})
}
