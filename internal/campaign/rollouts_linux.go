//go:build amd64 || arm64

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/onecopy/onecopy/registry"
)

// rollouts is a trial of replacing a model under load.
type rollouts struct {
	Rollouts  int           `json:"rollouts"`
	Processes int           `json:"processes"`
	Clients   int           `json:"connections_per_process"`
	Pause     time.Duration `json:"pause_ns"`
	Size      int64         `json:"model_bytes"`
	Seed      uint64        `json:"seed"`

	shmctl string
	report string
	stdout io.Writer
}

func runRollouts(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o := rollouts{stdout: stdout}
	fs := flag.NewFlagSet("rollouts", flag.ContinueOnError)
	fs.IntVar(&o.Rollouts, "rollouts", 100, "rollouts, half of which are killed")
	fs.IntVar(&o.Processes, "processes", 16, "processes that serve the model")
	fs.IntVar(&o.Clients, "clients", 2, "connections to each of them")
	fs.DurationVar(&o.Pause, "pause", 10*time.Millisecond, "of a connection between two requests")
	fs.Int64Var(&o.Size, "size", 32<<20, "bytes of the model")
	fs.Uint64Var(&o.Seed, "seed", 0, "of all decisions; 0 takes one from the clock")
	fs.StringVar(&o.shmctl, "shmctl", "bin/shmctl", "the program that publishes")
	fs.StringVar(&o.report, "report", "", "write NAME.md and NAME.json")
	if err := parse(fs, args, stderr); err != nil {
		return err
	}
	if o.Seed == 0 {
		o.Seed = uint64(time.Now().UnixNano())
	}
	if o.Rollouts < 1 || o.Processes < 1 || o.Clients < 1 || o.Size < 1<<20 {
		fmt.Fprintln(stderr, "campaign rollouts: at least 1 rollout, process and connection, and 1 MiB")
		return errUsage
	}
	return o.run(ctx)
}

func (o *rollouts) flags() string {
	return fmt.Sprintf("-rollouts %d -processes %d -clients %d -pause %v -size %d -seed %d", o.Rollouts, o.Processes, o.Clients, o.Pause, o.Size, o.Seed)
}

// fate is what is done to a publisher.
type fate string

const (
	left    fate = "left alone"
	refused fate = "refused by its canary"
	killed  fate = "killed"
)

// rollout is what became of one.
type rollout struct {
	Number    int           `json:"number"`
	Fate      fate          `json:"fate"`
	After     time.Duration `json:"killed_after_ns,omitempty"`
	Published bool          `json:"published"`
	Took      time.Duration `json:"took_ns"` // of the publisher
	// Switch is from the publisher's end to the last server's switch.
	Switch time.Duration `json:"switch_ns,omitempty"`
	// OneCopy is from then (if nothing was published, from the publisher's end)
	// until the tmpfs held one copy again.
	OneCopy time.Duration `json:"one_copy_ns"`
	Swept   bool          `json:"swept,omitempty"` // only after a shmctl gc
}

const modelName = "served"

type trial struct {
	o     *rollouts
	space *space
	reg   *registry.Registry
	dir   string // of sources and sockets
	meter *meter
	fleet *fleet
	ask   *clients

	deaths     int               // publishers in a row that were killed in vain
	one        int64             // payload of one copy
	tags       map[uint64]uint64 // by generation, as they were published
	rollouts   []rollout
	violations []string
}

func (t *trial) violate(text string, args ...any) {
	t.violations = append(t.violations, fmt.Sprintf(text, args...))
}

func (o *rollouts) run(ctx context.Context) error {
	if _, err := os.Stat(o.shmctl); err != nil {
		return fmt.Errorf("%w (make build)", err)
	}
	sp, err := newSpace(4*o.Size + 64<<20)
	if err != nil {
		return err
	}
	defer sp.end()
	dir, err := os.MkdirTemp("", "onecopy-campaign-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	t := &trial{o: o, space: sp, dir: dir, ask: &clients{tagOf: map[uint64]uint64{}}, tags: map[uint64]uint64{}, violations: []string{}}
	began := time.Now()
	if err := t.run(ctx); err != nil {
		return err
	}
	return t.finish(ctx, time.Since(began))
}

func (t *trial) source(number int) string {
	return filepath.Join(t.dir, fmt.Sprint("source-", number%2))
}

func (t *trial) run(ctx context.Context) (err error) {
	o := t.o
	if err := writeSource(t.source(0), o.Size, 1); err != nil {
		return err
	}
	if err := t.command(ctx, nil, "load", modelName, t.source(0)).Run(); err != nil {
		return fmt.Errorf("shmctl load: %w", err)
	}
	// It looks, and does nothing of what would be on trial.
	if t.reg, err = registry.Open(t.space.dir, &registry.Options{MustExist: true}); err != nil {
		return err
	}
	defer t.reg.Close()
	u, err := t.space.quickUsage()
	if err != nil {
		return err
	}
	t.one = u.payload(t.space.own)
	gen, err := t.published()
	if err != nil {
		return err
	}
	t.tags[gen] = 1
	t.ask.floor.Store(gen)

	t.fleet = newFleet(o.Processes)
	defer t.fleet.kill()
	for i := range o.Processes {
		if err := t.fleet.start(i, servePlan{t.space.dir, modelName, t.socket(i)}); err != nil {
			return err
		}
	}
	if err := t.fleet.await(ctx, gen); err != nil {
		return err
	}
	asking, stop := context.WithCancel(ctx)
	defer stop()
	for i := range o.Processes {
		if err := awaitSocket(ctx, t.socket(i)); err != nil {
			return err
		}
		t.ask.start(asking, t.socket(i), o.Clients, o.Pause)
	}
	t.meter = startMeter(t.space)
	defer t.meter.stop()
	random := rng(o.Seed, 0)
	typical := 200 * time.Millisecond
	for n := range o.Rollouts {
		r, err := t.rollout(ctx, n+1, random, typical)
		if err != nil {
			return fmt.Errorf("rollout %d: %w", n+1, err)
		}
		t.rollouts = append(t.rollouts, r)
		if r.Fate == left {
			typical = (3*typical + r.Took) / 4
		}
	}
	stop()
	t.ask.wait()
	return t.fleet.finish()
}

func (t *trial) socket(i int) string { return filepath.Join(t.dir, fmt.Sprint("socket-", i)) }

func (t *trial) command(ctx context.Context, env []string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, t.o.shmctl, append([]string{"--dir", t.space.dir}, args...)...)
	cmd.Env = append(os.Environ(), env...)
	return cmd
}

func (t *trial) published() (uint64, error) {
	e, err := t.reg.Entry(modelName)
	if err == nil && e.State != "ready" {
		err = fmt.Errorf("%s is %s", modelName, e.State)
	}
	return e.Generation, err
}

// rollout runs one publisher to its end and waits until everybody has followed.
func (t *trial) rollout(ctx context.Context, n int, random *rand.Rand, typical time.Duration) (r rollout, err error) {
	r = rollout{Number: n, Fate: left}
	switch k := random.IntN(20); {
	case k < 10 && t.deaths < 2:
		// After three deaths without a publication the registry makes the loaders
		// of a key wait.
		r.Fate, r.After = killed, time.Duration(random.Int64N(int64(typical)*5/4))
	case k >= 10 && k < 12:
		r.Fate = refused
	}
	tag := uint64(n + 1)
	if err := writeSource(t.source(n), t.o.Size, tag); err != nil {
		return r, err
	}
	before, err := t.published()
	if err != nil {
		return r, err
	}
	plan, err := json.Marshal(canaryPlan{tag, r.Fate == refused})
	if err != nil {
		return r, err
	}
	var said bytes.Buffer
	// Not bound to ctx, whose end would kill it too.
	cmd := t.command(context.WithoutCancel(ctx), []string{roleVar + "=canary", roleVar + "_ARG=" + string(plan)},
		"rollout", modelName, t.source(n), "--canary", fmt.Sprintf("exec /proc/%d/exe", os.Getpid()))
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.WaitDelay = 10 * time.Second // a canary that outlives a killed publisher has its stderr
	began := clock()
	p, err := startCommand(cmd)
	if err != nil {
		return r, err
	}
	var kill <-chan time.Time
	if r.Fate == killed {
		kill = time.After(r.After)
	}
	select {
	case <-kill:
		_ = p.cmd.Process.Kill()
		<-p.done
	case <-p.done:
	}
	r.Took = time.Duration(p.ended - began)
	gen, err := t.published()
	if err != nil {
		return r, err
	}
	r.Published = gen != before
	switch {
	case r.Published:
		t.deaths = 0
	case p.killed():
		t.deaths++
	}
	code := cmd.ProcessState.ExitCode()
	switch {
	case r.Fate == left && (code != 0 || !r.Published), r.Fate == refused && (code <= 0 || r.Published),
		r.Fate == killed && !p.killed() && (code != 0 || !r.Published):
		t.violate("rollout %d, %s: exit code %d, published %v: %s", n, r.Fate, code, r.Published, said.String())
	}
	from := p.ended
	if r.Published {
		t.tags[gen] = tag
		t.ask.floor.Store(gen)
		if err := t.fleet.await(ctx, gen); err != nil {
			return r, err
		}
		last := t.fleet.last()
		r.Switch, from = time.Duration(max(0, last-p.ended)), max(last, p.ended)
	}
	return r, t.awaitOneCopy(ctx, &r, from)
}

// patience is how long the memory of an old generation may stay without anybody
// who calls, before the trial calls shmctl gc and says so.
const patience = time.Second

func (t *trial) awaitOneCopy(ctx context.Context, r *rollout, from int64) error {
	at, ok, err := t.meter.await(ctx, t.one, patience)
	if err != nil {
		return err
	}
	if !ok {
		r.Swept = true
		if err := t.command(ctx, nil, "gc").Run(); err != nil {
			return fmt.Errorf("shmctl gc: %w", err)
		}
		if at, ok, err = t.meter.await(ctx, t.one, 10*patience); err != nil {
			return err
		}
		if !ok {
			u, _ := t.space.quickUsage()
			t.violate("rollout %d, %s: %d bytes are in use after shmctl gc, one copy has %d", r.Number, r.Fate, u.payload(t.space.own), t.one)
		}
	}
	r.OneCopy = time.Duration(max(0, at-from))
	return nil
}

// awaitSocket waits until somebody answers at a socket.
func awaitSocket(ctx context.Context, path string) error {
	for {
		c, err := dial(ctx, path)
		if err == nil {
			return c.Close()
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(time.Millisecond):
		}
	}
}

// finish judges the whole, and writes the report.
func (t *trial) finish(ctx context.Context, took time.Duration) error {
	c := t.ask
	for gen, tag := range c.tagOf {
		if t.tags[gen] != tag {
			t.violate("generation %d was served with tag %d; published was %d", gen, tag, t.tags[gen])
		}
	}
	for _, n := range []struct {
		count int
		what  string
	}{{c.failed, "failed requests"}, {c.mixed, "answers that mix generations"}, {c.stale, "answers of a generation that had been replaced before the request"}} {
		if n.count > 0 {
			t.violate("%d %s", n.count, n.what)
		}
	}
	t.violations = append(t.violations, c.wrong...)
	if c.requests == 0 {
		t.violate("nobody asked anything")
	}
	reg, err := registry.Open(t.space.dir, nil)
	if err != nil {
		return err
	}
	defer reg.Close()
	for p := range problems(ctx, reg) {
		t.violations = append(t.violations, p)
	}
	s := t.summary(took)
	s.print(t.o.stdout)
	figures, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	if err := writeReport(t.o.report, s.markdown(t.o, t.space.own), append(figures, '\n')); err != nil {
		return err
	}
	if len(t.violations) > 0 {
		return fmt.Errorf("%w: %d violations; again with: rollouts %s", errViolated, len(t.violations), t.o.flags())
	}
	return nil
}

// fleet are the servers.
type fleet struct {
	mu      sync.Mutex
	serving []notice
	changed chan struct{}
	servers []*child
	died    error
}

func newFleet(n int) *fleet {
	return &fleet{serving: make([]notice, n), changed: make(chan struct{}), servers: make([]*child, n)}
}

func (f *fleet) start(i int, p servePlan) error {
	out, in, err := os.Pipe()
	if err != nil {
		return err
	}
	f.servers[i], err = startRole("serve", p, in)
	in.Close()
	if err != nil {
		out.Close()
		return err
	}
	go func() {
		defer out.Close()
		dec := json.NewDecoder(out)
		for {
			var n notice
			err := dec.Decode(&n)
			f.mu.Lock()
			if err != nil {
				f.died = cmp.Or(f.died, fmt.Errorf("server %d says no more: %w", i, err))
			} else {
				f.serving[i] = n
			}
			close(f.changed)
			f.changed = make(chan struct{})
			f.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return nil
}

// await waits until all of them serve gen, or a later one.
func (f *fleet) await(ctx context.Context, gen uint64) error {
	for {
		f.mu.Lock()
		there := !slices.ContainsFunc(f.serving, func(n notice) bool { return n.Generation < gen })
		died, changed := f.died, f.changed
		f.mu.Unlock()
		if there || died != nil {
			return died
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// last is when the last of them changed.
func (f *fleet) last() (at int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, n := range f.serving {
		at = max(at, n.At)
	}
	return at
}

func (f *fleet) finish() (err error) {
	for i, s := range f.servers {
		err = errors.Join(err, s.finish())
		f.servers[i] = nil
	}
	return err
}

func (f *fleet) kill() {
	for _, s := range f.servers {
		if s != nil {
			s.kill()
		}
	}
}
