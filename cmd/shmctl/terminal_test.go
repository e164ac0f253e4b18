//go:build linux

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/google/go-cmp/cmp"
	"github.com/hinshun/vt10x"

	"github.com/onecopy/onecopy/registry"
)

// terminal is a program on a pseudo-terminal, and what a person sees there: an
// emulator reads what the program writes.
type terminal struct {
	t      *testing.T
	cmd    *exec.Cmd
	ctrl   *os.File
	screen vt10x.Terminal

	mu      sync.Mutex
	raw     bytes.Buffer
	changed chan struct{} // closed at each output
	drained chan struct{} // nobody has the terminal open any more
	exited  chan struct{}
}

func newTerminal(t *testing.T, cols, rows int, env []string, name string, args ...string) *terminal {
	t.Helper()
	x := &terminal{t: t, cmd: exec.Command(name, args...), changed: make(chan struct{}), drained: make(chan struct{}), exited: make(chan struct{})}
	x.cmd.Env = append(append(os.Environ(), "TERM=xterm-256color", "NO_COLOR=", "ONECOPY_TRUST_OWNER=0"), env...)
	var err error
	x.ctrl, err = pty.StartWithSize(x.cmd, size(cols, rows))
	if err != nil {
		t.Fatal(err)
	}
	x.screen = vt10x.New(vt10x.WithSize(cols, rows))
	go func() {
		defer close(x.drained)
		buf := make([]byte, 4096)
		for {
			n, err := x.ctrl.Read(buf)
			x.mu.Lock()
			x.raw.Write(buf[:n])
			_, _ = x.screen.Write(buf[:n])
			close(x.changed)
			x.changed = make(chan struct{})
			x.mu.Unlock()
			if err != nil { // EIO when the last holder of the terminal has gone
				return
			}
		}
	}()
	go func() {
		_ = x.cmd.Wait()
		close(x.exited)
	}()
	t.Cleanup(func() {
		_ = x.cmd.Process.Kill()
		<-x.exited
		x.ctrl.Close()
	})
	return x
}

func size(cols, rows int) *pty.Winsize {
	return &pty.Winsize{Rows: uint16(rows), Cols: uint16(cols)}
}

// lines is what the screen shows, without trailing blanks.
func (x *terminal) lines() (lines []string) {
	for l := range strings.SplitSeq(x.screen.String(), "\n") {
		lines = append(lines, strings.TrimRight(l, " "))
	}
	for len(lines) > 0 && lines[len(lines)-1] == "" {
		lines = lines[:len(lines)-1]
	}
	return lines
}

// see waits until the screen is as it should be.
func (x *terminal) see(what string, ok func(lines []string) bool) []string {
	x.t.Helper()
	hung := time.After(2 * time.Minute)
	for {
		x.mu.Lock()
		changed, lines := x.changed, x.lines()
		x.mu.Unlock()
		if ok(lines) {
			return lines
		}
		select {
		case <-changed:
		case <-x.exited:
			x.t.Fatalf("it ended (%v) before %s:\n%s", x.cmd.ProcessState, what, strings.Join(lines, "\n"))
		case <-hung:
			x.t.Fatalf("not %s:\n%s", what, strings.Join(lines, "\n"))
		}
	}
}

func (x *terminal) seeText(text string) []string {
	x.t.Helper()
	return x.see("showing "+text, func(lines []string) bool { return strings.Contains(strings.Join(lines, "\n"), text) })
}

func (x *terminal) press(keys string) {
	x.t.Helper()
	if _, err := x.ctrl.WriteString(keys); err != nil {
		x.t.Fatal(err)
	}
}

func (x *terminal) resize(cols, rows int) {
	x.t.Helper()
	x.mu.Lock()
	x.screen.Resize(cols, rows)
	x.mu.Unlock()
	if err := pty.Setsize(x.ctrl, size(cols, rows)); err != nil {
		x.t.Fatal(err)
	}
}

// end waits for the end of the program, and of its output.
func (x *terminal) end() *os.ProcessState {
	x.t.Helper()
	hung := time.After(2 * time.Minute)
	for _, c := range []chan struct{}{x.exited, x.drained} {
		select {
		case <-c:
		case <-hung:
			x.t.Fatalf("it does not end:\n%s", strings.Join(x.lines(), "\n"))
		}
	}
	return x.cmd.ProcessState
}

// output is all that was written until the end of the program.
func (x *terminal) output() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.raw.String()
}

// demoRegistry has models of the given sizes and returns its directory.
func demoRegistry(t *testing.T, sizes map[string]int64) string {
	t.Helper()
	base, err := os.MkdirTemp("/dev/shm", "onecopy-test-")
	if err != nil {
		t.Skipf("no /dev/shm: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	dir := filepath.Join(base, "r")
	r, err := registry.Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for key, n := range sizes {
		src := registry.Source{Version: "1", Load: func(_ context.Context, w *registry.Writer) error {
			f, err := w.Create("model.safetensors", n)
			if err != nil {
				return err
			}
			_, err = io.Copy(f, io.LimitReader(zeros{}, n))
			return err
		}}
		m, err := r.GetOrLoad(t.Context(), key, src)
		if err != nil {
			t.Fatal(err)
		}
		m.Close()
	}
	return dir
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// startHolders starts processes that hold a model with all of its pages.
func startHolders(t *testing.T, dir, key string, n int) {
	t.Helper()
	for i := range n {
		fifo := filepath.Join(t.TempDir(), "ready")
		if err := syscall.Mkfifo(fifo, 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("holdmodel", key, fifo)
		cmd.Env = append(os.Environ(), "ONECOPY_DIR="+dir)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
		b, err := os.ReadFile(fifo)
		if err != nil || !bytes.HasPrefix(b, []byte("ready")) {
			t.Fatalf("holder %d: %s %v", i, b, err)
		}
	}
}

// keysOf are the first words of the rows.
func keysOf(lines []string) (keys []string) {
	for i, l := range lines {
		if strings.HasPrefix(l, "KEY ") {
			for _, row := range lines[i+1:] {
				keys = append(keys, strings.Fields(row)[0])
			}
		}
	}
	return keys
}

// The live view: every key that sorts, in the order it says, until q.
func TestTopLive(t *testing.T) {
	dir := demoRegistry(t, map[string]int64{"ant": 3000, "bert": 9000, "cat": 5000})
	startHolders(t, dir, "cat", 2)
	startHolders(t, dir, "ant", 1)
	x := newTerminal(t, 120, 20, nil, "shmctl", "top", "--dir", dir, "--interval", "50ms")
	for _, s := range []struct {
		press, by string
		want      []string
	}{
		{"", "size", []string{"bert", "cat", "ant"}},
		{"k", "key", []string{"ant", "bert", "cat"}},
		{"h", "holders", []string{"cat", "ant", "bert"}},
		{"s", "size", []string{"bert", "cat", "ant"}},
		{"r", "resident", []string{"cat", "ant", "bert"}},
		{"p", "pss", []string{"cat", "ant", "bert"}},
		{"g", "age", nil},
		{"a", "attaches", nil},
	} {
		x.press(s.press)
		lines := x.see("sorted by "+s.by, func(lines []string) bool {
			text := strings.Join(lines, "\n")
			return strings.Contains(text, "sorted by "+s.by+";") && len(keysOf(lines)) == 3 && strings.Contains(text, "3 models, ")
		})
		if got := keysOf(lines); s.want != nil && !slices.Equal(got, s.want) {
			t.Errorf("by %s: %v, want %v", s.by, got, s.want)
		}
	}
	// It is live: a holder more is seen.
	startHolders(t, dir, "bert", 1)
	row := regexp.MustCompile(`(?m)^bert +ready +\d+ +8\.8 KiB +12 KiB +12 KiB +1 `)
	x.see("one holder of bert", func(lines []string) bool { return row.MatchString(strings.Join(lines, "\n")) })
	x.press("q")
	if s := x.end(); s.ExitCode() != 0 {
		t.Errorf("%v", s)
	}
	if !strings.Contains(x.output(), "\x1b[?1049l") {
		t.Error("the screen that was there before is not put back")
	}
}

// Before it has looked it says nothing about the registry.
func TestTopBeforeTheFirstLook(t *testing.T) {
	m := &topModel{a: newApp(nil, nil, nil, nil)}
	if first := m.View().Content; strings.Contains(first, "registry") || !strings.Contains(first, "KEY") {
		t.Errorf("%q", first)
	}
}

// A window may have any size, and change it.
func TestTopInAnyWindow(t *testing.T) {
	dir := demoRegistry(t, map[string]int64{"ant": 3000, "bert": 9000, "cat": 5000, "dog": 1})
	x := newTerminal(t, 1, 1, nil, "shmctl", "top", "--dir", dir, "--interval", "20ms")
	x.see("anything", func(lines []string) bool { return len(lines) > 0 })
	for _, s := range [][2]int{{20, 3}, {3, 40}, {200, 2}, {40, 6}} {
		x.resize(s[0], s[1])
		x.see(fmt.Sprint("fitting into ", s), func(lines []string) bool {
			return len(lines) > 0 && lines[0] != "" && strings.HasPrefix("4 models", lines[0][:min(8, len(lines[0]))])
		})
	}
	x.resize(40, 6)
	lines := x.seeText("and 3 more")
	if len(lines) > 6 {
		t.Errorf("%d lines in 6:\n%s", len(lines), strings.Join(lines, "\n"))
	}
	x.resize(120, 20)
	x.see("all", func(lines []string) bool { return len(keysOf(lines)) == 4 })
	x.press("\x03") // ctrl-C is a key here
	if s := x.end(); s.ExitCode() != 0 {
		t.Errorf("%v", s)
	}
}

// A signal ends it as it ends every command, and the terminal is put back.
func TestTopEndsBySignal(t *testing.T) {
	dir := demoRegistry(t, map[string]int64{"ant": 3000})
	x := newTerminal(t, 80, 20, nil, "shmctl", "top", "--dir", dir)
	x.seeText("ant")
	if err := x.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if s := x.end(); s.ExitCode() != exitInterrupted {
		t.Errorf("%v", s)
	}
	if !strings.Contains(x.output(), "\x1b[?1049l") {
		t.Error("the screen that was there before is not put back")
	}
}

// When its window is closed, nobody looks: it does not stay behind, not even if
// the signal that says so is ignored.
func TestTopWithoutItsTerminal(t *testing.T) {
	dir := demoRegistry(t, map[string]int64{"ant": 3000})
	for name, argv := range map[string][]string{
		"hangup":  {"shmctl", "top", "--interval", "20ms"},
		"ignored": {"sh", "-c", "trap '' HUP; exec shmctl top --interval 20ms"},
	} {
		t.Run(name, func(t *testing.T) {
			x := newTerminal(t, 80, 20, []string{"ONECOPY_DIR=" + dir}, argv[0], argv[1:]...)
			x.seeText("ant")
			x.ctrl.Close()
			if s := x.end(); s.ExitCode() == 0 {
				t.Errorf("%v", s)
			}
		})
	}
}

// A model that goes, and a registry that goes, do not end it.
func TestTopFollowsTheRegistry(t *testing.T) {
	dir := demoRegistry(t, map[string]int64{"ant": 3000})
	x := newTerminal(t, 80, 20, nil, "shmctl", "top", "--dir", dir, "--interval", "20ms")
	x.seeText("1 model,")
	if out, err := exec.Command("shmctl", "rm", "--yes", "--dir", dir, "ant").CombinedOutput(); err != nil {
		t.Fatalf("%s %v", out, err)
	}
	x.seeText("0 models,")
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	x.seeText("no registry at")
	x.press("q")
	x.end()
}

// The picture in the documents: go test ./cmd/shmctl -run TestPicture -update
//
// It is a photograph of top in a terminal, with real models and processes. Times
// and pids differ from one to the next, so only what does not is compared.
func TestPicture(t *testing.T) {
	const path = "../../docs/top.svg"
	if *update {
		dir := demoRegistry(t, map[string]int64{
			"all-MiniLM-L6-v2": 90_868_376, "smollm2-135m-q4": 91_700_000, "bert-int8": 23_026_053, "whisper-tiny": 39_000_000,
		})
		startHolders(t, dir, "all-MiniLM-L6-v2", 3)
		startHolders(t, dir, "bert-int8", 2)
		if out, err := exec.Command("shmctl", "pin", "--dir", dir, "smollm2-135m-q4").CombinedOutput(); err != nil {
			t.Fatalf("%s %v", out, err)
		}
		x := newTerminal(t, 100, 10, nil, "shmctl", "top", "--dir", dir, "--interval", "100ms", "--sort", "holders")
		x.seeText(" 0.0 ") // the second sample: there is a rate
		x.mu.Lock()
		svg := picture(x.screen)
		x.mu.Unlock()
		if err := os.WriteFile(path, svg, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range append([]string{"sorted by holders; k s r p h a g sort, q quits", "all-MiniLM-L6-v2"}, topHeader...) {
		if !bytes.Contains(b, []byte(want)) {
			t.Errorf("%s is stale, it has no %q: go test ./cmd/shmctl -run TestPicture -update", path, want)
		}
	}
}

// What picture draws is what is on the screen, with its weights.
func TestPictureOfText(t *testing.T) {
	screen := vt10x.New(vt10x.WithSize(20, 3))
	if _, err := screen.Write([]byte("a <b> & c\r\n\x1b[1mbold\x1b[0m thin")); err != nil {
		t.Fatal(err)
	}
	const want = `<svg xmlns="http://www.w3.org/2000/svg" width="200" height="71" viewBox="0 0 200 71" font-family="ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace" font-size="14">
<rect width="100%" height="100%" rx="6" fill="#101418"/>
<g fill="#d8dee6" xml:space="preserve">
<text x="16" y="27" textLength="76">a &lt;b&gt; &amp; c</text>
<text x="16" y="44" textLength="34" font-weight="bold" fill="#ffffff">bold</text>
<text x="58" y="44" textLength="34">thin</text>
</g>
</svg>
`
	if d := cmp.Diff(want, string(picture(screen))); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}
