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
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"
)

//go:embed worker.py
var workerScript []byte

func main() {
	if len(os.Args) > 1 && os.Args[1] == workerCommand {
		os.Exit(workerMain(os.Args[2:], os.Stdin, os.Stdout))
	}
	// SIGPIPE is among them so that a reader that goes away does not keep the clean-up from running.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM, unix.SIGHUP, unix.SIGPIPE)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// options are the flags.
type options struct {
	sizes    []int64
	workers  []int
	users    []int
	langs    []string
	ways     []string
	rounds   int
	python   string
	work     string
	shm      string
	json     string
	markdown string
	readme   string
	reread   bool
	shown    []string // the flags that were given and change what is measured: not the paths, which are of one machine
}

func parse(args []string, stderr io.Writer) (options, error) {
	var o options
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	sizes := flags.String("sizes", "48MB,1.5GB", "sizes of the model")
	workers := flags.String("workers", "1,3,10", "numbers of worker processes")
	users := flags.String("users", "4,50", "numbers of users in one process, with the first size; empty: none")
	langs := flags.String("lang", "go,python", "languages of the workers")
	ways := flags.String("ways", "private,mmap,onecopy,onecopy-empty", "ways to get the weights")
	quick := flags.Bool("quick", false, "48 MB and one round only")
	flags.IntVar(&o.rounds, "rounds", 0, "rounds; 0: 5 for models below 256 MB, else 3")
	flags.StringVar(&o.python, "python", "python3", "Python interpreter, 3.9 or later")
	flags.StringVar(&o.work, "work", "", "folder on the local disk for the model files (default: the folder for temporary files, or /var/tmp if that is in memory)")
	flags.StringVar(&o.shm, "shm", "/dev/shm", "tmpfs for the registries of the benchmark; no other registry is touched")
	flags.StringVar(&o.json, "json", "", "write machine facts, every trial and every median to this file, as JSON lines")
	flags.StringVar(&o.markdown, "markdown", "", "write the results to this file, as Markdown")
	flags.StringVar(&o.readme, "readme", "", "replace the text between the bench marks of this file")
	flags.BoolVar(&o.reread, "reread", false, "drop each generated file from the page cache once and fill the cache by reading")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	paths := []string{"python", "work", "shm", "json", "markdown", "readme"}
	flags.Visit(func(f *flag.Flag) {
		if !slices.Contains(paths, f.Name) {
			o.shown = append(o.shown, fmt.Sprintf("--%s=%s", f.Name, f.Value))
		}
	})
	if *quick {
		*sizes, o.rounds = "48MB", 1
	}
	for _, text := range list(*sizes) {
		size, err := humanize.ParseBytes(text)
		if err != nil || size < chunkBytes || size > 1<<50 {
			return o, fmt.Errorf("not the size of a model: %q (48MB, 1.5GB; at least %d bytes)", text, chunkBytes)
		}
		o.sizes = append(o.sizes, int64(size))
	}
	var err1, err2 error
	o.workers, err1 = counts(*workers)
	o.users, err2 = counts(*users)
	o.langs, o.ways = list(*langs), list(*ways)
	return o, errors.Join(err1, err2,
		known("language", o.langs, langGo, langPython),
		known("way", o.ways, wayPrivate, wayMmap, wayOnecopy, wayEmpty))
}

func list(text string) []string {
	return strings.FieldsFunc(text, func(r rune) bool { return r == ',' || r == ' ' })
}

func counts(text string) ([]int, error) {
	var all []int
	for _, word := range list(text) {
		n, err := strconv.Atoi(word)
		if err != nil || n < 1 {
			return nil, fmt.Errorf("not a number of workers or users: %q", word)
		}
		all = append(all, n)
	}
	return all, nil
}

func known(what string, words []string, allowed ...string) error {
	for _, word := range words {
		if !slices.Contains(allowed, word) {
			return fmt.Errorf("unknown %s %q (one of %s)", what, word, strings.Join(allowed, ", "))
		}
	}
	return nil
}

// run is the whole program except for the hidden worker command. It returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parse(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintln(stderr, "bench:", err)
		return 2
	}
	err = measureAll(ctx, o, stdout, stderr)
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(stderr, "bench: interrupted")
		return 130
	case err != nil:
		fmt.Fprintln(stderr, "bench:", err)
		return 1
	}
	return 0
}

func measureAll(ctx context.Context, o options, stdout, stderr io.Writer) (err error) {
	// Fail before an hour of work, not after it.
	if o.readme != "" {
		if err := replaceMarked(o.readme, ""); err != nil {
			return err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	b := &bench{self: self}
	work, err := newScratch(workFolder(o.work, stderr))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, work.remove()) }()
	shm, err := newScratch(o.shm)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, shm.remove()) }()
	b.work, b.shm = work.path, shm.path

	version := ""
	if slices.Contains(o.langs, langPython) {
		b.python, version, err = findPython(ctx, o.python)
		if err != nil {
			fmt.Fprintf(stderr, "bench: no Python workers: %v\n", err)
			o.langs = slices.DeleteFunc(o.langs, func(lang string) bool { return lang == langPython })
		}
		b.script = filepath.Join(b.work, "worker.py")
		if err := os.WriteFile(b.script, workerScript, 0o600); err != nil {
			return err
		}
	}

	res := &results{Machine: facts(version, b.shm, b.work, o.shown)}
	if err := b.all(ctx, o, res, stderr); err != nil {
		return err
	}
	if err := res.table(stdout); err != nil {
		return err
	}
	return res.write(o)
}

// workFolder is where the model files go. A file in memory would not be the rival that is meant.
func workFolder(chosen string, stderr io.Writer) string {
	dir := chosen
	if dir == "" {
		dir = os.TempDir()
		if mountOf(dir).Type == "tmpfs" && mountOf("/var/tmp").Type != "tmpfs" {
			dir = "/var/tmp"
		}
	}
	if mountOf(dir).Type == "tmpfs" {
		fmt.Fprintf(stderr, "bench: %s is in memory: the rows of mmap are not those of a disk file; see --work\n", dir)
	}
	return dir
}
