//go:build amd64 || arm64

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/onecopy/onecopy/registry"
)

// overcommit is a trial of the budget.
type overcommit struct {
	Minutes   float64       `json:"minutes"`
	Processes int           `json:"processes"`
	Models    int           `json:"models"`
	Largest   int64         `json:"largest_bytes"`
	Factor    float64       `json:"overcommitted"`
	Seed      uint64        `json:"seed"`
	Traces    string        `json:"traces"`
	Think     time.Duration `json:"think_ns"`
	Kill      time.Duration `json:"kill_every_ns"`

	report string
	keep   string
	stdout io.Writer
}

// hogShare is how much of the budget, in percent, one process holds at most: then
// the others meet a budget that evicting cannot keep.
const hogShare = 90

func runOvercommit(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o := overcommit{stdout: stdout}
	fs := flag.NewFlagSet("overcommit", flag.ContinueOnError)
	fs.Float64Var(&o.Minutes, "minutes", 10, "length of the trial, shared by the traces")
	fs.IntVar(&o.Processes, "processes", 16, "processes that use models")
	fs.IntVar(&o.Models, "models", 210, "models of 1 MiB to -largest")
	fs.Int64Var(&o.Largest, "largest", 16<<20, "bytes of the largest model")
	fs.Float64Var(&o.Factor, "factor", 3, "bytes of all models, in budgets")
	fs.Uint64Var(&o.Seed, "seed", 0, "of all decisions; 0 takes one from the clock")
	fs.StringVar(&o.Traces, "traces", "zipf,scan", "which of zipf, scan, mixed, one after the other")
	fs.DurationVar(&o.Think, "think", 40*time.Millisecond, "mean pause of a process between two accesses")
	fs.DurationVar(&o.Kill, "kill", 2*time.Second, "time between two kill -9 of a process; 0: none")
	fs.StringVar(&o.report, "report", "", "write NAME.md and NAME.json")
	fs.StringVar(&o.keep, "keep", "", "a folder for the journals; they are removed otherwise")
	if err := parse(fs, args, stderr); err != nil {
		return err
	}
	if o.Seed == 0 {
		o.Seed = uint64(time.Now().UnixNano())
	}
	if o.Minutes <= 0 || o.Processes < 2 || o.Models < 8 || o.Largest < 1<<20 || o.Factor < 1 {
		fmt.Fprintln(stderr, "campaign overcommit: -minutes above 0, at least 2 processes, 8 models of 1 MiB and a factor of 1")
		return errUsage
	}
	return o.run(ctx)
}

// outcome is what became of one trace.
type outcome struct {
	Trace      trace         `json:"trace"`
	Seconds    float64       `json:"seconds"`
	Budget     int64         `json:"budget_bytes"`
	Bytes      int64         `json:"bytes_of_all_models"`
	Kills      int           `json:"kills"`
	Tags       int64         `json:"tags_verified"`
	BudgetKept budgetResult  `json:"budget"`
	Kept       keptResult    `json:"leases_and_pins"`
	Hits       hitResult     `json:"hits"`
	Refusals   refusalResult `json:"refusals"`
	Violations []string      `json:"violations"`

	Counters registry.Counters `json:"counters"`
}

func (o *overcommit) run(ctx context.Context) error {
	names := strings.Split(o.Traces, ",")
	for _, name := range names {
		if !slices.Contains(traces, trace(name)) {
			return fmt.Errorf("no trace %q: there are %v", name, traces)
		}
	}
	var outcomes []*outcome
	bad := 0
	for _, name := range names {
		out, err := o.runTrace(ctx, trace(name), time.Duration(o.Minutes*float64(time.Minute))/time.Duration(len(names)))
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		outcomes = append(outcomes, out)
		bad += len(out.Violations)
		out.print(o.stdout, o.Seed)
	}
	text, figures, err := o.markdown(outcomes)
	if err != nil {
		return err
	}
	if err := writeReport(o.report, text, figures); err != nil {
		return err
	}
	if bad > 0 {
		return fmt.Errorf("%w: %d violations; again with: overcommit %s", errViolated, bad, o.flags())
	}
	return nil
}

// flags repeat the run: every process decides by the seed and its number. When
// they meet is the scheduler's affair.
func (o *overcommit) flags() string {
	return fmt.Sprintf("-minutes %v -processes %d -models %d -largest %d -factor %v -traces %s -think %v -kill %v -seed %d",
		o.Minutes, o.Processes, o.Models, o.Largest, o.Factor, o.Traces, o.Think, o.Kill, o.Seed)
}

// sizes of the models, in whole pages.
func (o *overcommit) sizes() (sizes []int64, all int64) {
	random := rng(o.Seed, -1)
	for range o.Models {
		n := 1<<20 + random.Int64N(o.Largest-1<<20+1)
		n = (n + tagEvery - 1) / tagEvery * tagEvery
		sizes = append(sizes, n)
		all += costOf(n)
	}
	return sizes, all
}

func (o *overcommit) runTrace(ctx context.Context, tr trace, length time.Duration) (*outcome, error) {
	sizes, all := o.sizes()
	e := &evidence{budget: int64(float64(all) / o.Factor), ends: map[int]int64{}}
	for _, n := range sizes {
		e.cost = append(e.cost, costOf(n))
		e.largest = max(e.largest, costOf(n))
	}
	// The tmpfs is larger: the budget alone is on trial.
	sp, err := newSpace(2*e.budget + 64<<20)
	if err != nil {
		return nil, err
	}
	defer sp.end()
	e.own = sp.own
	logs, done, err := o.logs(tr)
	if err != nil {
		return nil, err
	}
	defer done()
	reg, err := registry.Open(sp.dir, &registry.Options{Budget: e.budget})
	if err != nil {
		return nil, err
	}
	defer reg.Close()
	if err := o.pin(ctx, reg, sizes, e); err != nil {
		return nil, err
	}

	watcher, err := startRole("observe", observePlan{sp.dir, filepath.Join(logs, "observer"), 10 * time.Millisecond}, nil)
	if err != nil {
		return nil, err
	}
	defer watcher.kill()
	began := time.Now()
	c := &crew{o: o, dir: sp.dir, logs: logs, trace: tr, sizes: sizes, ends: e.ends, hog: e.budget / 100 * hogShare}
	kills, err := c.run(ctx, length)
	took := time.Since(began)
	if err != nil {
		return nil, err
	}
	if err := watcher.finish(); err != nil {
		return nil, fmt.Errorf("observer: %w", err)
	}

	// Reading the journals takes much memory once, and none afterwards.
	defer debug.FreeOSMemory()
	out := &outcome{Trace: tr, Seconds: took.Seconds(), Budget: e.budget, Bytes: all, Kills: kills, Violations: []string{}}
	for n := range c.next {
		l, err := readWorker(c.journal(n), n)
		if errors.Is(err, fs.ErrNotExist) {
			continue // killed before it began
		}
		if err != nil {
			return nil, err
		}
		e.log = append(e.log, l.accesses...)
		out.Tags += l.checked
		for _, w := range l.wrong {
			out.Violations = append(out.Violations, fmt.Sprintf("worker %d: wrong bytes: %s", n, w))
		}
	}
	if err := e.readObserver(filepath.Join(logs, "observer")); err != nil {
		return nil, err
	}
	out.judge(e)
	if out.Counters, err = reg.Counters(); err != nil {
		return nil, err
	}
	for p := range problems(ctx, reg) {
		out.Violations = append(out.Violations, p)
	}
	return out, nil
}

func (out *outcome) judge(e *evidence) {
	var budget, leases, refusals, hits []string
	out.BudgetKept, budget = e.judgeBudget()
	out.Kept, leases = e.judgeLeases()
	out.Refusals, refusals = e.judgeRefusals()
	out.Hits, hits = e.judgeHits()
	out.Violations = slices.Concat(out.Violations, budget, leases, refusals, hits)
}

// problems are those that a full check finds when everybody has left.
func problems(ctx context.Context, reg *registry.Registry) func(func(string) bool) {
	return func(yield func(string) bool) {
		if _, err := reg.GC(ctx); err != nil {
			yield(fmt.Sprintf("gc: %v", err))
			return
		}
		ps, err := reg.Check(ctx, registry.CheckOptions{Data: true})
		if err != nil {
			yield(fmt.Sprintf("check: %v", err))
			return
		}
		for _, p := range ps {
			if !p.Note && !yield(fmt.Sprintf("check: %s %s %s: %s", p.Kind, p.Key, p.Path, p.Text)) {
				return
			}
		}
	}
}

// logs makes the folder of the journals, which must not lie on the tmpfs.
func (o *overcommit) logs(tr trace) (dir string, done func(), err error) {
	if o.keep != "" {
		dir = filepath.Join(o.keep, string(tr)) // new: journals only grow
		return dir, func() {}, errors.Join(os.MkdirAll(o.keep, 0o755), os.Mkdir(dir, 0o755))
	}
	dir, err = os.MkdirTemp("", "onecopy-campaign-")
	return dir, func() { os.RemoveAll(dir) }, err
}

// pin loads and pins the first models: about a twentieth of the budget.
func (o *overcommit) pin(ctx context.Context, reg *registry.Registry, sizes []int64, e *evidence) error {
	for key, sum := 0, int64(0); sum < e.budget/20 && key < len(sizes)/8; key++ {
		m, err := reg.GetOrLoad(ctx, modelKey(key), registry.Source{
			Version: "1", Size: sizes[key],
			Load: func(_ context.Context, w *registry.Writer) error { return writeModel(w, key, sizes[key], sizes[key]) },
		})
		if err != nil {
			return err
		}
		if err := errors.Join(reg.Pin(ctx, modelKey(key)), m.Close()); err != nil {
			return err
		}
		e.pinned = append(e.pinned, key)
		sum += e.cost[key]
	}
	return nil
}

// crew are the worker processes.
type crew struct {
	o         *overcommit
	dir, logs string
	trace     trace
	sizes     []int64
	hog       int64
	ends      map[int]int64
	next      int // number of the next process
	now       []*member
}

type member struct {
	*child
	number int
}

func (c *crew) journal(number int) string {
	return filepath.Join(c.logs, fmt.Sprintf("worker-%04d", number))
}

// hire starts a process in place i. The first place is that of the hog.
func (c *crew) hire(i int) error {
	p := loadPlan{
		Dir: c.dir, Journal: c.journal(c.next), Position: filepath.Join(c.logs, "position"), Number: c.next,
		Seed: c.o.Seed, Trace: c.trace, Sizes: c.sizes, Think: c.o.Think,
	}
	if i == 0 {
		p.Hog = c.hog
	}
	ch, err := startRole("load", p, nil)
	if err != nil {
		return err
	}
	c.now[i] = &member{ch, c.next}
	c.next++
	return nil
}

// run keeps the processes going for the time of the trial, killing one of them
// now and then.
func (c *crew) run(ctx context.Context, length time.Duration) (kills int, err error) {
	c.now = make([]*member, c.o.Processes)
	defer func() {
		for _, m := range c.now {
			if m != nil {
				m.kill()
				c.ends[m.number] = m.ended
			}
		}
	}()
	for i := range c.now {
		if err := c.hire(i); err != nil {
			return 0, err
		}
	}
	random := rng(c.o.Seed, -2)
	over := time.After(length)
	var kill <-chan time.Time
	if c.o.Kill > 0 {
		t := time.NewTicker(c.o.Kill)
		defer t.Stop()
		kill = t.C
	}
	for {
		select {
		case <-ctx.Done():
			return kills, ctx.Err()
		case <-kill:
			i := random.IntN(len(c.now))
			m := c.now[i]
			m.kill()
			c.ends[m.number] = m.ended
			if !m.killed() {
				return kills, fmt.Errorf("worker %d had ended before: %w", m.number, cmpErr(m.err))
			}
			kills++
			if err := c.hire(i); err != nil {
				return kills, err
			}
		case <-over:
			for i, m := range c.now {
				err = errors.Join(err, m.finish())
				c.ends[m.number] = m.ended
				c.now[i] = nil
			}
			return kills, err
		}
	}
}

func cmpErr(err error) error {
	if err == nil {
		return errors.New("exit code 0")
	}
	return err
}

func (out *outcome) print(w io.Writer, seed uint64) {
	fmt.Fprintf(w, "%s, seed %d: %.0f s, %d accesses (%d hits, %d loads, %d refused), %d kills\n",
		out.Trace, seed, out.Seconds, out.Hits.Accesses, out.Hits.Hits, out.Hits.Loads, out.Refusals.Refused, out.Kills)
	fmt.Fprintf(w, "  budget %s: peak %s in %d samples, %d of them above it, by %s at most (largest model %s)\n",
		mib(out.Budget), mib(out.BudgetKept.Peak), out.BudgetKept.Samples, out.BudgetKept.Over, mib(max(0, out.BudgetKept.Excess)), mib(out.BudgetKept.LargestCost))
	fmt.Fprintf(w, "  leases %d, %d of them sampled; %d pinned; %d tags read\n", out.Kept.Leases, out.Kept.Seen, out.Kept.Pinned, out.Tags)
	fmt.Fprintf(w, "  hit rate %.4f, exact LRU %.4f\n", out.Hits.Rate, out.Hits.ExactRate)
	if out.Refusals.Refused > 0 {
		fmt.Fprintf(w, "  refused %d loads; the closest by %s that others held\n", out.Refusals.Refused, mib(out.Refusals.Slack))
	}
	printViolations(w, out.Violations)
}

func (o *overcommit) markdown(outcomes []*outcome) (text, figures []byte, err error) {
	doc := struct {
		Machine string      `json:"machine"`
		Date    string      `json:"date"`
		Flags   string      `json:"flags"`
		Options *overcommit `json:"options"`
		Traces  []*outcome  `json:"traces"`
	}{machine(), time.Now().UTC().Format(time.DateOnly), o.flags(), o, outcomes}
	if figures, err = json.MarshalIndent(doc, "", "  "); err != nil {
		return nil, nil, err
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "# An overcommitted registry under load\n\n")
	fmt.Fprintf(&b, "Measured on %s with\n\n```console\n$ go run ./internal/campaign overcommit %s\n```\n\n%s.\n\n", doc.Date, doc.Flags, doc.Machine)
	fmt.Fprintf(&b, "%d processes use %d models for %v minutes, one trace after the other. One of them collects leases up to %d %% of the budget and gives\n"+
		"all of them back, again and again; one in 40 accesses of the others is held for up to %v, and one load in 8 does not\n"+
		"announce its size. Every %v a process is\n"+
		"killed with SIGKILL and another one started. An observer process reads the table's bytes and the file system every 10 ms.\n\n",
		o.Processes, o.Models, o.Minutes, hogShare, maxLong, o.Kill)
	fmt.Fprintln(&b, "| |"+cells(outcomes, func(out *outcome) string { return string(out.Trace) }))
	fmt.Fprintln(&b, "| --- |"+cells(outcomes, func(*outcome) string { return "---:" }))
	for _, row := range []struct {
		name string
		cell func(*outcome) string
	}{
		{"bytes of all models", func(out *outcome) string { return mib(out.Bytes) }},
		{"budget", func(out *outcome) string { return mib(out.Budget) }},
		{"largest model", func(out *outcome) string { return mib(out.BudgetKept.LargestCost) }},
		{"accesses", func(out *outcome) string { return fmt.Sprint(out.Hits.Accesses) }},
		{"loads", func(out *outcome) string { return fmt.Sprint(out.Hits.Loads) }},
		{"evictions for space", func(out *outcome) string { return fmt.Sprint(out.Counters.EvictedSpace) }},
		{"processes killed", func(out *outcome) string { return fmt.Sprint(out.Kills) }},
		{"loads taken over from a killed process", func(out *outcome) string { return fmt.Sprint(out.Counters.Takeovers) }},
		{"samples of the observer", func(out *outcome) string { return fmt.Sprint(out.BudgetKept.Samples) }},
		{"most memory in use (" + measured(outcomes) + ")", func(out *outcome) string { return mib(out.BudgetKept.Peak) }},
		{"samples above the budget", func(out *outcome) string { return fmt.Sprint(out.BudgetKept.Over) }},
		{"most above the budget", func(out *outcome) string { return mib(max(0, out.BudgetKept.Excess)) }},
		{"leases; of them seen by a sample", func(out *outcome) string { return fmt.Sprintf("%d; %d", out.Kept.Leases, out.Kept.Seen) }},
		{"pinned models", func(out *outcome) string { return fmt.Sprint(out.Kept.Pinned) }},
		{"tags read from leased models", func(out *outcome) string { return fmt.Sprint(out.Tags) }},
		{"hit rate", func(out *outcome) string { return fmt.Sprintf("%.2f %%", 100*out.Hits.Rate) }},
		{"hit rate of an exact LRU", func(out *outcome) string { return fmt.Sprintf("%.2f %%", 100*out.Hits.ExactRate) }},
		{"loads refused", func(out *outcome) string { return fmt.Sprint(out.Refusals.Refused) }},
		{"refused by the exact LRU", func(out *outcome) string { return fmt.Sprint(out.Hits.ExactRefused) }},
		{"violations", func(out *outcome) string { return fmt.Sprint(len(out.Violations)) }},
	} {
		fmt.Fprintln(&b, "| "+row.name+" |"+cells(outcomes, row.cell))
	}
	b.WriteString("\nA violation is: for longer than a quarter of a second more memory than the budget and the largest model; a leased or pinned model that was not in the table,\n" +
		"or not under the same generation; a byte of a leased model that was not its own; a hit rate more than two points below an\n" +
		"exact LRU's on the same trace with the same leases; a load that failed although it would have fitted beside everything\n" +
		"that was in use, pinned or being loaded at any moment of the call; anything that a check with data finds at the end.\n")
	for _, out := range outcomes {
		for _, v := range out.Violations {
			fmt.Fprintf(&b, "\n- %s: %s", out.Trace, v)
		}
	}
	return b.Bytes(), append(figures, '\n'), nil
}

func measured(outcomes []*outcome) string {
	if outcomes[0].BudgetKept.OwnTmpfs {
		return "statfs of a tmpfs of its own, less the table"
	}
	return "st_blocks of all files"
}

func cells(outcomes []*outcome, text func(*outcome) string) (s string) {
	for _, out := range outcomes {
		s += " " + text(out) + " |"
	}
	return s
}
