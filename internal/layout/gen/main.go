// Command gen writes docs/FORMAT.md, and the constants of the Python package,
// from package layout: run go generate in internal/layout. The prose is in format.md.tmpl; every number and table comes
// from the package, so that the document cannot drift from the code.
package main

import (
	"bytes"
	_ "embed"
	"fmt"
	"os"
	"strconv"
	"strings"
	"text/template"
	"time"

	"github.com/onecopy/onecopy/internal/layout"
)

// Both are seen from internal/layout, where go generate runs.
const (
	output       = "../../docs/FORMAT.md"
	pythonOutput = "../../python/src/onecopy/_layout.py"
)

//go:embed format.md.tmpl
var text string

func main() {
	doc, err := render()
	if err == nil {
		err = os.WriteFile(output, doc, 0o644)
	}
	if err == nil {
		err = os.WriteFile(pythonOutput, pythonConstants(), 0o644)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gen:", err)
		os.Exit(1)
	}
}

func render() ([]byte, error) {
	t, err := template.New("format.md").Funcs(template.FuncMap{"fields": fields, "tree": tree}).Parse(text)
	if err != nil {
		return nil, err
	}
	example, err := exampleManifest().Encode()
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	err = t.Execute(&b, map[string]any{
		"Version": layout.Version, "Folder": layout.Folder, "Schema": layout.SchemaVersion,
		"TableFile": layout.TableFile, "LocksDir": layout.LocksDir, "TableLock": layout.TableLock, "ModelsDir": layout.ModelsDir,
		"ManifestExt": layout.ManifestExt, "DigestsExt": layout.DigestsExt,
		"FirstStripe": layout.StripeLock(0), "Stripes": layout.Stripes,
		"ExampleGen": layout.GenName(exampleEpoch, exampleGeneration),
		"HeaderSize": layout.HeaderSize, "SlotSize": layout.SlotSize, "MinSlots": layout.MinSlots, "MaxSlots": layout.MaxSlots,
		"MaxKey": layout.MaxKey, "MaxPath": layout.MaxPath, "MaxFiles": layout.MaxFiles, "MaxManifest": layout.MaxManifest,
		"MaxGen": uint64(layout.MaxGen), "Deleted": fmt.Sprintf("%#08x", layout.IndexDeleted),
		"DigestsHeader": digestsHeader(), "DigestSize": layout.DigestSize,
		"Limits": limits, "Sizes": sizes(), "Transitions": transitions(),
		"ManifestFields": layout.ManifestFields, "ManifestExample": string(example),
		"VectorEntries": layout.IndexEntries(layout.DefaultSlots), "Keys": keyVectors(), "Digests": digestVectors,
	})
	return b.Bytes(), err
}

// tree draws the directory.
func tree() string {
	var b strings.Builder
	line := func(depth int, name, about string) {
		fmt.Fprintf(&b, "%-38s  %s\n", strings.Repeat("  ", depth)+name, about)
	}
	line(0, "<dir>/", "0700, or 0755 for readers of other users")
	line(1, layout.Folder+"/", fmt.Sprintf("everything of layout version %d; mode as <dir>", layout.Version))
	line(2, layout.TableFile, "the header table, 0644")
	line(2, layout.LocksDir+"/", "0700: lock files, empty, 0600, never removed")
	line(3, layout.TableLock, "T, the table lock")
	line(3, layout.StripeLock(0)+" ... "+layout.StripeLock(layout.Stripes-1), "K, the load locks")
	line(2, layout.ModelsDir+"/", "generations; mode as <dir>")
	line(3, "<epoch>-<gen>"+layout.ManifestExt, "section 4, 0444")
	line(3, "<epoch>-<gen>"+layout.DigestsExt, "section 5, 0444")
	line(3, "<epoch>-<gen>/<name>/...", "the model's files under their own names, 0444")
	return b.String()
}

// fields are the rows of one struct.
func fields(name string) string {
	var b strings.Builder
	for _, f := range layout.Fields {
		if f.Struct == name {
			fmt.Fprintf(&b, "| %d | %d | %s | %s | %s |\n", f.Offset, f.Size, f.Name, f.Writer, f.Meaning)
		}
	}
	return b.String()
}

// digestsHeader is where the chunk digests begin.
func digestsHeader() int {
	for _, f := range layout.Fields {
		if f.Struct == "digests" && f.Name == "chunks" {
			return f.Offset
		}
	}
	panic("no chunks in the digests file")
}

type limit struct{ What, Value string }

var limits = []limit{
	{"slots of a table", fmt.Sprintf("%d to %d, %d by default", layout.MinSlots, layout.MaxSlots, layout.DefaultSlots)},
	{"generation", fmt.Sprintf("1 to %d (2^56 - 1)", uint64(layout.MaxGen))},
	{"load locks", strconv.Itoa(layout.Stripes)},
	{"key", fmt.Sprintf("%d bytes", layout.MaxKey)},
	{"files of a model", strconv.Itoa(layout.MaxFiles)},
	{"path of a file", fmt.Sprintf("%d bytes, 255 an element", layout.MaxPath)},
	{"manifest", fmt.Sprintf("%d bytes", layout.MaxManifest)},
}

type size struct{ Slots, Entries, Offset, Size int }

func sizes() (rows []size) {
	for _, n := range []int{layout.MinSlots, 100, layout.DefaultSlots, layout.MaxSlots} {
		rows = append(rows, size{n, layout.IndexEntries(n), layout.SlotsOffset(n), layout.TableSize(n)})
	}
	return rows
}

type transition struct{ From, To, Gen, Locks, Why string }

func transitions() (rows []transition) {
	for _, t := range layout.Transitions {
		row := transition{strings.ToUpper(t.From.String()), strings.ToUpper(t.To.String()), "the same", "T", t.Why}
		if t.NewGen {
			row.Gen = "another"
		}
		if t.Owner != "" {
			row.Locks += ", " + t.Owner
		}
		rows = append(rows, row)
	}
	return rows
}

const (
	exampleEpoch      = 0x8f3c5a0d41b7e296
	exampleGeneration = 42
)

// exampleManifest is encoded by the code that loaders use.
func exampleManifest() *layout.Manifest {
	const key = "sentence-transformers/all-MiniLM-L6-v2"
	return &layout.Manifest{
		Schema: layout.SchemaVersion, Key: key, Name: layout.SafeName(key),
		Epoch: exampleEpoch, Generation: exampleGeneration, Bytes: 8 + 4<<20 + 1, Backing: layout.BackingShm, ChunkBytes: 4 << 20,
		Origin:   layout.Origin{Kind: layout.OriginPath, Path: "/models/all-MiniLM-L6-v2"},
		LoadedAt: time.Date(2027, 1, 15, 8, 30, 0, 125e6, time.UTC), LoadSeconds: 0.021,
		Fill: layout.Fill{Collapsed: 4 << 20, Copied: 9},
		Files: []layout.ManifestFile{
			{Path: "1_Pooling/config.json", Size: 8, Digest: digestVectors[1].Root, ModTime: 1_700_000_000_123_456_789},
			{Path: "model.safetensors", Size: 4<<20 + 1, Digest: digestVectors[3].Root, ModTime: 1_700_000_001_000_000_000},
		},
	}
}

type keyVector struct {
	Key, Hash, Tag, Lock, Name string
	Home                       uint64
}

func keyVectors() (rows []keyVector) {
	for _, key := range []string{"a", "gpt2", "sentence-transformers/all-MiniLM-L6-v2", "meta-llama/Llama-3.1-8B@main", "org/模型-v2", "a/.."} {
		h := layout.HashKey(key)
		rows = append(rows, keyVector{
			Key: key, Hash: fmt.Sprintf("%016x", h), Tag: fmt.Sprintf("%04x", h>>48), Lock: layout.StripeLock(layout.Stripe(key)),
			Name: layout.SafeName(key), Home: h & uint64(layout.IndexEntries(layout.DefaultSlots)-1),
		})
	}
	return rows
}

// digestVectors are literal, because nothing below the layout computes digests;
// a test compares them with the code that does.
var digestVectors = []struct {
	What   string
	Chunks []string
	Root   string
}{
	{"0 bytes", nil, "xxh3-128:bb790d5c357fe4210248ad8018e945d6"},
	{"the 8 bytes `onecopy\\n`", []string{"cacec317756203dbe40f251064bcfcc1"}, "xxh3-128:bf5834085e44e817c92dfb77ba2f2c32"},
	{"4,194,304 zero bytes", []string{"34001ae2f947e773165f453a5f35c459"}, "xxh3-128:d48a16fdeec7102a770a549e84199476"},
	{"4,194,305 zero bytes", []string{"34001ae2f947e773165f453a5f35c459", "a6cd5e9392000f6ac44bdff4074eecdb"}, "xxh3-128:cf110a7149f036f85c8c5d5b7f5d3606"},
}
