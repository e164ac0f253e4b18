//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"encoding/binary"
	"fmt"
	"go/ast"
	goparser "go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// damages are things that Check finds, each with what it must say. The models "a"
// and "b", of two files each, are there and idle.
var damages = map[string]struct {
	do   func(t *testing.T, r *Registry, a Info)
	want []string // "kind: part of the text", each of them and nothing else
}{
	"a state that nobody knows": {func(t *testing.T, r *Registry, a Info) {
		setWord(t, r.Dir(), "a", layout.Word(99<<56)|layout.MakeWord(layout.Free, a.Generation))
	}, []string{"table: state 99 is unknown"}},
	"a generation that was never given out": {func(t *testing.T, r *Registry, a Info) {
		setWord(t, r.Dir(), "a", layout.MakeWord(layout.Ready, 1<<40))
	}, []string{"table: generation 1099511627776 was never given out", "manifest: missing although", "leftover: no slot names this generation"}},
	"a generation counter that is used up": {func(t *testing.T, r *Registry, a Info) {
		editTable(t, r.Dir(), func(e layout.Editor) { e.SetGeneration(layout.MaxGen) })
	}, []string{"table: the generation counter says"}},
	"two slots of one key": {func(t *testing.T, r *Registry, a Info) {
		editTable(t, r.Dir(), func(e layout.Editor) { e.SetKey(slotOf(t, e, "b"), "a") })
	}, []string{`table: key "a" is also in slot`, "table: leads to no slot", "table: the index does not lead to it", `manifest: describes key "b"`}},
	"two slots of one generation": {func(t *testing.T, r *Registry, a Info) {
		setWord(t, r.Dir(), "b", layout.MakeWord(layout.Ready, a.Generation))
	}, []string{"table: generation 1 is also in slot", `manifest: describes key "a"`, `payload: get "b": damaged`, "leftover: no slot names this generation"}},
	"a key that is not in the index": {func(t *testing.T, r *Registry, a Info) {
		editTable(t, r.Dir(), func(e layout.Editor) { e.IndexDelete(slotOf(t, e, "a"), "a") })
	}, []string{"table: the index does not lead to it"}},
	"an entry too many in the index": {func(t *testing.T, r *Registry, a Info) {
		editTable(t, r.Dir(), func(e layout.Editor) { e.IndexInsert(7, "nobody") })
	}, []string{"table: leads to no slot"}},
	"another version": {func(t *testing.T, r *Registry, a Info) {
		must(t, os.Mkdir(filepath.Join(r.Dir(), "v7"), 0o700))
	}, []string{"version: holds another layout version"}},
	"a name beside the versions": {func(t *testing.T, r *Registry, a Info) {
		writeFile(t, filepath.Join(r.Dir(), "notes.txt"), nil)
	}, []string{"leftover: belongs to no layout version"}},
	"a dead loader": {func(t *testing.T, r *Registry, a Info) {
		startStuck(t, r.Dir(), "k", "").Kill()
	}, []string{"loading: its loader died"}},
	"a dead loader of a replacement": {func(t *testing.T, r *Registry, a Info) {
		setHints(t, r.Dir(), "a", map[layout.Hint]uint64{layout.HintLoadStart: now()})
	}, []string{"loading: the loader of a replacement died"}},
	"a dead remover": {func(t *testing.T, r *Registry, a Info) {
		setWord(t, r.Dir(), "a", layout.MakeWord(layout.Evicting, a.Generation))
	}, []string{"evicting: its remover died"}},
	"a manifest that is gone": {func(t *testing.T, r *Registry, a Info) {
		removeFile(t, genPath(r.Dir(), a, layout.ManifestExt))
	}, []string{"manifest: missing although the slot is READY"}},
	"garbage as manifest": {func(t *testing.T, r *Registry, a Info) {
		swap(t, genPath(r.Dir(), a, layout.ManifestExt), []byte("garbage"))
	}, []string{"manifest: damaged", "payload: damaged"}},
	"the manifest of another key": {func(t *testing.T, r *Registry, a Info) {
		b, err := r.Entry("b")
		must(t, err)
		text, err := os.ReadFile(genPath(r.Dir(), *b.Info, layout.ManifestExt))
		must(t, err)
		swap(t, genPath(r.Dir(), a, layout.ManifestExt), text)
	}, []string{`manifest: describes key "b"`, "payload: describes key"}},
	"a FIFO as manifest": {func(t *testing.T, r *Registry, a Info) {
		removeFile(t, genPath(r.Dir(), a, layout.ManifestExt))
		must(t, unix.Mkfifo(genPath(r.Dir(), a, layout.ManifestExt), 0o444))
	}, []string{"manifest: is a FIFO", "payload: is a FIFO"}},
	"digests that are gone": {func(t *testing.T, r *Registry, a Info) {
		removeFile(t, genPath(r.Dir(), a, layout.DigestsExt))
	}, []string{"digest: missing", "digest: no such file"}},
	"a file that is gone": {func(t *testing.T, r *Registry, a Info) {
		removeFile(t, filepath.Join(a.Path, "one"))
	}, []string{"payload: missing: a third party deleted it", "digest: no such file"}},
	"a file in a folder's place": {func(t *testing.T, r *Registry, a Info) {
		must(t, os.RemoveAll(a.Path))
		must(t, os.WriteFile(a.Path, nil, 0o444))
	}, []string{"payload: not a directory", "digest: not a directory"}},
	"a link in a file's place": {func(t *testing.T, r *Registry, a Info) {
		removeFile(t, filepath.Join(a.Path, "one"))
		must(t, os.Symlink("/etc/passwd", filepath.Join(a.Path, "one")))
	}, []string{"payload: is no regular file", "digest: is a symbolic link"}},
	"a file that is shorter": {func(t *testing.T, r *Registry, a Info) {
		must(t, os.Truncate(filepath.Join(a.Path, "one"), 10))
	}, []string{"payload: has 10 bytes, published were 1000", "digest: has 10 bytes"}},
	"a file that can be written": {func(t *testing.T, r *Registry, a Info) {
		must(t, os.Chmod(filepath.Join(a.Path, "one"), 0o644))
	}, []string{"payload: is writable (mode 0644)"}},
	"a file too many": {func(t *testing.T, r *Registry, a Info) {
		writeFile(t, filepath.Join(a.Path, "more"), nil)
		writeFile(t, filepath.Join(a.Path, "sub", "more"), nil)
	}, []string{"payload: is none of the model's files"}},
	"a byte that was changed": {func(t *testing.T, r *Registry, a Info) {
		path := filepath.Join(a.Path, "one")
		must(t, os.Chmod(path, 0o600))
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		must(t, err)
		_, err = f.WriteAt([]byte{^randomBytes(1, 1000)[500]}, 500)
		must(t, err)
		must(t, f.Close())
		must(t, os.Chmod(path, 0o444))
	}, []string{"digest: one: chunk 0"}},
	"a generation that nobody names": {func(t *testing.T, r *Registry, a Info) {
		setWord(t, r.Dir(), "a", layout.MakeWord(layout.Free, a.Generation))
	}, []string{"leftover: no slot names this generation and nobody leases it", "table: leads to no slot"}},
	"a manifest that cannot be opened, and nobody names": {func(t *testing.T, r *Registry, a Info) {
		must(t, os.Symlink("/etc/passwd", v1(r.Dir(), layout.ModelsDir, layout.GenName(a.Epoch, 999)+layout.ManifestExt)))
	}, []string{"leftover: is a symbolic link"}},
	"a name that means nothing": {func(t *testing.T, r *Registry, a Info) {
		writeFile(t, v1(r.Dir(), layout.ModelsDir, "notes.txt"), nil)
	}, []string{"leftover: belongs to no generation"}},
	"a link in a lock file's place": {func(t *testing.T, r *Registry, a Info) {
		removeAll(t, keyLockPath(r.Dir(), "a"))
		must(t, os.Symlink("/etc/passwd", keyLockPath(r.Dir(), "a")))
	}, []string{"lock: is no regular file"}},
	"somebody else's lock file": {func(t *testing.T, r *Registry, a Info) {
		needRoot(t)
		must(t, os.Chown(keyLockPath(r.Dir(), "a"), foreignUID, -1))
	}, []string{"lock: belongs to uid 12345"}},
	"a stopped process with the table lock": {func(t *testing.T, r *Registry, a Info) {
		p := startStopped(t, r.Dir(), "a")
		t.Cleanup(p.Kill)
	}, []string{"lock: the table lock could not be had for a second"}},
}

// startStopped starts a process that holds T and is stopped.
func startStopped(t *testing.T, dir, key string) *proctest.Proc {
	t.Helper()
	p := proctest.Start(t, tableHolder, dir)
	p.Line(t)
	p.Stop()
	return p
}

// tableHolder holds the table lock until stdin ends.
var tableHolder = child("table-holder", func(args []string) error {
	f, err := os.Open(v1(args[0], layout.LocksDir, layout.TableLock))
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	fmt.Println("locked")
	_, err = os.Stdin.Read(make([]byte, 1))
	return err
})

func slotOf(t testing.TB, e layout.Editor, key string) int {
	t.Helper()
	f, ok := e.Scan(key)
	if !ok {
		t.Fatalf("no slot names %q", key)
	}
	return f.Slot
}

// setWord stores a slot's word as no writer of ours would.
func setWord(t *testing.T, dir, key string, w layout.Word) {
	t.Helper()
	b, err := os.ReadFile(tablePath(dir))
	must(t, err)
	e, err := layout.NewEditor(b)
	must(t, err)
	f, err := os.OpenFile(tablePath(dir), os.O_WRONLY, 0)
	must(t, err)
	defer f.Close()
	_, err = f.WriteAt(binary.LittleEndian.AppendUint64(nil, uint64(w)), int64(layout.SlotsOffset(e.Slots())+slotOf(t, e, key)*layout.SlotSize))
	must(t, err)
}

// TestEveryProblemHasARepair breaks a registry in every way that Check knows. Check
// has to list it, and doing what it says has to repair it.
func TestEveryProblemHasARepair(t *testing.T) {
	files := map[string][]byte{"one": randomBytes(1, 1000), "two": randomBytes(2, 1000)}
	var seen []Problem
	for name, c := range damages {
		t.Run(name, func(t *testing.T) {
			r := newRegistry(t, nil)
			a := mustLoad(t, r, "a", madeSource("a", files))
			must(t, a.Close())
			must(t, mustLoad(t, r, "b", madeSource("b", files)).Close())
			c.do(t, r, a.Info())
			ps, err := r.Check(ctxb, CheckOptions{Data: true})
			must(t, err)
			for _, p := range ps {
				if !slices.ContainsFunc(c.want, func(w string) bool { return says(p, w) }) {
					t.Errorf("not expected: %+v", p)
				}
			}
			for _, w := range c.want {
				if !slices.ContainsFunc(ps, func(p Problem) bool { return says(p, w) }) {
					t.Errorf("Check lacks %q: %+v", w, ps)
				}
			}
			seen = append(seen, ps...)
			// What gc repairs first: the rest may be gone with it.
			for _, gc := range []bool{true, false} {
				for _, p := range ps {
					if !p.Note && gc == (p.Repair == repairGC) {
						follow(t, r, p)
					}
				}
				ps, err = r.Check(ctxb, CheckOptions{Data: true})
				must(t, err)
			}
			for _, p := range ps {
				if !p.Note {
					t.Errorf("still: %+v", p)
				}
			}
			for key := range map[string]int{"a": 0, "b": 0} {
				m := mustLoad(t, r, key, madeSource(key, files))
				wantFiles(t, m, files)
				must(t, m.Close())
			}
			removeAll(t, filepath.Join(r.Dir(), "v7"))
		})
	}
	for _, p := range reportable(t) {
		if !slices.ContainsFunc(seen, p.is) {
			t.Errorf("nothing here makes Check report %s %q", p.kind, p.text)
		}
	}
}

func says(p Problem, want string) bool {
	kind, text, _ := strings.Cut(want, ": ")
	return p.Kind == kind && strings.Contains(p.Text, text)
}

// follow does what a problem's repair says.
func follow(t *testing.T, r *Registry, p Problem) {
	t.Helper()
	switch p.Repair {
	case repairGC:
		_, err := r.GC(ctxb)
		must(t, err)
	case repairReload:
		if err := r.Remove(ctxb, p.Key); err != nil {
			wantErr(t, err, ErrNotFound) // by the repair of another problem
		}
	case repairUnlink:
		removeAll(t, p.Path)
		_, err := r.GC(ctxb)
		must(t, err)
	case repairLock, repairName:
		removeAll(t, p.Path)
	case repairMode:
		must(t, os.Chmod(p.Path, 0o444))
	case repairHolder:
		for _, l := range holdersOfLock(t, p.Path) {
			must(t, unix.Kill(l, unix.SIGKILL))
		}
		awaitUnlocked(t, p.Path)
	default:
		t.Fatalf("%+v: no repair", p)
	}
}

// holdersOfLock are the processes that fuser would name.
func holdersOfLock(t *testing.T, path string) (pids []int) {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*/fd/*")
	must(t, err)
	for _, fd := range procs {
		if to, err := os.Readlink(fd); err == nil && to == path {
			pid, err := strconv.Atoi(strings.Split(fd, "/")[2])
			must(t, err)
			if pid != os.Getpid() {
				pids = append(pids, pid)
			}
		}
	}
	if len(pids) == 0 {
		t.Fatalf("nobody has %s open", path)
	}
	return pids
}

// awaitUnlocked waits, in the kernel, until nobody holds the lock of a file.
func awaitUnlocked(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	must(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
}

// reported is what a call of add can report.
type reported struct {
	kind, text string
	form       *regexp.Regexp
}

func (r reported) is(p Problem) bool { return p.Kind == r.kind && r.form.MatchString(p.Text) }

// reportable reads from the source what Check can report: its calls of add.
func reportable(t *testing.T) (all []reported) {
	t.Helper()
	text := func(e ast.Expr) string {
		lit, ok := e.(*ast.BasicLit)
		if !ok {
			t.Fatalf("an argument of add that is no literal: %#v", e)
		}
		s, err := strconv.Unquote(lit.Value)
		must(t, err)
		return s
	}
	verb := regexp.MustCompile(`%#?[a-z]`)
	visit := func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		if sel, ok := call.Fun.(*ast.SelectorExpr); !ok || sel.Sel.Name != "add" || len(call.Args) < 5 {
			return true
		}
		kind, form := text(call.Args[0]), text(call.Args[4])
		if _, none := call.Args[3].(*ast.BasicLit); none {
			t.Errorf("%s %q: its repair is no constant that this test knows", kind, form)
		}
		parts := verb.Split(form, -1)
		for i := range parts {
			parts[i] = regexp.QuoteMeta(parts[i])
		}
		all = append(all, reported{kind, form, regexp.MustCompile("^(?s:" + strings.Join(parts, ".*") + ")$")})
		return true
	}
	for _, name := range []string{"check_linux.go", "check_files_linux.go"} {
		tree, err := goparser.ParseFile(token.NewFileSet(), name, nil, 0)
		must(t, err)
		ast.Inspect(tree, visit)
	}
	if len(all) < 15 {
		t.Errorf("only %d calls of add", len(all))
	}
	return all
}

// Stats count what went wrong around this process. (That they count fallbacks is
// shown by TestBadDays.)
func TestStatsCountTrouble(t *testing.T) {
	r := newRegistry(t, nil)
	startStuck(t, r.Dir(), "k", "").Kill()
	m := mustLoad(t, r, "k", small("1"))
	if s := stats(t, r); s.Takeovers != 1 || s.Reclaimed != 1 || s.Leftovers != 0 || s.Retries != 0 {
		t.Errorf("after a dead loader: %+v", s)
	}

	setWord(t, r.Dir(), "k", layout.MakeWord(layout.Evicting, m.Generation()))
	_, err := r.GC(ctxb)
	must(t, err)
	if s := stats(t, r); s.Reclaimed != 2 {
		t.Errorf("after a dead remover whose work was undone: %+v", s)
	}
	must(t, m.Close())
	setWord(t, r.Dir(), "k", layout.MakeWord(layout.Evicting, m.Generation()))
	writeFile(t, v1(r.Dir(), layout.ModelsDir, "notes.txt"), nil)
	_, err = r.GC(ctxb)
	must(t, err)
	s := stats(t, r)
	if s.Reclaimed != 3 || s.Leftovers != 1 {
		t.Errorf("after a dead remover, and a leftover: %+v", s)
	}
	c, err := r.Counters()
	must(t, err)
	if c.Reclaimed != s.Reclaimed || c.Leftovers != s.Leftovers || c.Takeovers != s.Takeovers {
		t.Errorf("this process alone did it, but all did %+v", c)
	}

	// A lock that somebody holds on a manifest is tried again three times.
	m = mustLoad(t, r, "k", small("1"))
	must(t, m.Close())
	f, err := os.Open(genPath(r.Dir(), m.Info(), layout.ManifestExt))
	must(t, err)
	defer f.Close()
	must(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
	_, err = r.Get("k")
	wantErr(t, err, ErrBusy)
	if s := stats(t, r); s.Retries != 3 {
		t.Errorf("%d retries, want 3", s.Retries)
	}
}
