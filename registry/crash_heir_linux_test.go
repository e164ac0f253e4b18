//go:build crashpoint && (amd64 || arm64) && !onecopy_private

package registry

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/crashpoint"
	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// Children that a loader started, and that live on after it was killed.

func init() { proctest.Program("testator", testatorMain) }

// testatorMain is victimMain of a process that starts a child at the step
// TESTATOR_AT, by fork and exec or by fork alone as TESTATOR_BY says, and tells its
// number. It is killed there by ONECOPY_CRASH_AT.
func testatorMain(args []string) int {
	at, by := os.Getenv("TESTATOR_AT"), os.Getenv("TESTATOR_BY")
	crashpoint.Hook = func(name string) {
		if name != at {
			return
		}
		at = "" // once
		var pid int
		var err error
		if by == "fork" {
			pid, err = proctest.Fork()
		} else {
			// With whatever is not close-on-exec, and a copy of the streams.
			pid, err = syscall.ForkExec(by, []string{by}, &syscall.ProcAttr{Files: []uintptr{0, 1, 2}, Env: os.Environ()})
		}
		if err != nil {
			panic(err)
		}
		fmt.Println(pid)
	}
	return victimMain(args)
}

// legacies are loads that pass every step of a loader, each step once or more.
var legacies = []struct {
	steps  []string
	before func(*stage)
	orders func(*stage) []order
}{
	{steps: steps(loadSteps + " load.key"), orders: loadNew},
	{
		steps: steps("load.extend load.note"),
		orders: func(s *stage) []order {
			return []order{{Do: "load", Key: keyModel, Source: s.function("new"), Note: 100 << 10}}
		},
	},
	{
		steps:  steps("load.note load.link-manifest publish.lock-table publish.ready retire.*"),
		before: func(s *stage) { s.idle(keyModel, s.old) },
		orders: replaceWithNew,
	},
}

// heir is a child of a killed loader.
type heir struct {
	pid      int
	testator *proctest.Proc
}

func startTestator(t *testing.T, dir string, orders []order, env ...string) *proctest.Proc {
	t.Helper()
	b, err := json.Marshal(orders)
	if err != nil {
		t.Fatal(err)
	}
	return proctest.Env(env...).Start(t, "testator", dir, string(b))
}

// bequeath has a loader start a child at a step and die there.
func (s *stage) bequeath(step, by string, orders []order) heir {
	s.t.Helper()
	p := startTestator(s.t, s.dir, orders, "TESTATOR_AT="+step, "TESTATOR_BY="+by, "ONECOPY_CRASH_AT="+step)
	pid, err := strconv.Atoi(p.Line(s.t))
	if err != nil {
		s.t.Fatalf("%v\n%s", err, p.Stderr())
	}
	if code := p.Wait(); code != 128+9 {
		s.t.Fatalf("the loader ended with code %d, it should have been killed\n%s", code, p.Stderr())
	}
	if err := unix.Kill(pid, 0); err != nil {
		s.t.Fatalf("the child is gone: %v\n%s", err, p.Stderr())
	}
	return heir{pid, p}
}

// end ends the child.
func (h heir) end(t *testing.T) {
	t.Helper()
	h.testator.Stdin.Close()
	proctest.AwaitEnd(t, h.pid)
}

// has lists what of a directory the child has open.
func (h heir) has(t *testing.T, dir string) (open []string) {
	t.Helper()
	fds := fmt.Sprintf("/proc/%d/fd", h.pid)
	names, err := os.ReadDir(fds)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if to, err := os.Readlink(filepath.Join(fds, n.Name())); err == nil && strings.HasPrefix(to, dir) {
			open = append(open, to)
		}
	}
	return open
}

// TestCrashChildOfExec: what a program inherits that a loader had started is
// nothing. It lives on, and nobody notices.
func TestCrashChildOfExec(t *testing.T) {
	cat, err := exec.LookPath("cat")
	if err != nil {
		t.Skip(err)
	}
	t.Parallel()
	s := newStage(t)
	for _, l := range legacies {
		for _, step := range l.steps {
			if l.before != nil {
				l.before(s)
			}
			h := s.bequeath(step, cat, l.orders(s))
			if open := h.has(t, s.dir); len(open) > 0 {
				t.Errorf("%s: the child has inherited %v", step, open)
			}
			s.bystander()
			s.obtain()
			s.collect()
			s.clear()
			s.collect()
			h.end(t)
			if t.Failed() {
				t.Fatal(step)
			}
		}
	}
}

// TestCrashChildOfFork: fork alone, which Go has not but C has, hands a copy of
// every lock to the child. As long as it lives nobody can load what its parent was
// loading; nobody waits longer than he wants to, and readers do not notice. When it
// ends all is as if the parent had been killed just now.
func TestCrashChildOfFork(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.idle("org/ready", s.old)
	keptK, keptT := 0, 0
	for _, l := range legacies {
		for _, step := range l.steps {
			if l.before != nil {
				l.before(s)
			}
			h := s.bequeath(step, "fork", l.orders(s))
			k, table := s.isLocked(layout.StripeLock(layout.Stripe(keyModel))), s.isLocked(layout.TableLock)
			s.bystander()
			s.check(s.helper.must(t, order{Do: "get", Key: "org/ready"}))
			s.helper.must(t, order{Do: "close", Key: "org/ready"})
			impatient := startCrew(t, s.dir) // gone before the locks are free, and does not get them late
			if table {
				keptT++
				impatient.refused(t, "ErrTimeout", order{Do: "load", Key: "org/third", Source: s.new, Timeout: short / 5})
			}
			if k {
				keptK++
				impatient.refused(t, "ErrTimeout", order{Do: "load", Key: keyModel, Source: s.new, Replace: true, Timeout: short / 5})
			}
			if !table {
				s.check(s.helper.must(t, order{Do: "load", Key: "org/third", Source: s.new}))
				s.helper.must(t, order{Do: "close", Key: "org/third"})
				s.helper.must(t, order{Do: "remove", Key: "org/third"})
			}
			impatient.p.Kill()
			h.end(t)
			s.bystander()
			s.obtain()
			s.collect()
			s.clear()
			s.collect()
			if t.Failed() {
				t.Fatalf("%s: K kept %v, T kept %v", step, k, table)
			}
		}
	}
	if keptK < len(legacies[0].steps)-1 || keptT < 8 {
		t.Errorf("the children kept K at %d steps and T at %d: the test tests nothing", keptK, keptT)
	}
}

// isLocked reports whether somebody holds a lock file of w/.
func (s *stage) isLocked(name string) bool {
	s.t.Helper()
	f, err := os.Open(filepath.Join(s.dir, layout.Folder, layout.LocksDir, name))
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil
}

// TestCrashForkDuringALoad: the parent lives, and its child has a writable copy of
// the descriptor of a file that is about to be published. It is not: the load takes
// a fresh copy, or is an error.
func TestCrashForkDuringALoad(t *testing.T) {
	for _, source := range []string{"path", "function"} {
		t.Run(source, func(t *testing.T) {
			t.Parallel()
			s := newStage(t)
			orders := loadNew(s)
			if source == "function" {
				orders[0].Source = s.function("new")
			}
			orders[0].Note = 100 << 10
			p := startTestator(t, s.dir, orders, "TESTATOR_AT=load.note", "TESTATOR_BY=fork")
			pid, err := strconv.Atoi(p.Line(t))
			if err != nil {
				t.Fatalf("%v\n%s", err, p.Stderr())
			}
			if code := p.Wait(); code != 0 {
				t.Errorf("the loader ended with code %d\n%s", code, p.Stderr())
			}
			a := s.helper.ask(t, order{Do: "get", Key: keyModel})
			if a.Sentinel == "ErrNotFound" && source == "function" { // what it wrote cannot be had again
				awaitText(t, p, "held by somebody else: ", "a writer is left")
			} else {
				s.check(a)
			}
			// Closed by the loader, its locks were released for the child as well.
			s.obtain()
			s.helper.must(t, order{Do: "close", Key: keyModel})
			s.helper.must(t, order{Do: "gc"})
			if a := s.helper.must(t, order{Do: "check"}); len(a.Problems) > 0 {
				t.Errorf("check: %+v", a.Problems)
			}
			heir{pid, p}.end(t)
			s.clear()
			s.collect()
		})
	}
}

// awaitText waits until a process that has ended is known to have said so.
func awaitText(t *testing.T, p *proctest.Proc, parts ...string) {
	t.Helper()
	for range 5000 {
		if !slices.ContainsFunc(parts, func(s string) bool { return !strings.Contains(p.Stderr(), s) }) {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Errorf("%q does not say %q", p.Stderr(), parts)
}
