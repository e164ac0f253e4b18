//go:build linux && (amd64 || arm64)

package main

import (
	"cmp"
	"fmt"
	"slices"
	"sort"
	"strconv"
	"time"

	"github.com/onecopy/onecopy/internal/layout"
)

// evidence is everything that a run of overcommit left: what the workers say they
// did, and what the observer saw meanwhile.
type evidence struct {
	budget  int64
	largest int64   // cost of the largest model
	cost    []int64 // of each model, as the file system counts it
	pinned  []int
	own     bool // the tmpfs has no other user
	log     []*access
	ends    map[int]int64 // worker -> when its process was gone
	samples []sample
	slots   map[string][]sighting // by key name, in the order of the samples
}

// sample is one look of the observer.
type sample struct {
	from, to int64
	usage    usage
}

// sighting is a state of a key that the observer saw from one sample to another.
type sighting struct {
	first, last int // samples
	word        layout.Word
}

func (e *evidence) endOf(a *access) int64 { return a.end(e.ends[a.worker]) }

// readObserver reads the observer's journal: what it saw and when.
//
//	sample FROM TO ALL TABLE LINKED
//	slot SLOT WORD KEY     the slot changed since the sample before this one
func (e *evidence) readObserver(path string) error {
	type state struct {
		key   string
		since int
		word  layout.Word
	}
	now := map[string]state{} // by slot
	leave := func(slot string, last int) {
		if s, ok := now[slot]; ok && s.key != "" && last >= s.since {
			e.slots[s.key] = append(e.slots[s.key], sighting{s.since, last, s.word})
		}
	}
	e.slots = map[string][]sighting{}
	err := events(path, func(w []string) error {
		switch {
		case w[0] == "sample" && len(w) == 6:
			n, err := ints(w[1:])
			if err != nil {
				return err
			}
			e.samples = append(e.samples, sample{n[0], n[1], usage{all: n[2], table: n[3], linked: n[4]}})
		case w[0] == "slot" && len(w) >= 3:
			word, err := strconv.ParseUint(w[2], 10, 64)
			if err != nil {
				return err
			}
			i := len(e.samples) // its sample line follows
			leave(w[1], i-1)
			s := state{since: i, word: layout.Word(word)}
			if len(w) == 4 && s.word.State() != layout.Free {
				s.key = w[3]
			}
			now[w[1]] = s
		default:
			return fmt.Errorf("not understood: %v", w)
		}
		return nil
	})
	for slot := range now {
		leave(slot, len(e.samples)-1)
	}
	for _, s := range e.slots {
		slices.SortFunc(s, func(a, b sighting) int { return cmp.Compare(a.first, b.first) })
	}
	return err
}

// budgetResult: by how much the budget was exceeded, and in how many samples.
type budgetResult struct {
	Samples     int   `json:"samples"`
	Peak        int64 `json:"peak_bytes"`
	Excess      int64 `json:"excess_bytes"` // negative: it was never reached
	Over        int   `json:"samples_over"`
	LinkedPeak  int64 `json:"linked_peak_bytes"`
	LargestGap  int64 `json:"largest_gap_ns"` // between two samples
	OwnTmpfs    bool  `json:"own_tmpfs"`
	LargestCost int64 `json:"largest_model_bytes"`
}

// freeing is how long memory that has no name any more may still be counted: its
// pages are freed after the name is gone, by a process that may wait for a processor
// in the midst of it, or is dying.
const freeing = 250 * time.Millisecond

func (e *evidence) judgeBudget() (r budgetResult, violations []string) {
	over := int64(-1) // since when there is more than the budget and a model
	r = budgetResult{Samples: len(e.samples), Excess: -e.budget, OwnTmpfs: e.own, LargestCost: e.largest}
	for i, s := range e.samples {
		n := s.usage.payload(e.own)
		r.Peak = max(r.Peak, n)
		r.LinkedPeak = max(r.LinkedPeak, s.usage.linked)
		r.Excess = r.Peak - e.budget
		if n > e.budget {
			r.Over++
		}
		switch {
		case n <= e.budget+e.largest:
			over = -1
		case over < 0:
			over = s.from
		case s.to-over > int64(freeing):
			violations = append(violations, fmt.Sprintf("sample %d: %d bytes are used, the budget is %d and the largest model has %d, for %v",
				i, n, e.budget, e.largest, time.Duration(s.to-over)))
		}
		if i > 0 {
			r.LargestGap = max(r.LargestGap, s.from-e.samples[i-1].to)
		}
	}
	if len(e.samples) == 0 {
		violations = append(violations, "the observer saw nothing")
	}
	return r, violations
}

// between are the samples that lie wholly within two times.
func (e *evidence) between(from, to int64) (first, last int) {
	first = sort.Search(len(e.samples), func(i int) bool { return e.samples[i].from >= from })
	last = sort.Search(len(e.samples), func(i int) bool { return e.samples[i].to > to }) - 1
	return first, last
}

// judgeKept checks that key was READY at generation gen (0: at any one, but always
// the same) in every sample from first to last.
func (e *evidence) judgeKept(key string, gen uint64, first, last int) (violation string) {
	next := first
	for _, s := range e.slots[key] {
		if s.last < next || s.first > last {
			continue
		}
		if gen == 0 {
			gen = s.word.Generation()
		}
		if s.first > next {
			break
		}
		if s.word != layout.MakeWord(layout.Ready, gen) {
			return fmt.Sprintf("sample %d: %s is %v, not ready|%d", max(s.first, next), key, s.word, gen)
		}
		next = s.last + 1
	}
	if next <= last {
		return fmt.Sprintf("sample %d: %s is not in the table, generation %d was", next, key, gen)
	}
	return ""
}

type keptResult struct {
	Leases  int `json:"leases"`
	Seen    int `json:"leases_seen"` // by at least one sample
	Samples int `json:"samples"`     // of leases and pins
	Pinned  int `json:"pinned"`
}

// judgeLeases checks that nothing that was leased, or pinned, was ever evicted.
func (e *evidence) judgeLeases() (r keptResult, violations []string) {
	for _, a := range e.log {
		if a.got == 0 {
			continue
		}
		r.Leases++
		to := a.drop
		if to == 0 {
			// The kill came before the end that is known, by as long as it took to
			// notice it. Nothing later than the last event is certain.
			to = a.got
		}
		first, last := e.between(a.got, to)
		if last < first {
			continue
		}
		r.Seen++
		r.Samples += last - first + 1
		if v := e.judgeKept(modelKey(a.key), a.gen, first, last); v != "" {
			violations = append(violations, fmt.Sprintf("leased by worker %d: %s", a.worker, v))
		}
	}
	for _, key := range e.pinned {
		r.Pinned++
		r.Samples += len(e.samples)
		if v := e.judgeKept(modelKey(key), 0, 0, len(e.samples)-1); v != "" {
			violations = append(violations, "pinned: "+v)
		}
	}
	return r, violations
}

type refusalResult struct {
	Refused int `json:"refused"`
	// Slack is by how many bytes the closest refusal was right.
	Slack int64 `json:"slack_bytes"`
	Other int   `json:"failed_otherwise"`
}

// unknown is what a load is granted beyond its bytes, at most, while nobody knows
// how many it will have: a window and a step (shm.Writer, registry's extend).
const unknown = 12 << 20

// may is the most that a lease on a's model, or its load, may have cost.
func (e *evidence) may(a *access) int64 {
	if a.silent && a.claimed != 0 {
		return e.cost[a.key] + unknown
	}
	return e.cost[a.key]
}

// judgeRefusals checks that no load failed that an exact policy would have
// admitted. While a call ran that failed, the models that were pinned, in use or
// being loaded changed; what can be said for certain is how many bytes they had
// at most at once. A load that would have fitted beside all of these at every
// moment of the call was refused wrongly.
func (e *evidence) judgeRefusals() (r refusalResult, violations []string) {
	pinned := int64(0)
	isPinned := map[int]bool{}
	for _, key := range e.pinned {
		pinned += e.cost[key]
		isPinned[key] = true
	}
	byBegin := slices.Clone(e.log)
	slices.SortFunc(byBegin, func(a, b *access) int { return cmp.Compare(a.begun, b.begun) })
	for _, a := range e.log {
		if a.failed == 0 {
			continue
		}
		if !a.full {
			r.Other++
			violations = append(violations, fmt.Sprintf("worker %d, %s: %s", a.worker, modelKey(a.key), a.reason))
			continue
		}
		most := pinned + e.mostHeld(byBegin, a, isPinned)
		need := e.may(a)
		slack := most + need - e.budget
		if r.Refused++; r.Refused == 1 || slack < r.Slack {
			r.Slack = slack
		}
		if slack <= 0 {
			violations = append(violations, fmt.Sprintf("worker %d, %s: refused although %d bytes in use or pinned and the model's %d fit into %d: %s",
				a.worker, modelKey(a.key), most, need, e.budget, a.reason))
		}
	}
	return r, violations
}

// mostHeld is the largest number of bytes that others may have held at one moment
// while the call of a ran.
func (e *evidence) mostHeld(byBegin []*access, a *access, skip map[int]bool) (most int64) {
	type change struct {
		at  int64
		add bool
		b   *access
	}
	var changes []change
	for _, b := range byBegin {
		if b.begun > a.failed {
			break
		}
		// One that failed before it was granted anything held nothing.
		if b == a || skip[b.key] || b.got == 0 && b.claimed == 0 || e.endOf(b) < a.begun {
			continue
		}
		changes = append(changes, change{max(b.begun, a.begun), true, b}, change{min(e.endOf(b), a.failed) + 1, false, b})
	}
	slices.SortFunc(changes, func(x, y change) int {
		switch {
		case x.at != y.at:
			return cmp.Compare(x.at, y.at)
		case x.add == y.add:
			return 0
		case x.add:
			return -1
		}
		return 1
	})
	holders := map[int][]*access{} // of each model: they share it
	held := int64(0)
	for _, c := range changes {
		key := c.b.key
		held -= e.mostOf(holders[key])
		if c.add {
			holders[key] = append(holders[key], c.b)
		} else {
			holders[key] = slices.DeleteFunc(holders[key], func(b *access) bool { return b == c.b })
		}
		held += e.mostOf(holders[key])
		most = max(most, held)
	}
	return most
}

func (e *evidence) mostOf(holders []*access) (n int64) {
	for _, b := range holders {
		n = max(n, e.may(b))
	}
	return n
}

type hitResult struct {
	Accesses     int     `json:"accesses"`
	Hits         int     `json:"hits"`
	Rate         float64 `json:"rate"`
	ExactHits    int     `json:"exact_hits"`
	ExactRate    float64 `json:"exact_rate"`
	ExactRefused int     `json:"exact_refused"`
	Loads        int     `json:"loads"`
}

// maxPoints is how far the hit rate may be from the exact policy's.
const maxPoints = 0.02

func (e *evidence) judgeHits() (r hitResult, violations []string) {
	for _, a := range e.log {
		if a.got == 0 && a.failed == 0 {
			continue
		}
		r.Accesses++
		switch {
		case a.loaded:
			r.Loads++
		case a.got != 0:
			r.Hits++
		}
	}
	s := simulate(e.budget, e.cost, e.pinned, e.log, e.endOf)
	r.ExactHits, r.ExactRefused = s.hits, s.refused
	r.Rate, r.ExactRate = share(r.Hits, r.Accesses), share(s.hits, s.accesses)
	switch {
	case s.accesses != r.Accesses:
		violations = append(violations, fmt.Sprintf("%d accesses were simulated of %d", s.accesses, r.Accesses))
	case r.Accesses == 0:
		violations = append(violations, "nobody accessed anything")
	case r.Rate < r.ExactRate-maxPoints:
		violations = append(violations, fmt.Sprintf("hit rate %.4f, an exact LRU has %.4f", r.Rate, r.ExactRate))
	}
	return r, violations
}

func share(n, of int) float64 {
	if of == 0 {
		return 0
	}
	return float64(n) / float64(of)
}

func modelKey(n int) string { return "model-" + strconv.Itoa(n) }
