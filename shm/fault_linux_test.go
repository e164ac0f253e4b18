//go:build amd64 || arm64

package shm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/onecopy/onecopy/internal/faultinject"
	"github.com/onecopy/onecopy/internal/proctest"
	"github.com/onecopy/onecopy/lockfile"
)

// faultStory is what one program does with the package, step by step. Each step
// says what failed; after a failure the story goes on where it can.
type faultStory struct {
	name string
	tell func(dir, src string, did func(step string, err error) bool)
}

const storySize = 6*mib + 5

var faultStories = []faultStory{
	{"directory", func(dir, _ string, did func(string, error) bool) {
		d, err := OpenDir(dir+"/made", DirOptions{Create: true, Perm: 0o700})
		if !did("OpenDir", err) {
			return
		}
		defer d.Close()
		sub, err := d.Sub("sub", 0o700, true)
		if did("Sub", err) {
			defer sub.Close()
			did("Mkdir", sub.Mkdir("deep", 0o700))
			did("Chmod", os.Chmod(dir+"/made/sub", 0o500)) // the next one to open it repairs that
			if again, err := d.Sub("sub", 0o700, true); did("Sub", err) {
				again.Close()
			}
			if did("Create", sub.Create("deep/small", []byte("contents"), 0o444)) {
				if f, _, err := sub.Open("deep/small"); did("Open", err) {
					f.Close()
				}
			}
			_, err := sub.Names()
			did("Names", err)
			did("Unlink", sub.Unlink("deep/small"))
			did("RemoveTree", sub.RemoveTree("deep"))
		}
		did("ProbeLocks", d.ProbeLocks())
		_, _, err = d.Free()
		did("Free", err)
		did("RemoveTree", d.RemoveTree("sub"))
	}},
	{"copy", func(dir, src string, did func(string, error) bool) {
		d, err := OpenDir(dir, DirOptions{})
		if !did("OpenDir", err) {
			return
		}
		defer d.Close()
		f, err := os.Open(src)
		if err != nil {
			did("Copy", pathErr("open", src, err)) // the caller's own call
			return
		}
		defer f.Close()
		p, err := d.NewPending("copied")
		if !did("NewPending", err) {
			return
		}
		defer p.Abort()
		if _, err := p.Copy(ctxb, f, storySize, &Fill{Threads: 2}); did("Copy", err) {
			publish(d, p, did)
		}
	}},
	{"writer", func(dir, src string, did func(string, error) bool) {
		d, err := OpenDir(dir, DirOptions{})
		if !did("OpenDir", err) {
			return
		}
		defer d.Close()
		tellGap(d, did)
		for _, size := range []int64{storySize, -1} {
			p, err := d.NewPending("written")
			if !did("NewPending", err) {
				return
			}
			defer p.Abort()
			w, err := p.NewWriter(size, &Fill{})
			if !did("NewWriter", err) {
				return
			}
			want := randomBytes(1, storySize)
			ok := true
			for _, part := range [][]byte{want[:mib], want[mib : 5*mib], want[5*mib:]} {
				_, err := w.Write(part)
				ok = ok && did("Write", err)
			}
			if _, err := w.Finish(ctxb); did("Finish", err) && ok {
				publish(d, p, did)
			}
		}
	}},
}

// tellGap leaves a hole to Finish.
func tellGap(d *Dir, did func(string, error) bool) {
	p, err := d.NewPending("gap")
	if !did("NewPending", err) {
		return
	}
	defer p.Abort()
	w, err := p.NewWriter(3*mib, &Fill{})
	if !did("NewWriter", err) {
		return
	}
	_, err = w.WriteAt([]byte("x"), 0)
	did("Write", err)
	_, err = w.WriteAt([]byte("x"), 2*mib)
	did("Write", err)
	_, err = w.Finish(ctxb)
	did("Finish", err)
}

// errOther says that a step succeeded with another result than it has to have.
var errOther = errors.New("other bytes")

// publish seals, links, maps, compares and removes a segment of storySize.
func publish(d *Dir, p *Pending, did func(string, error) bool) {
	s, err := p.Seal(ctxb)
	if !did("Seal", err) {
		return
	}
	defer s.Close()
	_, err = s.Sums(ctxb, storySize)
	did("Sums", err)
	if !did("Link", s.Link(d, "segment")) {
		return
	}
	if m, err := Map(int(s.File().Fd()), storySize, false); did("Map", err) {
		if !bytes.Equal(m.Bytes, randomBytes(1, storySize)) {
			did("Map", errOther)
		}
		did("Unmap", m.Unmap())
	}
	did("Unlink", d.Unlink("segment"))
}

// storyStep is a step that failed.
type storyStep struct {
	Step, Text string
	Typed      bool // a sentinel of the package or an errno, with the path of the file if it has one
}

var storyTeller = child("fault-story", func(args []string) error {
	var failed []storyStep
	did := func(step string, err error) bool {
		if err != nil {
			var pe *fs.PathError
			var errno syscall.Errno
			typed := errors.As(err, &errno) || errors.Is(err, ErrWriter) || errors.Is(err, lockfile.ErrLocked)
			// What is given a bare descriptor knows no path.
			if step != "Map" && step != "Unmap" && step != "Sums" && step != "ProbeLocks" && step != "Names" {
				typed = typed && errors.As(err, &pe) && pe.Path != ""
			}
			failed = append(failed, storyStep{step, err.Error(), typed})
		}
		return err == nil
	}
	for _, s := range faultStories {
		if s.name == args[0] {
			faultinject.Begin()
			s.tell(args[1], args[2], did)
			faultinject.End()
		}
	}
	b, err := json.Marshal(failed)
	fmt.Println(string(b))
	return err
})

// TestFaults lets every system call of the package fail with every errno that it
// can have: the steps after it succeed or return a typed error, and no byte is
// wrong. The test of the same name of package registry says more.
func TestFaults(t *testing.T) {
	if err := faultinject.Supported(); err != nil {
		t.Skipf("no process can be traced here: %v", err)
	}
	every, part := uint32(40), uint32(0)
	if v := os.Getenv("ONECOPY_FAULTS"); v != "" {
		if !strings.Contains(v, "/") {
			v += "/0"
		}
		if _, err := fmt.Sscanf(v, "%d/%d", &every, &part); err != nil || part >= every {
			t.Fatalf("ONECOPY_FAULTS=%q: want N or N/K, K below N", v)
		}
	}
	src := filepath.Join(t.TempDir(), "source")
	noErr(t, os.WriteFile(src, randomBytes(1, storySize), 0o644))
	for _, s := range faultStories {
		t.Run(s.name, func(t *testing.T) {
			calls := tellStory(t, s.name, src).Calls
			if len(calls) == 0 {
				t.Fatal("no calls")
			}
			tried := 0
			for _, c := range calls {
				rules := []faultinject.Rule{}
				for _, errno := range faultinject.Errnos(c) {
					rules = append(rules, faultinject.Rule{Call: c, Errno: errno})
				}
				if faultinject.Partial(c) {
					rules = append(rules, faultinject.Rule{Call: c, Short: true})
				}
				for _, r := range rules {
					h := fnv.New32()
					fmt.Fprint(h, s.name, r)
					if h.Sum32()%every == part {
						tellStory(t, s.name, src, r)
						tried++
					}
				}
			}
			t.Logf("%d calls, %d faults", len(calls), tried)
		})
	}
}

func tellStory(t *testing.T, name, src string, rules ...faultinject.Rule) *faultinject.Result {
	t.Helper()
	dir := proctest.TmpRegistry(t)
	noErr(t, os.Mkdir(dir, 0o700))
	defer os.RemoveAll(dir)
	res, err := faultinject.Run(proctest.Env().Command(t, storyTeller, name, dir, src), faultinject.Options{
		Classify: func(p string) string {
			switch rel, ok := strings.CutPrefix(strings.TrimSuffix(p, " (deleted)"), dir); {
			case p == src:
				return "source"
			case strings.HasPrefix(p, "["):
				return p
			case !ok:
				return ""
			case strings.HasPrefix(filepath.Base(rel), "#"):
				return "segment"
			default:
				return "dir" + rel
			}
		},
		Rules: rules,
		Limit: time.Minute,
	})
	noErr(t, err)
	var failed []storyStep
	if res.Code != 0 || json.Unmarshal([]byte(res.Stdout), &failed) != nil {
		t.Errorf("%v: code %d, hung %v\n%s%s", rules, res.Code, res.Hung, res.Stdout, res.Stderr)
	}
	if len(rules) > 0 && res.Hits == 0 {
		t.Errorf("%v: the call was not made", rules)
	}
	for _, s := range failed {
		if !s.Typed || len(rules) == 0 {
			t.Errorf("%v: %s: %s", rules, s.Step, s.Text)
		}
	}
	return res
}
