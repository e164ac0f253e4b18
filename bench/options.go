//go:build linux

package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
)

// options are the flags.
type options struct {
	parts []string
	named []string // the parts that were named; all others are all of them
	shown []string // the flags that were given and change what is measured: not the paths, which are of one machine

	// Of all parts.
	rounds      int
	python      string
	module      string // the folder with the Python package
	work        string
	shm         string
	json        string
	markdown    string
	readme      string
	performance string
	from        []string // measure nothing

	// workers
	sizes   []int64
	workers []int
	users   []int
	langs   []string
	ways    []string
	peers   []string
	reread  bool

	// load
	loadSizes []int64
	coldFrom  int64
	files     int
	sparse    int64

	settleFrom int64 // of all parts: see prewarmSettled

	// micro
	micro     []string
	microSize int64
	waiters   []int
	models    int

	// pressure
	pressureSize int64
	leave, most  int64

	// tokens
	llama, gguf  string
	tokens       int
	tokenRounds  int
	tokenWorkers []int

	// scale; models is that of micro
	scale     []string
	shmctl    []string
	holders   int
	holds     int
	refreshes int
	interval  time.Duration
	scaleSize int64
	copies    int
}

func parse(args []string, stderr io.Writer) (options, error) {
	var o options
	for len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		o.named, args = append(o.named, args[0]), args[1:]
	}
	if o.parts = o.named; len(o.parts) == 0 {
		o.parts = partNames()
	}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprintf(stderr, "usage: bench [%s]... [flags]\n", strings.Join(partNames(), "|"))
		flags.PrintDefaults()
	}
	quick := flags.Bool("quick", false, "small models and one round only")
	flags.IntVar(&o.rounds, "rounds", 0, "rounds; 0: what each case needs")
	flags.StringVar(&o.python, "python", "python3", "Python interpreter, 3.9 or later")
	flags.StringVar(&o.module, "package", "python/src", "folder with the Python package onecopy")
	flags.StringVar(&o.work, "work", "", "folder on the local disk for the model files (default: the folder for temporary files, or /var/tmp if that is in memory)")
	flags.StringVar(&o.shm, "shm", "/dev/shm", "tmpfs for the registries of the benchmark; no other registry is touched")
	flags.StringVar(&o.json, "json", "", "write machine facts, every trial and every median to this file, as JSON lines")
	flags.StringVar(&o.markdown, "markdown", "", "write the results to this file, as Markdown")
	flags.StringVar(&o.readme, "readme", "", "replace the text between the bench marks of this file by the results of workers")
	flags.StringVar(&o.performance, "performance", "", "replace the text between the targets and figures marks of this file by the results")

	from := flags.String("from", "", "measure nothing; take what these files of earlier runs have (--json)")

	sizes := flags.String("sizes", "48MB,1.5GB", "workers: sizes of the model")
	workers := flags.String("workers", "1,3,10", "workers: numbers of worker processes")
	users := flags.String("users", "4,50", "workers: numbers of users in one process, with the first size; empty: none")
	langs := flags.String("lang", "go,python", "workers: languages of the workers")
	ways := flags.String("ways", "private,mmap,onecopy,onecopy-empty,onecopy-path", "workers: ways to get the weights")
	peers := flags.String("peers", strings.Join(allPeers, ","), "workers: libraries to compare with, as far as --python has them; empty: none")
	flags.BoolVar(&o.reread, "reread", false, "workers: drop each generated file from the page cache once and fill the cache by reading")

	loadSizes := flags.String("load-sizes", "1MiB,16MiB,256MiB,1.5GiB,4GiB", "load: sizes of the file")
	coldFrom := flags.String("cold-from", "256MiB", "load: the smallest size that is also loaded from a cold source")
	settleFrom := flags.String("settle-from", "512MiB", "load: the smallest size before which memory is held until the hypervisor has what it wants")
	flags.IntVar(&o.files, "files", 5000, "load: files of the folder; 0: no folder")
	sparse := flags.String("sparse", "1GiB", "load: size of the sparse file; 0: none")

	micro := flags.String("micro", strings.Join(allMicro, ","), "micro: what to measure")
	microSize := flags.String("micro-size", "1.5GiB", "micro: size of the model")
	waiters := flags.String("waiters", "1,10,200", "micro: numbers of waiting processes")
	flags.IntVar(&o.models, "models", 1000, "micro, scale: models of the registry")

	pressureSize := flags.String("pressure-size", "3GB", "pressure: size of the model")
	leave := flags.String("leave", "1.5GiB", "pressure: available memory that is left to the machine")
	most := flags.String("most", "64GiB", "pressure: the most that is taken")

	flags.StringVar(&o.llama, "llama", "", "tokens: folder with llama.cpp's libraries (default: where scripts/fetch_llama.py puts them)")
	flags.StringVar(&o.gguf, "gguf", "", "tokens: the model (default: where scripts/fetch_model.py smollm2 puts it)")
	flags.IntVar(&o.tokens, "tokens", 128, "tokens: tokens of a run")
	flags.IntVar(&o.tokenRounds, "token-rounds", 20, "tokens: rounds, unless --rounds says otherwise")
	tokenWorkers := flags.String("token-workers", "1,2", "tokens: numbers of workers that generate at once")

	scale := flags.String("scale", strings.Join(allScale, ","), "scale: what to measure")
	shmctl := flags.String("shmctl", "", "scale: programs to measure, the first for the targets (default: that of the checkout, built anew)")
	flags.IntVar(&o.holders, "holders", 200, "scale: processes that hold models")
	flags.IntVar(&o.holds, "holds", 5, "scale: models that each of them holds")
	flags.IntVar(&o.refreshes, "refreshes", 5, "scale: refreshes of top")
	flags.DurationVar(&o.interval, "interval", 0, "scale: interval of top (default: its own)")
	scaleSize := flags.String("scale-size", "1.5GiB", "scale: size of the model that is evicted, and of that which is copied")
	flags.IntVar(&o.copies, "copies", 10, "scale: private copies to look for; they take as much memory, and two more")

	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	paths := []string{"python", "package", "work", "shm", "json", "markdown", "readme", "performance", "llama", "gguf", "from", "shmctl"}
	flags.Visit(func(f *flag.Flag) {
		if !slices.Contains(paths, f.Name) {
			o.shown = append(o.shown, fmt.Sprintf("--%s=%s", f.Name, f.Value))
		}
	})
	if *quick {
		*sizes, *loadSizes, *microSize, *pressureSize, *most = "48MB", "16MiB", "64MiB", "48MB", "64MiB"
		*waiters, *sparse, o.rounds, o.files, o.models, o.tokens = "1,10", "64MiB", 1, 100, 20, 16
		*scaleSize, o.holders, o.refreshes = "64MiB", 10, 2
	}
	var errs []error
	keep := func(err error) { errs = append(errs, err) }
	var err error
	o.sizes, err = amounts(*sizes, chunkBytes)
	keep(err)
	o.loadSizes, err = amounts(*loadSizes, 1)
	keep(err)
	for _, one := range []struct {
		text string
		to   *int64
	}{{*coldFrom, &o.coldFrom}, {*settleFrom, &o.settleFrom}, {*sparse, &o.sparse}, {*microSize, &o.microSize}, {*pressureSize, &o.pressureSize}, {*leave, &o.leave}, {*most, &o.most}, {*scaleSize, &o.scaleSize}} {
		*one.to, err = amount(one.text)
		keep(err)
	}
	for _, one := range []struct {
		text string
		to   *[]int
	}{{*workers, &o.workers}, {*users, &o.users}, {*waiters, &o.waiters}, {*tokenWorkers, &o.tokenWorkers}} {
		*one.to, err = counts(one.text)
		keep(err)
	}
	o.from = list(*from)
	o.scale, o.shmctl = list(*scale), list(*shmctl)
	for name, n := range map[string]int{"models": o.models, "holders": o.holders, "holds": o.holds, "refreshes": o.refreshes, "copies": o.copies} {
		if n < 1 {
			keep(fmt.Errorf("--%s %d: at least 1", name, n))
		}
	}
	o.langs, o.ways, o.micro, o.peers = list(*langs), list(*ways), list(*micro), list(*peers)
	return o, errors.Join(append(errs,
		known("part", o.parts, partNames()...),
		known("language", o.langs, langGo, langPython),
		known("way", o.ways, ownWays...),
		known("peer", o.peers, allPeers...),
		known("group of micro", o.micro, allMicro...),
		known("group of scale", o.scale, allScale...))...)
}

func list(text string) []string {
	return strings.FieldsFunc(text, func(r rune) bool { return r == ',' || r == ' ' })
}

func counts(text string) ([]int, error) {
	var all []int
	for _, word := range list(text) {
		n, err := strconv.Atoi(word)
		if err != nil || n < 1 {
			return nil, fmt.Errorf("not a number of processes or users: %q", word)
		}
		all = append(all, n)
	}
	return all, nil
}

func amount(text string) (int64, error) {
	size, err := humanize.ParseBytes(text)
	if err != nil || size > 1<<50 {
		return 0, fmt.Errorf("not a size: %q (48MB, 1.5GiB)", text)
	}
	return int64(size), nil
}

func amounts(text string, least int64) ([]int64, error) {
	var all []int64
	for _, word := range list(text) {
		size, err := amount(word)
		if err != nil || size < least {
			return nil, fmt.Errorf("not the size of a model: %q (48MB, 1.5GB; at least %d bytes)", word, least)
		}
		all = append(all, size)
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
