//go:build crashpoint && linux

package crashpoint_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/onecopy/onecopy/internal/crashpoint"
	"github.com/onecopy/onecopy/internal/proctest"
	"golang.org/x/sys/unix"
)

func init() { proctest.Program("steps", steps) }

func TestMain(m *testing.M) {
	crashpoint.Points = []string{"test.first", "test.second"}
	proctest.Main(m)
}

// steps passes both points three times.
func steps(args []string) int {
	for round := range 3 {
		for _, name := range crashpoint.Points {
			fmt.Println(round, name)
			crashpoint.Hit(name)
		}
	}
	fmt.Println("done")
	return 0
}

var killed = 128 + int(syscall.SIGKILL)

func TestHit(t *testing.T) {
	tests := []struct {
		env  []string
		last string
		code int
	}{
		{nil, "done", 0},
		{[]string{"ONECOPY_CRASH_AT=test.other"}, "done", 0},
		{[]string{"ONECOPY_CRASH_AT=test.first"}, "0 test.first", killed},
		{[]string{"ONECOPY_CRASH_AT=test.second", "ONECOPY_CRASH_SKIP=0"}, "0 test.second", killed},
		{[]string{"ONECOPY_CRASH_AT=test.second", "ONECOPY_CRASH_SKIP=2"}, "2 test.second", killed},
		{[]string{"ONECOPY_CRASH_AT=test.second", "ONECOPY_CRASH_SKIP=3"}, "done", 0},
	}
	for _, test := range tests {
		p := proctest.Env(test.env...).Start(t, "steps")
		if code := p.Wait(); code != test.code {
			t.Errorf("%v: exit code %d, want %d", test.env, code, test.code)
			continue
		}
		for p.Line(t) != test.last {
		}
	}
}

func TestBadSkip(t *testing.T) {
	p := proctest.Env("ONECOPY_CRASH_SKIP=many").Start(t, "steps")
	if code := p.Wait(); code != 2 || !strings.Contains(p.Stderr(), "many") {
		t.Errorf("exit code %d, stderr %q", code, p.Stderr())
	}
}

func TestStop(t *testing.T) {
	file := filepath.Join(t.TempDir(), "stopped")
	p := proctest.Env("ONECOPY_STOP_AT=test.second", "ONECOPY_STOP_FILE="+file).Start(t, "steps")
	p.AwaitStop(t)
	if b, err := os.ReadFile(file); string(b) != "test.second\n" {
		t.Errorf("file contains %q (%v)", b, err)
	}
	for _, want := range []string{"0 test.first", "0 test.second"} {
		if got := p.Line(t); got != want {
			t.Errorf("line %q, want %q", got, want)
		}
	}
	p.Cont()
	if code := p.Wait(); code != 0 { // and it did not stop again
		t.Errorf("exit code %d", code)
	}
}

// A FIFO lets a test that did not start the process wait for the stop.
func TestStopFIFO(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "stopped")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	p := proctest.Env("ONECOPY_STOP_AT=test.first", "ONECOPY_STOP_FILE="+fifo).Start(t, "steps")
	if b, err := os.ReadFile(fifo); string(b) != "test.first\n" {
		t.Errorf("read %q (%v)", b, err)
	}
	p.AwaitStop(t)
}

func TestUnknownName(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("Hit of an unlisted name does not panic")
		}
	}()
	crashpoint.Hit("test.unlisted")
}
