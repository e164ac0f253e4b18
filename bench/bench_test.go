//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestMain makes the test's own program a worker or a task when the benchmark starts it as one.
func TestMain(m *testing.M) {
	hidden()
	os.Exit(m.Run())
}

// tmpfs returns a folder in shared memory that is gone after the test.
func sharedDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "onecopy-test-")
	if err != nil {
		t.Skipf("needs a tmpfs at /dev/shm: %v", err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// empty fails the test if the benchmark left something behind.
func empty(t *testing.T, dir string) {
	t.Helper()
	left, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range left {
		t.Errorf("%s was left in %s", entry.Name(), dir)
	}
}

// line is any line of the JSON results.
type line struct {
	Kind string `json:"kind"`
	trial
	Rounds int               `json:"rounds"`
	Values map[string]spread `json:"values"`
	CPU    any               `json:"cpu"`
}

func TestBench(t *testing.T) {
	const size, modelSize = "6MB", 6e6
	work, shm, out := t.TempDir(), sharedDir(t), t.TempDir()
	readme, results := filepath.Join(out, "README.md"), filepath.Join(out, "bench.jsonl")
	if err := os.WriteFile(readme, []byte("above\n"+markBench.Begin()+"\nSTALE\n"+markBench.End()+"\nbelow\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var stdout, stderr bytes.Buffer
	python, hasPackage := packagePython(t)
	args := []string{"workers", "--python", python, "--package", "../python/src", "--peers", "shared-memory", "--sizes", size, "--workers", "3", "--users", "4", "--rounds", "2",
		"--work", work, "--shm", shm, "--json", results, "--readme", readme}
	if code := run(t.Context(), args, &stdout, &stderr); code != 0 {
		t.Fatalf("exit code %d\n%s", code, &stderr)
	}
	empty(t, work)
	empty(t, shm)

	text, err := os.ReadFile(results)
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[string]int{}
	for raw := range bytes.Lines(text) {
		var l line
		if err := json.Unmarshal(raw, &l); err != nil {
			t.Fatalf("%v in %s", err, raw)
		}
		kinds[l.Kind]++
		if l.Kind != "trial" {
			continue
		}
		copies := int64(1)
		if l.Way == wayPrivate {
			copies = l.copies()
		}
		// PSS is rounded down to kilobytes and a mapping is in whole pages; a Go heap grows as it likes.
		slack := int64(modelSize/100) + 64<<10*l.copies()
		switch {
		case l.Way == wayPrivate:
			slack = modelSize * copies
		case slices.Contains(allPeers, l.Way):
			slack = modelSize // an interpreter's own memory is not the same each time
		}
		if l.Memory < copies*modelSize-slack || l.Memory > copies*modelSize+slack {
			t.Errorf("%+v: %d bytes of memory, want %.0f within %d", l.cell, l.Memory, float64(copies)*modelSize, slack)
		}
		if l.UsableFirst <= 0 || l.UsableLast < l.UsableFirst || l.ReadLast < l.UsableLast || l.StartFirst <= 0 {
			t.Errorf("%+v: the stamps are not in order: %+v", l.cell, l.trial)
		}
	}
	// 4 ways with Go workers, 3 in one process; with Python workers 3 without the package and 2 with it, and the
	// peer that every Python has; 2 rounds of each.
	want := map[string]int{"machine": 1, "note": 1, "load": 2, "trial": 2 * (4 + 3), "summary": 4 + 3}
	switch {
	case hasPackage:
		want["trial"] += 2 * 6
		want["summary"] += 6
	case hasPython(t):
		want["trial"] += 2 * 4
		want["summary"] += 4
		want["skipped"] = 2
	}
	if diff := cmp.Diff(want, kinds); diff != "" {
		t.Errorf("kinds of lines (-want +got):\n%s", diff)
	}
	for _, part := range []string{"6 MB model, 3 Go workers", "6 MB model, 4 users in one Go process", "Where onecopy is not better", "66.7 % saved"} {
		if !strings.Contains(stdout.String(), part) {
			t.Errorf("the table has no %q:\n%s", part, &stdout)
		}
	}
	page, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(string(page), "above\n"+markBench.Begin()+"\n") || !strings.HasSuffix(string(page), markBench.End()+"\nbelow\n") ||
		strings.Contains(string(page), "STALE") || !strings.Contains(string(page), "| onecopy |") {
		t.Errorf("the page is not as it should be:\n%s", page)
	}
}

// packagePython is an interpreter that has what the Python package needs, if there is one.
func packagePython(t *testing.T) (python string, has bool) {
	t.Helper()
	for _, python := range []string{"python3", "../bin/venv/bin/python", "../bin/demo-venv/bin/python"} {
		if exec.CommandContext(t.Context(), python, "-c", "import xxhash").Run() == nil {
			return python, true
		}
	}
	return "python3", false
}

func hasPython(t *testing.T) bool {
	t.Helper()
	name, err := exec.LookPath("python3")
	if err != nil {
		return false
	}
	_, _, err = findPython(t.Context(), name)
	return err == nil
}

// cancelOn cancels when a text is written.
type cancelOn struct {
	text   string
	cancel context.CancelFunc
}

func (c cancelOn) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte(c.text)) {
		c.cancel()
	}
	return len(p), nil
}

func TestInterrupted(t *testing.T) {
	work, shm := t.TempDir(), sharedDir(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	args := []string{"workers", "--sizes", "6MB", "--work", work, "--shm", shm}
	if code := run(ctx, args, new(bytes.Buffer), cancelOn{"round 1", cancel}); code != 130 {
		t.Errorf("exit code %d, want 130", code)
	}
	empty(t, work)
	empty(t, shm)
}

func TestLeftoversOfKilledRun(t *testing.T) {
	parent := t.TempDir()
	alive, err := newScratch(parent)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(parent, scratchPrefix+"dead"), 0o700); err != nil {
		t.Fatal(err)
	}
	other, err := newScratch(parent)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	entries, err := os.ReadDir(parent)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		got = append(got, filepath.Join(parent, entry.Name()))
	}
	want := []string{alive.path, other.path}
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("folders (-want +got):\n%s", diff)
	}
	for _, s := range []*scratch{alive, other} {
		if err := s.remove(); err != nil {
			t.Error(err)
		}
	}
	empty(t, parent)
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{
		{"--sizes", "small"},
		{"--sizes", "1kB"},
		{"--workers", "0"},
		{"--ways", "telepathy"},
		{"--lang", "cobol"},
		{"stray"},
	} {
		if code := run(t.Context(), args, new(bytes.Buffer), new(bytes.Buffer)); code != 2 {
			t.Errorf("%q: exit code %d, want 2", args, code)
		}
	}
	page := filepath.Join(t.TempDir(), "page.md")
	if err := os.WriteFile(page, []byte("no marks"), 0o600); err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	if code := run(t.Context(), []string{"--quick", "--readme", page}, new(bytes.Buffer), &stderr); code != 1 || !strings.Contains(stderr.String(), markBench.Begin()) {
		t.Errorf("a page without marks: exit code %d, %s", code, &stderr)
	}
}

func TestParseSmaps(t *testing.T) {
	const text = `55d0c0000000-55d0c0021000 rw-p 00000000 00:00 0                          [heap]
Size:                132 kB
Pss:                 100 kB
AnonHugePages:         0 kB
VmFlags: rd wr mr mw me ac
7f0000000000-7f0000200000 r--s 00000000 00:1b 42                         /dev/shm/onecopy-test/v1/m/1-1/name/a file
Pss:                 512 kB
ShmemPmdMapped:     2048 kB
7f0000200000-7f0000201000 r--s 00000000 00:1b 43                         /dev/shm/onecopy-test/v1/m/1-1.manifest
Pss:                   4 kB
7f0000300000-7f0000400000 r--p 00000000 fe:00 42                         /usr/lib/libc.so.6
Pss:                   7 kB
FilePmdMapped:      2048 kB
`
	got, err := parseSmaps([]byte(text), where{model: fileID{"00:1b", 42}, registry: "/dev/shm/onecopy-test"})
	if err != nil {
		t.Fatal(err)
	}
	want := pages{model: 512 << 10, registry: 4 << 10, anonymous: 100 << 10, total: (100 + 512 + 4 + 7) << 10, huge: 2048 << 10}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(pages{})); diff != "" {
		t.Errorf("pages (-want +got):\n%s", diff)
	}
	for _, bad := range []string{"nonsense here\n", "0-1 r--s 0 00:1b x /path\n", "0-1 r--s 0 00:1b 42 /path\nPss: many kB\n"} {
		if _, err := parseSmaps([]byte(bad), where{model: fileID{"00:1b", 42}}); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestText(t *testing.T) {
	for want, got := range map[string]string{
		"48 MB":     mega(48e6),
		"1.5 GB":    mega(1.5e9),
		"0.12":      short(0.123),
		"12.3":      short(12.34),
		"123":       short(123.4),
		"1,234,568": grouped(1234568),
		"0.0":       percent(-0.001),
		"1.20 ms":   nanoseconds(1.2e6),
		"80.0 ns":   nanoseconds(80),
		"2.50":      short(median(sorted([]float64{4, 1, 2, 3}))),
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
