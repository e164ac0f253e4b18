//go:build linux

package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestMain makes the test's own program a Go worker when the demo starts it as one.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == workerCommand {
		if err := workerMain(os.Args[2], os.Args[3], os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "worker:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// setUp returns the arguments of a small demo that needs no network, and a function that looks for leftovers.
func setUp(t *testing.T) (args []string, leftovers func()) {
	t.Helper()
	if _, err := exec.LookPath("python3"); err != nil {
		t.Skip("needs python3")
	}
	shm, err := os.MkdirTemp("/dev/shm", "onecopy-test-")
	if err != nil {
		t.Skipf("needs a tmpfs at /dev/shm: %v", err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(shm); err != nil {
			t.Error(err)
		}
	})
	shmctl := filepath.Join(t.TempDir(), "shmctl")
	build := exec.Command("go", "build", "-o", shmctl, "github.com/onecopy/onecopy/cmd/shmctl")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)
	return []string{"--shmctl", shmctl, "--shm", shm, "--fetch", "", "--megabytes", "6"}, func() {
		for _, dir := range []string{shm, temp} {
			left, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, entry := range left {
				t.Errorf("%s was left in %s", entry.Name(), dir)
			}
		}
	}
}

func TestDemo(t *testing.T) {
	for name, test := range map[string]struct {
		args func(t *testing.T) []string
		part string
	}{
		"with the package": {withPackage, "onecopy.open in a Python program"},
		"without it":       {func(*testing.T) []string { return []string{"--package", ""} }, "shmctl exec demo/generated -- python3"},
	} {
		t.Run(name, func(t *testing.T) {
			args, leftovers := setUp(t)
			var stdout, stderr bytes.Buffer
			if code := run(t.Context(), append(args, test.args(t)...), &stdout, &stderr); code != 0 {
				t.Fatalf("exit code %d\n%s\n%s", code, &stdout, &stderr)
			}
			for _, part := range []string{"9. Clean up", "no problems", "found 12 tensors", "Summary", "90.0 % less than private copies", test.part} {
				if !strings.Contains(stdout.String(), part) {
					t.Errorf("the output has no %q:\n%s", part, &stdout)
				}
			}
			leftovers()
		})
	}
}

// withPackage are the flags for an interpreter that has what the Python package needs.
func withPackage(t *testing.T) []string {
	t.Helper()
	for _, python := range []string{"python3", "../bin/venv/bin/python", "../bin/demo-venv/bin/python"} {
		if module, _ := findModule(t.Context(), python, "../python/src"); module != "" {
			return []string{"--package", "../python/src", "--python", python}
		}
	}
	t.Skip("needs a Python with xxhash: make demo, or scripts/test.sh python, makes one in bin")
	return nil
}

func TestAPackageThatCannotBeImported(t *testing.T) {
	if module, without := findModule(t.Context(), "python3", t.TempDir()); module != "" || !strings.Contains(without, "onecopy") {
		t.Errorf("module %q, reason %q", module, without)
	}
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
	for _, at := range []string{"1. Get a model", "3. Start ten workers", "6. Kill a worker"} {
		t.Run(at, func(t *testing.T) {
			args, leftovers := setUp(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if code := run(ctx, args, cancelOn{at, cancel}, new(bytes.Buffer)); code != 130 {
				t.Errorf("exit code %d, want 130", code)
			}
			leftovers()
		})
	}
}

func TestAFailedStepFailsTheDemo(t *testing.T) {
	args, leftovers := setUp(t)
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), append(args, "--python", "/nonexistent"), &stdout, &stderr); code != 1 {
		t.Errorf("exit code %d, want 1\n%s", code, &stdout)
	}
	if !strings.Contains(stderr.String(), "FAILED: step 3") {
		t.Errorf("unexpected text: %s", &stderr)
	}
	leftovers()
}
