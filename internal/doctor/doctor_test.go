package doctor

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
)

var update = flag.Bool("update", false, "rewrite the expected findings in testdata")

// facts are what a made-up machine says beside its files.
type facts struct {
	Dir      string
	UID      int
	Registry *Registry
	Space    Space
	Group    string // with a limit
	Headroom int64
	Owners   map[string]struct {
		UID  int
		Mode uint32
		Link bool
		File bool
	}
	Skipped, TmpFile, Lock, Lease string
	Huge                          syscall.Errno
}

func (f *facts) host(root string) Host {
	failed := func(s string) error {
		if s == "" {
			return nil
		}
		return errors.New(s)
	}
	return Host{
		Root: root, UID: f.UID,
		Statfs: func(string) (Space, error) { return f.Space, nil },
		Lstat: func(p string) (Owner, error) {
			o, ok := f.Owners[p]
			if !ok {
				return Owner{}, &fs.PathError{Op: "lstat", Path: p, Err: fs.ErrNotExist}
			}
			mode := fs.FileMode(o.Mode)
			switch {
			case o.Link:
				mode |= fs.ModeSymlink
			case !o.File:
				mode |= fs.ModeDir
			}
			return Owner{o.UID, mode}, nil
		},
		Headroom: func() (int64, string, bool) { return f.Headroom, f.Group, f.Group != "" },
		Probe: func(dir string) Probe {
			p := Probe{Dir: dir, Skipped: failed(f.Skipped), TmpFile: failed(f.TmpFile), Lock: failed(f.Lock), Lease: failed(f.Lease)}
			if f.Huge != 0 {
				p.Huge = f.Huge
			}
			return p
		},
	}
}

func render(findings []Finding) string {
	var b strings.Builder
	for _, f := range findings {
		fmt.Fprintf(&b, "%s %s: %s\n", f.Severity, f.Check, f.Text)
		if f.Reason != "" {
			fmt.Fprintf(&b, "     %s\n", f.Reason)
		}
		if f.Fix != "" {
			fmt.Fprintf(&b, "     $ %s\n", f.Fix)
		}
	}
	return b.String()
}

// Every file of testdata is a machine: its facts, its files, and the findings.
func TestMachines(t *testing.T) {
	paths, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no machines: %v", err)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			a, err := txtar.ParseFile(path)
			if err != nil {
				t.Fatal(err)
			}
			root := t.TempDir()
			var f facts
			want := -1
			for i, file := range a.Files {
				switch file.Name {
				case "facts":
					if err := json.Unmarshal(file.Data, &f); err != nil {
						t.Fatal(err)
					}
				case "want":
					want = i
				default:
					p := filepath.Join(root, file.Name)
					if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
						t.Fatal(err)
					}
					if err := os.WriteFile(p, file.Data, 0o644); err != nil {
						t.Fatal(err)
					}
				}
			}
			if want < 0 {
				a.Files = append(a.Files, txtar.File{Name: "want"})
				want = len(a.Files) - 1
			}
			got := render(f.host(root).Examine(f.Dir, f.Registry))
			if *update {
				a.Files[want].Data = []byte(got)
				if err := os.WriteFile(path, txtar.Format(a), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if d := cmp.Diff(string(a.Files[want].Data), got); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}

func TestWorst(t *testing.T) {
	if got := Worst([]Finding{{Severity: Info}, {Severity: Fail}, {Severity: OK}}); got != Fail {
		t.Errorf("%v", got)
	}
	if got := Worst(nil); got != OK {
		t.Errorf("of nothing: %v", got)
	}
}

func TestCovers(t *testing.T) {
	for _, tt := range []struct {
		pattern, path string
		want          bool
	}{
		{"/dev/shm", "/dev/shm/onecopy-0", true},
		{"/dev/shm/onecopy-*", "/dev/shm/onecopy-0", true},
		{"/dev/shm/onecopy-*", "/dev/shm/onecopy-0/v1/m", true},
		{"/dev/*", "/dev/shm/onecopy-0", true},
		{"/", "/dev/shm", true},
		{"/dev/shmem", "/dev/shm", false},
		{"/dev/shm/onecopy-0/v1", "/dev/shm/onecopy-0", false},
		{"/tmp", "/dev/shm", false},
		{"[", "/dev/shm", false},
	} {
		if got := covers(tt.pattern, tt.path); got != tt.want {
			t.Errorf("covers(%q, %q) = %v", tt.pattern, tt.path, got)
		}
	}
}

func TestParsers(t *testing.T) {
	for release, want := range map[string][3]int{"6.1.0-13-amd64": {6, 1, 1}, "6.18": {6, 18, 1}, "5.15.0": {5, 15, 1}, "x": {}, "": {}} {
		major, minor, ok := parseKernel(release)
		if got := [3]int{major, minor, map[bool]int{true: 1}[ok]}; ok != (want[2] == 1) || ok && got != want {
			t.Errorf("parseKernel(%q) = %v", release, got)
		}
	}
	for in, want := range map[string]string{"always [madvise] never": "madvise", "[never]": "never", "": "", "x": ""} {
		if got := chosen(in); got != want {
			t.Errorf("chosen(%q) = %q", in, got)
		}
	}
	for in, want := range map[string]string{"/a b": "'/a b'", "/a": "/a", "": "''", "it's": `'it'\''s'`} {
		if got := quote(in); got != want {
			t.Errorf("quote(%q) = %s", in, got)
		}
	}
	for n, want := range map[int64]string{0: "0 B", 1536: "1.5 KiB", 64 * mib: "64 MiB", 3 * gib / 2: "1.5 GiB", 1<<63 - 1: "8.0 EiB"} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %s, want %s", n, got, want)
		}
	}
	const limits = "Limit                     Soft Limit           Hard Limit           Units     \n" +
		"Max open files            1024                 524288               files     \n" +
		"Max address space         unlimited            unlimited            bytes     \n"
	if n, ok := parseLimit(limits, "Max open files"); !ok || n != 1024 {
		t.Errorf("open files: %d, %v", n, ok)
	}
	if n, ok := parseLimit(limits, "Max address space"); ok {
		t.Errorf("address space: %d", n)
	}
	if m := mountOf(parseMounts("1 0 0:1 / / rw - ext4 a rw\n2 1 0:2 / /with\\040blank rw - tmpfs b rw,huge=advise\nbroken\n"), "/with blank/x"); m.kind != "tmpfs" || m.options["huge"] != "advise" {
		t.Errorf("%+v", m)
	}
}

func FuzzParse(f *testing.F) {
	paths, _ := filepath.Glob("testdata/*.txtar")
	for _, p := range paths {
		a, err := txtar.ParseFile(p)
		if err != nil {
			f.Fatal(err)
		}
		for _, file := range a.Files {
			f.Add(string(file.Data))
		}
	}
	f.Fuzz(func(t *testing.T, text string) {
		for _, m := range parseMounts(text) {
			if m.options == nil {
				t.Error("a mount without options")
			}
		}
		for k, v := range parseMemInfo(text) {
			if v < 0 {
				t.Errorf("%s: %d", k, v)
			}
		}
		for _, r := range parseTmpfiles("f", text) {
			covers(r.path, "/dev/shm/x")
		}
		parseLimit(text, "Max open files")
		parseSetting(text, "Login", "RemoveIPC")
		parseKernel(text)
	})
}
