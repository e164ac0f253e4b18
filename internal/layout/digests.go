package layout

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// The digests file holds the digest of every chunk of every file of a
// generation, in the manifest's order, so that a check can name the chunk that
// differs. Only verifying reads it.
const (
	digestsMagic     = 0x7374736567696463 // the bytes "cdigests"
	offDigMagic      = 0
	offDigVersion    = 8
	offDigEpoch      = 16
	offDigGeneration = 24
	offDigChunkBytes = 32
	offDigCount      = 40
	offDigAlgorithm  = 48 // 16 bytes, zero-padded
	offDigests       = 64 // then XXH64 of everything before it

	// DigestSize is the size of one chunk digest.
	DigestSize = 16
)

// ErrDigests says that bytes are no valid digests file of the generation.
var ErrDigests = errors.New("not a valid digests file")

// ChunkCount is the number of chunks of a file.
func ChunkCount(size, chunkBytes int64) int64 {
	if size <= 0 {
		return 0
	}
	return (size-1)/chunkBytes + 1
}

// EncodeDigests returns the digests file of m, whose files' chunk digests are
// given in the manifest's order.
func EncodeDigests(m *Manifest, algorithm string, chunks [][DigestSize]byte) []byte {
	b := make([]byte, offDigests, offDigests+len(chunks)*DigestSize+8)
	put := binary.LittleEndian.PutUint64
	put(b[offDigMagic:], digestsMagic)
	put(b[offDigVersion:], Version)
	put(b[offDigEpoch:], uint64(m.Epoch))
	put(b[offDigGeneration:], m.Generation)
	put(b[offDigChunkBytes:], uint64(m.ChunkBytes))
	put(b[offDigCount:], uint64(len(chunks)))
	copy(b[offDigAlgorithm:offDigests], algorithm)
	for _, c := range chunks {
		b = append(b, c[:]...)
	}
	return binary.LittleEndian.AppendUint64(b, checksum(b))
}

// DecodeDigests validates b as the digests file of m and returns the chunk
// digests of each file. The result shares b.
func DecodeDigests(b []byte, m *Manifest, algorithm string) (perFile [][]byte, err error) {
	bad := func(format string, args ...any) ([][]byte, error) {
		return nil, fmt.Errorf("%w: %s", ErrDigests, fmt.Sprintf(format, args...))
	}
	var count int64
	for _, f := range m.Files {
		count += ChunkCount(f.Size, m.ChunkBytes)
		if count > int64(len(b)) {
			return bad("%d bytes are too few", len(b))
		}
	}
	if int64(len(b)) != offDigests+count*DigestSize+8 {
		return bad("%d bytes, want %d", len(b), offDigests+count*DigestSize+8)
	}
	get := func(off int) uint64 { return binary.LittleEndian.Uint64(b[off:]) }
	var alg [16]byte
	copy(alg[:], algorithm)
	switch {
	case get(offDigMagic) != digestsMagic:
		return bad("magic %#x", get(offDigMagic))
	case get(offDigVersion) != Version:
		return nil, fmt.Errorf("%w: digests file version %d", ErrVersion, get(offDigVersion))
	case get(offDigEpoch) != uint64(m.Epoch) || get(offDigGeneration) != m.Generation:
		return bad("belongs to generation %s", GenName(get(offDigEpoch), get(offDigGeneration)))
	case get(offDigChunkBytes) != uint64(m.ChunkBytes) || get(offDigCount) != uint64(count):
		return bad("%d chunks of %d bytes, want %d of %d", get(offDigCount), get(offDigChunkBytes), count, m.ChunkBytes)
	case !bytes.Equal(b[offDigAlgorithm:offDigests], alg[:]):
		return bad("algorithm %q, want %q", bytes.TrimRight(b[offDigAlgorithm:offDigests], "\x00"), algorithm)
	case get(len(b)-8) != checksum(b[:len(b)-8]):
		return bad("checksum does not match")
	}
	rest := b[offDigests:]
	for _, f := range m.Files {
		n := ChunkCount(f.Size, m.ChunkBytes) * DigestSize
		perFile = append(perFile, rest[:n:n])
		rest = rest[n:]
	}
	return perFile, nil
}
