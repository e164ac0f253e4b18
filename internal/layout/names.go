package layout

import (
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// ErrKey and ErrPath say that a name breaks the rules of the format.
var (
	ErrKey  = errors.New("not a valid key")
	ErrPath = errors.New("not a valid path of a model's file")
)

// ValidKey checks a key: 1 to 255 bytes of UTF-8 without control characters.
func ValidKey(key string) error {
	switch {
	case key == "":
		return fmt.Errorf("%w: empty", ErrKey)
	case len(key) > MaxKey:
		return fmt.Errorf("%w: %d bytes, at most %d", ErrKey, len(key), MaxKey)
	case !utf8.ValidString(key):
		return fmt.Errorf("%w: not UTF-8", ErrKey)
	}
	for _, c := range key {
		if unicode.IsControl(c) {
			return fmt.Errorf("%w: control character %U", ErrKey, c)
		}
	}
	return nil
}

// ValidPath checks the relative path of a file within a model: slash-separated,
// UTF-8, no empty, "." or ".." element, no control character, no backslash, at
// most 1024 bytes and 255 an element.
func ValidPath(p string) error {
	bad := func(why string) error {
		return fmt.Errorf("%w: %q: %s", ErrPath, clip(p), why)
	}
	switch {
	case p == "":
		return bad("empty")
	case len(p) > MaxPath:
		return bad(fmt.Sprintf("%d bytes, at most %d", len(p), MaxPath))
	case !utf8.ValidString(p):
		return bad("not UTF-8")
	case p[0] == '/':
		return bad("absolute")
	case strings.ContainsRune(p, '\\'):
		return bad("backslash")
	}
	for _, c := range p {
		if unicode.IsControl(c) {
			return bad(fmt.Sprintf("control character %U", c))
		}
	}
	for el := range strings.SplitSeq(p, "/") {
		switch {
		case el == "" || el == "." || el == "..":
			return bad(fmt.Sprintf("element %q", el))
		case len(el) > 255:
			return bad("an element is over 255 bytes")
		}
	}
	return nil
}

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "..."
	}
	return s
}

// SafeName is the name of a model's folder: the last component of its key with
// everything but letters, digits, '.', '_' and '-' replaced by '-'. Runtimes show
// it to people, so it is the same for all generations of a key.
func SafeName(key string) string {
	name := path.Base(key)
	b := []byte(name)
	if len(b) > 100 {
		b = b[:100]
	}
	for i, c := range b {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-') {
			b[i] = '-'
		}
	}
	if b[0] == '.' {
		b[0] = '_'
	}
	return string(b)
}

// GenName is the stem of everything of one generation below m/: the epoch in 16
// hexadecimal digits, '-', the generation in decimal.
func GenName(epoch, gen uint64) string {
	b := make([]byte, 0, 48)
	for shift := 60; shift >= 0; shift -= 4 {
		b = append(b, "0123456789abcdef"[epoch>>shift&15])
	}
	b = append(b, '-')
	return string(strconv.AppendUint(b, gen, 10))
}

// Endings of the two files beside a generation's folder.
const (
	ManifestExt = ".manifest"
	DigestsExt  = ".digests"
)

// ParseGenName undoes GenName and tells which file of the generation name is:
// ManifestExt, DigestsExt or "" for the folder.
func ParseGenName(name string) (epoch, gen uint64, ext string, ok bool) {
	for _, e := range []string{ManifestExt, DigestsExt} {
		if s, cut := strings.CutSuffix(name, e); cut {
			name, ext = s, e
			break
		}
	}
	if len(name) < 18 || name[16] != '-' {
		return 0, 0, "", false
	}
	epoch, err1 := strconv.ParseUint(name[:16], 16, 64)
	gen, err2 := strconv.ParseUint(name[17:], 10, 64)
	if err1 != nil || err2 != nil || gen > MaxGen || GenName(epoch, gen) != name {
		return 0, 0, "", false
	}
	return epoch, gen, ext, true
}

// Names below the registry's directory.
const (
	TableFile   = "registry"
	LocksDir    = "w"
	TableLock   = "table"
	ModelsDir   = "m"
	stripeWidth = 4
)

// StripeLock is the name of a load lock below w/.
func StripeLock(stripe int) string { return fmt.Sprintf("k-%0*d", stripeWidth, stripe) }
