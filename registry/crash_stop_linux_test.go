//go:build crashpoint && (amd64 || arm64) && !onecopy_private

package registry

import (
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// A stopped process keeps its locks. Whoever needs them waits, no longer than he
// wants to; nobody else notices.

// short is a deadline that passes because nothing can happen before it.
const short = 150 * time.Millisecond

func newStage(t *testing.T) *stage {
	s := &stage{scenario: scenario{name: t.Name()}, t: t}
	s.open()
	return s
}

// startStopped starts orders in a process that stops at a step.
func (s *stage) startStopped(step string, orders ...order) *proctest.Proc {
	s.t.Helper()
	p := startVictim(s.t, s.dir, orders, "ONECOPY_STOP_AT="+step)
	p.AwaitStop(s.t)
	return p
}

// refused is ask for orders that have to fail in a certain way.
func (c *crew) refused(t *testing.T, sentinel string, o order) {
	t.Helper()
	if a := c.ask(t, o); a.Sentinel != sentinel {
		t.Errorf("%+v: %q (%s), want %s", o, a.Error, a.Sentinel, sentinel)
	}
}

// TestCrashStoppedLoader stops a loader at every step at which it holds K and
// not T.
func TestCrashStoppedLoader(t *testing.T) {
	for _, step := range []string{
		"load.lock-key", "load.unlock-table", "load.fill",
		"load.link-manifest", "load.mkdir", "load.link-payload", "publish.unlock-table",
	} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			s := newStage(t)
			s.idle("org/ready", s.old)
			loader := s.startStopped(step, loadNew(s)...)
			s.bystander()
			s.check(s.helper.must(t, order{Do: "get", Key: "org/ready"}))
			s.check(s.helper.must(t, order{Do: "load", Key: "org/third", Source: s.new}))
			if step == "publish.unlock-table" { // visible, though its loader still holds K
				s.check(s.helper.must(t, order{Do: "get", Key: keyModel}))
			} else {
				s.helper.refused(t, "ErrNotFound", order{Do: "get", Key: keyModel})
				s.helper.refused(t, "ErrTimeout", order{Do: "load", Key: keyModel, Source: s.new, Timeout: short})
				s.helper.must(t, order{Do: "gc"}) // finds a loader that lives
				s.helper.tell(t, order{Do: "load", Key: keyModel, Source: s.new})
				proctest.AwaitBlocked(t, s.keyLock(), 1)
			}
			loader.Cont()
			if code := loader.Wait(); code != 0 {
				t.Errorf("the loader ended with code %d\n%s", code, loader.Stderr())
			}
			if step != "publish.unlock-table" {
				a := s.helper.hear(t)
				if s.check(a); a.Generation != s.generation() {
					t.Errorf("the waiter got generation %d, published is %d", a.Generation, s.generation())
				}
			}
			s.rest()
		})
	}
}

// TestCrashStoppedHolderOfTable stops a process while it holds T: readers go on,
// writers wait until their deadline, Check says what is wrong.
func TestCrashStoppedHolderOfTable(t *testing.T) {
	for _, step := range []string{"load.lock-table", "load.claim", "publish.ready", "publish.lock-table", "collect.lock-table"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			s := newStage(t)
			s.idle("org/ready", s.old)
			orders := loadNew(s)
			if step == "collect.lock-table" {
				orders = []order{{Do: "gc"}}
			}
			holder := s.startStopped(step, orders...)
			s.bystander()
			s.check(s.helper.must(t, order{Do: "get", Key: "org/ready"}))
			s.helper.must(t, order{Do: "close", Key: "org/ready"})
			s.check(s.helper.must(t, order{Do: "load", Key: "org/ready", Source: s.old})) // a hit needs no lock
			s.helper.must(t, order{Do: "close", Key: "org/ready"})
			s.helper.refused(t, "ErrTimeout", order{Do: "remove", Key: "org/ready", Timeout: short})
			s.helper.refused(t, "ErrTimeout", order{Do: "load", Key: "org/third", Source: s.new, Timeout: short})
			s.helper.refused(t, "ErrTimeout", order{Do: "gc", Timeout: short})
			found := false
			for _, p := range s.helper.must(t, order{Do: "check"}).Problems {
				found = found || p.Kind == "lock" && p.Path == filepath.Join(s.dir, layout.Folder, layout.LocksDir, layout.TableLock)
			}
			if !found {
				t.Error("Check does not name the lock that cannot be had")
			}
			// A process that starts now can read.
			late := startCrew(t, s.dir)
			s.check(late.must(t, order{Do: "get", Key: "org/ready"}))
			late.must(t, order{Do: "close", Key: "org/ready"})

			holder.Cont()
			if code := holder.Wait(); code != 0 {
				t.Errorf("the holder ended with code %d\n%s", code, holder.Stderr())
			}
			s.helper.must(t, order{Do: "remove", Key: "org/ready"})
			s.rest()
		})
	}
}

// TestCrashStoppedRemover stops a process that holds a manifest exclusively: that
// one model is busy for those who only get it, and replaced for those who load.
func TestCrashStoppedRemover(t *testing.T) {
	s := newStage(t)
	s.idle(keyModel, s.old)
	old := s.generation()
	remover := s.startStopped("evict.lock-manifest", order{Do: "remove", Key: keyModel})
	s.helper.refused(t, "ErrBusy", order{Do: "get", Key: keyModel})
	s.check(s.helper.must(t, order{Do: "get", Key: keyUsed}))
	s.helper.must(t, order{Do: "close", Key: keyUsed})
	s.helper.tell(t, order{Do: "load", Key: keyModel, Source: s.new}) // needs T
	remover.Cont()
	if code := remover.Wait(); code != 0 {
		t.Errorf("the remover ended with code %d\n%s", code, remover.Stderr())
	}
	a := s.helper.hear(t)
	if s.check(a); a.Generation <= old {
		t.Errorf("generation %d, removed was %d", a.Generation, old)
	}
	s.rest()
}

// rest closes the helper's models and demands that everything is in order without
// a collector.
func (s *stage) rest() {
	s.t.Helper()
	for _, key := range []string{keyModel, "org/ready", "org/third"} {
		s.helper.must(s.t, order{Do: "close", Key: key})
	}
	s.auditor.look(s.t, map[uint64]bool{s.leased[keyUsed]: true})
	s.bystander()
}

// TestCrashNextLoadCollects: without any call of GC, the next load of any key
// removes what the dead left before it counts the memory.
func TestCrashNextLoadCollects(t *testing.T) {
	s := newStage(t)
	s.hold(keyModel, s.old)
	s.idleReplace()
	s.idle("org/removed", s.old)
	s.kill("load.link-payload", order{Do: "load", Key: "org/dead", Source: s.old})
	s.kill("publish.lock-table", order{Do: "load", Key: keyUsed, Source: s.new, Replace: true})
	s.kill("evict.mark", order{Do: "remove", Key: "org/removed"})
	s.other.p.Kill() // the last user of the generation that was replaced
	clear(s.leased)
	s.check(s.helper.must(t, order{Do: "load", Key: "org/third", Source: s.new}))
	s.helper.must(t, order{Do: "close", Key: "org/third"})
	pic := s.auditor.look(t, nil)
	for _, key := range []string{keyModel, keyUsed, "org/third"} {
		if pic.Ready[key] == 0 {
			t.Errorf("%s is not READY", key)
		}
	}
	if len(pic.Ready) != 3 {
		t.Errorf("READY are %v", pic.Ready)
	}
}

// plainReader: dir, key. It gets the model and says what it reads.
var plainReader = child("plain-reader", func(args []string) error {
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	var a foreignAnswer
	m, err := r.Get(args[1])
	a.note(m, err)
	return errors.Join(say(a), r.Close())
})

// TestCrashReplacedAfterTheLease: between a reader's lease and its second look at
// the slot the model is replaced. It looks up again and gets the new generation.
func TestCrashReplacedAfterTheLease(t *testing.T) {
	r := newRegistry(t, nil)
	loadIdle(t, r, "k", small("1"))
	reader := proctest.Env("ONECOPY_STOP_AT=acquire.lease").Start(t, plainReader, r.Dir(), "k")
	reader.AwaitStop(t)
	src := small("2")
	src.Replace = true
	must(t, mustLoad(t, r, "k", src).Close())
	reader.Cont()
	if a := lastWord[foreignAnswer](t, reader); a.Text != "weights 2" {
		t.Errorf("%+v", a)
	}
}
