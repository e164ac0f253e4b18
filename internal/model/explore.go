package model

import (
	"fmt"
	"hash/maphash"
)

// A transition is one atomic step of one process (a system call or one 64-bit
// atomic access), a crash (kill -9), or a step of an outside adversary.
type transition[S any] struct {
	proc  int8 // who steps, -1 for an outsider
	fault bool // crash or adversary: never needed for progress
	label string
	to    S
}

const outsider = -1

// A system is a transition system plus what must hold of it. It must be
// deterministic: traces are rebuilt by stepping through it again.
type system[S comparable] struct {
	init     S
	next     func(S) []transition[S]
	check    func(S) string // "" or the violated safety invariant
	finished func(S) bool   // every process that is alive has finished
	describe func(S) string

	// step names the step that a process takes next; nil when steps have no names.
	step func(s S, proc int8) string
	// recover, when set, runs on every reachable state: kill everybody, restart
	// one process alone, clean up; "" or what could not be recovered.
	recover func(S) string
}

// A Result is what exploring one configuration found.
type Result struct {
	States, Steps, FaultSteps, Recoveries int

	Violation string      // "" or the broken invariant
	Trace     []TraceStep // a shortest way to it
	Truncated bool        // the limit was reached first
}

// A TraceStep is one step of a counter-example and the state that it leads to.
type TraceStep struct{ Label, State string }

// Verdict tells in one word how the exploration ended.
func (r Result) Verdict() Verdict {
	switch {
	case r.Violation != "":
		return Broken
	case r.Truncated:
		return Truncated
	}
	return Holds
}

// A stateKey stands for a state: 128 bits, so that two states of the 10^8 of the
// largest configuration collide with a probability of 10^-23.
type stateKey [2]uint64

var seeds = [2]maphash.Seed{maphash.MakeSeed(), maphash.MakeSeed()}

func keyOf[S comparable](s S) stateKey {
	return stateKey{maphash.Comparable(seeds[0], s), maphash.Comparable(seeds[1], s)}
}

// An exploration visits states breadth first, so that the first violation found
// is one with the fewest steps. It keeps no states, only how each was reached.
type exploration[S comparable] struct {
	system[S]
	ids      map[stateKey]int32
	parent   []int32
	via      []uint8 // which transition of the parent
	finished []bool
	from, to []int32 // transitions that are no faults, for the progress check
}

type visit[S any] struct {
	id int32
	s  S
}

func explore[S comparable](sys system[S], limit int) (res Result) {
	e := exploration[S]{system: sys, ids: map[stateKey]int32{}}
	defer func() { res.States = len(e.parent) }()
	queue := []visit[S]{{e.add(keyOf(sys.init), -1, 0), sys.init}}
	for len(queue) > 0 {
		var found []visit[S]
		for _, v := range queue {
			if broken := e.violation(v.s, &res); broken != "" {
				res.Violation, res.Trace = broken, e.trace(v.id)
				return res
			}
			e.finished[v.id] = sys.finished(v.s)
			for i, t := range sys.next(v.s) {
				res.Steps++
				if t.fault {
					res.FaultSteps++
				}
				key := keyOf(t.to)
				id, ok := e.ids[key]
				if !ok {
					id = e.add(key, v.id, uint8(i))
					found = append(found, visit[S]{id, t.to})
				}
				if !t.fault {
					e.from, e.to = append(e.from, v.id), append(e.to, id)
				}
			}
		}
		if len(e.parent) > limit {
			res.Truncated = true
			return res
		}
		queue = found
	}
	if id := e.stuck(); id >= 0 {
		res.Violation = "PROGRESS: a live process can never finish from here"
		res.Trace = e.trace(id)
	}
	return res
}

func (e *exploration[S]) add(key stateKey, parent int32, via uint8) int32 {
	id := int32(len(e.parent))
	e.ids[key] = id
	e.parent = append(e.parent, parent)
	e.via = append(e.via, via)
	e.finished = append(e.finished, false)
	return id
}

func (e *exploration[S]) violation(s S, res *Result) string {
	if v := e.check(s); v != "" {
		return "SAFETY: " + v
	}
	if e.recover == nil {
		return ""
	}
	if v := e.recover(s); v != "" {
		return "RECOVERY: " + v
	}
	res.Recoveries++
	return ""
}

func (e *exploration[S]) trace(id int32) []TraceStep {
	var path []uint8
	for ; e.parent[id] >= 0; id = e.parent[id] {
		path = append(path, e.via[id])
	}
	s := e.init
	out := []TraceStep{{"init", e.describe(s)}}
	for k := len(path) - 1; k >= 0; k-- {
		t := e.next(s)[path[k]]
		label := t.label
		if t.proc != outsider {
			if e.step != nil && !t.fault {
				label = e.step(s, t.proc) + ": " + label
			}
			label = fmt.Sprintf("p%d %s", t.proc, label)
		}
		s = t.to
		out = append(out, TraceStep{label, e.describe(s)})
	}
	return out
}

// stuck looks for a state from which no state can be reached, without a further
// fault, where all live processes are done: a deadlock, or a trap in which
// processes can only spin. It returns -1 when there is none.
func (e *exploration[S]) stuck() int32 {
	e.ids = nil // the memory is needed below
	n := len(e.parent)
	head := make([]int32, n+1) // head[i]:head[i+1] are the predecessors of i
	for _, d := range e.to {
		head[d+1]++
	}
	for i := range n {
		head[i+1] += head[i]
	}
	before := make([]int32, len(e.to))
	pos := append([]int32(nil), head[:n]...)
	for k, d := range e.to {
		before[pos[d]] = e.from[k]
		pos[d]++
	}
	ends := e.finished
	var stack []int32
	for i, ok := range ends {
		if ok {
			stack = append(stack, int32(i))
		}
	}
	for len(stack) > 0 {
		i := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		for _, p := range before[head[i]:head[i+1]] {
			if !ends[p] {
				ends[p] = true
				stack = append(stack, p)
			}
		}
	}
	for i, ok := range ends {
		if !ok {
			return int32(i)
		}
	}
	return -1
}
