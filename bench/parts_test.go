//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestParts runs every part but workers in its smallest form. No time is looked at.
func TestParts(t *testing.T) {
	work, shm, out := t.TempDir(), sharedDir(t), t.TempDir()
	lines, page, performance := filepath.Join(out, "bench.jsonl"), filepath.Join(out, "bench.md"), filepath.Join(out, "PERFORMANCE.md")
	marks := "above\n" + markTargets.Begin() + "\nSTALE\n" + markTargets.End() + "\nbetween\n" + markFigures.Begin() + "\nSTALE\n" + markFigures.End() + "\nbelow\n"
	if err := os.WriteFile(performance, []byte(marks), 0o600); err != nil {
		t.Fatal(err)
	}
	var stdout, stderr bytes.Buffer
	args := []string{"load", "micro", "pressure", "tokens", "scale", "--rounds", "1", "--load-sizes", "1MiB,6MiB", "--cold-from", "6MiB", "--files", "20",
		"--sparse", "20MiB", "--micro", "attach,scan,wait,remove,check", "--micro-size", "6MiB", "--waiters", "1,3", "--models", "5",
		"--pressure-size", "6MiB", "--leave", "64MiB", "--most", "64MiB", "--tokens", "2", "--token-workers", "1",
		"--holders", "3", "--holds", "2", "--refreshes", "2", "--interval", "10ms", "--scale-size", "6MiB", "--copies", "2",
		"--work", work, "--shm", shm, "--json", lines, "--markdown", page, "--performance", performance}
	if code := run(t.Context(), args, &stdout, &stderr); code != 0 {
		t.Fatalf("exit code %d\n%s", code, &stderr)
	}
	empty(t, work)
	empty(t, shm)

	got := map[string][]string{}
	skipped := false
	for raw := range bytes.Lines(readFile(t, lines)) {
		var l struct {
			Kind, Text string
			sample
		}
		if err := json.Unmarshal(raw, &l); err != nil {
			t.Fatalf("%v in %s", err, raw)
		}
		switch l.Kind {
		case "note":
			skipped = skipped || strings.HasPrefix(l.Text, "tokens: skipped")
		case "sample":
			key := l.Part + ": " + l.Case
			got[key] = append(got[key], l.Way)
			if l.Way == wayScan && (l.Values["missed"] != 0 || l.Values["wrong"] != 0 || l.Values["error_percent"] > 1) {
				t.Errorf("scan: %v", l.Values)
			}
			for name, v := range l.Values {
				if math.IsNaN(v) || math.IsInf(v, 0) {
					t.Errorf("%s, %s: %s is %v", key, l.Way, name, v)
				}
			}
		}
	}
	want := map[string][]string{
		"load: warm, 1 MiB":                       {wayCp, wayCopy, wayOne, wayTwo, wayPlain},
		"load: warm, 6 MiB":                       {wayCp, wayCopy, wayOne, wayTwo, wayPlain},
		"load: cold, 6 MiB":                       {wayCp, wayCopy, wayCold, wayPlain, wayRaw},
		"load: warm, folder of 20 files of 10 kB": {wayCp, wayOne, wayTwo},
		"load: warm, sparse file of 20 MiB, 1 MiB of data in 16 MiB":      {wayCp, wayCopy, wayOne, wayTwo},
		"micro: attach in a process that runs, 6 MiB":                     {wayModel},
		"micro: a fresh process":                                          {wayEmptyRun, wayAttaches},
		"micro: read all of it, one process, 6 MiB":                       {wayFile, wayTmpfs, wayModel},
		"micro: remove an idle model of 6 MiB":                            {wayModel},
		"micro: one process waits for a load":                             {wayPublish, wayKill},
		"micro: 3 processes wait for a load":                              {wayPublish, wayKill},
		"micro: check of 5 models of one small file":                      {checkTable, checkData},
		"pressure: " + casePressure + ", model of 6.29 MB, 67.11 MB left": {wayFile, wayModel},
		"scale: 5 models, 3 processes that hold some":                     {"version", wayLs, "ls -o json", wayCheck, wayHolders, "top --once", wayMetrics, wayScrape, wayTopJSON, wayTop},
		"scale: evict an idle model of 6 MiB":                             {wayRoom, wayNoRoom, wayTrim, wayRm},
		"scale: scan for 2 private copies of 6 MiB":                       {wayScan},
	}
	if ways, ok := got["tokens: 1 worker"]; ok {
		// Only where llama.cpp and the model were fetched; huge=advise takes root.
		want["tokens: 1 worker"] = ways
		if !slices.Contains(ways, wayDisk) || !slices.Contains(ways, wayModel) {
			t.Errorf("tokens: %q", ways)
		}
	} else if !skipped {
		t.Error("tokens were skipped without a note")
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("samples (-want +got):\n%s", diff)
	}
	for name, text := range map[string]string{"terminal": stdout.String(), "page": string(readFile(t, page))} {
		for _, part := range []string{"speed / cp", "a fresh process", "Memory pressure", "page tables, kB", "Many models, many holders"} {
			if !strings.Contains(text, part) {
				t.Errorf("%s: no %q:\n%s", name, part, text)
			}
		}
	}
	text := string(readFile(t, performance))
	if strings.Contains(text, "STALE") || !strings.HasPrefix(text, "above\n") || !strings.HasSuffix(text, "below\n") ||
		!strings.Contains(text, "| fresh process that attaches, over an empty one | ≤ 150 µs |") || !strings.Contains(text, "not measured") {
		t.Errorf("the page is not as it should be:\n%s", text)
	}
}

// TestFrom shows that a page made of written results is the page of the run.
func TestFrom(t *testing.T) {
	dir := t.TempDir()
	a, b, both := filepath.Join(dir, "a.jsonl"), filepath.Join(dir, "b.jsonl"), filepath.Join(dir, "both.jsonl")
	m := machine{CPU: "one", Kernel: "6.18", Args: []string{"load"}}
	old := sample{"load", "a case", wayCp, 0, values{"wall_ms": 1}}
	again := sample{"load", "a case", wayCp, 0, values{"wall_ms": 2}}
	other := sample{"micro", "a step", wayModel, 0, values{"ns": 3}}
	for path, r := range map[string]*results{
		a: {Machine: m, Samples: []sample{old, other}, Notes: []string{"seen"}},
		b: {Machine: m, Samples: []sample{again}, Notes: []string{"seen"}, Trials: []trial{{cell: cell{Size: 1, Way: wayMmap, Workers: 1, Users: 1}}}},
	} {
		if err := r.write(options{json: path}); err != nil {
			t.Fatal(err)
		}
	}
	var stderr bytes.Buffer
	if code := run(t.Context(), []string{"--from", a + "," + b, "--json", both}, new(bytes.Buffer), &stderr); code != 0 {
		t.Fatalf("exit code %d: %s", code, &stderr)
	}
	got, err := readResults(both)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]sample{other, again}, got.Samples); diff != "" {
		t.Errorf("samples (-want +got):\n%s", diff)
	}
	if len(got.Trials) != 1 || got.Trials[0].Way != wayMmap || len(got.Notes) != 1 || got.Machine.Kernel != m.Kernel {
		t.Errorf("got %+v", got)
	}
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestVerdicts(t *testing.T) {
	r := &results{}
	for round, ms := range []float64{100, 200, 400} {
		name := loadCase(false, targetSize)
		r.Samples = append(r.Samples,
			sample{"load", name, wayCp, round, values{"wall_ms": 2 * ms, "cpu_ms": ms}},
			sample{"load", name, wayOne, round, values{"wall_ms": ms, "cpu_ms": ms / 2, "verify_ms": ms / 2}})
	}
	met := map[string]string{}
	for _, v := range r.verdicts() {
		if v.Rounds > 0 {
			met[v.What] = v.Text + " " + v.answer()
		}
	}
	want := map[string]string{
		"warm load, 1.5 GiB, 1 thread: speed / `cp`, with digests":                        "2.00x yes",
		"the same without digests (estimate: less the time to digest the finished model)": "4.00x yes",
		"warm load, 1.5 GiB, 1 thread: processor time / `cp`":                             "0.50x **no**",
	}
	for what, text := range want {
		if met[what] != text {
			t.Errorf("%s: %q, want %q", what, met[what], text)
		}
	}
}

func TestInterval(t *testing.T) {
	if low, high := interval([]float64{1, 1, 1}); low != 1 || high != 1 {
		t.Errorf("of equal values: %v to %v", low, high)
	}
	values := sorted([]float64{0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5})
	low, high := interval(values)
	if low < 0.9 || low > 1.2 || high < 1.2 || high > 1.5 {
		t.Errorf("of %v: %v to %v", values, low, high)
	}
	if again, _ := interval(values); again != low {
		t.Errorf("not the same twice: %v, %v", low, again)
	}
}

func TestParseBenchmarks(t *testing.T) {
	const text = `goos: linux
BenchmarkAttach/sparse=1.5GiB-2   	    3829	     29905 ns/op	    4160 B/op	      42 allocs/op
BenchmarkWord   	100	 1.5 ns/op
BenchmarkBroken-2
PASS
`
	want := []benchmarkLine{
		{"Attach/sparse=1.5GiB", values{"ns": 29905, "allocs": 42}},
		{"Word", values{"ns": 1.5}},
	}
	if diff := cmp.Diff(want, parseBenchmarks(text), cmp.AllowUnexported(benchmarkLine{})); diff != "" {
		t.Errorf("lines (-want +got):\n%s", diff)
	}
}

func TestRotated(t *testing.T) {
	var got []string
	for round := range 3 {
		got = append(got, strings.Join(rotated([]string{"a", "b", "c"}, round), ""))
	}
	if diff := cmp.Diff([]string{"abc", "bca", "cab"}, got); diff != "" {
		t.Errorf("orders (-want +got):\n%s", diff)
	}
}
