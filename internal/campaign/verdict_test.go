//go:build linux && (amd64 || arm64)

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/onecopy/onecopy/internal/layout"
)

func ready(gen uint64) layout.Word { return layout.MakeWord(layout.Ready, gen) }

// scene is a run in which nothing is wrong: a budget of 100, model 0 is pinned,
// model 1 leased from 15 to 45, model 2 loaded, used and evicted.
func scene() *evidence {
	e := &evidence{
		budget: 100, largest: 30, cost: []int64{10, 20, 30, 71}, pinned: []int{0}, own: true,
		ends: map[int]int64{1: 1000},
		log: []*access{
			{worker: 1, key: 1, begun: 12, claimed: 13, got: 15, gen: 2, loaded: true, drop: 45, gone: 46},
			{worker: 1, key: 2, begun: 20, claimed: 21, got: 22, gen: 3, loaded: true, drop: 25, gone: 26},
			{worker: 1, key: 2, begun: 30, got: 31, gen: 3, drop: 32, gone: 33},
		},
		slots: map[string][]sighting{
			"model-0": {{0, 5, ready(1)}},
			"model-1": {{0, 0, layout.MakeWord(layout.Loading, 2)}, {1, 5, ready(2)}},
			"model-2": {{1, 3, ready(3)}},
		},
	}
	for i := range int64(6) {
		e.samples = append(e.samples, sample{from: 10 * (i + 1), to: 10*(i+1) + 1, usage: usage{all: 60, table: 10}})
	}
	return e
}

// over has the last two samples, which are a second apart, show so much.
func over(u usage) func(*evidence) {
	return func(e *evidence) {
		u.table = e.samples[0].usage.table
		e.samples[4].usage, e.samples[5].usage = u, u
		e.samples[5].from += int64(time.Second)
		e.samples[5].to += int64(time.Second)
	}
}

// judge returns every violation.
func judge(e *evidence) []string {
	var out outcome
	out.judge(e)
	return out.Violations
}

func TestNothingIsWrong(t *testing.T) {
	e := scene()
	if vs := judge(e); len(vs) > 0 {
		t.Errorf("%q", vs)
	}
	kept, _ := e.judgeLeases()
	if diff := cmp.Diff(keptResult{Leases: 3, Seen: 1, Samples: 3 + 6, Pinned: 1}, kept); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

const right = "right"

func TestViolations(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(*evidence)
		want  string // "": still nothing is wrong; right: no refusal is
	}{
		"over by less than a model":  {over(usage{all: 140}), ""},
		"over by more":               {over(usage{all: 141}), "131 bytes are used"},
		"over by more for a moment":  {func(e *evidence) { e.samples[3].usage.all = 141 }, ""},
		"over, by the files' blocks": {func(e *evidence) { e.own = false; over(usage{all: 60, linked: 131})(e) }, "131 bytes are used"},
		"no samples":                 {func(e *evidence) { e.samples = nil }, "saw nothing"},
		"nobody came":                {func(e *evidence) { e.log = nil }, "nobody accessed"},
		"a lease is broken": {func(e *evidence) {
			e.slots["model-1"] = []sighting{{1, 2, ready(2)}}
		}, "sample 3: model-1 is not in the table"},
		"a lease is broken for a moment": {func(e *evidence) {
			e.slots["model-1"] = []sighting{{0, 1, ready(2)}, {3, 5, ready(2)}}
		}, "sample 2: model-1 is not in the table"},
		"another generation is in its place": {func(e *evidence) {
			e.slots["model-1"] = []sighting{{0, 2, ready(2)}, {3, 5, ready(9)}}
		}, "sample 3: model-1 is ready|9, not ready|2"},
		"a leased one is being evicted": {func(e *evidence) {
			e.slots["model-1"] = []sighting{{0, 2, ready(2)}, {3, 3, layout.MakeWord(layout.Evicting, 2)}, {4, 5, ready(2)}}
		}, "model-1 is evicting|2"},
		"after the lease it may go": {func(e *evidence) {
			e.slots["model-1"] = []sighting{{1, 3, ready(2)}}
		}, ""},
		"a lease of a killed process is not certain": {func(e *evidence) {
			e.log[0].drop, e.log[0].gone = 0, 0
			e.slots["model-1"] = []sighting{{1, 1, ready(2)}}
		}, ""},
		"a pinned one goes": {func(e *evidence) {
			e.slots["model-0"] = []sighting{{0, 4, ready(1)}}
		}, "pinned: sample 5: model-0 is not in the table"},
		"a pinned one was loaded again": {func(e *evidence) {
			e.slots["model-0"] = []sighting{{0, 2, ready(1)}, {3, 5, ready(4)}}
		}, "pinned: sample 3: model-0 is ready|4"},
		"a load is refused rightly": {func(e *evidence) {
			// 10 are pinned and 20 leased: 71 more are too many until 46.
			e.log = append(e.log, &access{worker: 1, key: 3, begun: 40, failed: 44, full: true})
		}, right},
		"a load is refused wrongly": {func(e *evidence) {
			e.log = append(e.log, &access{worker: 1, key: 3, begun: 47, failed: 50, full: true})
		}, "refused although 10 bytes"},
		"... while somebody used the same model": {func(e *evidence) {
			e.budget = 110
			e.log = append(e.log, &access{worker: 1, key: 3, begun: 14, failed: 19, full: true},
				&access{worker: 1, key: 1, begun: 14, got: 16, gen: 2, drop: 40, gone: 41})
		}, "refused although 30 bytes"},
		"... while somebody else was refused": {func(e *evidence) {
			e.log = append(e.log, &access{worker: 1, key: 3, begun: 47, failed: 50, full: true},
				&access{worker: 1, key: 2, begun: 47, failed: 50, full: true})
		}, "refused although 10 bytes"},
		"it was refused beside a load of unknown size": {func(e *evidence) {
			e.log = append(e.log, &access{worker: 1, key: 3, begun: 47, failed: 50, full: true},
				&access{worker: 1, key: 2, silent: true, begun: 47, claimed: 48, got: 49, gen: 3, loaded: true, drop: 51, gone: 52})
		}, right},
		"it was refused beside what a killed process held": {func(e *evidence) {
			e.ends[2] = 48
			e.log = append(e.log, &access{worker: 2, key: 1, begun: 40, got: 41, gen: 2},
				&access{worker: 1, key: 3, begun: 47, failed: 50, full: true})
		}, right},
		"a load fails otherwise": {func(e *evidence) {
			e.log = append(e.log, &access{worker: 1, key: 3, begun: 40, failed: 44, reason: "no idea"})
		}, "no idea"},
		"hits are missing": {func(e *evidence) {
			for i := range int64(9) {
				e.log = append(e.log, &access{worker: 1, key: 1, begun: 100 + 10*i, claimed: 101 + 10*i, got: 102 + 10*i, gen: 2, loaded: true, gone: 103 + 10*i})
			}
		}, "hit rate 0.0833, an exact LRU has 0.8333"},
	} {
		t.Run(name, func(t *testing.T) {
			e := scene()
			c.spoil(e)
			vs := judge(e)
			switch {
			case c.want == right:
				if r, vs := e.judgeRefusals(); r.Refused == 0 || len(vs) > 0 {
					t.Errorf("%+v, %q", r, vs)
				}
			case c.want == "" && len(vs) > 0:
				t.Errorf("%q", vs)
			case c.want != "" && !strings.Contains(strings.Join(vs, "\n"), c.want):
				t.Errorf("%q does not say %q", vs, c.want)
			}
		})
	}
}

func TestObserverJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "observer")
	text := `slot 0 ` + words(ready(1)) + ` model-0
slot 3 ` + words(layout.MakeWord(layout.Loading, 2)) + ` model-1
sample 10 11 5 4 3
slot 3 ` + words(ready(2)) + ` model-1
sample 20 21 6 4 3
sample 30 31 7 4 3
slot 3 ` + words(layout.MakeWord(layout.Free, 2)) + ` model-1
sample 40 41 8 4 3
`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var e evidence
	if err := e.readObserver(path); err != nil {
		t.Fatal(err)
	}
	want := map[string][]sighting{
		"model-0": {{0, 3, ready(1)}},
		"model-1": {{0, 0, layout.MakeWord(layout.Loading, 2)}, {1, 2, ready(2)}},
	}
	if diff := cmp.Diff(want, e.slots, cmp.AllowUnexported(sighting{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if len(e.samples) != 4 || e.samples[2].usage != (usage{all: 7, table: 4, linked: 3}) || e.samples[2].from != 30 {
		t.Errorf("%+v", e.samples)
	}
	for _, bad := range []string{"sample 1 2 3\n", "slot 0 x y\n", "else\n"} {
		if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if new(evidence).readObserver(path) == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

func words(w layout.Word) string {
	var b []byte
	for n := uint64(w); ; n /= 10 {
		b = append([]byte{byte('0' + n%10)}, b...)
		if n < 10 {
			return string(b)
		}
	}
}

func TestExactLRU(t *testing.T) {
	l := newExactLRU(100)
	use := func(key int, cost int64, wantHit bool) {
		t.Helper()
		hit, ok := l.acquire(key, cost)
		if hit != wantHit || !ok {
			t.Errorf("%d: hit %v, ok %v", key, hit, ok)
		}
		l.release(key, false)
	}
	use(1, 40, false)
	use(2, 40, false)
	use(1, 40, true)
	use(3, 40, false) // 2 was used before 1
	use(1, 40, true)
	l.pinned[1] = true
	l.acquire(3, 40)
	if _, ok := l.acquire(4, 40); ok {
		t.Error("4 was admitted beside a pinned and a leased model")
	}
	if l.used != 80 || len(l.models) != 2 {
		t.Errorf("a refusal evicted something: %+v", l)
	}
	l.release(3, true)
	l.acquire(4, 50) // in the place of 3
	l.abort(4)
	if l.used != 40 || len(l.models) != 1 {
		t.Errorf("%+v", l)
	}
}
