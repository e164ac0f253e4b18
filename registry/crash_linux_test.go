//go:build crashpoint && (amd64 || arm64) && !onecopy_private

package registry

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/onecopy/onecopy/internal/crashpoint"
	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

var kills = flag.Int("kills", 20, "how often TestCrash kills a process at each step")

// TestCrash kills a process at every named step of the protocol and then demands,
// each time, that nobody else noticed: bytes in use stay right, whoever waited
// gets the model, and after one collector run nothing is left, no state, lock,
// file or byte.
func TestCrash(t *testing.T) {
	for _, point := range crashpoint.Points {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			var through []*stage
			for _, s := range scenarios {
				if slices.Contains(s.steps, point) {
					through = append(through, &stage{scenario: s})
				}
			}
			if len(through) == 0 {
				t.Fatal("no scenario passes this step")
			}
			for n := range max(*kills, len(through)) {
				through[n%len(through)].round(t, point, n/len(through))
			}
		})
	}
}

// TestCrashScenarios: a step of a scenario that is no crash point kills nobody.
func TestCrashScenarios(t *testing.T) {
	for _, s := range scenarios {
		for _, step := range s.steps {
			if !slices.Contains(crashpoint.Points, step) {
				t.Errorf("%s: %q is no crash point", s.name, step)
			}
		}
	}
}

// A scenario is an operation that is killed, and the situation in which it is.
type scenario struct {
	name    string
	steps   []string       // that the operation passes, and where it is killed
	times   map[string]int // how often it passes a step; 1 if not listed
	options Options        // of the registry
	first   bool           // the operation makes the registry
	size    int            // bytes of the models; 0: smallModel
	before  func(*stage)   // brings the situation about
	orders  func(*stage) []order
	stop    string               // the operation is stopped here, for what follows
	waits   func(*stage) []order // what the helper asks for meanwhile, and waits
	between func(*stage)         // others meddle
}

// Models are small, so that a thousand kills take a minute; a large one has
// windows of 2 MiB pages and a rest.
const (
	smallModel = 300<<10 + 7
	largeModel = 4<<20 + 5000
)

// The keys of a stage.
const (
	keyUsed  = "used/by-a-bystander" // leased during all of it
	keyModel = "org/model"           // what the operation is about
)

// stage is a registry with people on it, used for several rounds of a scenario.
type stage struct {
	scenario
	t       *testing.T
	point   string
	dir     string
	helper  *crew // prepares, waits, repairs, looks
	other   *crew // holds leases
	victim  *proctest.Proc
	auditor auditor

	sums     map[string]string // by origin: what each model's bytes have to be
	old, new string            // sources of keyModel
	leased   map[string]uint64 // generations that other holds, by key
	locked   map[uint64]bool   // and those that it locked by hand
}

func (s *stage) round(t *testing.T, point string, n int) {
	t.Helper()
	s.t, s.point = t, point
	s.open()
	defer func() {
		if t.Failed() {
			t.Fatalf("round %d of %q", n, s.name)
		}
	}()
	if s.before != nil {
		s.before(s)
	}
	env := []string{
		"ONECOPY_CRASH_AT=" + point,
		fmt.Sprintf("ONECOPY_CRASH_SKIP=%d", n%max(1, s.times[point])),
	}
	if s.stop != "" {
		env = append(env, "ONECOPY_STOP_AT="+s.stop)
	}
	s.victim = startVictim(t, s.dir, s.orders(s), env...)
	if s.stop != "" {
		s.victim.AwaitStop(t)
		if s.waits != nil {
			s.helper.tell(t, s.waits(s)[0])
			proctest.AwaitBlocked(t, s.keyLock(), 1)
		}
		if s.between != nil {
			s.between(s)
		}
		s.victim.Cont()
	}
	if code := s.victim.Wait(); code != 128+9 {
		t.Fatalf("%s: the operation ended with code %d, it should have been killed\n%s", s.name, code, s.victim.Stderr())
	}
	if s.first {
		s.people()
	}
	if s.waits != nil {
		s.check(s.helper.hear(t))
	}
	s.bystander()
	// Whoever needs the model repairs, or a collector does.
	if n%2 == 0 {
		s.obtain()
	}
	s.collect()
	s.obtain()
	s.clear()
	s.collect()
	if s.first {
		s.helper.p.Kill()
		s.other.p.Kill()
	}
}

// open makes the registry, its people, and the model that is in use throughout.
func (s *stage) open() {
	if s.dir != "" && !s.first {
		return
	}
	if s.size == 0 {
		s.size = smallModel
	}
	s.dir = proctest.TmpRegistry(s.t)
	s.auditor = newAuditor(s.dir)
	s.sums, s.leased, s.locked = map[string]string{}, map[string]uint64{}, map[uint64]bool{}
	s.old, s.new = s.source("old"), s.source("new")
	if !s.first {
		r, err := Open(s.dir, &s.options)
		if err != nil {
			s.t.Fatal(err)
		}
		if err := r.Close(); err != nil {
			s.t.Fatal(err)
		}
		s.people()
	}
}

func (s *stage) people() {
	s.helper, s.other = startCrew(s.t, s.dir), startCrew(s.t, s.dir)
	s.hold(keyUsed, s.source("used"))
}

// source makes a source whose bytes depend on name.
func (s *stage) source(name string) string {
	text := fmt.Sprintf("func:%s:%d", name, s.size)
	path, sum := sourceDir(s.t, text)
	s.sums[path], s.sums[text] = sum, sum
	return path
}

// function is a load function that makes what source(name) has.
func (s *stage) function(name string) string { return fmt.Sprintf("func:%s:%d", name, s.size) }

func (s *stage) keyLock() string {
	return filepath.Join(s.dir, layout.Folder, layout.LocksDir, layout.StripeLock(layout.Stripe(keyModel)))
}

// hold loads a model and has the bystander lease it.
func (s *stage) hold(key, source string) {
	s.helper.must(s.t, order{Do: "load", Key: key, Source: source})
	s.helper.must(s.t, order{Do: "close", Key: key})
	s.leased[key] = s.other.must(s.t, order{Do: "get", Key: key}).Generation
}

// idle loads a model that nobody uses.
func (s *stage) idle(key, source string) {
	s.check(s.helper.must(s.t, order{Do: "load", Key: key, Source: source}))
	s.helper.must(s.t, order{Do: "close", Key: key})
}

// idleReplace publishes a new generation of keyModel that nobody uses.
func (s *stage) idleReplace() {
	s.check(s.helper.must(s.t, order{Do: "load", Key: keyModel, Source: s.new, Replace: true}))
	s.helper.must(s.t, order{Do: "close", Key: keyModel})
}

// kill runs orders in a process that is killed at a step.
func (s *stage) kill(step string, orders ...order) {
	p := startVictim(s.t, s.dir, orders, "ONECOPY_CRASH_AT="+step)
	if code := p.Wait(); code != 128+9 {
		s.t.Fatalf("%s: code %d, it should have been killed at %s\n%s", s.name, code, step, p.Stderr())
	}
}

// lockManifest gives the published generation of keyModel, even while it is
// being removed, a lease that the library knows nothing of.
func (s *stage) lockManifest() {
	gen := s.generation()
	s.other.must(s.t, order{Do: "flock", Path: s.file(gen, layout.ManifestExt)})
	s.locked[gen] = true
}

// generation of keyModel in the table, whatever its state.
func (s *stage) generation() uint64 {
	s.t.Helper()
	table := s.table()
	f, ok := table.Scan(keyModel)
	if !ok {
		s.t.Fatalf("%s: no slot names %s", s.name, keyModel)
	}
	return f.Word.Generation()
}

func (s *stage) table() *layout.Table {
	s.t.Helper()
	b, err := os.ReadFile(filepath.Join(s.dir, layout.Folder, layout.TableFile))
	if err != nil {
		s.t.Fatal(err)
	}
	table, err := layout.NewTable(b)
	if err != nil {
		s.t.Fatal(err)
	}
	return table
}

func (s *stage) file(gen uint64, ext string) string {
	return filepath.Join(s.dir, layout.Folder, layout.ModelsDir, layout.GenName(s.table().Identity().Epoch, gen)+ext)
}

// check demands that an answer's model has the bytes of its origin.
func (s *stage) check(a answer) {
	s.t.Helper()
	if want := s.sums[a.Origin]; a.Error != "" || a.Sum == "" || a.Sum != want {
		s.t.Errorf("%s: got %+v, want bytes %s", s.name, a, want)
	}
}

// bystander reads everything that was leased before the kill.
func (s *stage) bystander() {
	s.t.Helper()
	for key, gen := range s.leased {
		a := s.other.must(s.t, order{Do: "sum", Key: key})
		if s.check(a); a.Generation != gen {
			s.t.Errorf("%s: the lease on %s is of generation %d, was %d", s.name, key, a.Generation, gen)
		}
	}
}

// obtain gets the model alone, and in time. What is published is used; what is
// loaded anew has a number that was never given out.
func (s *stage) obtain() {
	s.t.Helper()
	table, published := s.table(), uint64(0)
	if f, ok := table.Scan(keyModel); ok {
		switch f.Word.State() {
		case layout.Ready, layout.Evicting: // a dead remover's work may be undone
			published = f.Word.Generation()
		}
	}
	a := s.helper.must(s.t, order{Do: "load", Key: keyModel, Source: s.new, Timeout: 30 * time.Second})
	s.check(a)
	if a.Generation != published && a.Generation <= table.Generation() {
		s.t.Errorf("%s: generation %d, but %d was given out", s.name, a.Generation, table.Generation())
	}
	s.helper.must(s.t, order{Do: "close", Key: keyModel})
}

// collect runs one collector and then looks at everything.
func (s *stage) collect() {
	s.t.Helper()
	s.helper.must(s.t, order{Do: "close", Key: keyModel})
	s.helper.must(s.t, order{Do: "gc"})
	if a := s.helper.must(s.t, order{Do: "check"}); len(a.Problems) > 0 {
		s.t.Errorf("%s: check: %+v", s.name, a.Problems)
	}
	leased := map[uint64]bool{}
	for _, gen := range s.leased {
		leased[gen] = true
	}
	for _, h := range s.helper.must(s.t, order{Do: "holders"}).Holders {
		if h.PID != s.other.p.PID() || !leased[h.Generation] && !s.locked[h.Generation] {
			s.t.Errorf("%s: holder %+v", s.name, h)
		}
	}
	for gen := range s.locked {
		leased[gen] = true
	}
	s.auditor.look(s.t, leased)
}

// clear ends the situation: nothing but keyUsed is leased, keyModel is gone.
func (s *stage) clear() {
	s.t.Helper()
	s.other.must(s.t, order{Do: "unflock"})
	clear(s.locked)
	for key := range s.leased {
		if key != keyUsed {
			s.other.must(s.t, order{Do: "close", Key: key})
			delete(s.leased, key)
		}
	}
	s.helper.must(s.t, order{Do: "close", Key: keyModel})
	if a := s.helper.ask(s.t, order{Do: "remove", Key: keyModel}); a.Error != "" && a.Sentinel != "ErrNotFound" {
		s.t.Errorf("%s: remove: %s", s.name, a.Error)
	}
}

// steps are all crash points with one of the prefixes, but for some.
func steps(names string, but ...string) (out []string) {
	for name := range strings.FieldsSeq(names) {
		for _, p := range crashpoint.Points {
			family, all := strings.CutSuffix(name, "*")
			if (p == name || all && strings.HasPrefix(p, family)) && !slices.Contains(but, p) && !slices.Contains(out, p) {
				out = append(out, p)
			}
		}
	}
	return out
}
