package layout

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
)

// TestFieldsGolden freezes every offset, size and name.
func TestFieldsGolden(t *testing.T) {
	var b strings.Builder
	b.WriteString("struct\toffset\tsize\tname\n")
	for _, f := range Fields {
		fmt.Fprintf(&b, "%s\t%d\t%d\t%s\n", f.Struct, f.Offset, f.Size, f.Name)
	}
	golden(t, "fields.tsv", []byte(b.String()))
}

// TestFieldsTile: the fields of a struct are in order and leave no byte out, and
// every number is aligned.
func TestFieldsTile(t *testing.T) {
	next := map[string]int{}
	names := map[string]bool{}
	for _, f := range Fields {
		if f.Struct == "digests" && f.Offset < 0 {
			continue // from the end of the file
		}
		if f.Offset != next[f.Struct] {
			t.Errorf("%s.%s at %d, the field before it ends at %d", f.Struct, f.Name, f.Offset, next[f.Struct])
		}
		next[f.Struct] = f.Offset + f.Size
		if f.Offset%8 != 0 || f.Size%8 != 0 {
			t.Errorf("%s.%s: offset %d, size %d: not in whole words", f.Struct, f.Name, f.Offset, f.Size)
		}
		if id := f.Struct + "." + f.Name; f.Name != "unused" && names[id] {
			t.Errorf("%s twice", id)
		} else {
			names[id] = true
		}
		if f.Writer == "" || f.Meaning == "" || strings.Contains(f.Meaning, "|") {
			t.Errorf("%s.%s: writer %q, meaning %q", f.Struct, f.Name, f.Writer, f.Meaning)
		}
	}
	want := map[string]int{"header": HeaderSize, "slot": SlotSize, "digests": offDigests + DigestSize}
	if !reflect.DeepEqual(next, want) {
		t.Errorf("the structs end at %v, want %v", next, want)
	}
}

// TestFieldsNameHintsAndCounters: each has a row of its own.
func TestFieldsNameHintsAndCounters(t *testing.T) {
	rows := map[string]map[int]string{"header": {}, "slot": {}}
	for _, f := range Fields {
		if f.Struct != "digests" {
			rows[f.Struct][f.Offset] = f.Name
		}
	}
	for h := range hintEnd {
		if n := rows["slot"][slotHints+8*int(h)]; n == "" || n == "unused" {
			t.Errorf("hint %d has no row", h)
		}
	}
	for c := range counterEnd {
		if n := rows["header"][offCounters+8*int(c)]; !strings.HasPrefix(n, "count_") {
			t.Errorf("counter %d has no row", c)
		}
	}
}

// TestAlignment: words at multiples of 8, slots and their hints at cache lines.
func TestAlignment(t *testing.T) {
	for slots := MinSlots; slots <= MaxSlots; slots += 1 + slots/7 {
		if off := SlotsOffset(slots); off%4096 != 0 || off < HeaderSize+4*IndexEntries(slots) {
			t.Errorf("%d slots: slots begin at %d", slots, off)
		}
		if n := IndexEntries(slots); n&(n-1) != 0 || n < 4*slots || n >= 8*slots {
			t.Errorf("%d slots: %d index entries", slots, n)
		}
		last := HintOffset(slots, slots-1, numHints-1)
		if last+8 != int64(TableSize(slots)) {
			t.Errorf("%d slots: the last hint ends at %d of %d", slots, last+8, TableSize(slots))
		}
		if off := HintOffset(slots, 1, HintBytes); off%64 != 0 {
			t.Errorf("%d slots: hints at %d", slots, off)
		}
	}
}

// TestHintOffset: a write at HintOffset is what Hint reads.
func TestHintOffset(t *testing.T) {
	e := newEditor(t, 16)
	for slot := range e.Slots() {
		for h := range hintEnd {
			e.SetHint(slot, h, uint64(slot)<<8|uint64(h)+1)
		}
	}
	for slot := range e.Slots() {
		for h := range hintEnd {
			want := uint64(slot)<<8 | uint64(h) + 1
			if got := uint64(e.b[HintOffset(16, slot, h)]) | uint64(e.b[HintOffset(16, slot, h)+1])<<8; got != want {
				t.Errorf("slot %d hint %d: %#x in the file, want %#x", slot, h, got, want)
			}
		}
	}
}

// TestManifestFields: the documented members are those that Manifest has.
func TestManifestFields(t *testing.T) {
	var got []string
	var walk func(prefix string, typ reflect.Type)
	walk = func(prefix string, typ reflect.Type) {
		for f := range typ.Fields() {
			tag, opt, _ := strings.Cut(f.Tag.Get("json"), ",")
			switch name := prefix + tag; {
			case f.Type == reflect.TypeFor[Origin](), f.Type == reflect.TypeFor[Fill]():
				walk(name+".", f.Type)
			case f.Type == reflect.TypeFor[[]ManifestFile]():
				walk(name+"[].", f.Type.Elem())
			case opt != "":
				got = append(got, name+" optional")
			default:
				got = append(got, name)
			}
		}
	}
	walk("", reflect.TypeFor[Manifest]())
	var want []string
	for _, f := range ManifestFields {
		name := f.Name
		if strings.HasSuffix(f.Type, ", optional") {
			name += " optional"
		}
		want = append(want, name)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("Manifest has %q\ndocumented are %q", got, want)
	}
}
