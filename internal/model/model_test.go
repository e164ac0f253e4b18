package model

import (
	"bufio"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// TestConfigs explores the short configurations. Each must hold, or be caught, as
// the table says, and in exactly as many states and steps as RESULTS.txt records:
// a difference means that the model has changed since.
func TestConfigs(t *testing.T) {
	recorded := readResults(t)
	for _, c := range Configs() {
		if !c.Short {
			continue
		}
		t.Run(c.Name, func(t *testing.T) {
			want, ok := recorded[c.Name]
			if !ok {
				t.Fatal("not in RESULTS.txt: run modelcheck again")
			}
			if testing.Short() && want.states > 50_000 {
				t.Skipf("%d states are too many for -short", want.states)
			}
			t.Parallel()
			r := c.Run(want.states + 1)
			if r.Verdict() != c.Expect {
				t.Errorf("verdict %s, want %s: %s", r.Verdict(), c.Expect, r.Violation)
				for _, s := range r.Trace {
					t.Logf("%s   %s", s.Label, s.State)
				}
			}
			if r.States != want.states || r.Steps != want.steps {
				t.Errorf("%d states and %d steps, RESULTS.txt has %d and %d: the model has changed, run modelcheck again",
					r.States, r.Steps, want.states, want.steps)
			}
		})
	}
}

// TestResultsAreCurrent holds RESULTS.txt against the table of configurations.
func TestResultsAreCurrent(t *testing.T) {
	recorded := readResults(t)
	for _, c := range Configs() {
		if c.Big {
			continue
		}
		r, ok := recorded[c.Name]
		switch {
		case !ok:
			t.Errorf("RESULTS.txt lacks %q: run modelcheck again", c.Name)
		case r.verdict != c.Expect.String():
			t.Errorf("RESULTS.txt has %q as %s, want %s", c.Name, r.verdict, c.Expect)
		}
		delete(recorded, c.Name)
	}
	for name := range recorded {
		t.Errorf("RESULTS.txt has %q, which is no configuration of the default set", name)
	}
}

func TestConfigNamesAreUnique(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range Configs() {
		if seen[c.Name] {
			t.Errorf("two configurations are called %q", c.Name)
		}
		seen[c.Name] = true
		if c.Short && c.Big {
			t.Errorf("%q is short and big", c.Name)
		}
	}
}

func TestStepsAreNamed(t *testing.T) {
	form := regexp.MustCompile(`^[a-z]+\.[a-z]+(-[a-z]+)*$`)
	seen := map[string]bool{}
	for i, s := range Steps {
		if !form.MatchString(s.Name) || s.Does == "" {
			t.Errorf("step %d is %+v", i, s)
		}
		if seen[s.Name] {
			t.Errorf("two steps are called %q", s.Name)
		}
		seen[s.Name] = true
	}
}

// stepConfigs take every step of the protocol between them.
var stepConfigs = []genConfig{
	{P: []genRole{{genGetter, 1}, {genReplacer, 1}, {kind: genEvictor}, {kind: genCollector}}, Crash: 1, Fail: true},
	{P: []genRole{{genGetter, 1}, {genReplacer, 1}, {kind: genCollector}}, Rm: 1, RmReg: 1},
	{P: []genRole{{genReader, 1}, {genReplacer, 1}, {genReplacer, 1}, {kind: genCollector}}},
	{P: []genRole{{genGetter, 1}, {genReplacer, 1}, {genUndoer, 1}, {kind: genEvictor}}, Crash: 1},
	{P: []genRole{{genForeign, 1}, {genGetter, 1}, {genGetter, 2}}, Evict: true},
}

// watch explores c and calls saw for every step that is no fault.
func watch(c genConfig, saw func(at step, before, after genState)) {
	sys := c.system()
	sys.recover = nil
	next := sys.next
	sys.next = func(s genState) []transition[genState] {
		out := next(s)
		for _, t := range out {
			if !t.fault {
				saw(s.P[t.proc].at(), s, t.to)
			}
		}
		return out
	}
	explore(sys, 1<<20)
}

// TestEveryStepIsTaken shows that Steps has no step which the protocol never
// takes, and that those marked ModelOnly need a removed rule or a plain store.
func TestEveryStepIsTaken(t *testing.T) {
	var taken [stepDone]bool
	for _, c := range stepConfigs {
		watch(c, func(at step, _, _ genState) { taken[at] = true })
	}
	taken[loadLeased] = false // a mark that every loader passes
	for i, s := range Steps {
		if taken[i] == s.ModelOnly {
			t.Errorf("%s: ModelOnly is %v, taken is %v", s.Name, s.ModelOnly, taken[i])
		}
	}
}

// TestLastingSteps holds the mark against what the steps do: a step that changes
// the table or the names on the tmpfs is Lasting, and no other is.
func TestLastingSteps(t *testing.T) {
	type lasting struct {
		Tab [3]genTable
		Cur uint8
		D   [9]genFiles
	}
	of := func(s genState) lasting { return lasting{s.Tab, s.Cur, s.D} }
	var changes [stepDone]bool
	for _, c := range stepConfigs {
		watch(c, func(at step, before, after genState) {
			if of(before) != of(after) {
				changes[at] = true
			}
		})
	}
	for i, s := range Steps {
		if !s.ModelOnly && s.Lasting != changes[i] {
			t.Errorf("%s: Lasting is %v, but whether it changes what outlives its process is %v", s.Name, s.Lasting, changes[i])
		}
	}
}

// TestExplore tries the checker itself on systems whose faults are plain to see.
func TestExplore(t *testing.T) {
	// A counter that goes up to 3, where it is done.
	counter := func() system[int] {
		return system[int]{
			next: func(s int) []transition[int] {
				if s == 3 {
					return nil
				}
				return []transition[int]{{label: "up", to: s + 1}}
			},
			check:    func(int) string { return "" },
			finished: func(s int) bool { return s == 3 },
			describe: strconv.Itoa,
		}
	}
	for _, c := range []struct {
		name    string
		change  func(*system[int])
		limit   int
		verdict Verdict
		reason  string // prefix of the violation
		steps   int    // length of the trace
	}{
		{name: "sound", change: func(*system[int]) {}, limit: 10, verdict: Holds},
		{name: "limit", change: func(*system[int]) {}, limit: 1, verdict: Truncated},
		{
			name: "unsafe", limit: 10, verdict: Broken, reason: "SAFETY", steps: 2,
			change: func(s *system[int]) {
				s.check = func(n int) string { return map[int]string{2: "two"}[n] }
			},
		},
		{
			name: "lost", limit: 10, verdict: Broken, reason: "RECOVERY", steps: 1,
			change: func(s *system[int]) {
				s.recover = func(n int) string { return map[int]string{1: "one"}[n] }
			},
		},
		{
			name: "deadlock", limit: 10, verdict: Broken, reason: "PROGRESS", steps: 0,
			change: func(s *system[int]) { s.finished = func(int) bool { return false } },
		},
		{
			name: "only a fault helps", limit: 10, verdict: Broken, reason: "PROGRESS", steps: 0,
			change: func(s *system[int]) {
				next := s.next
				s.next = func(n int) []transition[int] {
					out := next(n)
					for i := range out {
						out[i].fault = out[i].fault || n == 2
					}
					return out
				}
			},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			sys := counter()
			c.change(&sys)
			r := explore(sys, c.limit)
			if r.Verdict() != c.verdict || !strings.HasPrefix(r.Violation, c.reason) {
				t.Fatalf("%s %q, want %s %q", r.Verdict(), r.Violation, c.verdict, c.reason)
			}
			if r.Violation != "" && len(r.Trace)-1 != c.steps {
				t.Errorf("the trace has %d steps, want %d: %v", len(r.Trace)-1, c.steps, r.Trace)
			}
		})
	}
}

type recordedResult struct {
	verdict       string
	states, steps int
}

func readResults(t *testing.T) map[string]recordedResult {
	t.Helper()
	f, err := os.Open("RESULTS.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	line := regexp.MustCompile(`^(.+?) +(HOLDS|BROKEN|TRUNCATED) +(\d+) states +(\d+) steps `)
	out := map[string]recordedResult{}
	for s := bufio.NewScanner(f); s.Scan(); {
		m := line.FindStringSubmatch(s.Text())
		if m == nil {
			continue
		}
		states, _ := strconv.Atoi(m[3])
		steps, _ := strconv.Atoi(m[4])
		out[m[1]] = recordedResult{m[2], states, steps}
	}
	if len(out) == 0 {
		t.Fatal("RESULTS.txt has no results")
	}
	return out
}
