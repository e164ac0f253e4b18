//go:build linux && (amd64 || arm64)

package faultinject

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/proctest"
)

func TestMain(m *testing.M) { proctest.Main(m) }

func init() {
	proctest.Program("toucher", toucher)
	proctest.Program("threads", threads)
	proctest.Program("dies", func([]string) int { Begin(); panic("as told") })
}

// toucher works on the file args[0] and says what each step brought.
func toucher(args []string) int {
	f, err := os.OpenFile(args[0], os.O_RDWR, 0)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fd := int(f.Fd())
	Begin()
	b := make([]byte, 8)
	for range 3 {
		n, err := unix.Pread(fd, b, 0)
		fmt.Println("pread", n, err)
	}
	n, err := unix.Pwrite(fd, []byte("12345678"), 0)
	fmt.Println("pwrite", n, err)
	g, err := unix.Openat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY, 0)
	fmt.Println("openat", g > 0, err)
	fmt.Println("flock", unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB))
	m, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
	fmt.Println("mmap", len(m), err)
	if err == nil {
		fmt.Println("madvise", unix.Madvise(m, unix.MADV_DONTDUMP))
		fmt.Println("munmap", unix.Munmap(m))
	}
	if g > 0 {
		fmt.Println("close", unix.Close(g))
		_, err := unix.FcntlInt(uintptr(g), unix.F_GETFD, 0)
		fmt.Println("closed", err)
	}
	End()
	fmt.Println("after", unix.Fsync(fd))
	return 0
}

// threads reads the file args[0] from many threads at once.
func threads(args []string) int {
	f, err := os.Open(args[0])
	if err != nil {
		fmt.Println(err)
		return 1
	}
	Begin()
	var wg sync.WaitGroup
	failed := make(chan error, 200)
	for range 20 {
		wg.Go(func() {
			for range 10 {
				if _, err := unix.Pread(int(f.Fd()), make([]byte, 4), 0); err != nil {
					failed <- err
				}
			}
		})
	}
	wg.Wait()
	End()
	close(failed)
	for err := range failed {
		fmt.Println(err)
	}
	return 0
}

func supported(t *testing.T) {
	if err := Supported(); err != nil {
		t.Skipf("no process can be traced here: %v", err)
	}
}

func file(t *testing.T) string {
	path := filepath.Join(t.TempDir(), "subject")
	if err := os.WriteFile(path, bytes.Repeat([]byte("x"), 5000), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func run(t *testing.T, program string, rules ...Rule) *Result {
	t.Helper()
	path := file(t)
	r, err := Run(proctest.Env().Command(t, program, path), Options{
		Classify: func(p string) string {
			if p == path {
				return "subject"
			}
			return ""
		},
		Rules: rules,
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestCallsAreListed(t *testing.T) {
	supported(t)
	r := run(t, "toucher")
	var got []string
	for _, c := range r.Calls {
		got = append(got, c.String())
	}
	want := []string{
		"close subject #1", "flock(EX|NB) subject #1", "madvise(DONTDUMP) subject #1", "mmap(READ) subject #1",
		"munmap subject #1", "openat(RDONLY) subject #1", "pread64 subject #1", "pread64 subject #2",
		"pread64 subject #3", "pwrite64 subject #1",
	}
	// F_GETFD of a descriptor that is closed leads nowhere, and is not listed.
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if r.Code != 0 || !r.Ended || r.Hits != 0 || !strings.Contains(r.Stdout, "after <nil>") {
		t.Errorf("%+v", r)
	}
}

// Every listed call fails with every errno that Errnos has for it, and its
// program sees just that.
func TestEveryCallFails(t *testing.T) {
	supported(t)
	calls := run(t, "toucher").Calls
	if len(calls) == 0 {
		t.Fatal("no calls")
	}
	for _, c := range calls {
		errnos := Errnos(c)
		if len(errnos) == 0 {
			t.Errorf("%v: no errno", c)
		}
		for _, e := range errnos {
			r := run(t, "toucher", Rule{Call: c, Errno: e})
			name := strings.TrimSuffix(c.Name, "64")
			if r.Hits != 1 || r.Code != 0 || !r.Ended || !strings.Contains(r.Stdout, "\n"+name) && !strings.HasPrefix(r.Stdout, name) {
				t.Errorf("%v = %v: %+v", c, e, r)
			}
			if !strings.Contains(r.Stdout, e.Error()+"\n") {
				t.Errorf("%v = %v: the program saw\n%s", c, e, r.Stdout)
			}
			if c.Name == "close" && !strings.Contains(r.Stdout, "closed bad file descriptor") {
				t.Errorf("%v = %v: left open\n%s", c, e, r.Stdout)
			}
		}
	}
}

func TestOnlyThatCallFails(t *testing.T) {
	supported(t)
	second := Call{Name: "pread64", Target: "subject", N: 2}
	r := run(t, "toucher", Rule{Call: second, Errno: syscall.EIO})
	if want := "pread 8 <nil>\npread -1 input/output error\npread 8 <nil>\npwrite 8 <nil>\n"; !strings.HasPrefix(r.Stdout, want) {
		t.Errorf("got %q, want %q", r.Stdout, want)
	}
	r = run(t, "toucher", Rule{Call: second, Errno: syscall.EIO, Always: true})
	if want := "pread 8 <nil>\npread -1 input/output error\npread -1 input/output error\npwrite 8 <nil>\n"; !strings.HasPrefix(r.Stdout, want) || r.Hits != 2 {
		t.Errorf("got %q, want %q", r.Stdout, want)
	}
}

func TestShort(t *testing.T) {
	supported(t)
	r := run(t, "toucher", Rule{Call: Call{Name: "pread64", Target: "subject", N: 1}, Short: true},
		Rule{Call: Call{Name: "pwrite64", Target: "subject", N: 1}, Short: true})
	if want := "pread 4 <nil>\npread 8 <nil>\npread 8 <nil>\npwrite 4 <nil>\n"; !strings.HasPrefix(r.Stdout, want) || r.Hits != 2 {
		t.Errorf("got %q, want %q", r.Stdout, want)
	}
}

func TestThreads(t *testing.T) {
	supported(t)
	r := run(t, "threads", Rule{Call: Call{Name: "pread64", Target: "subject", N: 150}, Errno: syscall.ENOMEM, Always: true})
	if n := strings.Count(r.Stdout, syscall.ENOMEM.Error()); n != 51 || r.Hits != 51 || len(r.Calls) != 200 || r.Code != 0 {
		t.Errorf("%d calls, %d hits, %d failures\n%s%s", len(r.Calls), r.Hits, n, r.Stdout, r.Stderr)
	}
}

func TestProgramThatDies(t *testing.T) {
	supported(t)
	r := run(t, "dies")
	if r.Code != 2 || r.Ended || r.Hung || !strings.Contains(r.Stderr, "as told") {
		t.Errorf("%+v", r)
	}
	_, err := Run(proctest.Env().Command(t, "nobody"), Options{})
	if err != nil {
		t.Error(err) // it ran, to tell its test that it is unknown
	}
	cmd := proctest.Env().Command(t, "dies")
	cmd.Path = "/nonexistent"
	if _, err := Run(cmd, Options{}); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("%v", err)
	}
}

func TestStrings(t *testing.T) {
	c := Call{Name: "openat", Detail: "RDONLY", Target: "table", N: 2}
	if got, want := (Rule{Call: c, Errno: syscall.EIO, Always: true}).String(), "openat(RDONLY) table #2 = EIO from then on"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got, want := (Rule{Call: c, Short: true}).String(), "openat(RDONLY) table #2 = short"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
