//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

var lruAccesses = flag.Int("lru.accesses", 600, "accesses in each trace of TestLRUQuality")

// exactLRU is what the registry is measured by: least recently used first, in
// the unit of the budget.
type exactLRU struct {
	budget, used int64
	sizes        map[int]int64
	order        []int // least recently used first
	hits         int
}

func (l *exactLRU) access(key int, size int64) {
	if i := slices.Index(l.order, key); i >= 0 {
		l.hits++
		l.order = append(slices.Delete(l.order, i, i+1), key)
		return
	}
	for l.used+size > l.budget {
		l.used -= l.sizes[l.order[0]]
		l.order = l.order[1:]
	}
	l.sizes[key] = size
	l.used += size
	l.order = append(l.order, key)
}

// TestLRUQuality runs traces over three times as many bytes as the budget has
// against an exact LRU: no load fails, the budget is kept, and the hit rate is
// within two points.
func TestLRUQuality(t *testing.T) {
	const keys = 48
	sizes := make([]int64, keys) // of the payload, in pages
	var all int64
	random := rand.New(rand.NewPCG(1, 2))
	for i := range sizes {
		sizes[i] = 1 + random.Int64N(8)
		all += (sizes[i] + 2) * 4096
	}
	zipf := rand.NewZipf(random, 1.1, 1, keys-1)
	for name, next := range map[string]func(i int) int{
		"zipf": func(int) int { return int(zipf.Uint64()) },
		"scan": func(i int) int { return i % keys },
		"zipf with scans": func(i int) int {
			if i/keys%4 == 3 {
				return i % keys
			}
			return int(zipf.Uint64())
		},
	} {
		t.Run(name, func(t *testing.T) {
			budget := all / 3
			r := newRegistry(t, &Options{Budget: budget, Slots: 64})
			pinned := mustLoad(t, r, "leased", small("1"))
			exact := exactLRU{budget: budget - block, sizes: map[int]int64{}}
			hits := 0
			for i := range *lruAccesses {
				k := next(i)
				exact.access(k, (sizes[k]+2)*4096)
				m, err := r.GetOrLoad(ctxb, fmt.Sprint("model-", k), Source{
					Size: sizes[k] * 4096, Version: "1",
					Load: madeSource("", map[string][]byte{"w": make([]byte, sizes[k]*4096)}).Load,
				})
				if err != nil {
					t.Fatalf("access %d: %v", i, err)
				}
				if m.Info().AlreadyPresent {
					hits++
				}
				m.Close()
				if i%50 == 0 {
					if s := stats(t, r); s.Used > budget {
						t.Fatalf("access %d: %d bytes used of a budget of %d", i, s.Used, budget)
					}
				}
			}
			if pinned.Stale() {
				t.Error("a leased model was evicted")
			}
			got, want := float64(hits)/float64(*lruAccesses), float64(exact.hits)/float64(*lruAccesses)
			t.Logf("hit rate %.3f, exact LRU %.3f", got, want)
			if got < want-0.02 || got > want+0.02 {
				t.Errorf("hit rate %.3f, exact LRU has %.3f", got, want)
			}
		})
	}
}
