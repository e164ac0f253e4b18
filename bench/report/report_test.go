package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const example = `{"kind":"machine","cpu":"a <machine>","cores":2}
{"kind":"sample","part":"load","case":"warm, 1 MiB","way":"cp","round":0,"values":{"wall_ms":4}}
{"kind":"sample","part":"load","case":"warm, 1 MiB","way":"cp","round":1,"values":{"wall_ms":6}}
{"kind":"sample","part":"load","case":"warm, 1 MiB","way":"onecopy, 1 thread","round":0,"values":{"wall_ms":2}}
{"kind":"trial","model_bytes":48000000,"lang":"go","way":"mmap","workers":1,"users_per_worker":1,"memory_bytes":48000000}
{"kind":"trial","model_bytes":48000000,"lang":"go","way":"onecopy","workers":3,"users_per_worker":1,"memory_bytes":48000000}
{"kind":"target","what":"a load","figure":2,"limit":1.8,"at_least":true,"met":true,"rounds":2,"target_text":"≥ 1.8x","figure_text":"2.0x"}
{"kind":"note","text":"other work ran"}
{"kind":"something new"}
`

func TestPage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bench.jsonl")
	if err := os.WriteFile(path, []byte(example), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := run(path, &out); err != nil {
		t.Fatal(err)
	}
	text := out.String()
	for _, part := range []string{"<svg", "warm, 1 MiB", "onecopy, 1 thread", "≥ 1.8x", "other work ran", "a &lt;machine&gt;", "Workers: 48 MB, go"} {
		if !strings.Contains(text, part) {
			t.Errorf("the page has no %q", part)
		}
	}
	for _, part := range []string{"<?xml", "src=", "<script"} {
		if strings.Contains(text, part) {
			t.Errorf("the page has %q", part)
		}
	}
	// The plots are well-formed and stand for themselves.
	for _, rest := range strings.Split(text, "<svg")[1:] {
		svg, _, ok := strings.Cut("<svg"+rest, "</svg>")
		if !ok {
			t.Fatal("a plot does not end")
		}
		d := xml.NewDecoder(strings.NewReader(svg + "</svg>"))
		for {
			if _, err := d.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestBarOf(t *testing.T) {
	if got := barOf("x", []float64{3, 1, 2, 10}); got != (bar{"x", 2.5, 1, 10}) {
		t.Errorf("got %+v", got)
	}
}

func TestBroken(t *testing.T) {
	if _, err := read(strings.NewReader("{\n")); err == nil || !strings.Contains(err.Error(), "line 1") {
		t.Errorf("half a line: %v", err)
	}
}
