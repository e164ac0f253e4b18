//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// A crew member is a process that does what its test tells it: one order per line
// on stdin, one answer per line on stdout.
type crew struct{ p *proctest.Proc }

// order is one thing to do. Sources are named by text: "DIR" is a path,
// "func:VERSION:BYTES" a load function, "fail:BYTES" one that fails in the end.
type order struct {
	Do      string // load get sum close remove reject undo pin pardon gc check holders flock unflock
	Key     string
	Source  string
	Replace bool
	Timeout time.Duration // 0: one minute
	Path    string        // of flock
	Note    int64         // bytes between two notes of a load
}

type answer struct {
	Error      string
	Sentinel   string // name of the sentinel that Error is
	Generation uint64
	Origin     string // of the model's source
	Sum        string // of its bytes
	Holders    []Holder
	Problems   []Problem
}

func init() {
	proctest.Program("crew", crewMain)
	proctest.Program("victim", victimMain)
}

// crewMain serves orders until stdin ends.
func crewMain(args []string) int {
	h, err := newHand(args[0])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		var o order
		if err := json.Unmarshal(in.Bytes(), &o); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		b, _ := json.Marshal(h.do(o))
		fmt.Printf("%s\n", b)
	}
	return 0
}

// victimMain does the orders in args[1] and is expected to die on the way.
func victimMain(args []string) int {
	var orders []order
	if err := json.Unmarshal([]byte(args[1]), &orders); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	h, err := newHand(args[0])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for _, o := range orders {
		if a := h.do(o); a.Error != "" {
			fmt.Fprintf(os.Stderr, "%+v: %s\n", o, a.Error)
		}
	}
	return 0
}

// hand is a process's side of a crew.
type hand struct {
	r     *Registry
	held  map[string]*Model
	locks []*os.File
}

func newHand(dir string) (*hand, error) {
	r, err := Open(dir, nil)
	return &hand{r: r, held: map[string]*Model{}}, err
}

func (h *hand) do(o order) (a answer) {
	err := h.try(o, &a)
	if err != nil {
		a.Error = err.Error()
		for name, sentinel := range map[string]error{
			"ErrTimeout": ErrTimeout, "ErrInUse": ErrInUse, "ErrNotFound": ErrNotFound,
			"ErrSource": ErrSource, "ErrLoadFailed": ErrLoadFailed, "ErrBusy": ErrBusy,
		} {
			if errors.Is(err, sentinel) {
				a.Sentinel = name
			}
		}
	}
	return a
}

func (h *hand) try(o order, a *answer) (err error) {
	if o.Timeout == 0 {
		o.Timeout = time.Minute
	}
	ctx, cancel := context.WithTimeout(context.Background(), o.Timeout)
	defer cancel()
	switch o.Do {
	case "load", "get":
		var m *Model
		if o.Do == "get" {
			m, err = h.r.Get(o.Key)
		} else {
			if o.Note != 0 {
				noteEvery = o.Note
			}
			src := sourceOf(o.Source)
			src.Replace, src.OnChange = o.Replace, ChangeIgnore
			m, err = h.r.GetOrLoad(ctx, o.Key, src)
		}
		if err != nil {
			return err
		}
		if old := h.held[o.Key]; old != nil {
			old.Close()
		}
		h.held[o.Key] = m
		return a.describe(m)
	case "sum":
		return a.describe(h.held[o.Key])
	case "close":
		if m := h.held[o.Key]; m != nil {
			delete(h.held, o.Key)
			return m.Close()
		}
	case "remove":
		return h.r.Remove(ctx, o.Key)
	case "reject": // a rollout whose proof fails
		_, err = h.r.Rollout(ctx, o.Key, sourceOf(o.Source), func(context.Context, *Model) error {
			return errors.New("rejected as told")
		})
		return err
	case "undo":
		return undo(ctx, h.r, o.Key)
	case "pin":
		return h.r.Pin(ctx, o.Key)
	case "pardon":
		return pardon(ctx, h.r)
	case "gc":
		_, err = h.r.GC(ctx)
		return err
	case "check":
		a.Problems, err = h.r.Check(ctx, CheckOptions{Data: true})
		a.Problems = slices.DeleteFunc(a.Problems, func(p Problem) bool { return p.Note })
		return err
	case "holders":
		a.Holders, err = h.r.Holders(o.Key)
		return err
	case "flock":
		f, err := os.Open(o.Path)
		if err != nil {
			return err
		}
		h.locks = append(h.locks, f)
		return unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	case "unflock":
		for _, f := range h.locks {
			f.Close()
		}
		h.locks = nil
	default:
		return fmt.Errorf("unknown order %q", o.Do)
	}
	return nil
}

// pardon forgets the deaths of all loaders, and so the pauses after them.
func pardon(ctx context.Context, r *Registry) error {
	return r.host.each(func(p *place) error {
		return p.withTable(ctx, "edit.lock-table", func(t *tx) error {
			for slot := range t.Slots() {
				t.SetHint(slot, layout.HintDeaths, 0)
			}
			return nil
		})
	})
}

// describe reads all bytes of a model.
func (a *answer) describe(m *Model) error {
	if m == nil {
		return errors.New("no such model held")
	}
	i := m.Info()
	a.Generation, a.Origin = i.Generation, i.Origin.Path
	if i.Origin.Kind == layout.OriginFunc {
		a.Origin = i.Origin.Version
	}
	var err error
	a.Sum, err = sumModel(m)
	return err
}

func sumModel(m *Model) (string, error) {
	files := map[string][]byte{}
	for _, f := range m.Files() {
		b, err := m.Bytes(f.Path)
		if err != nil {
			return "", err
		}
		files[f.Path] = b
	}
	return sumFiles(files), nil
}

// sumFiles is the SHA-256 of names, sizes and contents.
func sumFiles(files map[string][]byte) string {
	h := sha256.New()
	for _, name := range slices.Sorted(func(yield func(string) bool) {
		for n := range files {
			if !yield(n) {
				return
			}
		}
	}) {
		fmt.Fprintf(h, "%q %d\n", name, len(files[name]))
		h.Write(files[name])
	}
	return hex.EncodeToString(h.Sum(nil))
}

// noise is n bytes that only seed decides.
func noise(seed string, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8(sha256.Sum256([]byte(seed))).Read(b)
	return b
}

// contents are the files of the model that a source named "func:..." makes.
func contents(source string) map[string][]byte {
	n, _ := strconv.Atoi(source[strings.LastIndexByte(source, ':')+1:])
	return map[string][]byte{
		"weights.bin":     noise(source, n),
		"sub/config.json": noise(source+" config", 777),
		"sub/empty":       {},
	}
}

// sourceOf makes the source that an order names.
func sourceOf(name string) Source {
	if !strings.HasPrefix(name, "func:") && !strings.HasPrefix(name, "fail:") {
		return Source{Path: name}
	}
	return Source{Version: name, Load: func(ctx context.Context, w *Writer) error {
		// One file of a declared size, the others with as many bytes as come.
		for name, b := range contents(name) {
			size := int64(-1)
			if name == "weights.bin" {
				size = int64(len(b))
			}
			f, err := w.Create(name, size)
			if err != nil {
				return err
			}
			for off := 0; off < len(b); off += 64 << 10 {
				if _, err := f.Write(b[off:min(off+64<<10, len(b))]); err != nil {
					return err
				}
			}
		}
		if strings.HasPrefix(name, "fail:") {
			return errors.New("failed as told")
		}
		return nil
	}}
}

// sourceDir writes a folder with the contents of a source named "func:..." and
// returns its path and the sum that its model has.
func sourceDir(t *testing.T, source string) (path, sum string) {
	t.Helper()
	dir := t.TempDir()
	files := contents(source)
	for name, b := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		t.Fatal(err)
	}
	return real, sumFiles(files)
}

func startCrew(t *testing.T, dir string) *crew {
	t.Helper()
	return &crew{proctest.Start(t, "crew", dir)}
}

// tell sends an order; the answer is for hear.
func (c *crew) tell(t *testing.T, o order) {
	t.Helper()
	b, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.p.Stdin.Write(append(b, '\n')); err != nil {
		t.Fatalf("crew: %v\n%s", err, c.p.Stderr())
	}
}

func (c *crew) hear(t *testing.T) (a answer) {
	t.Helper()
	line := c.p.Line(t)
	if err := json.Unmarshal([]byte(line), &a); err != nil {
		t.Fatalf("crew: %v: %s", err, line)
	}
	return a
}

func (c *crew) ask(t *testing.T, o order) answer {
	t.Helper()
	c.tell(t, o)
	return c.hear(t)
}

// must is ask for orders that have to work.
func (c *crew) must(t *testing.T, o order) answer {
	t.Helper()
	a := c.ask(t, o)
	if a.Error != "" {
		t.Fatalf("%+v: %s", o, a.Error)
	}
	return a
}

// startVictim starts a process that does the orders in the environment env.
func startVictim(t *testing.T, dir string, orders []order, env ...string) *proctest.Proc {
	t.Helper()
	b, err := json.Marshal(orders)
	if err != nil {
		t.Fatal(err)
	}
	return proctest.Env(env...).Start(t, "victim", dir, string(b))
}
