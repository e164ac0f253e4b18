package main

import (
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/onecopy/onecopy/internal/digest"
	"github.com/onecopy/onecopy/internal/layout"
)

// TestFormatIsFresh: the committed document is what the code generates.
func TestFormatIsFresh(t *testing.T) {
	want, err := render()
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join("..", output))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("docs/FORMAT.md is stale: run go generate ./internal/layout\n%s", d)
	}
}

// TestPythonConstantsAreFresh: so is what the Python package imports.
func TestPythonConstantsAreFresh(t *testing.T) {
	if digestAlgorithm != digest.Algorithm || chunkBytes != digest.ChunkBytes {
		t.Errorf("digests: %s of %d bytes, package digest has %s of %d", digestAlgorithm, chunkBytes, digest.Algorithm, digest.ChunkBytes)
	}
	got, err := os.ReadFile(filepath.Join("..", pythonOutput))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(pythonConstants()), string(got)); d != "" {
		t.Errorf("_layout.py is stale: run go generate ./internal/layout\n%s", d)
	}
}

// TestFormatHasEveryField, at the offsets that the golden list froze.
func TestFormatHasEveryField(t *testing.T) {
	doc, err := render()
	if err != nil {
		t.Fatal(err)
	}
	list, err := os.ReadFile(filepath.Join("..", "..", "..", "testdata", "layout", "v1", "fields.tsv"))
	if err != nil {
		t.Fatal(err)
	}
	section := map[string]string{}
	for name, heading := range map[string]string{"header": "\n### Header\n", "slot": "\n### Slot\n", "digests": "\n## 5. Digests\n"} {
		_, rest, ok := strings.Cut(string(doc), heading)
		if !ok {
			t.Fatalf("no section%s", heading)
		}
		section[name], _, _ = strings.Cut(rest, "\n##")
	}
	rows := 0
	for line := range strings.Lines(string(list)) {
		f := strings.Fields(line)
		if f[0] == "struct" {
			continue
		}
		rows++
		if row := fmt.Sprintf("\n| %s | %s | %s | ", f[1], f[2], f[3]); !strings.Contains(section[f[0]], row) {
			t.Errorf("%s: no row %q", f[0], row)
		}
	}
	if rows != len(layout.Fields) {
		t.Errorf("%d rows frozen, %d fields", rows, len(layout.Fields))
	}
}

// TestFormatTables: every row of a table has as many cells as its heading, and
// no template action or lost value is left in the text.
func TestFormatTables(t *testing.T) {
	doc, err := render()
	if err != nil {
		t.Fatal(err)
	}
	cells, n := 0, 0
	for line := range strings.Lines(string(doc)) {
		n++
		if !strings.HasPrefix(line, "|") {
			cells = 0
			continue
		}
		if c := strings.Count(line, "|"); cells == 0 {
			cells = c
		} else if c != cells {
			t.Errorf("line %d has %d cells, its table %d: %s", n, c-1, cells-1, line)
		}
	}
	if bad := regexp.MustCompile(`\{\{|<no value>|%!`).FindString(string(doc)); bad != "" {
		t.Errorf("%q in the text", bad)
	}
	if i := strings.IndexRune(string(doc), '\r'); i >= 0 {
		t.Error("carriage return in the text")
	}
}

// TestFormatLinks lead to files, as far as they are relative.
func TestFormatLinks(t *testing.T) {
	doc, err := render()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`\]\(([^)]+)\)`).FindAllStringSubmatch(string(doc), -1) {
		if _, err := os.Stat(filepath.Join("..", filepath.Dir(output), m[1])); err != nil {
			t.Errorf("link to %s: %v", m[1], err)
		}
	}
}

// TestDigestVectors: the document shows what loaders compute.
func TestDigestVectors(t *testing.T) {
	contents := [][]byte{nil, []byte("onecopy\n"), make([]byte, digest.ChunkBytes), make([]byte, digest.ChunkBytes+1)}
	if len(contents) != len(digestVectors) {
		t.Fatalf("%d vectors", len(digestVectors))
	}
	for i, b := range contents {
		var sums []byte
		var chunks []string
		for off := 0; off < len(b); off += digest.ChunkBytes {
			s := digest.Sum(b[off:min(off+digest.ChunkBytes, len(b))])
			sums = append(sums, s[:]...)
			chunks = append(chunks, hex.EncodeToString(s[:]))
		}
		v := digestVectors[i]
		if d := cmp.Diff(v.Chunks, chunks); d != "" || v.Root != digest.Root(int64(len(b)), sums) {
			t.Errorf("%s: root %s\n%s", v.What, digest.Root(int64(len(b)), sums), d)
		}
	}
	if digest.ChunkBytes != exampleManifest().ChunkBytes || digest.Size != layout.DigestSize {
		t.Error("the document's chunk size is not the code's")
	}
	// The published value for no bytes at all: the algorithm is the one we name.
	if s := digest.Sum(nil); hex.EncodeToString(s[:]) != "99aa06d3014798d86001c324468d497f" {
		t.Errorf("XXH3-128 of nothing is %x", s)
	}
}
