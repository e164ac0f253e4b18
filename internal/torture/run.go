//go:build linux

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/crashpoint"
	"github.com/onecopy/onecopy/registry"
)

const (
	firstRound = 10 * time.Second // before the first audit; later ones are rarer
	longRound  = 30 * time.Second // between two audits
	hungAfter  = 2 * time.Minute  // a worker that lives longer hangs
)

// campaign is one run.
type campaign struct {
	options
	place
	board   *board
	began   time.Time
	stop    chan struct{}
	stopped sync.Once
	auditor *auditProcess
	python  *pythonNursery // nil without Python

	mu sync.Mutex
	tally
	rng *rand.Rand
	bad []string
}

// tally is what the report counts.
type tally struct {
	Kills   int            // all of them
	Steps   map[string]int // kills at each named step
	PySteps map[string]int // of them, of Python processes
	Random  int            // kills at random
	Inside  int            // kills while an operation of the protocol ran
	Stops   int            // workers stopped at a named step, for a while
	Past    int            // workers that ended because they did not come to their step
	Python  int            // kills of Python processes
	Rounds  int            // audits
	Line    [lineWords]uint64
}

func run(o options) (ok bool, err error) {
	p, err := places(o)
	if err != nil {
		return false, err
	}
	c := &campaign{options: o, place: p, began: time.Now(), stop: make(chan struct{}), rng: rand.New(rand.NewPCG(o.seed, 0))}
	c.tally = tally{Steps: map[string]int{}, PySteps: map[string]int{}}
	if c.board, err = openBoard(p.board(), o.procs); err != nil {
		return false, err
	}
	for dir, budget := range map[string]int64{p.steady(): steadyBudget, p.doomed(): doomedBudget} {
		r, err := registry.Open(dir, &registry.Options{Budget: budget, Slots: 48})
		if err != nil {
			return false, err
		}
		if err := r.Close(); err != nil {
			return false, err
		}
	}
	if c.auditor, err = startAuditor(p); err != nil {
		return false, err
	}
	defer c.auditor.close()
	if o.python != "" {
		if c.python, err = startNursery(o.python, p); err != nil {
			return false, err
		}
		defer c.python.close()
	}
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, unix.SIGINT, unix.SIGTERM)
	go func() { <-interrupted; c.end() }()

	fmt.Printf("seed %d, %d processes\n", o.seed, o.procs)
	for !c.over() {
		c.round()
		c.audit()
		c.Rounds++
		fmt.Printf("%8s  %8d kills, %5.0f/s, fewest at a step %d (%s), %d late of %d waits\n", time.Since(c.began).Round(time.Second),
			c.Kills, float64(c.Kills)/time.Since(c.began).Seconds(), c.Steps[c.rarest()], c.rarest(), c.Line[wordLate], c.Line[wordWaits])
	}
	return c.report()
}

func (c *campaign) end() { c.stopped.Do(func() { close(c.stop) }) }

func (c *campaign) over() bool {
	select {
	case <-c.stop:
		return true
	default:
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.bad) > 0 || c.options.kills > 0 && c.Kills >= c.options.kills ||
		c.options.kills == 0 && time.Since(c.began) >= c.options.time
}

// round kills for a while, and returns when no worker is alive.
func (c *campaign) round() {
	until := time.Now().Add(min(max(firstRound, time.Since(c.began)/10), longRound))
	var all sync.WaitGroup
	for slot := range c.procs {
		all.Add(1)
		go func() {
			defer all.Done()
			for time.Now().Before(until) && !c.over() {
				c.worker(slot)
			}
		}()
	}
	all.Wait()
}

// plan decides about the next worker: most are killed at the step that has seen the
// fewest kills, or at one of them all.
func (c *campaign) plan(slot int) (j job, rng *rand.Rand, python bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	j = job{place: c.place, Slot: slot, Seed: c.rng.Uint64()}
	rng = rand.New(rand.NewPCG(j.Seed, 2))
	switch n := rng.IntN(10); {
	case n < 5:
		j.Step = c.rarest()
	case n < 7:
		j.Step = crashpoint.Points[rng.IntN(len(crashpoint.Points))]
	}
	if rng.IntN(12) == 0 { // up to an hour behind, as far as there is one, or a month ahead
		j.Shift = rng.Int64N(30*24*3600) - min(3600, monotonic()/2e9)
	}
	j.Stop = j.Step != "" && rng.IntN(10) == 0
	python = c.python != nil && !j.Stop && rng.IntN(6) == 0 && (j.Step == "" || c.python.steps[j.Step])
	return j, rng, python
}

func (c *campaign) rarest() (step string) {
	for _, p := range crashpoint.Points {
		if step == "" || c.Steps[p] < c.Steps[step] {
			step = p
		}
	}
	return step
}

// A victim is a process that a worker runs in.
type victim interface {
	pid() int
	await(stopped func()) error // its end; the number stays taken. stopped is called each time it was stopped
	reap() (status syscall.WaitStatus, output string, err error)
}

// worker starts one and sees to its end.
func (c *campaign) worker(slot int) {
	j, rng, python := c.plan(slot)
	var v victim
	var err error
	if python {
		v, err = c.python.start(j)
	} else {
		v, err = startGo(j)
	}
	if err != nil {
		c.violation(j, "cannot start a worker: "+err.Error())
		return
	}
	// A signal never reaches another process that got the number of a dead one: mu
	// is held when the victim is reaped.
	var mu sync.Mutex
	var dead bool
	var killedAt int64
	signal := func(sig unix.Signal) {
		mu.Lock()
		defer mu.Unlock()
		if dead {
			return
		}
		if sig == unix.SIGKILL {
			killedAt = monotonic()
		}
		_ = unix.Kill(v.pid(), sig)
	}
	ended := make(chan struct{})
	go func() {
		if j.Step == "" {
			pause(ended, time.Duration((1+rng.ExpFloat64()*8)*float64(time.Millisecond)))
			if rng.IntN(8) == 0 {
				signal(unix.SIGSTOP)
				pause(ended, time.Duration(rng.ExpFloat64()*float64(5*time.Millisecond)))
				signal(unix.SIGCONT)
			}
			signal(unix.SIGKILL)
			return
		}
		pause(ended, hungAfter)
		select {
		case <-ended:
		default:
			c.violation(j, fmt.Sprintf("process %d hangs: %s", v.pid(), stacks(v.pid())))
			signal(unix.SIGKILL)
		}
	}()
	err = v.await(func() {
		if j.Step == "" {
			return // by us
		}
		// At its step, with the locks that it has there.
		pause(ended, time.Duration(rng.ExpFloat64()*float64(5*time.Millisecond)))
		c.mu.Lock()
		c.Stops++
		c.mu.Unlock()
		signal(unix.SIGCONT)
	})
	mu.Lock()
	dead = true
	at := killedAt
	if at == 0 {
		at = monotonic()
	}
	c.board.died(v.pid(), at)
	status, output, err2 := v.reap()
	mu.Unlock()
	close(ended)
	if err = errors.Join(err, err2); err != nil {
		c.violation(j, err.Error())
		return
	}
	c.record(j, python, status, output, killedAt != 0)
}

// stacks are those in the kernel.
func stacks(pid int) (text string) {
	tasks, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	for _, t := range tasks {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/stack", pid, t.Name()))
		text += "\n" + string(b)
	}
	return text
}

func pause(ended chan struct{}, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ended:
	case <-t.C:
	}
}

func (c *campaign) record(j job, python bool, status syscall.WaitStatus, output string, byUs bool) {
	line := c.board.take(j.Slot)
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, n := range line {
		switch i {
		case wordDoing:
		case wordSlowest, wordBegan, wordOverrun:
			c.Line[i] = max(c.Line[i], n)
		default:
			c.Line[i] += n
		}
	}
	others := int(line[wordKillsMark] + line[wordKillsLink])
	c.Steps["evict.mark"] += int(line[wordKillsMark])
	c.Steps["load.link-payload"] += int(line[wordKillsLink])
	c.Kills += others
	c.Inside += others
	switch {
	case status.Exited() && status.ExitStatus() == 0 && output == "":
		c.Past++
		return
	case !status.Signaled() || status.Signal() != unix.SIGKILL || strings.Contains(output, "panic"):
		c.bad = append(c.bad, fmt.Sprintf("seed %d, step %q: a process ended by itself with status %#x: %s", j.Seed, j.Step, uint32(status), output))
		return
	}
	c.Kills++
	if line[wordDoing] != 0 {
		c.Inside++
	}
	if python {
		c.Python++
	}
	if byUs {
		c.Random++
		return
	}
	c.Steps[j.Step]++
	if python {
		c.PySteps[j.Step]++
	}
}

func (c *campaign) violation(j job, text string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bad = append(c.bad, fmt.Sprintf("seed %d, step %q: %s", j.Seed, j.Step, text))
}

// audit has everything put in order, and looked at, before and after each model was
// got by one process alone.
func (c *campaign) audit() {
	j := job{place: c.place, Seed: c.rng.Uint64()}
	look := func(when string) {
		for _, p := range c.auditor.look() {
			c.violation(j, when+": "+p)
		}
	}
	tidy := func(dir, only string) {
		j.Key, j.Only = dir, only
		cmd := command(j)
		cmd.Args[1] = "tidy"
		var out bytes.Buffer
		cmd.Stderr = &out
		if err := cmd.Run(); err != nil {
			c.violation(j, fmt.Sprintf("putting %s in order: %v: %s", dir, err, out.String()))
		}
	}
	tidy(c.steady(), "")
	tidy(c.doomed(), "")
	look("after the collector")
	tidy(c.steady(), "all")
	tidy(c.doomed(), "all")
	tidy(c.steady(), "")
	look("after each model was got")
	if err := os.RemoveAll(c.doomed()); err != nil {
		c.violation(j, err.Error())
	}
	r, err := registry.Open(c.doomed(), &registry.Options{Budget: doomedBudget, Slots: 48})
	if err == nil {
		err = r.Close()
	}
	if err != nil {
		c.violation(j, err.Error())
	}
	c.board.take(j.Slot)
}

// goVictim is a worker written in Go.
type goVictim struct {
	cmd *exec.Cmd
	out bytes.Buffer
}

func startGo(j job) (victim, error) {
	v := &goVictim{cmd: command(j)}
	v.cmd.Stderr = &v.out
	return v, v.cmd.Start()
}

func (v *goVictim) pid() int { return v.cmd.Process.Pid }

func (v *goVictim) await(stopped func()) error {
	var info unix.Siginfo
	for {
		err := unix.Waitid(unix.P_PID, v.pid(), &info, unix.WEXITED|unix.WSTOPPED|unix.WNOWAIT, nil)
		switch {
		case err == unix.EINTR:
		case err != nil || info.Code != cldStopped:
			return err
		default:
			// So that the next call waits for something else. A killed one is not
			// stopped any more.
			_ = unix.Waitid(unix.P_PID, v.pid(), &info, unix.WSTOPPED|unix.WNOHANG, nil)
			stopped()
		}
	}
}

const cldStopped = 5 // CLD_STOPPED

func (v *goVictim) reap() (syscall.WaitStatus, string, error) {
	err := v.cmd.Wait()
	if v.cmd.ProcessState == nil {
		return 0, "", err
	}
	return v.cmd.ProcessState.Sys().(syscall.WaitStatus), v.out.String(), nil
}

// auditProcess is the auditor, a process of its own from the first kill to the last.
type auditProcess struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startAuditor(p place) (*auditProcess, error) {
	cmd := command(job{place: p})
	cmd.Args[1] = "auditor"
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	return &auditProcess{cmd, in, bufio.NewReader(out)}, cmd.Start()
}

func (a *auditProcess) look() (problems []string) {
	if _, err := a.in.Write([]byte("look\n")); err != nil {
		return []string{err.Error()}
	}
	line, err := a.out.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &problems)
	}
	if err != nil {
		problems = append(problems, "the auditor: "+err.Error())
	}
	return problems
}

func (a *auditProcess) close() {
	a.in.Close()
	_ = a.cmd.Wait()
}
