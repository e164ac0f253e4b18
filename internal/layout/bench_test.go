package layout

import (
	"fmt"
	"testing"
)

// BenchmarkLookup measures what the registry promises to do in at most 25 ns,
// for keys as long as real ones.
func BenchmarkLookup(b *testing.B) {
	for _, models := range []int{64, DefaultSlots * 9 / 10} {
		e := newEditor(b, DefaultSlots)
		var hits, misses [64]string
		for slot := range models {
			key := fmt.Sprintf("sentence-transformers/all-MiniLM-L6-v%d", slot)
			publish(b, e, slot, key)
			hits[slot%64] = key
			misses[slot%64] = fmt.Sprintf("sentence-transformers/all-MiniLM-L7-v%d", slot)
		}
		run := func(name string, keys *[64]string, want bool) {
			b.Run(fmt.Sprintf("%s/%d-of-%d", name, models, DefaultSlots), func(b *testing.B) {
				b.ReportAllocs()
				i := 0
				for b.Loop() {
					if _, ok := e.Lookup(keys[i&63]); ok != want {
						b.Fatalf("Lookup(%q) = %v", keys[i&63], ok)
					}
					i++
				}
			})
		}
		run("hit", &hits, true)
		run("miss", &misses, false)
	}
}

// BenchmarkWord is the check for a newer generation that a process-local handle
// makes.
func BenchmarkWord(b *testing.B) {
	e := newEditor(b, DefaultSlots)
	w := publish(b, e, 3, "key")
	for b.Loop() {
		if e.Word(3) != w {
			b.Fatal("the word moved")
		}
	}
}

// BenchmarkReplace frees a model of a table that is 90 % full and loads another.
func BenchmarkReplace(b *testing.B) {
	e := newEditor(b, DefaultSlots)
	fill(b, e, DefaultSlots*9/10)
	keys := [2]string{"org/one", "org/another"}
	i := 0
	for b.Loop() {
		remove(b, e, 5)
		publish(b, e, 5, keys[i&1])
		i++
	}
}

// BenchmarkProblems is the table's part of a check.
func BenchmarkProblems(b *testing.B) {
	e := newEditor(b, DefaultSlots)
	fill(b, e, 1000)
	for b.Loop() {
		if ps := e.Problems(); len(ps) != 0 {
			b.Fatal(ps)
		}
	}
}

// BenchmarkDecodeManifest is the parsing that an attach does.
func BenchmarkDecodeManifest(b *testing.B) {
	for _, files := range []int{1, 10} {
		m := exampleManifest()
		m.Files = m.Files[:0]
		for i := range files {
			m.Files = append(m.Files, ManifestFile{
				Path: fmt.Sprintf("onnx/model-%05d.safetensors", i), Size: 1,
				Digest: "xxh3-128:99aa06d3014798d86001c324468d497f", ModTime: 1_800_000_000_123_456_789,
			})
		}
		m.Bytes = int64(files)
		data, err := m.Encode()
		if err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprintf("%d-files", files), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := DecodeManifest(data); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
