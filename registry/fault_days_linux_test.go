//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/faultinject"
	"github.com/onecopy/onecopy/internal/proctest"
)

// A badDay is what a machine, a kernel or another program does to a load. Others
// have tests of their own: a source that shrinks, grows or is written to
// (TestSourceThatChangesDuringTheLoad), a tmpfs that fills up
// (TestTmpfsThatFillsDuringALoad), a small control group
// (TestCgroupSmallerThanTheModel).
type badDay struct {
	name  string
	cold  bool // the source lies on the disk only
	how   string
	rules []faultinject.Rule
	want  string // the sentinel of the error; "" is a load
	fill  func(FillStats) bool
}

const badDaySize = 70*mib + 5 // more than one window

func collapse(n int, errno syscall.Errno, always bool) []faultinject.Rule {
	return []faultinject.Rule{{Call: faultinject.Call{Name: "madvise", Detail: "COLLAPSE", Target: "segment", N: n}, Errno: errno, Always: always}}
}

func onSource(name, detail string, n int, errno syscall.Errno, always bool) []faultinject.Rule {
	return []faultinject.Rule{{Call: faultinject.Call{Name: name, Detail: detail, Target: "source", N: n}, Errno: errno, Always: always}}
}

func onSegment(name string, n int, errno syscall.Errno) []faultinject.Rule {
	return []faultinject.Rule{{Call: faultinject.Call{Name: name, Target: "segment", N: n}, Errno: errno, Always: true}}
}

// noPages: not one byte in 2 MiB pages, and as many windows tell of it as there are.
func noPages(f FillStats) bool {
	return f.Collapsed == 0 && f.Copied == badDaySize && f.Fallbacks >= 2
}

// somePages: one window fell back.
func somePages(f FillStats) bool {
	return f.Collapsed > 0 && f.Copied > mib && f.Fallbacks == 1 && f.Collapsed+f.Copied == badDaySize
}

func notDirect(f FillStats) bool { return f.Direct == 0 && f.Collapsed+f.Copied == badDaySize }

var badDays = []badDay{
	{name: "kernel without MADV_COLLAPSE", rules: collapse(1, syscall.EINVAL, true), fill: noPages},
	{name: "kernel without MADV_COLLAPSE, cold source", cold: true, rules: collapse(1, syscall.EINVAL, true), fill: noPages},
	{name: "huge pages forbidden by prctl", how: "prctl", fill: noPages},
	{name: "memory fragmented, ENOMEM", rules: collapse(1, syscall.ENOMEM, true), fill: noPages},
	{name: "memory fragmented, EAGAIN for a window", rules: collapse(1, syscall.EAGAIN, false), fill: somePages},
	{name: "control group at its limit, EBUSY for a window", rules: collapse(2, syscall.EBUSY, false), fill: somePages},
	{name: "no room for a mapping", rules: []faultinject.Rule{{Call: faultinject.Call{Name: "mmap", Detail: "READ|WRITE", Target: "segment", N: 1}, Errno: syscall.ENOMEM, Always: true}}, fill: noPages},
	{name: "tmpfs full at the first byte", rules: onSegment("pwrite64", 1, syscall.ENOSPC), want: "ErrNoSpace"},
	{name: "tmpfs full within a window", rules: onSegment("pwrite64", 20, syscall.ENOSPC), want: "ErrNoSpace"},
	{name: "tmpfs full in the last window", rules: onSegment("pwrite64", 34, syscall.ENOSPC), want: "ErrNoSpace"},
	{name: "quota used up within a window", rules: onSegment("pwrite64", 20, syscall.EDQUOT), want: "ErrNoSpace"},
	{name: "source cannot be read in the middle", rules: onSource("pread64", "", 10, syscall.EIO, true), want: "ErrSource"},
	{name: "source cannot be read once", rules: onSource("pread64", "", 12, syscall.EIO, false), want: "ErrSource"},
	{name: "source cannot be read past the cache", cold: true, rules: onSource("pread64", "DIRECT", 5, syscall.EIO, true), want: "ErrSource"},
	{name: "source is replaced by another file", how: "rename"},
	{name: "O_DIRECT refused at the open", cold: true, rules: onSource("openat", "RDONLY|DIRECT", 1, syscall.EINVAL, true), fill: notDirect},
	{name: "O_DIRECT refused at the first read", cold: true, rules: onSource("pread64", "DIRECT", 1, syscall.EINVAL, false)},
	{name: "kernel without RWF_NOWAIT", cold: true, rules: onSource("preadv2", "NOWAIT", 1, syscall.EOPNOTSUPP, true), fill: notDirect},
	{name: "no file leases", rules: []faultinject.Rule{{Call: faultinject.Call{Name: "fcntl", Detail: "SETLEASE", Target: "segment", N: 1}, Errno: syscall.EINVAL, Always: true}}, want: "Unsupported"},
}

// badDayAnswer is what the loader of a bad day says.
type badDayAnswer struct {
	Err       report
	Fill      FillStats
	Fallbacks uint64 // by Stats of the process
	Right     bool   // the bytes are those of the file that was opened
	Used      int64  // by the registry, after the load
}

// badDayLoader: dir, source, how.
var badDayLoader = child("bad-day", func(args []string) error {
	if args[2] == "prctl" {
		if err := unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0); err != nil {
			return err
		}
	}
	r, err := Open(args[0], &Options{MustExist: true, Threads: 1})
	if err != nil {
		return err
	}
	src := Source{Path: args[1]}
	if args[2] == "rename" {
		src.Progress = func(done, total int64) {
			if other := args[1] + ".new"; done < 20*mib {
				_ = os.Rename(other, args[1]) // the second time there is none
			}
		}
	}
	faultinject.Begin()
	m, err := r.GetOrLoad(ctxb, "k", src)
	faultinject.End()
	a := badDayAnswer{Err: reportOf(err)}
	if err == nil {
		a.Fill = m.Info().Fill
		b, err := m.Bytes(filepath.Base(args[1]))
		if err != nil {
			return err
		}
		a.Right = bytes.Equal(b, randomBytes(1, badDaySize))
		m.Close()
	}
	s, err := r.Stats()
	a.Fallbacks, a.Used = s.Fallbacks, s.Used
	return errors.Join(err, r.Close(), say(a))
})

// On a bad day a load is right or a typed error, it leaves nothing behind, and the
// statistics say which way the bytes took.
func TestBadDays(t *testing.T) {
	for _, day := range badDays {
		t.Run(day.name, func(t *testing.T) {
			a := day.run(t)
			if a.Err.Text != "" || day.want != "" {
				if day.want == "" || !a.Err.is(day.want) {
					t.Errorf("%+v, want %q", a.Err, day.want)
				}
				if a.Used != 0 {
					t.Errorf("%d bytes are used after the failure", a.Used)
				}
				return
			}
			if !a.Right {
				t.Error("other bytes")
			}
			if day.fill != nil && !day.fill(a.Fill) {
				t.Errorf("%+v", a.Fill)
			}
			if a.Fallbacks != uint64(a.Fill.Fallbacks) {
				t.Errorf("Stats counts %d fallbacks, the model %d", a.Fallbacks, a.Fill.Fallbacks)
			}
		})
	}
}

func (day *badDay) run(t *testing.T) (a badDayAnswer) {
	if err := faultinject.Supported(); err != nil {
		t.Skipf("no process can be traced here: %v", err)
	}
	dir := proctest.TmpRegistry(t)
	r := openRegistry(t, dir, nil) // with the checks at the end
	path := filepath.Join(t.TempDir(), "w.bin")
	writeFile(t, path, randomBytes(1, badDaySize))
	if day.how == "rename" {
		writeFile(t, path+".new", randomBytes(2, badDaySize))
	}
	if day.cold && !dropFromCache(t, path) {
		t.Skipf("%s lies in memory only: nothing there is cold", path)
	}
	res, err := faultinject.Run(proctest.Env().Command(t, badDayLoader, dir, path, day.how), faultinject.Options{
		Classify: func(p string) string {
			switch p = strings.TrimSuffix(p, " (deleted)"); {
			case p == path:
				return "source"
			case strings.HasPrefix(p, dir) && strings.HasPrefix(filepath.Base(p), "#"):
				return "segment"
			}
			return ""
		},
		Rules: day.rules,
	})
	if err != nil || res.Code != 0 {
		if strings.Contains(res.Stderr, "invalid argument") {
			t.Skip("prctl cannot forbid huge pages here")
		}
		t.Fatalf("%v, code %d\n%s", err, res.Code, res.Stderr)
	}
	if len(day.rules) > 0 && res.Hits == 0 {
		t.Fatalf("%v was not made, but\n%v", day.rules, res.Calls)
	}
	if err := json.Unmarshal([]byte(res.Stdout), &a); err != nil {
		t.Fatal(err)
	}
	// What the registry holds is the model or nothing, and the next load is like
	// any other.
	if problems, err := r.Check(ctxb, CheckOptions{Data: true}); err != nil || len(problems) > 0 {
		t.Errorf("%+v, %v", problems, err)
	}
	next, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	m, err := r.GetOrLoad(ctxb, "k", Source{Path: path, OnChange: ChangeReplace})
	if err != nil {
		t.Fatalf("the next load: %v", err)
	}
	defer m.Close()
	if b, err := m.Bytes("w.bin"); err != nil || !bytes.Equal(b, next) {
		t.Errorf("the next load: other bytes, %v", err)
	}
	return a
}
