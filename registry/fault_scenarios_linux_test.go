//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/onecopy/onecopy/internal/faultinject"
	"github.com/onecopy/onecopy/internal/layout"
)

// A faultScenario is a part of a program's life in which every system call is
// made to fail, one at a time.
type faultScenario struct {
	name   string
	source func() map[string][]byte // the files that the program may load
	cold   bool                     // the source lies on the disk only
	fresh  bool                     // there is no registry yet
	closed bool                     // the program opens the registry within act
	loaded bool                     // the source is loaded as "k"
	budget int64

	// prepare brings the registry into the state that act meets. The test does
	// so, without faults, and then lets nobody use the registry.
	prepare func(t *testing.T, r *Registry)

	// act runs in the program, with faults, and then once more in the test,
	// without: then it must succeed.
	act func(*faulted)
}

// faulted is the program of one run.
type faulted struct {
	r        *Registry
	dir, src string
	want     map[string][]byte // the files of src
	again    bool              // the run without faults, after one with

	steps []faultStep
	later []func() error // what was returned as right has to be right
}

// faultStep is a call of the API that failed.
type faultStep struct {
	Call  string
	Err   report
	Typed bool // *Error that is a sentinel of the package or an errno
}

func (f *faulted) did(call string, err error) bool {
	if err != nil {
		var e *Error
		var errno syscall.Errno
		rep := reportOf(err)
		f.steps = append(f.steps, faultStep{call, rep, errors.As(err, &e) && (len(rep.Is) > 0 || errors.As(err, &errno))})
	}
	return err == nil
}

// right says what has to hold if the call before it succeeded.
func (f *faulted) right(check func() error) { f.later = append(f.later, check) }

func (f *faulted) open() bool {
	if f.r != nil {
		return true
	}
	r, err := Open(f.dir, nil)
	f.r = r
	return f.did("Open", err)
}

func (f *faulted) close() {
	if f.r != nil {
		f.did("Close", f.r.Close())
		f.r = nil
	}
}

// use reads a model's files, and remembers to compare them with want.
func (f *faulted) use(m *Model, want map[string][]byte) {
	for _, name := range sortedNames(want) {
		b, err := m.Bytes(name)
		if f.did("Bytes", err) && !bytes.Equal(b, want[name]) {
			f.right(func() error { return fmt.Errorf("%s: other bytes than were loaded", name) })
		}
	}
}

// load gets a model from src and compares it.
func (f *faulted) load(key string, src Source, want map[string][]byte) {
	m, err := f.r.GetOrLoad(ctxb, key, src)
	if f.did("GetOrLoad", err) {
		f.use(m, want)
		f.did("Close", m.Close())
	}
}

// keep is a model that every registry of these tests holds and no run touches.
var keep = madeSource("keep", map[string][]byte{"a.bin": []byte("what others use"), "b/c.bin": randomBytes(9, 9000)})

var pair = map[string][]byte{"one.bin": randomBytes(1, 5000), "two.bin": randomBytes(2, 70_000)}

// dead makes the slot of key look as if its loader or remover had been killed.
func dead(t *testing.T, r *Registry, key string, state layout.State) {
	t.Helper()
	editTable(t, r.Dir(), func(e layout.Editor) {
		found, ok := e.Lookup(key)
		w, to := found.Word, found.Word.With(state)
		if state == layout.Loading { // only a FREE slot is loaded into
			ok = ok && e.CompareAndSwap(found.Slot, w, w.With(layout.Free))
			w, to = w.With(layout.Free), layout.MakeWord(layout.Loading, e.NextGeneration())
		}
		if !ok || !e.CompareAndSwap(found.Slot, w, to) {
			t.Fatalf("%s: %v", key, found)
		}
		if state == layout.Loading {
			e.SetHint(found.Slot, layout.HintLoadStart, 1)
			e.SetHint(found.Slot, layout.HintReserved, 4096)
		}
	})
}

func loaded(t *testing.T, r *Registry, key string, src Source) Info {
	t.Helper()
	m, err := r.GetOrLoad(ctxb, key, src)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	return m.Info()
}

// orphan leaves a generation that no slot names, as a killed user of a replaced
// model does.
func orphan(t *testing.T, r *Registry, key string) {
	t.Helper()
	i := loaded(t, r, key, small("1"))
	editTable(t, r.Dir(), func(e layout.Editor) {
		found, _ := e.Lookup(key)
		e.CompareAndSwap(found.Slot, found.Word, found.Word.With(layout.Free))
		e.IndexDelete(found.Slot, key)
	})
	writeFile(t, v1(r.Dir(), layout.ModelsDir, layout.GenName(i.Epoch, 999), "m", "sub", "w.bin"), randomBytes(1, 5000))
}

// leftByTheDead leaves something of every kind to the collector.
func leftByTheDead(t *testing.T, r *Registry) {
	t.Helper()
	orphan(t, r, "gone")
	loaded(t, r, "evicting", small("1"))
	loaded(t, r, "loading", small("1"))
	dead(t, r, "evicting", layout.Evicting)
	dead(t, r, "loading", layout.Loading)
}

// nearlyFull leaves room in a budget of 300,000 bytes only if "old" is evicted.
func nearlyFull(t *testing.T, r *Registry) {
	t.Helper()
	loaded(t, r, "old", madeSource("1", map[string][]byte{"w.bin": randomBytes(1, 200_000)}))
	must(t, r.Pin(ctxb, "keep"))
}

// oneFile is the source w.bin. It is made when it is asked for: every process of
// these tests has this list.
func oneFile(seed byte, n int) func() map[string][]byte {
	return sync.OnceValue(func() map[string][]byte { return map[string][]byte{"w.bin": randomBytes(seed, n)} })
}

var faultScenarios = []faultScenario{
	{
		name: "open", fresh: true, closed: true,
		act: func(f *faulted) { f.open(); f.close() },
	},
	{
		name: "open-untidy", closed: true,
		prepare: func(t *testing.T, r *Registry) { orphan(t, r, "gone") },
		act:     func(f *faulted) { f.open(); f.close() },
	},
	{
		name:    "get",
		prepare: func(t *testing.T, r *Registry) { loaded(t, r, "k", madeSource("1", pair)) },
		act: func(f *faulted) {
			m, err := f.r.Get("k")
			if f.did("Get", err) {
				f.use(m, pair)
				f.did("Close", m.Close())
			}
			f.did("Use", f.r.Use("k", func(m *Model) error { f.use(m, pair); return nil }))
			f.close()
		},
	},
	{
		name:    "lease",
		prepare: func(t *testing.T, r *Registry) { loaded(t, r, "k", madeSource("1", pair)) },
		act: func(f *faulted) {
			m, err := f.r.Get("k")
			if !f.did("Get", err) {
				return
			}
			lease, err := m.Lease()
			if f.did("Lease", err) {
				if err := f.r.Remove(ctxb, "k"); !errors.Is(err, ErrInUse) && err != nil {
					f.did("Remove", err)
				} else if err == nil {
					f.right(func() error { return errors.New("a leased model was removed") })
				}
				lease.Close()
			}
			f.did("Verify", m.Verify(ctxb))
			f.did("Close", m.Close())
		},
	},
	{
		name: "load-warm", source: oneFile(3, 10<<20+1),
		act: func(f *faulted) { f.load("k", Source{Path: f.src}, f.want) },
	},
	{
		name: "load-cold", source: oneFile(4, 18<<20+5), cold: true,
		act: func(f *faulted) { f.load("k", Source{Path: f.src}, f.want) },
	},
	{
		name: "load-folder", source: func() map[string][]byte {
			return map[string][]byte{
				"config.json": []byte("{}"), "empty": {}, "w/1.bin": randomBytes(1, 100_000),
				"w/2.bin": randomBytes(2, 4096), "w/deep/3.bin": randomBytes(3, 1),
			}
		},
		act: func(f *faulted) { f.load("k", Source{Path: f.src}, f.want) },
	},
	{
		name: "load-func",
		act: func(f *faulted) {
			want := map[string][]byte{
				"known.bin": append(randomBytes(1, 3<<20), make([]byte, 2<<20)...),
				"open.bin":  randomBytes(2, 4<<20+3),
				"small.bin": randomBytes(3, 77),
			}
			f.load("k", Source{Version: "1", Load: func(_ context.Context, w *Writer) error {
				for _, name := range sortedNames(want) {
					size := int64(-1)
					if name == "known.bin" {
						size = 5 << 20
					}
					file, err := w.Create(name, size)
					if err != nil {
						return err
					}
					written := want[name]
					if size > 0 {
						written = written[:3<<20] // the rest becomes zeros
					}
					for len(written) > 0 {
						n := min(len(written), 1<<20)
						if _, err := file.Write(written[:n]); err != nil {
							return err
						}
						written = written[n:]
					}
				}
				return nil
			}}, want)
		},
	},
	{
		name:   "present",
		source: func() map[string][]byte { return pair },
		act: func(f *faulted) {
			f.load("k", Source{Path: f.src}, f.want)
			f.load("k", Source{Path: f.src}, f.want)
		},
	},
	{
		name:    "replace",
		prepare: func(t *testing.T, r *Registry) { loaded(t, r, "k", madeSource("1", pair)) },
		act: func(f *faulted) {
			old, err := f.r.Get("k")
			if !f.did("Get", err) {
				return
			}
			src := madeSource("2", map[string][]byte{"new.bin": []byte("second version")})
			src.Replace = true
			f.load("k", src, map[string][]byte{"new.bin": []byte("second version")})
			if !f.again {
				f.use(old, pair) // the lease of the old one holds
			}
			f.did("Close", old.Close())
			m, err := f.r.Get("k")
			if f.did("Get", err) {
				if v := m.Info().Origin.Version; v != "1" && v != "2" {
					f.right(func() error { return fmt.Errorf("version %q", v) })
				}
				f.did("Close", m.Close())
			}
		},
	},
	{
		name:    "remove",
		prepare: func(t *testing.T, r *Registry) { loaded(t, r, "k", madeSource("1", pair)) },
		act: func(f *faulted) {
			err := f.r.Remove(ctxb, "k")
			if f.again && errors.Is(err, ErrNotFound) {
				err = nil
			}
			if f.did("Remove", err) {
				f.right(func() error {
					if _, err := f.r.Get("k"); !errors.Is(err, ErrNotFound) {
						return fmt.Errorf("after its removal: %v", err)
					}
					return nil
				})
			}
		},
	},
	{
		name:    "gc",
		prepare: leftByTheDead,
		act: func(f *faulted) {
			_, err := f.r.GC(ctxb)
			f.did("GC", err)
		},
	},
	{
		name: "take-over",
		prepare: func(t *testing.T, r *Registry) {
			loaded(t, r, "k", madeSource("1", pair))
			dead(t, r, "k", layout.Loading)
		},
		act: func(f *faulted) { f.load("k", madeSource("1", pair), pair) },
	},
	{
		name: "evict", budget: 300_000,
		prepare: nearlyFull,
		act: func(f *faulted) {
			want := map[string][]byte{"w.bin": randomBytes(2, 200_000)}
			src := madeSource("1", want)
			src.Size = 200_000
			f.load("k", src, want)
		},
	},
	{
		name:    "check",
		prepare: func(t *testing.T, r *Registry) { loaded(t, r, "k", madeSource("1", pair)) },
		act: func(f *faulted) {
			problems, err := f.r.Check(ctxb, CheckOptions{Data: true})
			if f.did("Check", err) && f.again && len(problems) > 0 {
				f.right(func() error { return fmt.Errorf("%+v", problems) })
			}
		},
	},
	{
		name:    "look",
		prepare: func(t *testing.T, r *Registry) { loaded(t, r, "k", madeSource("1", pair)) },
		act: func(f *faulted) {
			_, err := f.r.Entries()
			f.did("Entries", err)
			_, err = f.r.Stats()
			f.did("Stats", err)
			_, err = f.r.PlanGC(ctxb)
			f.did("PlanGC", err)
			_, err = f.r.Config()
			f.did("Config", err)
		},
	},
	{
		name:    "look-closely",
		prepare: func(t *testing.T, r *Registry) { loaded(t, r, "k", sized(4*mib+5)) },
		act: func(f *faulted) {
			_, err := f.r.HugePages("k")
			f.did("HugePages", err)
			_, err = f.r.Charges("keep")                                                     // a small one: a call for each page
			if !errors.Is(err, errors.ErrUnsupported) && !errors.Is(err, fs.ErrPermission) { // for want of root
				f.did("Charges", err)
			}
			_, err = f.r.Generations("k")
			f.did("Generations", err)
			_, err = f.r.Counters()
			f.did("Counters", err)
			_, err = f.r.Overview()
			f.did("Overview", err)
		},
	},
	{
		name: "policy",
		prepare: func(t *testing.T, r *Registry) {
			loaded(t, r, "k", madeSource("1", pair))
			loaded(t, r, "idle", small("1"))
		},
		act: func(f *faulted) {
			f.did("Pin", f.r.Pin(ctxb, "k"))
			f.did("Unpin", f.r.Unpin(ctxb, "k"))
			f.did("SetTTL", f.r.SetTTL(ctxb, "k", time.Hour))
			f.did("Touch", f.r.Touch(ctxb, "k"))
			if f.did("Pin", f.r.Pin(ctxb, "keep")) && f.did("Pin", f.r.Pin(ctxb, "k")) {
				_, err := f.r.Trim(ctxb, 0)
				f.did("Trim", err)
			}
		},
	},
	{
		name:    "rollout",
		prepare: func(t *testing.T, r *Registry) { loaded(t, r, "k", madeSource("1", pair)) },
		act: func(f *faulted) {
			old, err := f.r.Get("k")
			if !f.did("Get", err) {
				return
			}
			version := old.Info().Origin.Version
			m, err := f.r.Rollout(ctxb, "k", madeSource("2", pair), nil)
			if f.did("Rollout", err) {
				f.use(m, pair)
				f.did("Close", m.Close())
				if f.did("Undo", undo(ctxb, f.r, "k")) {
					f.right(func() error {
						i, err := f.r.Entry("k")
						if err != nil || i.Info == nil || i.Info.Origin.Version != version {
							return fmt.Errorf("undone: %+v, %v", i, err)
						}
						return nil
					})
				}
			}
			f.did("Close", old.Close())
		},
	},
	{
		name:   "load-wait",
		source: oneFile(1, 9000),
		// The test holds the load lock until the program waits for it, or ends.
		act: func(f *faulted) { f.load("k", Source{Path: f.src}, f.want) },
	},
}

// pythonScenarios are those of testdata/faults.py, by their names. There act is what
// the test does afterwards, without faults: whatever was loaded can be loaded.
var pythonScenarios = []faultScenario{
	{name: "open", fresh: true, closed: true, act: func(f *faulted) { f.open() }},
	{name: "open-untidy", prepare: func(t *testing.T, r *Registry) { orphan(t, r, "gone") }, act: func(*faulted) {}},
	{name: "get", source: oneFile(5, 70_000), loaded: true, act: loadAgain},
	{name: "load-warm", source: oneFile(3, 10<<20+1), act: loadAgain},
	{name: "load-cold", source: oneFile(4, 18<<20+5), cold: true, act: loadAgain},
	{name: "load-folder", source: someFiles, act: loadAgain},
	{name: "load-wait", source: oneFile(1, 9000), act: loadAgain},
	{name: "replace", source: someFiles, loaded: true, act: loadAgain},
	{name: "take-over", source: someFiles, act: loadAgain, prepare: func(t *testing.T, r *Registry) {
		loaded(t, r, "k", small("1"))
		dead(t, r, "k", layout.Loading)
	}},
	{name: "evict", source: oneFile(2, 200_000), act: loadAgain, budget: 300_000, prepare: nearlyFull},
	{name: "object", act: objectAgain},
	{name: "writer", act: objectAgain},
	{name: "remove", source: someFiles, loaded: true, act: loadAgain},
	{name: "gc", act: func(*faulted) {}, prepare: leftByTheDead},
	{name: "check", source: someFiles, loaded: true, act: loadAgain},
	{name: "look", source: someFiles, loaded: true, act: loadAgain},
	{name: "policy", source: someFiles, loaded: true, act: loadAgain},
}

func someFiles() map[string][]byte {
	return map[string][]byte{"config.json": []byte("{}"), "empty": {}, "w/1.bin": randomBytes(1, 100_000), "w/deep/2.bin": randomBytes(3, 1)}
}

func loadAgain(f *faulted) { f.load("k", Source{Path: f.src}, f.want) }

// objectAgain loads another object under the key, whether or not there is one.
func objectAgain(f *faulted) {
	src := madeSource("other", pair)
	src.OnChange = ChangeReplace
	f.load("object", src, pair)
}

// runFaulted: scenario, dir, source folder, and anything if mappings will be left.
var runFaulted = child("faulted", func(args []string) error {
	i := slices.IndexFunc(faultScenarios, func(s faultScenario) bool { return s.name == args[0] })
	s := &faultScenarios[i]
	f := &faulted{dir: args[1], src: args[2]}
	if s.source != nil {
		f.want = s.source()
	}
	if !s.closed && !f.open() {
		return fmt.Errorf("before the faults: %+v", f.steps)
	}
	faultinject.Begin()
	s.act(f)
	faultinject.End()
	return say(f.answer(args[3] != ""))
})

// faultAnswer is what a run says at its end.
type faultAnswer struct {
	Steps []faultStep
	Wrong []string
	Open  []string // descriptors and mappings of the registry
}

// answer makes the checks that were put off, closes everything, and looks for what
// is still open; leaky says that something will be.
func (f *faulted) answer(leaky bool) (a faultAnswer) {
	for _, check := range f.later {
		if err := check(); err != nil {
			a.Wrong = append(a.Wrong, err.Error())
		}
	}
	f.close()
	a.Steps = f.steps
	// What nobody waits for, such as a second try to retire a generation, may take a
	// moment longer.
	for range 5000 {
		if a.Open = openRegistryFiles(); len(a.Open) == 0 || leaky {
			break
		}
		time.Sleep(time.Millisecond)
	}
	return a
}

func openRegistryFiles() (open []string) {
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, fd := range fds {
		to, err := os.Readlink("/proc/self/fd/" + fd.Name())
		if err == nil && registryFile(to) {
			open = append(open, "fd "+fd.Name()+" -> "+to)
		}
	}
	maps, _ := os.ReadFile("/proc/self/maps")
	for line := range strings.Lines(string(maps)) {
		if i := strings.IndexByte(line, '/'); i >= 0 && registryFile(strings.TrimSpace(line[i:])) {
			open = append(open, strings.TrimSpace(line))
		}
	}
	return open
}
