package layout

import (
	"encoding/binary"
	"errors"
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const testAlgorithm = "xxh3-128"

// exampleChunks are the chunk digests of exampleManifest: one of the first file,
// two of the second.
func exampleChunks() [][DigestSize]byte {
	chunks := make([][DigestSize]byte, 3)
	for i := range chunks {
		for j := range chunks[i] {
			chunks[i][j] = byte(16*i + j)
		}
	}
	return chunks
}

func TestGoldenDigests(t *testing.T) {
	m := exampleManifest()
	golden(t, "example.digests", EncodeDigests(m, testAlgorithm, exampleChunks()))
	b, err := os.ReadFile(filepath.Join(goldenDir, "example.digests"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeDigests(b, m, testAlgorithm)
	if err != nil {
		t.Fatal(err)
	}
	c := exampleChunks()
	want := [][]byte{c[0][:], append(append([]byte(nil), c[1][:]...), c[2][:]...)}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestDecodeDigestsRefuses(t *testing.T) {
	m := exampleManifest()
	sound := EncodeDigests(m, testAlgorithm, exampleChunks())
	set := func(off int, v uint64) func([]byte) []byte {
		return func(b []byte) []byte {
			binary.LittleEndian.PutUint64(b[off:], v)
			binary.LittleEndian.PutUint64(b[len(b)-8:], checksum(b[:len(b)-8]))
			return b
		}
	}
	for name, c := range map[string]struct {
		do   func(b []byte) []byte
		want error
	}{
		"magic":            {set(offDigMagic, Magic), ErrDigests},
		"version":          {set(offDigVersion, 2), ErrVersion},
		"epoch":            {set(offDigEpoch, 1), ErrDigests},
		"generation":       {set(offDigGeneration, 43), ErrDigests},
		"chunk size":       {set(offDigChunkBytes, 2<<20), ErrDigests},
		"count":            {set(offDigCount, 4), ErrDigests},
		"algorithm":        {set(offDigAlgorithm, 0x3834363432_686873), ErrDigests},
		"longer algorithm": {set(offDigAlgorithm+8, 'x'), ErrDigests},
		"checksum":         {func(b []byte) []byte { b[offDigests] ^= 1; return b }, ErrDigests},
		"empty":            {func(b []byte) []byte { return nil }, ErrDigests},
		"header only":      {func(b []byte) []byte { return b[:offDigests] }, ErrDigests},
		"one short":        {func(b []byte) []byte { return b[:len(b)-1] }, ErrDigests},
		"one long":         {func(b []byte) []byte { return append(b, 0) }, ErrDigests},
	} {
		b := c.do(append([]byte(nil), sound...))
		if _, err := DecodeDigests(b, m, testAlgorithm); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	huge := exampleManifest()
	huge.Files[0].Size = math.MaxInt64
	huge.Files[1].Size = math.MaxInt64
	if _, err := DecodeDigests(sound, huge, testAlgorithm); !errors.Is(err, ErrDigests) {
		t.Errorf("of a model without end: %v", err)
	}
}

// TestDigestsEveryFlip: no changed byte is taken for a digest.
func TestDigestsEveryFlip(t *testing.T) {
	m := exampleManifest()
	b := EncodeDigests(m, testAlgorithm, exampleChunks())
	for off := range b {
		b[off] ^= 0x10
		if _, err := DecodeDigests(b, m, testAlgorithm); !errors.Is(err, ErrDigests) && !errors.Is(err, ErrVersion) {
			t.Errorf("byte %d changed: %v", off, err)
		}
		b[off] ^= 0x10
	}
}

func TestChunkCount(t *testing.T) {
	for _, c := range []struct{ size, chunk, want int64 }{
		{0, 4096, 0}, {-1, 4096, 0}, {1, 4096, 1}, {4096, 4096, 1}, {4097, 4096, 2},
		{4<<20 - 1, 4 << 20, 1}, {math.MaxInt64, 4096, 1 << 51}, {math.MaxInt64, 1, math.MaxInt64},
	} {
		if got := ChunkCount(c.size, c.chunk); got != c.want {
			t.Errorf("ChunkCount(%d, %d) = %d, want %d", c.size, c.chunk, got, c.want)
		}
	}
}

// TestDigestsOfEmptyFiles: a file of size 0 has no chunks and takes none from
// its neighbours.
func TestDigestsOfEmptyFiles(t *testing.T) {
	m := exampleManifest()
	m.Files = []ManifestFile{{Path: "a"}, {Path: "b", Size: 1}, {Path: "c"}}
	c := exampleChunks()[1:2]
	got, err := DecodeDigests(EncodeDigests(m, testAlgorithm, c), m, testAlgorithm)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([][]byte{{}, c[0][:], {}}, got); d != "" {
		t.Error(d)
	}
	m.Files = m.Files[:1]
	if b := EncodeDigests(m, testAlgorithm, nil); len(b) != offDigests+8 {
		t.Errorf("no chunks: %d bytes", len(b))
	}
}
