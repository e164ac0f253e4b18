// Package packaging holds what the packages are built from. Its tests look at
// unit files and manifests without installing anything.
package packaging

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// TestUnits has systemd read the units. Programs that they start are not there.
func TestUnits(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is not installed")
	}
	dir := t.TempDir()
	var units []string
	for _, pattern := range []string{"systemd/*.service", "systemd/*.timer", "systemd/*.mount", "../examples/systemd/*.service"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: no files, %v", pattern, err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			b = bytes.ReplaceAll(b, []byte("/usr/bin/shmctl"), []byte("/bin/true"))
			// Another program's manual pages are not there either.
			lines := bytes.Split(b, []byte("\n"))
			for i, l := range lines {
				if bytes.HasPrefix(l, []byte("Documentation=man:shmctl")) {
					lines[i] = nil
				}
			}
			name := strings.Replace(filepath.Base(f), "@.", "@1.", 1)
			if err := os.WriteFile(filepath.Join(dir, name), bytes.Join(lines, []byte("\n")), 0o644); err != nil {
				t.Fatal(err)
			}
			units = append(units, filepath.Join(dir, name))
		}
	}
	cmd := exec.Command(analyze, append([]string{"verify", "--man=no"}, units...)...)
	out, err := cmd.CombinedOutput()
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, dir) {
			t.Error(strings.TrimSpace(line))
		}
	}
	if err != nil {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

// TestYAML reads every manifest; package packaging/manifests, a module of its own,
// reads them as Kubernetes and Docker Compose do (make manifests).
func TestYAML(t *testing.T) {
	for _, pattern := range []string{"*.yaml", "../examples/docker/*.yaml", "../examples/kubernetes/*.yaml"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: no files, %v", pattern, err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			var v any
			if err := yaml.Unmarshal(b, &v); err != nil {
				t.Errorf("%s: %v", f, err)
			}
			if _, err := json.Marshal(v); err != nil {
				t.Errorf("%s: %v", f, err)
			}
		}
	}
}
