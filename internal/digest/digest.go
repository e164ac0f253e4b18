// Package digest computes the payload digests of the format: XXH3-128 of every
// chunk, and a root over their list. They find accidents, not attackers. Why
// XXH3 and not XXH64: docs/adr.
package digest

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"

	"github.com/zeebo/xxh3"
)

// Algorithm names the digests in manifests and digests files.
const Algorithm = "xxh3-128"

// ChunkBytes is the size of a chunk: large enough that the list stays small
// (4 bytes per MiB), small enough that the chunk is still in the processor's
// cache when it is digested right after it was read.
const ChunkBytes = 4 << 20

// Size of a digest in bytes.
const Size = 16

// Sum is the digest of one chunk, in canonical (big-endian) byte order.
func Sum(b []byte) [Size]byte { return xxh3.Hash128(b).Bytes() }

// Root is the digest of a file: over its size, the chunk size and the digests
// of its chunks in order (Size bytes each).
func Root(size int64, chunks []byte) string {
	h := xxh3.New()
	var head [16]byte
	binary.LittleEndian.PutUint64(head[:], uint64(size))
	binary.LittleEndian.PutUint64(head[8:], ChunkBytes)
	h.Write(head[:])
	h.Write(chunks)
	sum := h.Sum128().Bytes()
	return fmt.Sprintf("%s:%s", Algorithm, hex.EncodeToString(sum[:]))
}
