//go:build linux && (amd64 || arm64)

package main

import (
	"cmp"
	"slices"
)

// exactLRU is the policy that the registry is compared with: least recently used
// first, whole models, never what is leased or pinned, all of it known at once.
type exactLRU struct {
	budget, used int64
	models       map[int]*cached
	pinned       map[int]bool
	tick         int64
}

type cached struct {
	cost   int64
	used   int64 // tick of the last use
	leases int
}

func newExactLRU(budget int64) *exactLRU {
	return &exactLRU{budget: budget, models: map[int]*cached{}, pinned: map[int]bool{}}
}

// acquire takes a lease on key; ok is false when there is no room for it.
func (l *exactLRU) acquire(key int, cost int64) (hit, ok bool) {
	l.tick++
	if m := l.models[key]; m != nil {
		m.leases++
		m.used = l.tick
		return true, true
	}
	if !l.evict(l.used + cost - l.budget) {
		return false, false
	}
	l.models[key] = &cached{cost: cost, used: l.tick, leases: 1}
	l.used += cost
	return false, true
}

// evict frees at least short bytes, or nothing.
func (l *exactLRU) evict(short int64) bool {
	if short <= 0 {
		return true
	}
	type victim struct {
		key int
		*cached
	}
	var vs []victim
	for key, m := range l.models {
		if m.leases == 0 && !l.pinned[key] {
			vs = append(vs, victim{key, m})
		}
	}
	slices.SortFunc(vs, func(a, b victim) int { return cmp.Compare(a.used, b.used) })
	for i, v := range vs {
		if short -= v.cost; short > 0 {
			continue
		}
		for _, v := range vs[:i+1] {
			delete(l.models, v.key)
			l.used -= v.cost
		}
		return true
	}
	return false
}

// release gives a lease back, which counts as a use unless the holder was killed.
func (l *exactLRU) release(key int, killed bool) {
	m := l.models[key]
	m.leases--
	if !killed {
		l.tick++
		m.used = l.tick
	}
}

// abort ends a load that published nothing.
func (l *exactLRU) abort(key int) {
	m := l.models[key]
	if m.leases--; m.leases == 0 {
		l.used -= m.cost
		delete(l.models, key)
	}
}

// simulation is what the exact policy makes of a trace.
type simulation struct {
	accesses, hits int // of those whose outcome is known
	refused        int
}

// simulate replays a trace in the order in which things took effect: a load when
// its memory was granted, a hit when the model was there.
func simulate(budget int64, cost []int64, pinned []int, log []*access, endOf func(*access) int64) (s simulation) {
	type step struct {
		at    int64
		a     *access
		leave bool
	}
	var steps []step
	for _, a := range log {
		at := a.got
		switch {
		case a.claimed != 0:
			at = a.claimed
		case a.got == 0 && a.failed != 0:
			at = a.failed
		case a.got == 0:
			continue // killed before anything had happened
		}
		steps = append(steps, step{at: at, a: a}, step{at: max(at, endOf(a)), a: a, leave: true})
	}
	// What ends at the very moment at which it began still begins first.
	slices.SortStableFunc(steps, func(a, b step) int { return cmp.Compare(a.at, b.at) })
	l := newExactLRU(budget)
	for _, key := range pinned {
		l.pinned[key] = true
		l.acquire(key, cost[key])
		l.release(key, false)
	}
	held := map[*access]bool{}
	for _, st := range steps {
		a := st.a
		switch {
		case !st.leave:
			hit, ok := l.acquire(a.key, cost[a.key])
			held[a] = ok
			if a.got == 0 && a.failed == 0 {
				break // no outcome to compare with
			}
			s.accesses++
			if hit {
				s.hits++
			}
			if !ok {
				s.refused++
			}
		case !held[a]:
		case a.got == 0 && a.claimed != 0:
			l.abort(a.key)
		default:
			l.release(a.key, a.gone == 0 && a.failed == 0)
		}
	}
	return s
}
