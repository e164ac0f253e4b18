//go:build linux

// Command torture kills processes that use a registry, hundreds in a second, at
// every named step of the protocol and at random, and has an auditor look at what
// is left. It is built with the tag crashpoint: make torture.
//
// Nothing may be lost, whatever dies: every byte that a worker gets is compared
// with its source; no process ends but by our hand; after one collector run no
// lock is held, no state is transient, and the tmpfs holds what the models need and
// nothing else; each model can be had by one process alone; and a key never has
// two loaders.
//
// The same seed makes the same plan: who is started with which random numbers and
// is killed where. When the kernel runs whom is not in it.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/crashpoint"
)

// Budgets that the models do not fit in: 24 of them need some 50 MiB, and those of
// single workers as much again. But there is room for what is leased, most of the
// time, because an error that names all holders takes a while.
const (
	tmpfsSize    = 108 << 20
	steadyBudget = 72 << 20
	doomedBudget = 22 << 20
)

type options struct {
	time   time.Duration
	kills  int
	procs  int
	seed   uint64
	python string
	report string
}

// The kernel lets the thread that a process began with, and no other, enter a time
// namespace.
func init() { runtime.LockOSThread() }

func main() {
	if len(os.Args) == 3 {
		if role := map[string]func(job) error{"worker": work, "shifted": shifted, "tidy": tidy, "auditor": auditor}[os.Args[1]]; role != nil {
			var j job
			if err := json.Unmarshal([]byte(os.Args[2]), &j); err != nil {
				fail(err)
			}
			if err := role(j); err != nil {
				fail(fmt.Errorf("%s, seed %d, step %q: %w", os.Args[1], j.Seed, j.Step, err))
			}
			return
		}
	}
	var o options
	flag.DurationVar(&o.time, "time", time.Minute, "how long to kill")
	flag.IntVar(&o.kills, "kills", 0, "stop after so many kills; 0: after -time")
	flag.IntVar(&o.procs, "processes", 16, "workers at the same time")
	flag.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()), "of the plan; a run prints its own")
	flag.StringVar(&o.python, "python", "", "interpreter for Python workers, which need xxhash; none: Go only")
	flag.StringVar(&o.report, "report", "", "file for the report, in Markdown; default: the terminal, and torture-<seed>.md if anything was lost")
	mutants := flag.String("mutants", "", "put one bug after the other into the library and see that each is found; \"all\", or a part of their names")
	page := flag.String("readme", "", "put what the file of -report says into this page, and do nothing else")
	flag.Parse()
	if *page != "" {
		if err := readme(o.report, *page); err != nil {
			fail(err)
		}
		return
	}
	if *mutants != "" {
		if err := hunt(o, *mutants); err != nil {
			fail(err)
		}
		return
	}
	if !crashpoint.Enabled {
		fail(fmt.Errorf("build it with -tags crashpoint, or use make torture"))
	}
	if flag.NArg() > 0 {
		fail(fmt.Errorf("unexpected argument %q", flag.Arg(0)))
	}
	if os.Getenv(insideEnv) == "" {
		os.Exit(inside())
	}
	ok, err := run(o)
	if err != nil {
		fail(err)
	}
	if !ok {
		os.Exit(1)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "torture:", err)
	os.Exit(3)
}

// cannotRun is the exit status where there can be no tmpfs of our own.
const cannotRun = 77

// insideEnv names the tmpfs of a process that has one of its own.
const insideEnv = "ONECOPY_TORTURE_TMPFS"

// inside runs this program again, in a mount namespace of its own with a tmpfs that
// nobody else uses, so that the kernel itself can say how much is in use. It ends
// with the namespace, whoever is killed.
func inside() int {
	dir, err := os.MkdirTemp("", "onecopy-torture-")
	if err != nil {
		fail(err)
	}
	defer os.RemoveAll(dir)
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), insideEnv+"="+dir)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	if err := cmd.Run(); cmd.ProcessState == nil {
		fmt.Fprintln(os.Stderr, "torture: a mount namespace needs root, or user namespaces:", err)
		return cannotRun
	}
	return cmd.ProcessState.ExitCode()
}

// places makes the tmpfs and the folder for everything else.
func places(o options) (p place, err error) {
	top := os.Getenv(insideEnv)
	p = place{Base: filepath.Join(top, "base"), Shm: filepath.Join(top, "shm"), Slots: o.procs}
	for _, dir := range []string{p.Base, p.Shm, p.witness()} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return p, err
		}
	}
	if err := unix.Mount("tmpfs", p.Shm, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("size=%d,mode=0700", tmpfsSize)); err != nil {
		return p, fmt.Errorf("mount a tmpfs: %w", err)
	}
	return p, prepare(p.Base, o.seed)
}
