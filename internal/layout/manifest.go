package layout

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// SchemaVersion of the manifest's JSON.
const SchemaVersion = 1

// BackingShm says that the payload lies beside the manifest on the tmpfs.
// "file" is reserved for models that stay where they are.
const BackingShm = "shm"

// Kinds of origin.
const (
	OriginPath = "path" // files of the local file system
	OriginFunc = "func" // made by code, named by a version
)

// Hex64 is a 64-bit number that JSON shows as 16 hexadecimal digits, because
// many readers of JSON keep only 53 bits.
type Hex64 uint64

// MarshalText implements encoding.TextMarshaler.
func (h Hex64) MarshalText() ([]byte, error) { return fmt.Appendf(nil, "%016x", uint64(h)), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *Hex64) UnmarshalText(b []byte) (err error) {
	*h, err = parseHex64(string(b))
	return err
}

func parseHex64(s string) (Hex64, error) {
	if len(s) != 16 {
		return 0, fmt.Errorf("%q: want 16 hexadecimal digits", clip(s))
	}
	v, err := strconv.ParseUint(s, 16, 64)
	return Hex64(v), err
}

// Manifest describes one published generation. The file is immutable; its
// mapping is the lease.
type Manifest struct {
	Schema      int            `json:"schema"`
	Key         string         `json:"key"`
	Name        string         `json:"name"` // of the folder, SafeName(Key)
	Epoch       Hex64          `json:"epoch"`
	Generation  uint64         `json:"generation"`
	Bytes       int64          `json:"bytes"` // of all files
	Backing     string         `json:"backing"`
	ChunkBytes  int64          `json:"chunk_bytes"` // of the digests file
	Origin      Origin         `json:"origin"`
	LoadedAt    time.Time      `json:"loaded_at"`
	LoadSeconds float64        `json:"load_seconds"`
	Fill        Fill           `json:"fill"`
	Files       []ManifestFile `json:"files"`
}

// Origin says where a generation came from. With the files' names, sizes and
// mtimes it is the fingerprint that tells a changed source.
type Origin struct {
	Kind        string            `json:"kind"`
	Path        string            `json:"path,omitempty"` // real path of the file or folder
	Version     string            `json:"version,omitempty"`
	Environment map[string]string `json:"environment,omitempty"`
}

// Fill counts the bytes of the payload by the way they took into memory.
type Fill struct {
	Collapsed int64 `json:"collapsed"` // in 2 MiB pages
	Copied    int64 `json:"copied"`    // in 4 KiB pages
	Direct    int64 `json:"direct"`    // read past the page cache
	Fallbacks int   `json:"fallbacks"` // windows that were to be collapsed and could not
}

// ManifestFile is one file of a model.
type ManifestFile struct {
	Path    string `json:"path"`
	Size    int64  `json:"size"`
	Digest  string `json:"digest"`             // algorithm:hex, over size, chunk size and chunk digests
	ModTime int64  `json:"mtime_ns,omitempty"` // of the source, nanoseconds since 1970
}

// ErrManifest says that bytes are no valid manifest.
var ErrManifest = errors.New("not a valid manifest")

// Encode validates m and returns its JSON.
func (m *Manifest) Encode() ([]byte, error) {
	if err := m.validate(); err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrManifest, err)
	}
	b = append(b, '\n')
	if len(b) > MaxManifest {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrManifest, len(b), MaxManifest)
	}
	return b, nil
}

// DecodeManifest parses and validates a manifest. Unknown fields are ignored:
// additions do not change the schema version.
func DecodeManifest(b []byte) (*Manifest, error) {
	if len(b) > MaxManifest {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrManifest, len(b), MaxManifest)
	}
	var m Manifest
	if !scanManifest(b, &m) {
		m = Manifest{}
		if err := json.Unmarshal(b, &m); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrManifest, err)
		}
	}
	if err := m.validate(); err != nil {
		return nil, err
	}
	return &m, nil
}

func (m *Manifest) validate() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrManifest, fmt.Sprintf(format, args...))
	}
	if m.Schema != SchemaVersion {
		return fmt.Errorf("%w: manifest schema %d, this program knows %d", ErrVersion, m.Schema, SchemaVersion)
	}
	if err := ValidKey(m.Key); err != nil {
		return bad("%v", err)
	}
	switch {
	case m.Name != SafeName(m.Key):
		return bad("name %q does not belong to key %q", clip(m.Name), m.Key)
	case m.Epoch == 0 || m.Generation == 0 || m.Generation > MaxGen:
		return bad("epoch %x, generation %d", uint64(m.Epoch), m.Generation)
	case m.Backing != BackingShm:
		return bad("backing %q", clip(m.Backing))
	case m.ChunkBytes < 4096 || m.ChunkBytes > 1<<30 || m.ChunkBytes&(m.ChunkBytes-1) != 0:
		return bad("chunk size %d", m.ChunkBytes)
	case m.Origin.Kind != OriginPath && m.Origin.Kind != OriginFunc:
		return bad("origin kind %q", clip(m.Origin.Kind))
	case len(m.Files) == 0 || len(m.Files) > MaxFiles:
		return bad("%d files, want 1 to %d", len(m.Files), MaxFiles)
	}
	var total int64
	for _, f := range m.Files {
		if f.Size < 0 || f.Size > math.MaxInt64-total {
			return bad("%q: size %d", clip(f.Path), f.Size)
		}
		total += f.Size
		if !validDigest(f.Digest) {
			return bad("%q: digest %q", clip(f.Path), clip(f.Digest))
		}
	}
	if total != m.Bytes {
		return bad("files have %d bytes, total says %d", total, m.Bytes)
	}
	if err := ValidPaths(m.Files); err != nil {
		return bad("%v", err)
	}
	return nil
}

// validDigest checks the form algorithm:hex, not whether the algorithm is known.
func validDigest(s string) bool {
	alg, hex, _ := strings.Cut(s, ":")
	return alg != "" && hex != "" && len(s) <= 200 &&
		strings.Trim(alg, "abcdefghijklmnopqrstuvwxyz0123456789-") == "" &&
		strings.Trim(hex, "0123456789abcdef") == ""
}

// ValidPaths checks all paths of a model: each valid, none twice, none both a
// file and a folder.
func ValidPaths(files []ManifestFile) error {
	if len(files) == 1 {
		return ValidPath(files[0].Path)
	}
	seen := make(map[string]bool, len(files)) // path -> is a file
	for _, f := range files {
		if err := ValidPath(f.Path); err != nil {
			return err
		}
		if _, dup := seen[f.Path]; dup {
			return fmt.Errorf("%w: %q: twice, or both a file and a folder", ErrPath, clip(f.Path))
		}
		seen[f.Path] = true
		for i := strings.LastIndexByte(f.Path, '/'); i > 0; i = strings.LastIndexByte(f.Path[:i], '/') {
			file, known := seen[f.Path[:i]]
			if file {
				return fmt.Errorf("%w: %q: both a file and a folder", ErrPath, clip(f.Path[:i]))
			}
			if known {
				break
			}
			seen[f.Path[:i]] = false
		}
	}
	return nil
}
