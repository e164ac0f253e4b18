//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/registry"
	"github.com/rogpeppe/go-internal/testscript"
)

// The scripts run real processes: the test binary, called by one of these
// names, is that program.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"shmctl":    shmctlMain,
		"as-nobody": asNobody,
		"holdmodel": holdModel,
		"closefds":  closeFDs,
		"unleased":  unleased,
		"report":    reportExit,
		"normjson":  normJSON,
		"on-pty":    onPTY,
		"unloaded":  unloaded,
		"gone":      gone,
		"looking":   looking,
		"state":     state,
		"scrape":    scrape,
		"conforms":  conforms,
	})
}

var update = flag.Bool("update", false, "rewrite the expected output in the scripts")

func TestScripts(t *testing.T) {
	if _, err := os.Stat("/dev/shm"); err != nil {
		t.Skipf("no /dev/shm: %v", err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                "testdata/script",
		RequireUniqueNames: true,
		UpdateScripts:      *update,
		Setup: func(e *testscript.Env) error {
			dir, err := os.MkdirTemp("/dev/shm", "onecopy-test-")
			if err != nil {
				return err
			}
			e.Defer(func() { os.RemoveAll(dir) })
			// The registry is a directory that does not exist yet, so that
			// scripts see it being created.
			e.Setenv("ONECOPY_DIR", dir+"/r")
			e.Setenv("TERM", "xterm")
			schemas, err := filepath.Abs(schemaDir)
			if err != nil {
				return err
			}
			e.Setenv("SCHEMAS", schemas)
			e.Setenv("TZ", "Asia/Tokyo")            // output is UTC wherever it is made
			e.Setenv("GORACE", "atexit_sleep_ms=0") // the race detector's second at each exit
			return nil
		},
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "root":
				return os.Geteuid() == 0, nil
			case "pidns": // may PID namespaces be made here?
				return exec.Command("unshare", "--pid", "--fork", "--mount-proc", "true").Run() == nil, nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":   scriptExits,
			"capture": scriptCapture,
		},
	})
}

// scriptExits runs a program that must end with an exit code: exits 5 shmctl rm bert
func scriptExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits code program [args...]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var ee *exec.ExitError
		if !errors.As(err, &ee) {
			ts.Fatalf("%v", err)
		}
		if got = ee.ExitCode(); got < 0 {
			ts.Fatalf("%s: %v", args[1], err)
		}
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// scriptCapture keeps a piece of text: capture VARIABLE file regexp
func scriptCapture(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: capture variable file regexp")
	}
	m := regexp.MustCompile(args[2]).FindStringSubmatch(ts.ReadFile(args[1]))
	if len(m) != 2 {
		ts.Fatalf("%s: no match for %s with one group", args[1], args[2])
	}
	ts.Setenv(args[0], m[1])
}

// shmctlMain is the program itself, with loads that can be held up:
//
//	TEST_HOLD=p      a load tells FIFO p.loading that it has begun, and goes
//	                 on when FIFO p.go says so, or when it is cancelled, which
//	                 it tells FIFO p.cancelled
//	TEST_HANG=1      ... but does not go on after it was cancelled
//	TEST_WAITING=p   a load that waits for another process tells FIFO p
func shmctlMain() {
	a := newApp(os.Stdin, os.Stdout, os.Stderr, os.Environ())
	if p := os.Getenv("TEST_HOLD"); p != "" {
		var once sync.Once
		a.progress = func(ctx context.Context, _, _ int64) { once.Do(func() { hold(ctx, p) }) }
	}
	if p := os.Getenv("TEST_WAITING"); p != "" {
		a.waiting = func() { tell(p, "waiting") }
	}
	os.Exit(a.run(os.Args[1:]))
}

func hold(ctx context.Context, p string) {
	tell(p+".loading", "loading")
	proceed := make(chan struct{})
	go func() {
		os.ReadFile(p + ".go")
		close(proceed)
	}()
	select {
	case <-proceed:
	case <-ctx.Done():
		tell(p+".cancelled", "cancelled")
		if os.Getenv("TEST_HANG") != "" {
			time.Sleep(time.Hour)
		}
	}
}

// tell writes to a FIFO; it waits until somebody reads.
func tell(fifo, text string) {
	if err := os.WriteFile(fifo, []byte(text+"\n"), 0); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
}

// as-nobody ARGS... is shmctl run by another user.
func asNobody() {
	const nobody = 65534
	for _, err := range []error{syscall.Setgroups(nil), syscall.Setgid(nobody), syscall.Setuid(nobody)} {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(99)
		}
	}
	shmctlMain()
}

var touched byte // keeps the compiler from leaving reads out

// holdmodel KEY FIFO attaches a model, tells FIFO so and keeps it until killed.
func holdModel() {
	m, err := func() (*registry.Model, error) {
		r, err := registry.Open(registry.DefaultDir(), &registry.Options{MustExist: true})
		if err != nil {
			return nil, err
		}
		return r.Get(os.Args[1])
	}()
	if err != nil {
		tell(os.Args[2], err.Error())
		os.Exit(1)
	}
	for _, f := range m.Files() { // resident, so that there is something to see
		b, err := m.Bytes(f.Path)
		if err != nil {
			tell(os.Args[2], err.Error())
			os.Exit(1)
		}
		for i := 0; i < len(b); i += 4096 {
			touched += b[i]
		}
	}
	tell(os.Args[2], fmt.Sprintf("ready %d", os.Getpid()))
	time.Sleep(time.Hour)
}

// closefds FIFO closes every descriptor it does not know, as daemons do.
func closeFDs() {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	for _, e := range fds {
		fd, _ := strconv.Atoi(e.Name())
		link, _ := os.Readlink("/proc/self/fd/" + e.Name())
		if fd > 2 && !strings.HasPrefix(link, "anon_inode:") { // the runtime's own
			syscall.Close(fd)
		}
	}
	tell(os.Args[1], "ready")
	time.Sleep(time.Hour)
}

// unleased waits until nobody holds the only model of the registry.
func unleased() {
	names, _ := filepath.Glob(filepath.Join(registry.DefaultDir(), layout.Folder, layout.ModelsDir, "*"+layout.ManifestExt))
	if len(names) != 1 {
		fmt.Fprintln(os.Stderr, "want one manifest, got", names)
		os.Exit(1)
	}
	fd, err := syscall.Open(names[0], syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err == nil {
		for err = syscall.EINTR; err == syscall.EINTR; {
			err = syscall.Flock(fd, syscall.LOCK_EX)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// report FILE PROGRAM ARGS... runs a program, hands signals on to it, and
// writes its exit code into FILE.
func reportExit() {
	runtime.LockOSThread() // Pdeathsig is about the thread
	cmd := exec.Command(os.Args[2], os.Args[3:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	c := make(chan os.Signal, 2)
	signal.Notify(c, os.Interrupt, syscall.SIGTERM)
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	go func() {
		for s := range c {
			cmd.Process.Signal(s)
		}
	}()
	cmd.Wait()
	text := cmd.ProcessState.String()
	if err := os.WriteFile(os.Args[1], []byte(text+"\n"), 0o666); err != nil {
		os.Exit(1)
	}
}

var genName = regexp.MustCompile(`[0-9a-f]{16}-([0-9]+)`)

// normjson rewrites JSON documents so that what differs from run to run and
// from machine to machine does not, and sorts their members.
func normJSON() {
	d := json.NewDecoder(os.Stdin)
	d.UseNumber()
	for {
		var v any
		err := d.Decode(&v)
		if err == io.EOF {
			return
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		b, _ := json.MarshalIndent(norm("", v), "", "  ")
		fmt.Printf("%s\n", b)
	}
}

func norm(name string, v any) any {
	switch name {
	case "charges", "needs", "outside_not_visible": // what is known depends on who asks
		return strings.ToUpper(name)
	}
	switch v := v.(type) {
	case map[string]any:
		for k := range v {
			v[k] = norm(k, v[k])
		}
		return v
	case []any:
		for i := range v {
			v[i] = norm(name, v[i])
		}
		return v
	case json.Number:
		switch name {
		case "load_seconds", "pid", "uid", "resident_bytes", "proportional_bytes", "budget_bytes", "free_bytes",
			"size_bytes", "used_bytes", "model_bytes", "overhead_bytes", "held_bytes", "value", "hidden_processes", "freed_bytes", "collapsed_bytes", "copied_bytes", "direct_bytes", "fallbacks",
			"seconds", "examined_processes", "not_visible_processes", "not_visible_same_user", "attached_resident_bytes":
			return "NUMBER"
		}
		return v
	case string:
		if _, err := time.Parse(time.RFC3339Nano, v); err == nil {
			if !strings.HasSuffix(v, "Z") {
				return "NOT UTC: " + v
			}
			return "TIME"
		}
		switch name {
		case "epoch", "command", "cgroup", "hex", "go", "platform", "commit", "date":
			return strings.ToUpper(name)
		case "text": // of a raw field
			if strings.Trim(v, "0123456789abcdef") == "" {
				return "NUMBER"
			}
		}
		v = strings.ReplaceAll(v, os.Getenv("ONECOPY_DIR"), "$ONECOPY_DIR")
		v = strings.ReplaceAll(v, os.Getenv("WORK"), "$WORK")
		return genName.ReplaceAllString(v, "EPOCH-$1")
	}
	return v
}

// on-pty PROGRAM ARGS... runs a program with stdout and stderr on a terminal of
// 200 columns, and writes what came to it.
func onPTY() {
	code, out, err := runOnPTY(os.Args[1], os.Args[2:]...)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Print(out)
	os.Exit(code)
}

func runOnPTY(name string, args ...string) (code int, out string, err error) {
	ctrl, tty, err := pty.Open()
	if err != nil {
		return 0, "", err
	}
	defer ctrl.Close()
	if err := pty.Setsize(tty, &pty.Winsize{Rows: 40, Cols: 200}); err != nil {
		tty.Close()
		return 0, "", err
	}
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = tty, tty
	if err := cmd.Start(); err != nil {
		tty.Close()
		return 0, "", err
	}
	tty.Close()
	b, _ := io.ReadAll(ctrl) // ends with EIO when the last holder of the terminal has gone
	cmd.Wait()
	return cmd.ProcessState.ExitCode(), string(b), nil
}

// unloaded KEY waits until a model is gone.
func unloaded() {
	for {
		r, err := registry.Open(registry.DefaultDir(), &registry.Options{MustExist: true})
		if err == nil {
			_, err = r.Entry(os.Args[1])
			r.Close()
		}
		if err != nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// state prints what of the registry a command that fails must not change: the
// published generations and all files.
func state() {
	r, err := registry.Open(registry.DefaultDir(), &registry.Options{MustExist: true})
	if err == nil {
		var es []registry.Entry
		es, err = r.Entries()
		for _, e := range es {
			fmt.Println(e.Key, e.State, e.Generation, e.Bytes, e.Pinned, e.TTL)
		}
	}
	if err == nil {
		err = filepath.Walk(registry.DefaultDir(), func(p string, fi os.FileInfo, err error) error {
			// The files of the locks of keys stay, empty, for who comes next.
			if err == nil && filepath.Base(filepath.Dir(p)) != layout.LocksDir {
				fmt.Println(p, fi.Mode())
			}
			return err
		})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// looking ARGS... waits until a process with these arguments has mapped a table: by then
// it listens to signals.
func looking() {
	args := strings.Join(os.Args[1:], "\x00") + "\x00"
	for {
		paths, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, path := range paths {
			b, _ := os.ReadFile(path)
			maps, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "maps"))
			if string(b) == args && strings.Contains(string(maps), registry.DefaultDir()+"/v1/"+layout.TableFile) {
				return
			}
		}
		time.Sleep(time.Millisecond)
	}
}

// gone PID... waits until processes have ended.
func gone() {
	for _, pid := range os.Args[1:] {
		for {
			// A zombie has ended; who inherits it may never look.
			b, err := os.ReadFile("/proc/" + pid + "/stat")
			_, state, _ := strings.Cut(string(b), ") ")
			if err != nil || strings.HasPrefix(state, "Z") || strings.HasPrefix(state, "X") {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
}

// scrape runs shmctl metrics --listen, prints what it serves, tries to listen at
// the same address again, and stops it.
func scrape() {
	err := func() error {
		cmd := exec.Command("shmctl", "metrics", "--listen", "127.0.0.1:0")
		stderr, err := cmd.StderrPipe()
		if err != nil {
			return err
		}
		if err := cmd.Start(); err != nil {
			return err
		}
		defer cmd.Process.Kill()
		line, err := bufio.NewReader(stderr).ReadString('\n')
		if err != nil {
			return err
		}
		url := strings.TrimSpace(line[strings.Index(line, "http://"):])
		get, err := http.Get(url)
		if err != nil {
			return err
		}
		defer get.Body.Close()
		if _, err := io.Copy(os.Stdout, get.Body); err != nil {
			return err
		}
		addr := strings.TrimSuffix(strings.TrimPrefix(url, "http://"), "/metrics")
		out, err := exec.Command("shmctl", "metrics", "--listen", addr).CombinedOutput()
		fmt.Printf("again: %v %s", err, out)
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		fmt.Println("served:", get.Status, cmd.ProcessState)
		return nil
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// More room is for the file system that the registry lies on.
func TestMoreRoom(t *testing.T) {
	for dir, want := range map[string]string{
		"/proc/r":    "mount -o remount,size=SIZE /proc",
		"/dev/shm/r": "mount -o remount,size=SIZE /dev/shm (containers: --shm-size)",
	} {
		a := &app{dir: dir}
		err := &registry.Error{Op: "load", Key: "k", Err: registry.ErrNoSpace}
		if got := a.hintOf(err); !strings.HasSuffix(got, ": "+want) || !strings.Contains(got, "shmctl rm KEY") {
			t.Errorf("%s: %q", dir, got)
		}
	}
}
