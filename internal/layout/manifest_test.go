package layout

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// manifestCases make the files of testdata/layout/v1/manifests. The beginning of
// a name says what a reader must do: ok- accept, bad- refuse, version- refuse as
// another version.
var manifestCases = map[string]func(m map[string]any){
	"ok-example":       func(m map[string]any) {},
	"ok-one-file":      func(m map[string]any) { m["files"], m["bytes"] = files(m)[:1], 612 },
	"ok-empty-file":    func(m map[string]any) { file(m, 0)["size"], m["bytes"] = 0, 4<<20+1 },
	"ok-unknown-field": func(m map[string]any) { m["later"], file(m, 0)["later"] = map[string]any{"x": 1}, []int{1} },
	"ok-from-code": func(m map[string]any) {
		m["origin"] = map[string]any{"kind": "func", "version": "7", "environment": map[string]any{"torch": "2.9"}}
		delete(file(m, 0), "mtime_ns")
	},
	"ok-other-digest":   func(m map[string]any) { file(m, 0)["digest"] = "sha-256:00ff" },
	"ok-smallest-chunk": func(m map[string]any) { m["chunk_bytes"] = 4096 },
	"ok-biggest-chunk":  func(m map[string]any) { m["chunk_bytes"] = 1 << 30 },
	"ok-last-generation": func(m map[string]any) {
		m["epoch"], m["generation"] = "ffffffffffffffff", json.Number("72057594037927935")
	},

	"version-schema-0": func(m map[string]any) { delete(m, "schema") },
	"version-schema-2": func(m map[string]any) { m["schema"] = 2 },

	"bad-no-key":              func(m map[string]any) { delete(m, "key") },
	"bad-control-in-key":      func(m map[string]any) { m["key"], m["name"] = "a\nb", "a-b" },
	"bad-long-key":            func(m map[string]any) { m["key"], m["name"] = strings.Repeat("k", 256), strings.Repeat("k", 100) },
	"bad-name":                func(m map[string]any) { m["name"] = "another" },
	"bad-name-dots":           func(m map[string]any) { m["name"] = ".." },
	"bad-name-slash":          func(m map[string]any) { m["name"] = "../../all-MiniLM-L6-v2" },
	"bad-epoch-0":             func(m map[string]any) { m["epoch"] = "0000000000000000" },
	"bad-epoch-short":         func(m map[string]any) { m["epoch"] = "1234" },
	"bad-epoch-number":        func(m map[string]any) { m["epoch"] = 81985529216486895 },
	"bad-epoch-sign":          func(m map[string]any) { m["epoch"] = "+123456789abcdef" },
	"bad-generation-0":        func(m map[string]any) { m["generation"] = 0 },
	"bad-generation-2-to-56":  func(m map[string]any) { m["generation"] = json.Number("72057594037927936") },
	"bad-generation-negative": func(m map[string]any) { m["generation"] = -1 },
	"bad-generation-fraction": func(m map[string]any) { m["generation"] = 1.5 },
	"bad-backing":             func(m map[string]any) { m["backing"] = "file" },
	"bad-chunk-0":             func(m map[string]any) { m["chunk_bytes"] = 0 },
	"bad-chunk-not-a-power":   func(m map[string]any) { m["chunk_bytes"] = 5000 },
	"bad-chunk-small":         func(m map[string]any) { m["chunk_bytes"] = 2048 },
	"bad-chunk-big":           func(m map[string]any) { m["chunk_bytes"] = 2 << 30 },
	"bad-chunk-negative":      func(m map[string]any) { m["chunk_bytes"] = math.MinInt64 },
	"bad-origin-kind":         func(m map[string]any) { m["origin"] = map[string]any{"kind": "url"} },
	"bad-no-origin":           func(m map[string]any) { delete(m, "origin") },
	"bad-no-files":            func(m map[string]any) { m["files"], m["bytes"] = []any{}, 0 },
	"bad-files-null":          func(m map[string]any) { m["files"], m["bytes"] = nil, 0 },
	"bad-total":               func(m map[string]any) { m["bytes"] = 4194916 },
	"bad-size-negative":       func(m map[string]any) { file(m, 0)["size"], m["bytes"] = -1, 4<<20 },
	"bad-sizes-overflow": func(m map[string]any) {
		file(m, 0)["size"], file(m, 1)["size"], m["bytes"] = math.MaxInt64, 2, math.MinInt64+1
	},
	"bad-size-over-63-bits":    func(m map[string]any) { file(m, 0)["size"] = json.Number("9223372036854775808") },
	"bad-digest-missing":       func(m map[string]any) { delete(file(m, 0), "digest") },
	"bad-digest-no-algorithm":  func(m map[string]any) { file(m, 0)["digest"] = ":00ff" },
	"bad-digest-no-value":      func(m map[string]any) { file(m, 0)["digest"] = "xxh3-128:" },
	"bad-digest-upper-case":    func(m map[string]any) { file(m, 0)["digest"] = "xxh3-128:00FF" },
	"bad-digest-escape":        func(m map[string]any) { file(m, 0)["digest"] = "xxh3-128:\x1b[2J" },
	"bad-digest-long":          func(m map[string]any) { file(m, 0)["digest"] = "xxh3-128:" + strings.Repeat("0", 192) },
	"bad-path-empty":           func(m map[string]any) { file(m, 0)["path"] = "" },
	"bad-path-absolute":        func(m map[string]any) { file(m, 0)["path"] = "/etc/passwd" },
	"bad-path-dots":            func(m map[string]any) { file(m, 0)["path"] = "../config.json" },
	"bad-path-dots-inside":     func(m map[string]any) { file(m, 0)["path"] = "a/../../config.json" },
	"bad-path-backslash":       func(m map[string]any) { file(m, 0)["path"] = `..\config.json` },
	"bad-path-nul":             func(m map[string]any) { file(m, 0)["path"] = "a\x00b" },
	"bad-path-long":            func(m map[string]any) { file(m, 0)["path"] = strings.Repeat("a/", 512) + "a" },
	"bad-path-long-element":    func(m map[string]any) { file(m, 0)["path"] = strings.Repeat("a", 256) },
	"bad-path-twice":           func(m map[string]any) { file(m, 0)["path"] = "onnx/model.onnx" },
	"bad-path-file-and-folder": func(m map[string]any) { file(m, 0)["path"] = "onnx" },
	"bad-path-not-a-string":    func(m map[string]any) { file(m, 0)["path"] = 1 },
	"bad-loaded-at":            func(m map[string]any) { m["loaded_at"] = "yesterday" },
	"bad-environment":          func(m map[string]any) { m["origin"] = map[string]any{"kind": "func", "environment": []any{"x"}} },
}

func files(m map[string]any) []any                { return m["files"].([]any) }
func file(m map[string]any, i int) map[string]any { return files(m)[i].(map[string]any) }

// asMap is exampleManifest as JSON sees it, for members that Manifest could not
// hold.
func asMap(t *testing.T) map[string]any {
	t.Helper()
	b, err := exampleManifest().Encode()
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	if err := d.Decode(&m); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestGoldenManifests(t *testing.T) {
	for name, change := range manifestCases {
		m := asMap(t)
		change(m)
		b, err := json.MarshalIndent(m, "", " ")
		if err != nil {
			t.Fatal(err)
		}
		golden(t, filepath.Join("manifests", name+".json"), append(b, '\n'))
	}
	paths, err := filepath.Glob(filepath.Join(goldenDir, "manifests", "*"))
	if err != nil {
		t.Fatal(err)
	}
	if len(paths) != len(manifestCases) {
		t.Errorf("%d files, %d made by code", len(paths), len(manifestCases))
	}
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		_, err = DecodeManifest(b)
		expect, _, _ := strings.Cut(filepath.Base(path), "-")
		want, ok := map[string]error{"ok": nil, "bad": ErrManifest, "version": ErrVersion}[expect]
		if !ok || !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", filepath.Base(path), err, want)
		}
	}
}

// TestManifestRoundTrip: what was encoded is decoded, and the JSON is stable.
func TestManifestRoundTrip(t *testing.T) {
	m := exampleManifest()
	b, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeManifest(b)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(m, got); d != "" {
		t.Error(d)
	}
	if again, err := got.Encode(); err != nil || string(again) != string(b) {
		t.Errorf("encoded again: %v\n%s", err, again)
	}
}

// TestEncodeRefuses what DecodeManifest would refuse, and what JSON cannot say.
func TestEncodeRefuses(t *testing.T) {
	for name, change := range map[string]func(m *Manifest){
		"name":        func(m *Manifest) { m.Name = "x" },
		"total":       func(m *Manifest) { m.Bytes++ },
		"path":        func(m *Manifest) { m.Files[0].Path = "../x" },
		"no files":    func(m *Manifest) { m.Files, m.Bytes = nil, 0 },
		"not finite":  func(m *Manifest) { m.LoadSeconds = math.NaN() },
		"over limit":  func(m *Manifest) { m.Origin.Path = strings.Repeat("x", MaxManifest) },
		"many files":  func(m *Manifest) { many(m, MaxFiles+1) },
		"digest":      func(m *Manifest) { m.Files[0].Digest = "xxh3-128" },
		"digest form": func(m *Manifest) { m.Files[0].Digest = "xxh3-128:00:00" },
	} {
		m := exampleManifest()
		change(m)
		if b, err := m.Encode(); !errors.Is(err, ErrManifest) || b != nil {
			t.Errorf("%s: %v, want ErrManifest", name, err)
		}
	}
	m := exampleManifest()
	m.Schema = 2
	if _, err := m.Encode(); !errors.Is(err, ErrVersion) {
		t.Errorf("schema 2: %v", err)
	}
}

func many(m *Manifest, n int) {
	m.Files = nil
	for i := range n {
		m.Files = append(m.Files, ManifestFile{Path: fmt.Sprintf("%s/%05d", strings.Repeat("x", 200), i), Digest: m.Name[:3] + ":00"})
	}
	m.Bytes = 0
}

// TestBiggestManifest: a model at the limit of files can be written and read.
func TestBiggestManifest(t *testing.T) {
	m := exampleManifest()
	many(m, MaxFiles)
	b, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := DecodeManifest(b); err != nil {
		t.Errorf("%d bytes: %v", len(b), err)
	}
}

func TestDecodeManifestRefuses(t *testing.T) {
	sound, err := exampleManifest().Encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		"nothing":           nil,
		"null":              []byte("null"),
		"a list":            []byte("[]"),
		"half":              sound[:len(sound)/2],
		"two":               append(sound[:len(sound):len(sound)], sound...),
		"trailing bytes":    append(sound[:len(sound):len(sound)], 0),
		"too big":           append(sound[:len(sound):len(sound)], bytes.Repeat([]byte(" "), MaxManifest)...),
		"deep":              bytes.Repeat([]byte("["), 1<<20),
		"not UTF-8 in path": bytes.Replace(sound, []byte("config.json"), []byte("config\xff\x00json"), 1),
	} {
		_, err := DecodeManifest(b)
		if !errors.Is(err, ErrManifest) && !errors.Is(err, ErrVersion) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestManifestEveryFlip: a changed byte is refused, or gives another valid
// manifest; it never panics.
func TestManifestEveryFlip(t *testing.T) {
	sound, err := exampleManifest().Encode()
	if err != nil {
		t.Fatal(err)
	}
	for off := range sound {
		for _, x := range []byte{0x01, 0x20, 0x80} {
			b := append([]byte(nil), sound...)
			b[off] ^= x
			reencode(t, b)
		}
	}
}

// TestScanManifest: what programs write needs no encoding/json.
func TestScanManifest(t *testing.T) {
	for name, change := range map[string]func(m *Manifest){
		"example":     func(*Manifest) {},
		"environment": func(m *Manifest) { m.Origin.Environment = map[string]string{"torch": "2.9", "": "é"} },
		"version":     func(m *Manifest) { m.Origin = Origin{Kind: OriginFunc, Version: "7"} },
		"no mtime":    func(m *Manifest) { m.Files[0].ModTime = 0 },
		"exponent":    func(m *Manifest) { m.LoadSeconds = 1e-9 },
	} {
		m := exampleManifest()
		change(m)
		b, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		var got Manifest
		if !scanManifest(b, &got) {
			t.Errorf("%s: not scanned\n%s", name, b)
		} else if d := cmp.Diff(m, &got, cmpopts.EquateEmpty()); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}

// reencode checks that what is accepted can be written and means the same, and
// that whatever the scanner takes is what encoding/json makes of it.
func reencode(t *testing.T, b []byte) {
	t.Helper()
	var scanned, parsed Manifest
	if scanManifest(b, &scanned) {
		if err := json.Unmarshal(b, &parsed); err != nil {
			t.Errorf("scanned, but no JSON: %v\n%s", err, b)
		} else if d := cmp.Diff(parsed, scanned, cmpopts.EquateEmpty()); d != "" {
			t.Errorf("%s\n%s", d, b)
		}
	}
	m, err := DecodeManifest(b)
	if err != nil {
		if !errors.Is(err, ErrManifest) && !errors.Is(err, ErrVersion) {
			t.Errorf("untyped error %v", err)
		}
		return
	}
	again, err := m.Encode()
	if err != nil {
		t.Fatalf("accepted, but cannot be written: %v\n%s", err, b)
	}
	m2, err := DecodeManifest(again)
	if err != nil {
		t.Fatalf("written, but not accepted: %v\n%s", err, again)
	}
	if d := cmp.Diff(m, m2, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("%s\n%s", d, b)
	}
}
