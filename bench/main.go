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

	"golang.org/x/sys/unix"
)

//go:embed worker.py
var workerScript []byte

//go:embed peers.py
var peersScript []byte

func main() {
	hidden()
	// SIGPIPE is among them so that a reader that goes away does not keep the clean-up from running.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM, unix.SIGHUP, unix.SIGPIPE)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// hidden runs what this program starts itself as, and then does not return.
func hidden() {
	if len(os.Args) < 2 {
		return
	}
	switch os.Args[1] {
	case workerCommand:
		os.Exit(workerMain(os.Args[2:], os.Stdin, os.Stdout))
	case taskCommand:
		os.Exit(taskMain(os.Args[2:], os.Stdin, os.Stdout, os.Stderr))
	}
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
	if err := o.pages(); err != nil {
		return err
	}
	if len(o.from) > 0 {
		res := &results{}
		if err := res.merge(o.from); err != nil {
			return err
		}
		return errors.Join(res.print(stdout), res.write(o))
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
	if slices.Contains(o.langs, langPython) || slices.Contains(o.parts, "tokens") {
		b.python, version, err = findPython(ctx, o.python)
		if err != nil {
			fmt.Fprintf(stderr, "bench: no Python workers: %v\n", err)
			o.langs = slices.DeleteFunc(o.langs, func(lang string) bool { return lang == langPython })
		}
		b.script = filepath.Join(b.work, "worker.py")
		err := errors.Join(os.WriteFile(b.script, workerScript, 0o600), os.WriteFile(filepath.Join(b.work, "peers.py"), peersScript, 0o600))
		if err != nil {
			return err
		}
		if b.python != "" {
			b.preparePackage(ctx, o.module)
		}
	}

	res := &results{Machine: facts(version, b.shm, b.work, append(slices.Clone(o.named), o.shown...))}
	s := &session{bench: b, o: o, res: res, progress: stderr}
	for _, p := range parts {
		if !slices.Contains(o.parts, p.name) || ctx.Err() != nil {
			continue
		}
		if e := p.run(s, ctx); e != nil {
			// What the other parts find out after half an hour is not thrown away.
			err = errors.Join(err, fmt.Errorf("%s: %w", p.name, e))
			s.note("%s failed: %v", p.name, e)
		}
		// Who reads the figures should know what else ran.
		s.note("load average at the end of %s: %s", p.name, firstLine("/proc/loadavg"))
	}
	if ctx.Err() != nil {
		// The pages keep what they have; what was measured so far is in the JSON lines.
		return errors.Join(err, res.write(options{json: o.json}))
	}
	return errors.Join(err, res.print(stdout), res.write(o))
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
