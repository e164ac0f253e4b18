package layout

import (
	"strconv"
	"unicode/utf8"
)

// scanManifest reads a manifest as all programs of the project write it: the
// members of ManifestFields in their order, strings without escapes. It says
// false to everything else, which encoding/json then reads, and where it says
// true it gives what encoding/json would. encoding/json looks at the types
// first, which is two thirds of what attaching a model costs a fresh process.
// All strings are parts of one copy of b.
func scanManifest(b []byte, m *Manifest) bool {
	s := scan{b: string(b)}
	s.open('{')
	m.Schema = int(s.integer("schema"))
	m.Key = s.text("key")
	m.Name = s.text("name")
	epoch := s.text("epoch")
	m.Generation = uint64(s.integer("generation"))
	m.Bytes = s.integer("bytes")
	m.Backing = s.text("backing")
	m.ChunkBytes = s.integer("chunk_bytes")
	s.member("origin")
	s.origin(&m.Origin)
	loadedAt := s.text("loaded_at")
	m.LoadSeconds = s.number("load_seconds")
	s.member("fill")
	s.open('{')
	m.Fill = Fill{
		Collapsed: s.integer("collapsed"), Copied: s.integer("copied"),
		Direct: s.integer("direct"), Fallbacks: int(s.integer("fallbacks")),
	}
	s.end('}')
	s.member("files")
	s.open('[')
	for s.more(']') {
		m.Files = append(m.Files, s.file())
	}
	s.end('}')
	s.space()
	if s.odd || s.pos != len(b) || m.Generation > MaxGen {
		return false
	}
	var err error
	m.Epoch, err = parseHex64(epoch)
	return err == nil && m.LoadedAt.UnmarshalText([]byte(loadedAt)) == nil
}

func (s *scan) origin(o *Origin) {
	s.open('{')
	o.Kind = s.text("kind")
	if s.has("path") {
		o.Path = s.string()
	}
	if s.has("version") {
		o.Version = s.string()
	}
	if s.has("environment") {
		o.Environment = map[string]string{}
		s.open('{')
		for s.more('}') {
			name := s.string()
			s.byte(':')
			o.Environment[name] = s.string()
		}
	}
	s.end('}')
}

func (s *scan) file() (f ManifestFile) {
	s.open('{')
	f.Path = s.text("path")
	f.Size = s.integer("size")
	f.Digest = s.text("digest")
	if s.has("mtime_ns") {
		f.ModTime = s.int()
	}
	s.end('}')
	return f
}

// scan is a place in a JSON text. odd is set for good by what it does not know.
type scan struct {
	b     string
	pos   int
	first bool // the next member or element is the first one
	odd   bool
}

// peek is the next byte that is no space; 0 is the end.
func (s *scan) peek() byte {
	s.space()
	if s.odd || s.pos == len(s.b) {
		return 0
	}
	return s.b[s.pos]
}

func (s *scan) space() {
	for s.pos < len(s.b) {
		switch s.b[s.pos] {
		case ' ', '\n', '\t', '\r':
			s.pos++
		default:
			return
		}
	}
}

func (s *scan) byte(c byte) {
	if s.peek() != c {
		s.odd = true
		return
	}
	s.pos++
}

func (s *scan) open(c byte) {
	s.byte(c)
	s.first = true
}

func (s *scan) end(c byte) {
	s.byte(c)
	s.first = false
}

// more steps to the next element, or past the end of the list or object.
func (s *scan) more(end byte) bool {
	switch c := s.peek(); {
	case c == end:
		s.end(end)
		return false
	case !s.first:
		s.byte(',')
	}
	s.first = false
	return !s.odd
}

// has steps to the value of the next member if that is its name.
func (s *scan) has(name string) bool {
	was := *s
	if s.peek() == '}' {
		return false
	}
	if s.more('}') && s.string() == name && !s.odd {
		s.byte(':')
		return true
	}
	*s = was
	return false
}

func (s *scan) member(name string) {
	if !s.has(name) {
		s.odd = true
	}
}

func (s *scan) text(name string) string {
	s.member(name)
	return s.string()
}

func (s *scan) integer(name string) int64 {
	s.member(name)
	return s.int()
}

// string is a string without escapes.
func (s *scan) string() string {
	s.byte('"')
	from := s.pos
	ascii := true
	for ; !s.odd && s.pos < len(s.b); s.pos++ {
		switch c := s.b[s.pos]; {
		case c == '"':
			text := s.b[from:s.pos]
			s.pos++
			if !ascii && !utf8.ValidString(text) {
				s.odd = true
			}
			return text
		case c < ' ' || c == '\\':
			s.odd = true
		case c >= utf8.RuneSelf:
			ascii = false
		}
	}
	s.odd = true
	return ""
}

// token is a number: -?(0|[1-9][0-9]*)(.[0-9]+)?([eE][+-]?[0-9]+)?, and whether
// it is an integer.
func (s *scan) token() (text string, whole bool) {
	s.space()
	from := s.pos
	digits := func() {
		start := s.pos
		for s.pos < len(s.b) && s.b[s.pos]-'0' <= 9 {
			s.pos++
		}
		if s.pos == start {
			s.odd = true
		}
	}
	skip := func(set ...byte) bool {
		for _, c := range set {
			if s.pos < len(s.b) && s.b[s.pos] == c {
				s.pos++
				return true
			}
		}
		return false
	}
	skip('-')
	if !skip('0') {
		digits()
	}
	whole = true
	if skip('.') {
		whole = false
		digits()
	}
	if skip('e', 'E') {
		whole = false
		skip('+', '-')
		digits()
	}
	return s.b[from:s.pos], whole
}

func (s *scan) int() int64 {
	text, whole := s.token()
	n, err := strconv.ParseInt(text, 10, 64)
	if !whole || err != nil {
		s.odd = true
	}
	return n
}

func (s *scan) number(name string) float64 {
	s.member(name)
	text, _ := s.token()
	n, err := strconv.ParseFloat(text, 64)
	if err != nil {
		s.odd = true
	}
	return n
}
