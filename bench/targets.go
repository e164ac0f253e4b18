//go:build linux

package main

import (
	"fmt"
	"math"
	"math/rand/v2"
)

// target is what the project promised itself for one figure.
type target struct {
	what  string
	limit float64
	least bool // the figure must be at least the limit; otherwise at most
	text  func(float64) string
	of    func(r *results) []float64 // by round, ascending; nothing: not measured
	// pick is what of them is held against the limit; nil: the median.
	pick func([]float64) float64
}

const (
	targetSize  = 1536 << 20
	targetModel = int64(1.5e9)
)

func micros(v float64) string { return short(v) + " µs" }
func millis(v float64) string { return short(v) + " ms" }
func nanos(v float64) string  { return short(v) + " ns" }
func kibi(v float64) string   { return short(v/1024) + " KiB" }

// speed is how many times faster than base a way of the part load is, round by round.
func loadSpeed(cold bool, way, base string) func(*results) []float64 {
	return loadRatio(cold, base, way, "wall_ms")
}

func loadRatio(cold bool, a, b, metric string) func(*results) []float64 {
	return func(r *results) []float64 {
		name := loadCase(cold, targetSize)
		return ratios(r.series("load", name, a, metric), r.series("load", name, b, metric))
	}
}

func microFigure(name, way, metric string, scale float64) func(*results) []float64 {
	return func(r *results) []float64 {
		var all []float64
		for _, v := range flat(r.series("micro", name, way, metric)) {
			all = append(all, v*scale)
		}
		return all
	}
}

func scaleFigure(name, way, metric string) func(*results) []float64 {
	return func(r *results) []float64 { return flat(r.series("scale", name, way, metric)) }
}

func percentage(v float64) string { return short(v) + " %" }

const (
	calls    = "single calls"
	attachBy = "registry: Attach/sparse="
)

var (
	caseScanTarget   = caseScan + ", " + gibi(targetSize)
	caseAttachTarget = caseAttach + ", " + gibi(targetSize)
	caseScaleTarget  = scaleCase(1000, 200)
	caseScanCopies   = copiesCase(10, targetSize)
)

var targets = []target{
	{what: "warm load, 1.5 GiB, 1 thread: speed / `cp`, with digests", limit: 1.8, least: true, text: times, of: loadSpeed(false, wayOne, wayCp)},
	{what: "the same without digests (estimate: less the time to digest the finished model)", limit: 2, least: true, text: times, of: func(r *results) []float64 {
		name := loadCase(false, targetSize)
		less := r.series("load", name, wayOne, "wall_ms")
		for round, ms := range r.series("load", name, wayOne, "verify_ms") {
			less[round] -= ms
		}
		return ratios(r.series("load", name, wayCp, "wall_ms"), less)
	}},
	{what: "warm load, 1.5 GiB, 1 thread: processor time / `cp`", limit: 0.45, text: times, of: loadRatio(false, wayOne, wayCp, "cpu_ms")},
	{what: "warm load, 1.5 GiB, 2 threads: speed / `cp`", limit: 3, least: true, text: times, of: loadSpeed(false, wayTwo, wayCp)},
	{what: "load without 2 MiB pages: speed / `cp`", limit: 0.9, least: true, text: times, of: loadSpeed(false, wayPlain, wayCp)},
	{what: "cold load, 1.5 GiB: speed / `cp`", limit: 1.4, least: true, text: times, of: loadSpeed(true, wayCold, wayCp)},
	{what: "cold load, 1.5 GiB: speed / O_DIRECT read of the same file", limit: 0.85, least: true, text: times, of: loadSpeed(true, wayCold, wayRaw)},
	{what: "folder of 5,000 files of 10 kB: time / `cp -r`", limit: 2, text: times, of: func(r *results) []float64 {
		const name = "warm, folder of 5,000 files of 10 kB"
		return ratios(r.series("load", name, wayOne, "wall_ms"), r.series("load", name, wayCp, "wall_ms"))
	}},
	{what: "attach", limit: 60, text: micros, of: microFigure(caseAttachTarget, wayModel, "ns", 1e-3)},
	{what: "attach: 70 GiB (sparse) / 1.5 GiB", limit: 1.2, text: times, of: func(r *results) []float64 {
		return ratios(r.series("micro", calls, attachBy+"70.0GiB", "ns"), r.series("micro", calls, attachBy+"1.5GiB", "ns"))
	}},
	{what: "fresh process that attaches, over an empty one", limit: 150, text: micros, of: microFigure(caseFresh, wayAttaches, "over_us", 1)},
	{what: "first full scan / second scan", limit: 1.1, text: times, of: func(r *results) []float64 {
		return ratios(r.series("micro", caseScanTarget, wayModel, "scan1_ms"), r.series("micro", caseScanTarget, wayModel, "scan2_ms"))
	}},
	{what: "first full scan: speed / mmap of the warm disk file", limit: 1.3, least: true, text: times, of: func(r *results) []float64 {
		return ratios(r.series("micro", caseScanTarget, wayFile, "scan1_ms"), r.series("micro", caseScanTarget, wayModel, "scan1_ms"))
	}},
	{what: "page tables per worker, 1.5 GiB", limit: 16 << 10, text: kibi, of: microFigure(caseScanTarget, wayModel, "tables_bytes", 1)},
	{what: "look-up", limit: 25, text: nanos, of: microFigure(calls, "registry: Lookup/hit", "ns", 1)},
	{what: "look-up: allocations", limit: 0, text: short, of: microFigure(calls, "registry: Lookup/hit", "allocs", 1)},
	{what: "cached `Use`", limit: 40, text: nanos, of: microFigure(calls, "registry: UseCached", "ns", 1)},
	{what: "cached `Use`: allocations", limit: 0, text: short, of: microFigure(calls, "registry: UseCached", "allocs", 1)},
	{what: "kill -9 of the loader, 1 waiter: it owns the load after", limit: 1, text: millis, of: microFigure(waitCase(1), wayKill, "first_ms", 1)},
	{what: "kill -9 of the loader, 200 waiters: one owns the load after", limit: 1, text: millis, of: microFigure(waitCase(200), wayKill, "first_ms", 1)},
	{what: "the last of 200 has the result, after that", limit: 40, text: millis, of: microFigure(waitCase(200), wayKill, "last_ms", 1)},
	{what: "processor time of 200 waiters, per second", limit: 0, text: millis, of: microFigure(waitCase(200), wayKill, "cpu_ms_per_s", 1)},
	{what: "llama.cpp, 1 worker: tokens/s / warm disk file", limit: 1.03, least: true, text: ratio3, of: tokenRatio(1)},
	{what: "the same, lower bound of the 95 % interval", limit: 1, least: true, text: ratio3, of: tokenRatio(1), pick: lowerBound},
	{what: "llama.cpp, 2 workers: tokens/s / warm disk file", limit: 1.03, least: true, text: ratio3, of: tokenRatio(2)},
	{what: "the same, lower bound of the 95 % interval", limit: 1, least: true, text: ratio3, of: tokenRatio(2), pick: lowerBound},
	{what: "1,000 models, 200 holders: `shmctl ls`", limit: 20, text: millis, of: scaleFigure(caseScaleTarget, wayLs, "wall_ms")},
	{what: "the same: `shmctl check`, without the data", limit: 50, text: millis, of: scaleFigure(caseScaleTarget, wayCheck, "wall_ms")},
	{what: "the same: `shmctl holders`", limit: 100, text: millis, of: scaleFigure(caseScaleTarget, wayHolders, "wall_ms")},
	{what: "the same: `shmctl metrics`", limit: 20, text: millis, of: scaleFigure(caseScaleTarget, wayMetrics, "wall_ms")},
	{what: "the same: a scrape of `shmctl metrics --listen`", limit: 20, text: millis, of: scaleFigure(caseScaleTarget, wayScrape, "wall_ms")},
	{what: "the same: `shmctl top` on a terminal, of one processor", limit: 5, text: percentage, of: scaleFigure(caseScaleTarget, wayTop, "share_percent")},
	{what: "the same: a refresh of `shmctl top -o jsonl` every 2 s, of one processor", limit: 5, text: percentage, of: scaleFigure(caseScaleTarget, wayTopJSON, "refresh_percent")},
	{what: "a load that evicts an idle model of 1.5 GiB", limit: 100, text: millis, of: scaleFigure(evictCase(targetSize), wayRoom, "wall_ms")},
	{what: "scan for 10 private copies of 1.5 GiB", limit: 10_000, text: millis, of: scaleFigure(caseScanCopies, wayScan, "wall_ms")},
	{what: "the same: copies not found", text: short, of: scaleFigure(caseScanCopies, wayScan, "missed")},
	{what: "the same: found in another model of the same size", text: short, of: scaleFigure(caseScanCopies, wayScan, "wrong")},
	{what: "the same: error of the reclaimable bytes", limit: 1, text: percentage, of: scaleFigure(caseScanCopies, wayScan, "error_percent")},
	{what: "10 Go workers with 1.5 GB: memory / one copy", limit: 1.01, text: ratio3, of: copiesOf(langGo, wayOnecopy)},
	{what: "10 Python workers with 1.5 GB, one loads by `open`: memory / one copy", limit: 1.02, text: ratio3, of: copiesOf(langPython, wayEmpty)},
	{what: "10 Python workers with 1.5 GB, `get_or_load` of an array: memory / one copy", limit: 1.02, text: ratio3, of: copiesOf(langPython, wayObject)},
	{what: "warm load by Python, 1.5 GiB: speed / `cp`", limit: 1.5, least: true, text: times, of: loadSpeed(false, wayPython, wayCp)},
}

// copiesOf is how many copies the workers of a way hold together, by round.
func copiesOf(lang, way string) func(*results) []float64 {
	return func(r *results) []float64 {
		var all []float64
		for _, t := range r.rounds(group{targetModel, lang, 10, 1}, way) {
			all = append(all, float64(t.Memory)/float64(t.Size))
		}
		return sorted(all)
	}
}

func tokenRatio(workers int) func(*results) []float64 {
	return func(r *results) []float64 {
		name := tokensCase(workers)
		return ratios(r.series("tokens", name, wayModel, "tokens_per_s"), r.series("tokens", name, wayDisk, "tokens_per_s"))
	}
}

func lowerBound(values []float64) float64 { low, _ := interval(values); return low }

// interval is the 95 % interval of the median, by drawing rounds again with the same random numbers each time.
func interval(values []float64) (low, high float64) {
	const draws = 10_000
	if len(values) == 0 {
		return 0, 0
	}
	random := rand.New(rand.NewPCG(1, 2))
	medians := make([]float64, draws)
	drawn := make([]float64, len(values))
	for i := range medians {
		for j := range drawn {
			drawn[j] = values[random.IntN(len(values))]
		}
		medians[i] = median(sorted(drawn))
	}
	medians = sorted(medians)
	return medians[draws*25/1000], medians[draws*975/1000]
}

// verdict is a target with what was measured.
type verdict struct {
	What   string  `json:"what"`
	Limit  float64 `json:"limit"`
	Least  bool    `json:"at_least"`
	Figure float64 `json:"figure"`
	spread
	Rounds int    `json:"rounds"` // 0: not measured
	Met    bool   `json:"met"`
	Target string `json:"target_text"`
	Text   string `json:"figure_text"`
}

func (r *results) verdicts() []verdict {
	var all []verdict
	for _, t := range targets {
		values := t.of(r)
		v := verdict{What: t.what, Limit: t.limit, Least: t.least, spread: spreadOf(values), Rounds: len(values)}
		v.Target, v.Text = "≤ "+t.text(t.limit), "not measured"
		if t.least {
			v.Target = "≥ " + t.text(t.limit)
		}
		if len(values) > 0 {
			v.Figure = v.Median
			if t.pick != nil {
				v.Figure = t.pick(values)
			}
			v.Met = v.Figure <= t.limit || math.Abs(v.Figure-t.limit) < 5e-4
			if t.least {
				v.Met = v.Figure >= t.limit
			}
			v.Text = t.text(v.Figure)
			if span := v.span(t.text); t.pick == nil && span != v.Text {
				v.Text += " (" + span + ")"
			}
		}
		all = append(all, v)
	}
	return all
}

func (v verdict) answer() string {
	switch {
	case v.Rounds == 0:
		return "-"
	case v.Met:
		return "yes"
	}
	return "**no**"
}

// targetGrid is the table of targets. Rows that were not measured are left out unless all is set.
func (r *results) targetGrid(all bool) grid {
	g := grid{rows: [][]string{{"what", "target", "measured: median (range)", "rounds", "met"}}}
	for _, v := range r.verdicts() {
		if all || v.Rounds > 0 {
			g.rows = append(g.rows, []string{v.What, v.Target, v.Text, fmt.Sprint(v.Rounds), v.answer()})
		}
	}
	return g
}
