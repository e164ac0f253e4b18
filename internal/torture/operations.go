//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/registry"
)

// What workers do when no step is wanted, by weight, and now and then otherwise.
var anything = strings.Fields(`get get get get load load load load load load use use
	replace replace replace remove remove gc check undo pin fail stat destroy fresh`)

// ways says which operations pass a step. The first prefix that fits counts.
var ways = []struct{ prefix, operations string }{
	{"open.", "fresh"},
	{"acquire.", "get use load"},
	{"use.", "get"},
	{"load.", "replace replace load own"},
	{"publish.claim-evicted", "replace-removed"},
	{"publish.", "replace own"},
	{"abort.unlink", "no-link"},
	{"abort.rmdir", "no-link"},
	{"abort.", "fail"},
	{"retire.", "own"},
	{"evict.", "own-remove"},
	{"reclaim.try-shared", "late-lease"},
	{"reclaim.undo", "late-lease"},
	{"reclaim.lock-manifest", "dead-remover"},
	{"reclaim.unlink-manifest", "dead-remover"},
	{"reclaim.", "dead-loader"},
	{"undo.", "own-undo"},
	{"collect.unlink-payload", "lost-manifest dead-replacer"},
	{"collect.rmdir", "lost-manifest dead-replacer"},
	{"collect.slot", "dead-replacer lost-manifest"},
	{"collect.lock-table", "gc"},
	{"collect.unlock-table", "gc"},
	{"collect.", "dead-replacer"},
	{"edit.", "pin"},
	{"check.", "check"},
}

func wayTo(step string) []string {
	for _, w := range ways {
		if step != "" && strings.HasPrefix(step, w.prefix) {
			return strings.Fields(w.operations)
		}
	}
	return nil
}

type operation = func(w *worker, ctx context.Context) (*registry.Model, error)

// operations is filled by init, because some of them start others.
var operations map[string]operation

func init() {
	operations = map[string]operation{
		"get": func(w *worker, _ context.Context) (*registry.Model, error) { return w.r.Get(w.key()) },
		"load": func(w *worker, ctx context.Context) (*registry.Model, error) {
			key := w.key()
			return w.r.GetOrLoad(ctx, key, w.source(key, registry.OnChange(w.rng.IntN(3))))
		},
		"use": func(w *worker, _ context.Context) (*registry.Model, error) {
			key := w.key()
			err := w.r.Use(key, w.verify)
			if w.rng.IntN(2) == 0 {
				w.r.Release(key)
			}
			return nil, err
		},
		"replace": func(w *worker, ctx context.Context) (*registry.Model, error) { return w.replace(ctx, w.key(), nil) },
		"remove": func(w *worker, ctx context.Context) (*registry.Model, error) {
			return nil, w.r.Remove(ctx, w.key())
		},
		"gc": func(w *worker, ctx context.Context) (*registry.Model, error) {
			_, err := w.r.GC(ctx)
			return nil, err
		},
		"check": func(w *worker, ctx context.Context) (*registry.Model, error) {
			_, err := w.r.Check(ctx, registry.CheckOptions{})
			return nil, err
		},
		"stat": func(w *worker, _ context.Context) (*registry.Model, error) {
			_, err := w.r.Stats()
			return nil, err
		},
		"undo": func(w *worker, ctx context.Context) (*registry.Model, error) { return nil, w.undo(ctx, w.key()) },
		"pin": func(w *worker, ctx context.Context) (*registry.Model, error) {
			key := w.own()
			return nil, errors.Join(w.r.Pin(ctx, key), w.r.Unpin(ctx, key))
		},
		"fail": func(w *worker, ctx context.Context) (*registry.Model, error) {
			return w.replace(ctx, w.own(), func(context.Context) error { return errTold })
		},

		// With keys that nobody else uses: what others do cannot prevent the step.
		"own": func(w *worker, ctx context.Context) (*registry.Model, error) { return w.replace(ctx, w.own(), nil) },
		"own-remove": func(w *worker, ctx context.Context) (*registry.Model, error) {
			key := w.own()
			if err := w.idle(ctx, key); err != nil {
				return nil, err
			}
			return nil, w.r.Remove(ctx, key)
		},
		"own-undo": func(w *worker, ctx context.Context) (*registry.Model, error) {
			key := w.own()
			old, err := w.r.GetOrLoad(ctx, key, w.source(key, registry.ChangeIgnore))
			if err != nil {
				return nil, err
			}
			if err := w.idle(ctx, key); err != nil {
				return old, err
			}
			return old, w.undo(ctx, key)
		},
		"replace-removed": func(w *worker, ctx context.Context) (*registry.Model, error) {
			key := w.own()
			if err := w.idle(ctx, key); err != nil {
				return nil, err
			}
			return w.replace(ctx, key, func(ctx context.Context) error {
				other, err := registry.Open(w.dir, nil) // as another process would
				if err != nil {
					return err
				}
				defer other.Close()
				return other.Remove(ctx, key)
			})
		},
		"no-link": func(w *worker, ctx context.Context) (*registry.Model, error) {
			key := w.own()
			if err := w.gone(ctx, key); err != nil {
				return nil, err
			}
			// A stranger's folder stands where the model's belongs.
			m, err := w.replace(ctx, key, func(context.Context) error {
				table, err := readTable(w.dir)
				if err != nil {
					return err
				}
				found, ok := table.Scan(key)
				if !ok {
					return fmt.Errorf("%s is being loaded, but no slot names it", key)
				}
				return os.Mkdir(w.file(table, found.Word.Generation(), ""), 0o700)
			})
			if errors.Is(err, os.ErrExist) {
				return m, nil
			}
			return m, err
		},

		// What the dead left behind.
		"dead-loader": func(w *worker, ctx context.Context) (*registry.Model, error) {
			key := w.own()
			if err := w.gone(ctx, key); err != nil {
				return nil, err
			}
			w.kill("load.link-payload", "load-this", key)
			return w.r.GetOrLoad(ctx, key, w.source(key, registry.ChangeIgnore))
		},
		"dead-replacer": afterDeath("load.link-payload", "load-this"),
		"dead-remover":  afterDeath("evict.mark", "remove-this"),
		"late-lease": func(w *worker, ctx context.Context) (*registry.Model, error) {
			key := w.own()
			if err := w.idle(ctx, key); err != nil {
				return nil, err
			}
			table, err := readTable(w.dir)
			if err != nil {
				return nil, err
			}
			found, ok := table.Lookup(key)
			if !ok {
				return nil, registry.ErrNotFound
			}
			lease, err := os.Open(w.file(table, found.Word.Generation(), layout.ManifestExt))
			if err != nil {
				return nil, nil // evicted meanwhile
			}
			defer lease.Close()
			killed := w.kill("evict.mark", "remove-this", key)
			if err := unix.Flock(int(lease.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != nil {
				return nil, nil // somebody is collecting it
			}
			var st unix.Stat_t
			if err := unix.Fstat(int(lease.Fd()), &st); err != nil || st.Nlink == 0 || !killed {
				return nil, err // somebody has collected it
			}
			if _, err = w.r.GC(ctx); err != nil {
				return nil, err
			}
			if table, err = readTable(w.dir); err != nil {
				return nil, err
			}
			if now, ok := table.Scan(key); !ok || now.Word != found.Word {
				return nil, fmt.Errorf("%s is leased and was %v; after the death of its remover and a collection it is %v", key, found.Word, now.Word)
			}
			return nil, nil
		},
		"lost-manifest": func(w *worker, ctx context.Context) (*registry.Model, error) {
			key := w.own()
			if err := w.idle(ctx, key); err != nil {
				return nil, err
			}
			table, err := readTable(w.dir)
			if err != nil {
				return nil, err
			}
			if found, ok := table.Lookup(key); ok {
				_ = os.Remove(w.file(table, found.Word.Generation(), layout.ManifestExt))
			}
			_, err = w.r.GC(ctx)
			return nil, err
		},
		"load-this":   func(w *worker, ctx context.Context) (*registry.Model, error) { return w.replace(ctx, w.Key, nil) },
		"remove-this": func(w *worker, ctx context.Context) (*registry.Model, error) { return nil, w.r.Remove(ctx, w.Key) },

		// A registry that is made, and deleted, all the time.
		"fresh": func(w *worker, ctx context.Context) (*registry.Model, error) {
			dir := filepath.Join(w.Shm, fmt.Sprint("fresh-", w.rng.IntN(4)))
			if w.rng.IntN(2) == 0 {
				_ = os.RemoveAll(dir)
			}
			r, err := registry.Open(dir, &registry.Options{Slots: layout.MinSlots, Budget: doomedBudget})
			if err != nil {
				if os.IsNotExist(err) || errors.Is(err, registry.ErrNoRegistry) || errors.Is(err, registry.ErrGone) || errors.Is(err, registry.ErrNoSpace) {
					err = nil
				}
				return nil, err
			}
			return nil, r.Close()
		},
		"destroy": func(w *worker, _ context.Context) (*registry.Model, error) {
			if w.dir != w.doomed() {
				return nil, nil
			}
			if w.rng.IntN(2) == 0 {
				_ = os.RemoveAll(w.dir)
				return nil, nil
			}
			var files []string
			_ = filepath.WalkDir(w.dir, func(path string, d os.DirEntry, err error) error {
				if err == nil && !d.IsDir() {
					files = append(files, path)
				}
				return nil
			})
			if len(files) > 0 {
				_ = os.Remove(files[w.rng.IntN(len(files))])
			}
			return nil, nil
		},
	}
}

// afterDeath has another process die in an operation on an idle model, and collects.
func afterDeath(step, name string) operation {
	return func(w *worker, ctx context.Context) (*registry.Model, error) {
		key := w.own()
		if err := w.idle(ctx, key); err != nil {
			return nil, err
		}
		w.kill(step, name, key)
		_, err := w.r.GC(ctx)
		return nil, err
	}
}

// replace loads a further version of key; meanwhile runs in the load function.
func (w *worker) replace(ctx context.Context, key string, meanwhile func(context.Context) error) (*registry.Model, error) {
	src := w.source(key, registry.ChangeError)
	if meanwhile != nil {
		src = w.function(name(key, w.rng.IntN(versions)), registry.ChangeError, meanwhile)
	}
	src.Replace = true
	return w.r.GetOrLoad(ctx, key, src)
}

// idle loads a new generation of key that this process does not hold.
func (w *worker) idle(ctx context.Context, key string) error {
	m, err := w.replace(ctx, key, nil)
	if err != nil {
		return err
	}
	return m.Close()
}

func (w *worker) undo(ctx context.Context, key string) error {
	_, _, err := w.r.Undo(ctx, key)
	return err
}

// gone removes key, if it is there.
func (w *worker) gone(ctx context.Context, key string) error {
	if err := w.r.Remove(ctx, key); err != nil && !errors.Is(err, registry.ErrNotFound) {
		return err
	}
	return nil
}

// kill starts another process for one operation and has it killed at a step; it
// reports whether it was.
func (w *worker) kill(step, operation, key string) bool {
	cmd := command(job{place: w.place, Slot: w.Slot, Seed: w.rng.Uint64(), Step: step, Only: operation, Key: key})
	_ = cmd.Run()
	dead := killed(cmd)
	if dead {
		counter := wordKillsLink
		if step == "evict.mark" {
			counter = wordKillsMark
		}
		w.board.word(w.Slot, counter).Add(1)
	}
	w.board.word(w.Slot, wordDoing).Store(1) // the other one uses the same line
	return dead
}

// command starts a worker.
func command(j job) *exec.Cmd {
	text, err := json.Marshal(j)
	if err != nil {
		panic(err) // a struct of strings and numbers
	}
	role := "worker"
	if j.Shift != 0 {
		role = "shifted"
	}
	cmd := exec.Command("/proc/self/exe", role, string(text))
	cmd.Env = []string{"ONECOPY_CRASH_AT=" + j.Step, "ONECOPY_CRASH_SKIP=" + strconv.Itoa(skip(j))}
	if j.Stop {
		cmd.Env = append(cmd.Env, "ONECOPY_STOP_AT="+j.Step)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	return cmd
}

// skip is how often a worker passes its step before it is killed there.
func skip(j job) int {
	if j.Only != "" || j.Seed%4 != 0 {
		return 0
	}
	return int(j.Seed >> 8 % 4)
}

func killed(cmd *exec.Cmd) bool {
	if cmd.ProcessState == nil {
		return false
	}
	status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == unix.SIGKILL
}

// readTable reads the table as an outsider: without a lock.
func readTable(dir string) (*layout.Table, error) {
	b, err := os.ReadFile(filepath.Join(dir, layout.Folder, layout.TableFile))
	if err != nil {
		return nil, err
	}
	return layout.NewTable(b)
}

// file is the path of a generation's manifest, digests or folder.
func (w *worker) file(t *layout.Table, gen uint64, ext string) string {
	return filepath.Join(w.dir, layout.Folder, layout.ModelsDir, layout.GenName(t.Identity().Epoch, gen)+ext)
}

// waits is called before a load that may have to wait, and returns what the load
// calls when it begins. That takes a lock which has nothing to do with the
// registry, and which must be free, because whoever loads is alone.
func (w *worker) waits(key string) func(kind string) io.Closer {
	if w.dir != w.steady() { // one loader per key and life of a registry
		return func(string) io.Closer { return io.NopCloser(nil) }
	}
	wait := &wait{owner: w.board.owner(layout.Stripe(key)), begun: monotonic()}
	awaited.Store(wait)
	return func(kind string) io.Closer {
		f, err := w.alone(key, kind, wait)
		if err != nil {
			w.bad = err
			return io.NopCloser(nil)
		}
		return f
	}
}

type witness struct{ *os.File }

// Close says that this load came to its end.
func (w witness) Close() error {
	_, _ = w.WriteAt(fmt.Appendf(nil, "%-31s\n", "0 done"), 0)
	return w.File.Close()
}

func (w *worker) alone(key, kind string, wait *wait) (io.Closer, error) {
	f, err := os.OpenFile(filepath.Join(w.witness(), strings.ReplaceAll(key, "/", "-")), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	var last int
	var lastKind string
	for try := 0; ; try++ {
		taken := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
		b := make([]byte, 32)
		n, _ := f.ReadAt(b, 0)
		last, lastKind = 0, ""
		_, _ = fmt.Sscan(string(b[:n]), &last, &lastKind)
		if taken {
			break
		}
		// The kernel closes the files of a dead process one after the other: his
		// load lock may be gone before this one, but then he is dying. And whoever
		// loads a path learns of its failure only afterwards, when others may be
		// loading already: of those this finds only who never comes back.
		if running(last) && (lastKind == "function" || try > 100_000) {
			f.Close()
			return nil, fmt.Errorf("process %d is loading %s too, from a %s", last, key, lastKind)
		}
		time.Sleep(100 * time.Microsecond)
	}
	if died, ok := w.board.deathOf(wait.before); ok && died > wait.begun {
		late := uint64(max(0, wait.owned-died))
		w.board.word(w.Slot, wordWaits).Add(1)
		if late > uint64(lateAfter) {
			w.board.word(w.Slot, wordLate).Add(1)
		}
		w.board.longest(w.Slot, wordSlowest, late)
		w.board.longest(w.Slot, wordBegan, uint64(max(0, monotonic()-died)))
	}
	_, err = f.WriteAt(fmt.Appendf(nil, "%-31s\n", fmt.Sprint(os.Getpid(), " ", kind)), 0)
	return witness{f}, err
}

// running reports whether a process exists and is not about to end.
func running(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	rest := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(rest) < 7 || rest[0] == "Z" || rest[0] == "X" {
		return false
	}
	const exiting = 4 // PF_EXITING
	flags, _ := strconv.Atoi(rest[6])
	return flags&exiting == 0
}
