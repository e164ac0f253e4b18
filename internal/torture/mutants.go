//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// A mutant is a bug: the library with one piece of a file replaced. A campaign that
// does not find it has no teeth.
type mutant struct {
	name string
	file string
	old  string // there exactly once
	new  string
}

var mutants = []mutant{
	{"readers take no lease", "registry/attach_linux.go",
		"if err := lockfile.TrySharedFD(fd); err != nil {",
		"if err := error(nil); err != nil {"},
	{"a model in use is evicted", "registry/remove_linux.go",
		"if err := lockfile.TryExclusive(f); err != nil {\n\t\tf.Close()",
		"if err := lockfile.TryExclusive(f); false {\n\t\tf.Close()"},
	{"a dead remover's model goes although it is leased", "registry/remove_linux.go",
		"t.CompareAndSwap(slot, w, w.With(layout.Ready))",
		"t.CompareAndSwap(slot, w, w.With(layout.Free))"},
	{"a dead loader's slot stays LOADING", "registry/remove_linux.go",
		"crashpoint.Hit(\"reclaim.unlink-dead-load\")\n\tt.free(slot, w)\n",
		"crashpoint.Hit(\"reclaim.unlink-dead-load\")\n"},
	{"what a dead loader was promised stays promised", "registry/remove_linux.go",
		"for _, h := range []layout.Hint{layout.HintPromised, layout.HintReserved, layout.HintLoaderPID, layout.HintLoadStart} {",
		"for _, h := range []layout.Hint{layout.HintLoaderPID} {"},
	{"digests outlive their model", "registry/remove_linux.go",
		"if e := p.m.Unlink(g.name + layout.DigestsExt); err == nil {",
		"if e := error(nil); err == nil {"},
	{"the collector takes superseded generations that are leased", "registry/remove_linux.go",
		"keep[stem] = true // leased, or in the making\n\t\t\tf.Close()\n\t\t\tcontinue",
		"f.Close()"},
	{"a lease ends with its descriptor", "registry/attach_linux.go",
		"a := p.newAttachment(r, man, f.Slot, f.Word, lease)",
		"_ = lease.Unmap()\n\ta := p.newAttachment(r, man, f.Slot, f.Word, lease)"},
	{"retiring does not ask for leases", "registry/remove_linux.go",
		"if lockfile.TryExclusive(f) != nil {\n\t\t\treturn nil // leased",
		"if false {\n\t\t\treturn nil // leased"},
	{"two loaders of one key", "registry/place_linux.go",
		"file := p.lockFile(layout.StripeLock(stripe))",
		"file := p.lockFile(layout.StripeLock((stripe + os.Getpid()) % layout.Stripes))"},
	{"the table is changed without its lock", "registry/place_linux.go",
		"t := &tx{p: p, held: held}",
		"_ = held.Unlock()\n\tt := &tx{p: p}"},
	{"generations are numbered twice", "internal/layout/editor.go",
		"g := e.w.word64(offGeneration).Add(1)",
		"g := e.w.word64(offGeneration).Add(1) | 1"},
	{"the second window of a file is filled from the first", "shm/fill_linux.go",
		"direct, err := c.src.read(b, off, cold && len(b) == chunkBytes)",
		"direct, err := c.src.read(b, off%warmWindow, cold && len(b) == chunkBytes)"},
	{"files stay writable", "shm/pending_linux.go",
		"if err := unix.Fchmod(int(p.f.Fd()), 0o444); err != nil {\n\t\treturn nil, p.wrap(\"chmod\", err)",
		"if err := unix.Fchmod(int(p.f.Fd()), 0o644); err != nil {\n\t\treturn nil, p.wrap(\"chmod\", err)"},
}

// apply returns the file of a mutant, below the root of the module, with its bug.
func (m *mutant) apply(root string) ([]byte, error) {
	text, err := os.ReadFile(filepath.Join(root, m.file))
	if err != nil {
		return nil, err
	}
	if n := bytes.Count(text, []byte(m.old)); n != 1 {
		return nil, fmt.Errorf("mutant %q: %s has its text %d times: %q", m.name, m.file, n, m.old)
	}
	return bytes.Replace(text, []byte(m.old), []byte(m.new), 1), nil
}

// A mutant has to be found within this time.
const mutantTime = 3 * time.Minute

// hunt builds this command with each bug in turn, without touching the sources, and
// has it look for the bug. It is called in the root of the module.
func hunt(o options, which string) error {
	dir, err := os.MkdirTemp("", "onecopy-mutants-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var b strings.Builder
	fmt.Fprintf(&b, "# %d bugs, and how long a campaign takes to find each\n\n", len(mutants))
	fmt.Fprintf(&b, "Written by `make mutants` on %s: %s. Each is one change of the library's code, of which a campaign\n", time.Now().Format(time.DateOnly), machine())
	fmt.Fprintf(&b, "with %d processes knows nothing.\n\n| bug | file | found after | the first complaint |\n| --- | --- | ---: | --- |\n", o.procs)
	survivors := 0
	for i := range mutants {
		m := &mutants[i]
		if which != "all" && !strings.Contains(m.name, which) {
			continue
		}
		took, complaint, err := m.hunt(o, dir)
		if err != nil {
			return fmt.Errorf("mutant %q: %w", m.name, err)
		}
		after := took.Round(100 * time.Millisecond).String()
		if complaint == "" {
			survivors++
			after = "**never**"
		}
		line := fmt.Sprintf("| %s | %s | %s | %s |\n", m.name, m.file, after, strings.ReplaceAll(complaint, "|", "/"))
		fmt.Print(line)
		b.WriteString(line)
	}
	if o.report != "" {
		if err := os.WriteFile(o.report, []byte(b.String()), 0o644); err != nil {
			return err
		}
	}
	if survivors > 0 {
		return fmt.Errorf("%d of %d bugs were not found within %v", survivors, len(mutants), mutantTime)
	}
	return nil
}

// hunt returns an empty complaint when the campaign found nothing.
func (m *mutant) hunt(o options, dir string) (took time.Duration, complaint string, err error) {
	root, err := os.Getwd()
	if err != nil {
		return 0, "", err
	}
	text, err := m.apply(root)
	if err != nil {
		return 0, "", err
	}
	bug, overlay, program := filepath.Join(dir, "bug.go"), filepath.Join(dir, "overlay.json"), filepath.Join(dir, "torture")
	if err := os.WriteFile(bug, text, 0o600); err != nil {
		return 0, "", err
	}
	list, err := json.Marshal(map[string]any{"Replace": map[string]string{filepath.Join(root, m.file): bug}})
	if err != nil {
		return 0, "", err
	}
	if err := os.WriteFile(overlay, list, 0o600); err != nil {
		return 0, "", err
	}
	build := exec.Command("go", "build", "-tags", "crashpoint", "-overlay", overlay, "-o", program, "./internal/torture")
	if out, err := build.CombinedOutput(); err != nil {
		return 0, "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(context.Background(), mutantTime+hungAfter)
	defer cancel()
	report := filepath.Join(dir, "report.md")
	run := exec.CommandContext(ctx, program, "-time", mutantTime.String(), "-processes", fmt.Sprint(o.procs), "-seed", fmt.Sprint(o.seed), "-report", report)
	begun := time.Now()
	out, err := run.CombinedOutput()
	took = time.Since(begun)
	var exit *exec.ExitError
	switch {
	case err == nil:
		return took, "", nil
	case !errors.As(err, &exit) || exit.ExitCode() != 1:
		return took, "", fmt.Errorf("%w\n%s", err, out)
	}
	return took, firstComplaint(report), nil
}

// firstComplaint is the first violation in a report, in one short line.
func firstComplaint(report string) string {
	text, _ := os.ReadFile(report)
	_, list, _ := strings.Cut(string(text), violationsHead)
	line, _, _ := strings.Cut(strings.TrimSpace(list), "\n")
	if i := strings.LastIndex(line, `step "`); i >= 0 { // who says so comes before
		if _, text, ok := strings.Cut(line[i:], `": `); ok {
			line = text
		}
	}
	if r := []rune(line); len(r) > 160 {
		line = string(r[:160]) + " …"
	}
	return line
}
