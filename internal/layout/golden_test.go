package layout

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// An image is a golden table. Code must go on making the same bytes, and they
// must go on decoding to the committed contents.
type image struct {
	name  string
	about string
	bytes func(t *testing.T) []byte
	err   error  // of NewTable
	text  string // part of the error
}

var images = []image{
	{"empty-8", "a fresh table of 8 slots", func(t *testing.T) []byte {
		return newEditor(t, 8).b
	}, nil, ""},
	{"models-16", "16 slots in every state, with keys of 1 to 255 bytes, a replaced generation, hints and counters; slot 7 was freed and its index entry is a mark",
		modelsImage, nil, ""},
	{"full-8", "8 models in 8 slots", func(t *testing.T) []byte {
		e := newEditor(t, 8)
		for slot := range 8 {
			publish(t, e, slot, fmt.Sprintf("org/model-%d", slot))
		}
		return e.b
	}, nil, ""},
	{"problems-8", "a table that no correct writer leaves behind", problemsImage, nil, ""},
	{"version-2", "the header of a later version, whose file may have any length", func(t *testing.T) []byte {
		return badHeader(offVersion, 2)(t)[:HeaderSize]
	}, ErrVersion, "version 2"},
	{"byte-order", "a header written by a big-endian machine", badHeader(offByteOrder, 0x0807060504030201), ErrVersion, "byte-order mark"},
	{"bad-magic", "another program's file", badHeader(offMagic, 0x0a79706f63656e6e), ErrCorrupt, "magic"},
	{"bad-epoch", "epoch 0", badHeader(offEpoch, 0), ErrCorrupt, "epoch"},
	{"bad-few-slots", "fewer slots than a table may have", badHeader(offSlots, MinSlots-1), ErrCorrupt, "7 slots"},
	{"bad-many-slots", "more slots than a table may have", badHeader(offSlots, MaxSlots+1), ErrCorrupt, "32769 slots"},
	{"bad-other-slots", "a capacity that does not belong to the length", badHeader(offSlots, 9), ErrCorrupt, "9 slots need"},
	{"bad-index", "an index size that does not belong to the slots", badHeader(offIndex, 64), ErrCorrupt, "index 64"},
	{"bad-stripes", "a number of load locks that does not belong to version 1", badHeader(offStripes, 1000), ErrCorrupt, "stripes 1000"},
	{"bad-slot-size", "a slot size that does not belong to version 1", badHeader(offSlotSize, 512), ErrCorrupt, "slot size 512"},
	{"bad-checksum", "one bit of the creation time differs", func(t *testing.T) []byte {
		b := newEditor(t, 8).b
		b[offCreated] ^= 1
		return b
	}, ErrCorrupt, "checksum"},
	{"bad-length", "the file ends with its header", func(t *testing.T) []byte {
		return newEditor(t, 8).b[:HeaderSize]
	}, ErrCorrupt, "4096 bytes, but 8 slots need"},
	{"bad-short", "the file ends within its header", func(t *testing.T) []byte {
		return newEditor(t, 8).b[:offGeneration]
	}, ErrCorrupt, "less than a header"},
}

func modelsImage(t *testing.T) []byte {
	e := newEditor(t, 16)
	e.SetBudget(8<<30, 0)
	e.SetDefaultTTL(3600e9)

	publish(t, e, 0, "a")
	publish(t, e, 1, "sentence-transformers/all-MiniLM-L6-v2")
	e.SetHint(1, HintBytes, 90_868_373)
	e.SetHint(1, HintTTL, 60e9)
	e.SetHint(1, HintPin, 1)
	e.SetHint(1, HintLastAttach, 5_000_000_000)
	e.SetHint(1, HintLastRelease, 6_000_000_000)
	e.SetHint(1, HintIdleSince, 7_000_000_000)
	e.SetHint(1, HintAttaches, 12)
	e.SetHint(1, HintLoaderPID, 4711)
	e.SetHint(1, HintLoadStart, 4_000_000_000)

	claim(t, e, 2, "being/loaded")
	e.SetHint(2, HintReserved, 1<<30)
	e.SetHint(2, HintLoaderPID, 4712)
	e.SetHint(2, HintLoadStart, 8_000_000_000)

	publish(t, e, 3, strings.Repeat("k", MaxKey))
	publish(t, e, 4, "моделі/模型 🤗")
	swap(t, e, publishSlot(t, e, 5, "being/removed"), e.Word(5).With(Evicting))

	old := publish(t, e, 6, "replaced@v2")
	swap(t, e, 6, MakeWord(Ready, e.NextGeneration()))
	e.SetHint(6, HintPrevious, old.Generation())

	gone, after := collidingKeys(e, "gone")
	publish(t, e, 7, gone)
	publish(t, e, 8, after)
	remove(t, e, 7)

	swap(t, e, 9, claim(t, e, 9, "failed/three/times").With(Free))
	e.IndexDelete(9, "failed/three/times")
	e.SetHint(9, HintDeaths, 3)
	e.SetHint(9, HintRetryAfter, 9_000_000_000)

	for i, k := range []string{"12345678", "1234567", "123456789"} { // the edges of a word
		publish(t, e, 10+i, k)
	}
	for c := range counterEnd {
		e.Count(c, 100+uint64(c))
	}
	return e.b
}

func publishSlot(t *testing.T, e Editor, slot int, key string) int {
	publish(t, e, slot, key)
	return slot
}

// collidingKeys returns two keys whose probes begin at the same index entry, so
// that freeing the first leaves a mark.
func collidingKeys(e Editor, prefix string) (string, string) {
	homes := map[uint32]string{}
	for i := 0; ; i++ {
		key := fmt.Sprintf("%s-%d", prefix, i)
		home := uint32(hashKey(key)) & e.mask
		if e.indexAt(home) != indexEmpty || e.indexAt((home+1)&e.mask) != indexEmpty {
			continue
		}
		if other, ok := homes[home]; ok {
			return other, key
		}
		homes[home] = key
	}
}

func problemsImage(t *testing.T) []byte {
	e := newEditor(t, 8)
	publish(t, e, 0, "sound")
	publish(t, e, 1, "twice")
	publish(t, e, 2, "twice")
	publish(t, e, 3, "lost/by/the/index")
	e.IndexDelete(3, "lost/by/the/index")
	publish(t, e, 4, "unknown/state")
	e.slot[4][slotWord/8].Store(uint64(MakeWord(9, 4)))
	publish(t, e, 5, "no/key")
	e.slot[5][slotKeyLen/8].Store(0)
	publish(t, e, 6, "generation/of/the/future")
	e.slot[6][slotWord/8].Store(uint64(MakeWord(Ready, 999)))
	publish(t, e, 7, "freed/but/indexed")
	swap(t, e, 7, e.Word(7).With(Evicting))
	swap(t, e, 7, e.Word(7).With(Free))
	return e.b
}

// badHeader makes a fresh table with one field of the header changed and the
// checksum fixed up.
func badHeader(off int, v uint64) func(t *testing.T) []byte {
	return func(t *testing.T) []byte {
		b := newEditor(t, 8).b
		putHeader(b, off, v)
		return b
	}
}

// contents is what a golden image decodes to, as JSON that other
// implementations can test themselves against.
type contents struct {
	About      string            `json:"about"`
	Error      string            `json:"error,omitempty"` // "version" or "corrupt"
	Identity   *identityJSON     `json:"identity,omitempty"`
	Generation uint64            `json:"generation,omitempty"`
	Budget     uint64            `json:"budget,omitempty"`
	BudgetPPM  uint64            `json:"budget_ppm,omitempty"` // as it counts
	TTL        uint64            `json:"ttl,omitempty"`
	Counters   map[string]uint64 `json:"counters,omitempty"`
	Slots      []slotJSON        `json:"slots,omitempty"` // those that were ever used
	Index      []string          `json:"index,omitempty"` // of every entry that is not 0
	Lookups    []lookupJSON      `json:"lookups,omitempty"`
	Problems   []string          `json:"problems,omitempty"`
}

type identityJSON struct {
	Epoch   Hex64  `json:"epoch"`
	BootID  string `json:"boot_id"`
	Slots   int    `json:"slots"`
	Created int64  `json:"created"`
}

type slotJSON struct {
	Slot       int               `json:"slot"`
	Word       string            `json:"word"`
	State      string            `json:"state"`
	Generation uint64            `json:"generation"`
	Key        string            `json:"key"`
	Hints      map[string]uint64 `json:"hints,omitempty"`
}

type lookupJSON struct {
	Key    string `json:"key"`
	Found  bool   `json:"found"`
	Slot   int    `json:"slot"`
	Word   string `json:"word,omitempty"`
	Probes int    `json:"probes"`
}

func describe(about string, b []byte) contents {
	c := contents{About: about}
	tab, err := NewTable(b)
	switch {
	case errors.Is(err, ErrVersion):
		c.Error = "version"
	case errors.Is(err, ErrCorrupt):
		c.Error = "corrupt"
	case err != nil:
		c.Error = err.Error()
	}
	if err != nil {
		return c
	}
	id := tab.Identity()
	c.Identity = &identityJSON{Hex64(id.Epoch), hex.EncodeToString(id.BootID[:]), id.Slots, id.Created}
	c.Generation, c.TTL = tab.Generation(), tab.DefaultTTL()
	c.Budget, c.BudgetPPM = tab.Budget()
	for _, f := range Fields {
		if n, ok := strings.CutPrefix(f.Name, "count_"); ok {
			if v := tab.Counter(Counter(f.Offset-offCounters) / 8); v != 0 {
				if c.Counters == nil {
					c.Counters = map[string]uint64{}
				}
				c.Counters[n] = v
			}
		}
	}
	keys := []string{"missing"}
	for slot := range tab.Slots() {
		w := tab.Word(slot)
		if w == 0 {
			continue
		}
		key, _ := tab.Key(slot)
		s := slotJSON{slot, fmt.Sprintf("%016x", uint64(w)), w.State().String(), w.Generation(), key, nil}
		for _, f := range Fields {
			if f.Struct != "slot" || f.Offset < slotHints || f.Name == "unused" {
				continue
			}
			if v := tab.Hint(slot, Hint(f.Offset-slotHints)/8); v != 0 {
				if s.Hints == nil {
					s.Hints = map[string]uint64{}
				}
				s.Hints[f.Name] = v
			}
		}
		c.Slots = append(c.Slots, s)
		if key != "" {
			keys = append(keys, key)
		}
	}
	for pos := range tab.mask + 1 {
		switch e := tab.indexAt(pos); e {
		case indexEmpty:
		case indexDeleted:
			c.Index = append(c.Index, fmt.Sprintf("%d deleted", pos))
		default:
			c.Index = append(c.Index, fmt.Sprintf("%d tag %04x slot %d", pos, e>>16, int(e&0xffff)-1))
		}
	}
	for _, key := range keys {
		l := lookupJSON{Key: key}
		f, ok := tab.Lookup(key)
		if l.Found, l.Probes = ok, f.Probes; ok {
			l.Slot, l.Word = f.Slot, fmt.Sprintf("%016x", uint64(f.Word))
		}
		c.Lookups = append(c.Lookups, l)
	}
	for _, p := range tab.Problems() {
		c.Problems = append(c.Problems, fmt.Sprintf("slot %d: %s", p.Slot, p.Text))
	}
	return c
}

// TestGoldenImages: code still makes the committed images, and they still decode
// to the committed contents.
func TestGoldenImages(t *testing.T) {
	for _, im := range images {
		t.Run(im.name, func(t *testing.T) {
			golden(t, im.name+".bin", im.bytes(t))
			b, err := os.ReadFile(filepath.Join(goldenDir, im.name+".bin"))
			if err != nil {
				t.Fatal(err)
			}
			if len(b) > 64<<10 {
				t.Errorf("%d bytes are too many for a golden image", len(b))
			}
			got, err := json.MarshalIndent(describe(im.about, b), "", " ")
			if err != nil {
				t.Fatal(err)
			}
			golden(t, im.name+".json", append(got, '\n'))
		})
	}
}

// TestGoldenErrors: what is refused is refused for the stated reason.
func TestGoldenErrors(t *testing.T) {
	for _, im := range images {
		b, err := os.ReadFile(filepath.Join(goldenDir, im.name+".bin"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = NewTable(b)
		if !errors.Is(err, im.err) || err != nil && !strings.Contains(err.Error(), im.text) {
			t.Errorf("%s: %v, want %v with %q", im.name, err, im.err, im.text)
		}
		if _, verr := Validate(b); !errors.Is(verr, im.err) {
			t.Errorf("%s: Validate: %v, want %v", im.name, verr, im.err)
		}
	}
}

// TestGoldenFilesAreKnown: nothing lies in the folder that no test reads.
func TestGoldenFilesAreKnown(t *testing.T) {
	known := map[string]bool{"README.md": true, "fields.tsv": true, "keys.json": true, "manifests": true, "example.digests": true}
	for _, im := range images {
		known[im.name+".bin"], known[im.name+".json"] = true, true
	}
	files, err := os.ReadDir(goldenDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !known[f.Name()] {
			t.Errorf("%s: no test reads it", f.Name())
		}
	}
}

// keyVector lets another implementation test its hash, placement and names.
type keyVector struct {
	Key    string `json:"key"`
	XXH64  Hex64  `json:"xxh64"`
	Tag    string `json:"tag"`
	Home   uint64 `json:"home_of_4096"`
	Stripe string `json:"load_lock"`
	Name   string `json:"name"`
}

func TestGoldenKeys(t *testing.T) {
	var vs []keyVector
	for _, key := range []string{
		"a", "gpt2", "sentence-transformers/all-MiniLM-L6-v2", "meta-llama/Llama-3.1-8B@main",
		"trailing/slash/", "/", "///", "..", "a/..", ".hidden", "-rf", "spaces and:colons", "模型", "org/模型-v2",
		strings.Repeat("k", MaxKey), "x/" + strings.Repeat("long", 30),
	} {
		h := hashKey(key)
		vs = append(vs, keyVector{key, Hex64(h), fmt.Sprintf("%04x", h>>48), h & 4095, StripeLock(Stripe(key)), SafeName(key)})
	}
	b, err := json.MarshalIndent(vs, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "keys.json", append(b, '\n'))
}

// TestXXH64 pins the hash itself to its published values.
func TestXXH64(t *testing.T) {
	got := []uint64{hashKey(""), hashKey("a"), hashKey("abc")}
	want := []uint64{0xef46db3751d8e999, 0xd24ec4f1a98c6e5b, 0x44bc2cf5ad770999}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}
