package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/registry"
)

func (a *app) dumpCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "dump",
		Short: "Print the raw header table with offsets",
		Long: `Dump prints the registry's header table as it lies in the file: every field of
the header, every field of every slot that is not free, each with its offset,
and how the index is filled. The fields are explained in docs/FORMAT.md.

It reads the file without opening the registry, so it also shows a table that
everything else refuses; then it ends with exit code 6.`,
		Example: `  shmctl dump
  shmctl dump | grep ' slot 0 '
  shmctl dump -o jsonl | jq 'select(.name == "word")'`,
		Args: takes(0, 0, ""),
		RunE: func(*cobra.Command, []string) error { return a.dump() },
	}
}

// rawField is one field as it lies in the file.
type rawField struct {
	Offset int     `json:"offset"`
	Size   int     `json:"size"`
	Struct string  `json:"struct"` // header or slot
	Slot   *int    `json:"slot"`
	Name   string  `json:"name"`
	Hex    string  `json:"hex"`  // the bytes in their order in the file
	Text   *string `json:"text"` // what they mean, where that is more than bytes
}

type indexJSON struct {
	Offset     int     `json:"offset"`
	Entries    int     `json:"entries"`
	Used       int     `json:"used"`
	Deleted    int     `json:"deleted"`
	MeanProbes float64 `json:"mean_probes"` // of looking up each key that is there
	MaxProbes  int     `json:"max_probes"`
}

type dumpJSON struct {
	schema
	Path   string     `json:"path"`
	Bytes  int64      `json:"bytes"`
	Fields []rawField `json:"fields"`
	Index  *indexJSON `json:"index"` // null when the table is refused
}

type rawFieldLineJSON struct {
	schema
	rawField
}

func (a *app) dump() error {
	path := filepath.Join(a.registryDir(), layout.Folder, layout.TableFile)
	b, err := readTable(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return &registry.Error{Op: "dump", Path: a.registryDir(), Err: registry.ErrNoRegistry}
		}
		return err
	}
	doc := dumpJSON{schema: newSchema(), Path: path, Bytes: int64(len(b)), Fields: headerFields(b)}
	t, bad := layout.NewTable(b)
	if bad == nil {
		for slot := range t.Slots() {
			if t.Word(slot).State() != layout.Free {
				doc.Fields = append(doc.Fields, slotFields(b, t, slot)...)
			}
		}
		doc.Index = indexStatistics(b, t)
	}
	if err := a.writeDump(doc); err != nil {
		return err
	}
	if bad == nil {
		return nil
	}
	if !errors.Is(bad, registry.ErrVersion) {
		bad = fmt.Errorf("%w: %w", registry.ErrCorrupt, bad)
	}
	return &registry.Error{Op: "dump", Path: path, Err: bad}
}

func (a *app) writeDump(doc dumpJSON) error {
	switch a.output {
	case formatJSON:
		return a.writeJSON(doc)
	case formatJSONL:
		for _, f := range doc.Fields {
			if err := a.writeJSON(rawFieldLineJSON{newSchema(), f}); err != nil {
				return err
			}
		}
		return nil
	case formatName:
		for _, f := range doc.Fields {
			if f.Name == "key" && f.Text != nil {
				if err := a.writeLines(*f.Text); err != nil {
					return err
				}
			}
		}
		return nil
	}
	if err := a.writeLines(fmt.Sprintf("%s, %d bytes", visible(doc.Path), doc.Bytes), ""); err != nil {
		return err
	}
	var rows [][]string
	for _, f := range doc.Fields {
		in, value := f.Struct, f.Hex
		if f.Slot != nil {
			in += " " + strconv.Itoa(*f.Slot)
		}
		if f.Text != nil {
			value = *f.Text
		}
		rows = append(rows, []string{fmt.Sprintf("0x%06x", f.Offset), in, f.Name, value})
	}
	if err := a.writeTable([]string{"OFFSET", "IN", "FIELD", "VALUE"}, rows); err != nil || doc.Index == nil {
		return err
	}
	x := doc.Index
	return a.writeLines("", fmt.Sprintf("index at 0x%06x: %d entries, %d used, %d deleted; %.2f probes a key, at most %d",
		x.Offset, x.Entries, x.Used, x.Deleted, x.MeanProbes, x.MaxProbes))
}

// readTable reads at most as many bytes as a table can have: the file may be
// anything.
func readTable(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO would block
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, &registry.Error{Op: "dump", Path: path, Err: fmt.Errorf("%w: not a regular file", registry.ErrCorrupt)}
	}
	return io.ReadAll(io.LimitReader(f, int64(layout.TableSize(layout.MaxSlots))+1))
}

// headerFields decodes as much of a header as there is.
func headerFields(b []byte) (out []rawField) {
	for _, f := range fieldsOf("header") {
		if r, ok := newRawField(b, f, 0); ok {
			out = append(out, r)
		}
	}
	return out
}

func slotFields(b []byte, t *layout.Table, slot int) (out []rawField) {
	start := layout.SlotsOffset(t.Slots()) + slot*layout.SlotSize
	for _, f := range fieldsOf("slot") {
		r, ok := newRawField(b, f, start)
		if !ok {
			continue
		}
		r.Slot = &slot
		switch f.Name {
		case "word":
			text := t.Word(slot).String()
			r.Text = &text
		case "key":
			r.Text = nil
			if key, ok := t.Key(slot); ok {
				r.Text = &key
			}
		}
		out = append(out, r)
	}
	return out
}

func fieldsOf(name string) (out []layout.Field) {
	for _, f := range layout.Fields {
		if f.Struct == name {
			out = append(out, f)
		}
	}
	return out
}

// newRawField cuts one field out of b; ok is false when b ends before it, or
// when it is unused and empty, as it should be.
func newRawField(b []byte, f layout.Field, start int) (r rawField, ok bool) {
	off := start + f.Offset
	if off < 0 || f.Size < 0 || off+f.Size > len(b) {
		return r, false
	}
	raw := b[off : off+f.Size]
	if f.Name == "unused" && !slices.ContainsFunc(raw, func(c byte) bool { return c != 0 }) {
		return r, false
	}
	r = rawField{Offset: off, Size: f.Size, Struct: f.Struct, Name: f.Name, Hex: fmt.Sprintf("%x", raw)}
	if f.Size == 8 && f.Name != "magic" && f.Name != "unused" {
		v := binary.LittleEndian.Uint64(raw)
		text := strconv.FormatUint(v, 10)
		if f.Name == "epoch" || f.Name == "checksum" || f.Name == "byte_order" {
			text = hex64(v)
		}
		r.Text = &text
	}
	if f.Name == "magic" {
		text := strconv.Quote(string(raw))
		r.Text = &text
	}
	return r, true
}

func indexStatistics(b []byte, t *layout.Table) *indexJSON {
	x := &indexJSON{Offset: layout.HeaderSize, Entries: layout.IndexEntries(t.Slots())}
	for i := range x.Entries {
		switch binary.LittleEndian.Uint32(b[x.Offset+4*i:]) {
		case 0:
		case layout.IndexDeleted:
			x.Deleted++
		default:
			x.Used++
		}
	}
	keys := 0
	for slot := range t.Slots() {
		if t.Word(slot).State() == layout.Free {
			continue
		}
		if key, ok := t.Key(slot); ok {
			f, _ := t.Lookup(key)
			keys++
			x.MeanProbes += float64(f.Probes)
			x.MaxProbes = max(x.MaxProbes, f.Probes)
		}
	}
	if keys > 0 {
		x.MeanProbes /= float64(keys)
	}
	return x
}
