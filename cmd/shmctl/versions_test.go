//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
)

// Two layout versions side by side: this program, and one that is built from the
// same source with the next version number.

// versionedCLI is shmctl of one layout version, with its own contents for the keys
// that both have.
type versionedCLI struct {
	program string
	version int
	folder  string // below the registry's directory
	dir     string // the registry's
	source  string
}

var sideKeys = []string{"org/a", "org/b", "c"}

// weights of a key: every version has its own.
func (v *versionedCLI) weights(key string) []byte {
	return bytes.Repeat(fmt.Appendf(nil, "%s of layout version %d\n", key, v.version), 3000)
}

// nextVersion builds shmctl with the next layout version.
func nextVersion(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("the go command is not installed")
	}
	file, err := filepath.Abs("../../internal/layout/layout.go")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ pattern, with string }{
		{fmt.Sprintf(`(?m)^(\tVersion\s+= )%d$`, layout.Version), fmt.Sprintf("${1}%d", layout.Version+1)},
		{fmt.Sprintf(`(?m)^(\tFolder\s+= )"v%d"`, layout.Version), fmt.Sprintf(`${1}"v%d"`, layout.Version+1)},
	} {
		re := regexp.MustCompile(c.pattern)
		if n := len(re.FindAll(text, -1)); n != 1 {
			t.Fatalf("%s matches %d times in %s", c.pattern, n, file)
		}
		text = re.ReplaceAll(text, []byte(c.with))
	}
	tmp := t.TempDir()
	changed, overlay, program := filepath.Join(tmp, "layout.go"), filepath.Join(tmp, "overlay.json"), filepath.Join(tmp, "shmctl")
	replace, err := json.Marshal(map[string]any{"Replace": map[string]string{file: changed}})
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{changed: text, overlay: replace} {
		if err := os.WriteFile(name, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-overlay", overlay, "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return program
}

// run returns the output and the exit code.
func (v *versionedCLI) run(args ...string) (stdout string, code int, err error) {
	cmd := exec.Command(v.program, args...)
	cmd.Env = append(os.Environ(), "ONECOPY_DIR="+v.dir, "GORACE=atexit_sleep_ms=0")
	var out, text bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &text
	err = cmd.Run()
	var ee *exec.ExitError
	if errors.As(err, &ee) && ee.ExitCode() >= 0 {
		code = ee.ExitCode()
		err = fmt.Errorf("exit code %d: %s", code, text.String())
	}
	return out.String(), code, err
}

func (v *versionedCLI) must(t *testing.T, args ...string) string {
	t.Helper()
	out, _, err := v.run(args...)
	if err != nil {
		t.Fatalf("version %d: %v: %v", v.version, args, err)
	}
	return out
}

// work runs n commands, and returns what went wrong.
func (v *versionedCLI) work(seed uint64, n int) (wrong []string) {
	rng := rand.New(rand.NewPCG(seed, uint64(v.version)))
	do := func(allowed []int, args ...string) (string, bool) {
		out, code, err := v.run(args...)
		if err != nil && !slices.Contains(allowed, code) {
			wrong = append(wrong, fmt.Sprintf("version %d: %v: %v\n%s", v.version, args, err, out))
		}
		return out, err == nil
	}
	// What others of this version do meanwhile: removed, in use, being loaded.
	for range n {
		key := sideKeys[rng.IntN(len(sideKeys))]
		source := filepath.Join(v.source, key)
		switch rng.IntN(8) {
		case 0, 1:
			do(nil, "load", key, source)
		case 2:
			do(nil, "load", "--replace", key, source)
		case 3:
			if out, ok := do([]int{exitNotFound, exitInUse}, "cat", key, "w.bin"); ok && out != string(v.weights(key)) {
				wrong = append(wrong, fmt.Sprintf("version %d: cat %s gives other bytes: %.60q", v.version, key, out))
			}
		case 4:
			out, _ := do(nil, "ls", "-o", "json")
			var doc lsJSON
			if err := json.Unmarshal([]byte(out), &doc); err != nil || doc.Stats == nil || doc.Stats.LayoutVersion != v.version {
				wrong = append(wrong, fmt.Sprintf("version %d: ls: %v, %s", v.version, err, out))
			}
		case 5:
			do(nil, "gc")
		case 6:
			do([]int{exitNotFound, exitInUse}, "rm", "--yes", key)
		case 7:
			// A moment may show what somebody is about to take away; nobody's, never.
			out, _ := do([]int{exitOther}, "check", "-o", "json")
			var doc checkJSON
			if err := json.Unmarshal([]byte(out), &doc); err != nil {
				wrong = append(wrong, fmt.Sprintf("version %d: check: %v: %s", v.version, err, out))
			}
			for _, p := range doc.Problems {
				if p.Kind != "version" && p.Path != nil && !strings.HasPrefix(*p.Path, filepath.Join(v.dir, v.folder)+"/") {
					wrong = append(wrong, fmt.Sprintf("version %d: check: %s: %s", v.version, *p.Path, p.Text))
				}
			}
		}
	}
	return wrong
}

// together runs several processes of the given versions at the same time.
func together(t *testing.T, seed uint64, n int, versions ...*versionedCLI) {
	t.Helper()
	var wg sync.WaitGroup
	for i, v := range versions {
		for g := range 3 {
			wg.Go(func() {
				for _, w := range v.work(seed+uint64(10*i+g), n) {
					t.Error(w)
				}
			})
		}
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

func TestTwoVersionsSideBySide(t *testing.T) {
	parent, err := os.MkdirTemp("/dev/shm", "onecopy-test-")
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { os.RemoveAll(parent) })
	shmctl, err := exec.LookPath("shmctl")
	if err != nil {
		t.Fatal(err)
	}
	seed, n := rand.Uint64(), 25
	if testing.Short() {
		n = 10
	}
	t.Logf("seed %d", seed)
	one := &versionedCLI{program: shmctl, version: layout.Version}
	two := &versionedCLI{program: nextVersion(t), version: layout.Version + 1}
	both := []*versionedCLI{one, two}
	for _, v := range both {
		v.folder = fmt.Sprintf("v%d", v.version)
		v.dir, v.source = filepath.Join(parent, "r"), t.TempDir()
		for _, key := range sideKeys {
			name := filepath.Join(v.source, key, "w.bin")
			if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(name, v.weights(key), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		var doc versionJSON
		if err := json.Unmarshal([]byte(v.must(t, "version", "-o", "json")), &doc); err != nil || doc.LayoutVersion != v.version {
			t.Fatalf("%+v, %v", doc, err)
		}
	}
	for _, v := range both {
		v.must(t, "load", sideKeys[0], filepath.Join(v.source, sideKeys[0])) // ls of nothing has no version
	}
	together(t, seed, n, both...)
	for _, v := range both {
		for _, key := range sideKeys {
			v.must(t, "load", key, filepath.Join(v.source, key))
		}
	}

	for i, v := range both {
		other := both[1-i]
		folder := filepath.Join(v.dir, other.folder)
		// Neither opens, reads or changes anything of the other's.
		events := watchTree(t, folder)
		together(t, seed+100, n, v)
		for _, key := range sideKeys {
			v.must(t, "load", key, filepath.Join(v.source, key))
		}
		problems := v.must(t, "check", "--data", "-o", "json")
		doctor, _, _ := v.run("doctor", "-o", "json")
		for _, e := range events() {
			t.Errorf("version %d: %s", v.version, e)
		}

		// Both name it, and complain of nothing else in it.
		var check checkJSON
		if err := json.Unmarshal([]byte(problems), &check); err != nil {
			t.Fatal(err)
		}
		if len(check.Problems) != 1 || check.Problems[0].Kind != "version" || !check.Problems[0].Note ||
			check.Problems[0].Path == nil || *check.Problems[0].Path != folder {
			t.Errorf("version %d: check: %s", v.version, problems)
		}
		var findings doctorJSON
		if err := json.Unmarshal([]byte(doctor), &findings); err != nil {
			t.Fatalf("%v: %s", err, doctor)
		}
		if !slices.ContainsFunc(findings.Findings, func(f findingJSON) bool {
			return f.Check == "versions" && strings.Contains(f.Text, other.folder)
		}) {
			t.Errorf("version %d: doctor does not name %s: %s", v.version, other.folder, doctor)
		}

		// Neither counts the other's memory.
		var ls lsJSON
		if err := json.Unmarshal([]byte(v.must(t, "ls", "-o", "json")), &ls); err != nil || ls.Stats == nil {
			t.Fatalf("%+v, %v", ls, err)
		}
		if got, want := ls.Stats.UsedBytes, treeBytes(t, filepath.Join(v.dir, v.folder, layout.ModelsDir)); got != want || ls.Stats.Models != len(sideKeys) {
			t.Errorf("version %d: %d models of %d bytes, its files have %d", v.version, ls.Stats.Models, got, want)
		}
	}

	// After all that each has its own models.
	for _, v := range both {
		for _, key := range sideKeys {
			if got := v.must(t, "cat", key, "w.bin"); got != string(v.weights(key)) {
				t.Errorf("version %d: %s has other bytes: %.60q", v.version, key, got)
			}
		}
	}

	// One of them may go, whole.
	if err := os.RemoveAll(filepath.Join(two.dir, two.folder)); err != nil {
		t.Fatal(err)
	}
	if got := one.must(t, "check", "--data"); got != "no problems\n" {
		t.Errorf("check: %s", got)
	}
}

func treeBytes(t *testing.T, dir string) (n int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && !d.IsDir() {
			err = unix.Lstat(path, &st)
			n += st.Blocks * 512
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// watchTree has the kernel note everything that anybody does to the files and
// folders of a tree, and returns what it noted.
func watchTree(t *testing.T, dir string) func() []string {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	watched := map[int]string{}
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			var wd int
			wd, err = unix.InotifyAddWatch(fd, path, unix.IN_ALL_EVENTS|unix.IN_DONT_FOLLOW)
			watched[wd] = path
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	read := func() (all []string) {
		buf := make([]byte, 64<<10)
		n, err := unix.Read(fd, buf)
		for b := buf[:max(n, 0)]; err == nil && len(b) >= unix.SizeofInotifyEvent; {
			word := func(i int) uint32 { return uint32(b[i]) | uint32(b[i+1])<<8 | uint32(b[i+2])<<16 | uint32(b[i+3])<<24 }
			name := string(bytes.TrimRight(b[unix.SizeofInotifyEvent:unix.SizeofInotifyEvent+word(12)], "\x00"))
			all = append(all, fmt.Sprintf("event %#x on %s", word(4), filepath.Join(watched[int(int32(word(0)))], name)))
			b = b[unix.SizeofInotifyEvent+word(12):]
		}
		return all
	}
	read() // the walk's own: a folder may be listed after its watch was set
	return read
}
