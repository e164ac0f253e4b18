//go:build linux

package main

import (
	"context"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

//go:embed worker.py
var workerScript []byte

func main() {
	if len(os.Args) == 4 && os.Args[1] == workerCommand {
		if err := workerMain(os.Args[2], os.Args[3], os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "worker:", err)
			os.Exit(1)
		}
		return
	}
	// SIGPIPE is among them so that `make demo | head` cleans up, too.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM, unix.SIGHUP, unix.SIGPIPE)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// demo is the state that the steps share.
type demo struct {
	out      io.Writer
	shmctl   string // the program
	python   string
	module   string // the folder with the package onecopy; "" where the interpreter cannot import it
	without  string // why it cannot
	script   string // worker.py
	self     string // this program, for Go workers
	fetch    string // the script that fetches real weights, "" for generated ones
	limit    int64  // size of generated weights
	home     string // the demo's folder on the tmpfs, "" when it is gone; the registry is within
	registry string
	temp     string // the demo's folder for temporary files

	key, source string // the model and where it comes from
	what        string // its name for people
	size        int64
	files       int
	crc         uint32
	path        string // of the shared model
	workers     []*worker
	together    int64 // PSS of all workers
	back        float64
}

// run is the whole program except for the hidden worker command. It returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("onecopy-demo", flag.ContinueOnError)
	flags.SetOutput(stderr)
	d := &demo{out: stdout}
	flags.StringVar(&d.shmctl, "shmctl", "bin/shmctl", "the inspector, as built by make")
	flags.StringVar(&d.python, "python", "python3", "Python interpreter, 3.9 or later")
	flags.StringVar(&d.module, "package", "python/src", "folder with the Python package onecopy; empty: the Python workers do without it")
	flags.StringVar(&d.fetch, "fetch", "scripts/fetch_model.py", "script that fetches the real weights; empty: generate some")
	megabytes := flags.Int64("megabytes", 90, "size of generated weights")
	shm := flags.String("shm", "/dev/shm", "tmpfs for the demo's own registry; no other registry is touched")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil || flags.NArg() > 0 || *megabytes < 1 {
		fmt.Fprintln(stderr, "demo: unexpected arguments; see --help")
		return 2
	}
	d.limit = *megabytes * 1e6
	err := d.run(ctx, *shm)
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(stderr, "\ndemo: interrupted")
		return 130
	case err != nil:
		fmt.Fprintf(stderr, "\ndemo: FAILED: %v\n", err)
		return 1
	}
	return 0
}

func (d *demo) run(ctx context.Context, shm string) (err error) {
	if d.shmctl, err = exec.LookPath(d.shmctl); err != nil {
		return fmt.Errorf("%w (run this by: make demo)", err)
	}
	if d.self, err = os.Executable(); err != nil {
		return err
	}
	unlock, err := d.claim(shm)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.cleanUp(), unlock()) }() // unlocked last
	if d.module != "" {
		d.module, d.without = findModule(ctx, d.python, d.module)
	}
	d.script = filepath.Join(d.temp, "worker.py")
	if err := os.WriteFile(d.script, workerScript, 0o600); err != nil {
		return err
	}

	fmt.Fprintf(d.out, "onecopy: one copy of a model for all processes of a machine\n")
	for i, step := range []struct {
		title string
		do    func(context.Context) error
	}{
		{"Get a model", d.getModel},
		{"Load it into shared memory, once", d.load},
		{"Start ten workers that use it", d.startAll},
		{"Who holds what?", d.showHolders},
		{"What does it cost?", d.showMemory},
		{"Kill a worker with -9", d.killOne},
		{"Start it again", d.restart},
		{"End all workers", d.endAll},
		{"Clean up", d.leave},
	} {
		fmt.Fprintf(d.out, "\n%d. %s\n", i+1, step.title)
		if err := step.do(ctx); err != nil {
			return fmt.Errorf("step %d: %w", i+1, err)
		}
	}
	d.summary()
	return nil
}

// claim makes the demo's folders and locks the one on the tmpfs, so that two demos do not remove each other's. What
// a killed demo left there is removed.
func (d *demo) claim(shm string) (unlock func() error, err error) {
	home := filepath.Join(shm, fmt.Sprintf("onecopy-demo-%d", os.Getuid()))
	for {
		if err := os.Mkdir(home, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("%w\nthe demo needs shared memory at %s: in a container give it some, for example docker run --shm-size=1g", err, shm)
		}
		f, err := os.Open(home)
		if errors.Is(err, os.ErrNotExist) {
			continue // another demo has just ended
		}
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			return nil, errors.Join(fmt.Errorf("another demo is running in %s", home), f.Close())
		}
		locked, err1 := f.Stat()
		named, err2 := os.Stat(home)
		if err1 != nil || err2 != nil || !os.SameFile(locked, named) {
			f.Close()
			continue // the same
		}
		if err := mine(home, named); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		d.home, d.registry, d.temp = home, filepath.Join(home, "registry"), filepath.Join(os.TempDir(), filepath.Base(home))
		if err := errors.Join(os.RemoveAll(d.registry), os.RemoveAll(d.temp), os.Mkdir(d.temp, 0o700)); err != nil {
			return nil, errors.Join(err, d.cleanUp(), f.Close())
		}
		return f.Close, nil
	}
}

// mine refuses a folder that somebody else made in a place where everybody can.
func mine(path string, info os.FileInfo) error {
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || int(st.Uid) != os.Getuid() || info.Mode().Perm() != 0o700 {
		return fmt.Errorf("%s is not a private folder of this user: remove it", path)
	}
	return nil
}

// cleanUp removes everything of the demo, whatever happened before. The second call does nothing: the folder on
// the tmpfs may be another demo's by then.
func (d *demo) cleanUp() error {
	for _, w := range d.workers {
		w.kill()
	}
	var errs []error
	for _, dir := range []string{d.home, d.temp} {
		if dir != "" {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	d.workers, d.home, d.temp = nil, "", ""
	return errors.Join(errs...)
}

// say prints a paragraph of a step.
func (d *demo) say(format string, args ...any) {
	text := strings.TrimRight(fmt.Sprintf(format, args...), "\n")
	for line := range strings.Lines(text + "\n") {
		fmt.Fprint(d.out, "   ", line)
	}
}

// env is the environment in which the demo's registry is the default one and Python finds the package.
func (d *demo) env() []string {
	env := append(os.Environ(), "ONECOPY_DIR="+d.registry)
	if d.module != "" {
		env = append(env, "PYTHONPATH="+d.module)
	}
	return env
}

// findModule returns the absolute folder of the package if the interpreter can import it, else why not.
func findModule(ctx context.Context, python, folder string) (module, without string) {
	folder, err := filepath.Abs(folder)
	if err != nil {
		return "", err.Error()
	}
	cmd := exec.CommandContext(ctx, python, "-c", "import onecopy")
	cmd.Env = append(os.Environ(), "PYTHONPATH="+folder)
	if text, err := cmd.CombinedOutput(); err != nil {
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		return "", strings.TrimSpace(lines[len(lines)-1] + " (" + err.Error() + ")")
	}
	return folder, ""
}

// ctl runs shmctl and shows the command and its output. It returns what was on standard output.
func (d *demo) ctl(ctx context.Context, args ...string) (string, error) {
	d.say("$ shmctl %s", strings.Join(args, " "))
	text, err := d.quiet(ctx, args...)
	if text != "" {
		d.say("%s", text)
	}
	return text, err
}

// quiet runs shmctl and shows nothing.
func (d *demo) quiet(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, d.shmctl, args...)
	cmd.Env = d.env()
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("shmctl %s: %w\n%s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimRight(string(out), "\n"), err
}

// mega is a size as people read it; 1 MB is 1,000,000 bytes.
func mega(size int64) string { return fmt.Sprintf("%.1f MB", float64(size)/1e6) }

func milliseconds(ns int64) float64 { return float64(ns) / 1e6 }
