//go:build linux

package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
)

// results is everything one run found out.
type results struct {
	Machine machine
	Loads   []load
	Trials  []trial
	Skips   []skipped
	Samples []sample
	Notes   []string
}

// skip notes a cell once, whatever the number of rounds.
func (r *results) skip(c cell, reason string) {
	if !slices.ContainsFunc(r.Skips, func(s skipped) bool { return s.cell == c }) {
		r.Skips = append(r.Skips, skipped{c, reason})
	}
}

// group is the cells that belong into one table: the same model and workers, all ways.
type group struct {
	size    int64
	lang    string
	workers int
	users   int
}

func (c cell) group() group { return group{c.Size, c.Lang, c.Workers, c.Users} }

// title is the heading of a table.
func (g group) title() string {
	if g.users > 1 {
		return fmt.Sprintf("%s model, %d users in one Go process", mega(g.size), g.users)
	}
	workers := "workers"
	if g.workers == 1 {
		workers = "worker"
	}
	return fmt.Sprintf("%s model, %d %s %s", mega(g.size), g.workers, language(g.lang), workers)
}

func language(lang string) string {
	if lang == langGo {
		return "Go"
	}
	return "Python"
}

// groups lists all groups: processes first, then users within a process.
func (r *results) groups() []group {
	var all []group
	for _, t := range r.Trials {
		all = append(all, t.group())
	}
	for _, s := range r.Skips {
		all = append(all, s.group())
	}
	slices.SortFunc(all, func(a, b group) int {
		return cmp.Or(cmp.Compare(min(a.users, 2), min(b.users, 2)), cmp.Compare(a.size, b.size),
			cmp.Compare(a.lang, b.lang), cmp.Compare(a.workers, b.workers), cmp.Compare(a.users, b.users))
	})
	return slices.Compact(all)
}

var (
	ownWays = []string{wayPrivate, wayMmap, wayOnecopy, wayEmpty, wayPath}
	allWays = append(slices.Clone(ownWays), allPeers...)
)

// label is a way's name in the tables.
func (g group) label(way string) string {
	if g.users > 1 && way == wayEmpty {
		return wayOnecopy // the first user loads, the others share: there is only this form in one process
	}
	return way
}

// rounds are the trials of a cell.
func (r *results) rounds(g group, way string) []trial {
	var all []trial
	for _, t := range r.Trials {
		if t.group() == g && t.Way == way {
			all = append(all, t)
		}
	}
	return all
}

// skipped returns why a cell was not run, "" if it was.
func (r *results) skipped(g group, way string) string {
	for _, s := range r.Skips {
		if s.group() == g && s.Way == way {
			return s.Reason
		}
	}
	return ""
}

// loads are the times of loading a model of a size into an empty registry, and the share of huge pages.
func (r *results) loads(size int64) (ms spread, collapsed float64) {
	var times []float64
	for _, l := range r.Loads {
		if l.Size == size {
			times = append(times, l.MS)
			collapsed = float64(l.Collapsed) / float64(l.Size)
		}
	}
	return spreadOf(times), collapsed
}

// loadedSizes are the sizes that were loaded, in ascending order.
func (r *results) loadedSizes() []int64 {
	var sizes []int64
	for _, l := range r.Loads {
		sizes = append(sizes, l.Size)
	}
	slices.Sort(sizes)
	return slices.Compact(sizes)
}

// loadText tells what is paid once per machine, which no other way pays.
func (r *results) loadText(size int64) string {
	ms, collapsed := r.loads(size)
	return fmt.Sprintf("%s: one load per machine, before the rows of onecopy: %s ms [%s]; %s %% of the bytes in 2 MiB pages",
		mega(size), short(ms.Median), ms.span(short), percent(100*collapsed))
}

// span is the range as text.
func (s spread) span(text func(float64) string) string {
	low, high := text(s.Min), text(s.Max)
	if low == high {
		return low
	}
	return low + ".." + high
}

// headline is the short list of what was measured against what was promised.
func (r *results) headline() []string {
	var lines []string
	for _, g := range r.groups() {
		way := wayOnecopy
		if g.users > 1 {
			way = wayEmpty
		}
		ours, rival := r.rounds(g, way), r.rounds(g, wayMmap)
		if g.workers*g.users < 2 || len(ours) == 0 {
			continue
		}
		line := fmt.Sprintf("%s: %s MB in place of %s, %s %% saved", g.title(),
			memory.text(memory.over(ours).Median), mega(g.size*int64(g.workers)*int64(g.users)), percent(saved.over(ours).Median))
		if len(rival) > 0 {
			line += fmt.Sprintf(" (mapping the file: %s %%)", percent(saved.over(rival).Median))
		}
		if g.users > 1 {
			cold, hit := firstUser.over(ours).Median, access.over(ours).Median
			line += fmt.Sprintf("; cold load %s, cached access %s: 1 to %s", nanoseconds(cold), nanoseconds(hit), grouped(int64(cold/hit)))
		}
		lines = append(lines, line)
	}
	return lines
}

// remarks are what a reader must know to judge the figures.
func (r *results) remarks() []string {
	var lines []string
	unaligned := false
	for _, g := range r.groups() {
		for _, way := range allWays {
			rounds := r.rounds(g, way)
			if len(rounds) == 0 {
				continue
			}
			// What cannot be known (-1) is not remarked on.
			if kept := pageCache.over(rounds).Min; kept >= 0 && kept < 0.99*float64(g.size) {
				lines = append(lines, fmt.Sprintf("%s, %s: the kernel took back a part of the page cache (%s %% of the source was left in one round), so some times may be those of the disk",
					g.title(), g.label(way), percent(100*kept/float64(g.size))))
			}
			_, collapsed := r.loads(g.size)
			unaligned = unaligned || way == wayPath && collapsed > 0.5 && huge.over(rounds).Max == 0
		}
	}
	if unaligned {
		lines = append(lines, "workers that map the path by themselves (onecopy-path) have page tables with 4 KiB entries although the memory has 2 MiB pages: the kernel aligns mappings of this tmpfs only if it is mounted with huge=advise, within_size or always")
	}
	return lines
}

// compared are the metrics in which less is better.
var compared = []struct {
	metric
	what, unit string
	least      float64 // smaller differences are nothing that anybody could notice
}{
	{memory, "memory", "MB", 1e6},
	{tables, "page tables", "kB", 20e3},
	{usableN, "usable, last worker", "ms", 0.5},
	{readN, "fully read, last worker", "ms", 0.5},
	{scan1, "first scan", "ms", 0.5},
	{scan2, "second scan", "ms", 0.5},
	{again, "usable again after kill -9", "ms", 0.5},
}

// notBetter lists where another way had the better median, by 2 % and more than nothing.
func (r *results) notBetter() []string {
	var lines []string
	for _, g := range r.groups() {
		ours := r.rounds(g, wayOnecopy)
		if len(ours) == 0 {
			continue
		}
		for _, way := range append([]string{wayPrivate, wayMmap}, allPeers...) {
			theirs := r.rounds(g, way)
			if way == wayObject {
				continue // not somebody else's
			}
			var found []string
			for _, m := range compared {
				a, b := m.over(ours), m.over(theirs)
				if len(theirs) == 0 || a.Median <= b.Median*1.02 || a.Median-b.Median < m.least {
					continue
				}
				text := fmt.Sprintf("%s %s against %s %s", m.what, m.text(a.Median), m.text(b.Median), m.unit)
				if a.Min <= b.Max {
					text += " (ranges overlap)"
				}
				found = append(found, text)
			}
			if len(found) > 0 {
				lines = append(lines, fmt.Sprintf("%s, against %s: %s", g.title(), way, strings.Join(found, "; ")))
			}
		}
	}
	return lines
}

// write writes the files that the options ask for.
func (r *results) write(o options) error {
	var errs []error
	if o.json != "" {
		text, err := r.jsonLines()
		errs = append(errs, err, os.WriteFile(o.json, text, 0o644))
	}
	if o.markdown != "" {
		errs = append(errs, os.WriteFile(o.markdown, []byte(r.all()), 0o644))
	}
	if o.readme != "" && r.hasWorkers() {
		errs = append(errs, markBench.Replace(o.readme, r.readme()))
	}
	if o.performance != "" {
		errs = append(errs, markTargets.Replace(o.performance, r.targetGrid(true).markdown()+"\n"), markFigures.Replace(o.performance, r.figures()))
	}
	return errors.Join(errs...)
}

// jsonLines is one line for the machine, one per load, trial, skipped cell, sample, target and note, and one summary per cell. Each
// line has a field "kind".
func (r *results) jsonLines() ([]byte, error) {
	var out bytes.Buffer
	lines := json.NewEncoder(&out)
	var errs []error
	errs = append(errs, lines.Encode(struct {
		Kind string `json:"kind"`
		machine
	}{"machine", r.Machine}))
	for _, l := range r.Loads {
		errs = append(errs, lines.Encode(struct {
			Kind string `json:"kind"`
			load
		}{"load", l}))
	}
	for _, t := range r.Trials {
		errs = append(errs, lines.Encode(struct {
			Kind string `json:"kind"`
			trial
		}{"trial", t}))
	}
	for _, s := range r.Skips {
		errs = append(errs, lines.Encode(struct {
			Kind string `json:"kind"`
			skipped
		}{"skipped", s}))
	}
	for _, one := range r.Samples {
		errs = append(errs, lines.Encode(struct {
			Kind string `json:"kind"`
			sample
		}{"sample", one}))
	}
	for _, v := range r.verdicts() {
		if v.Rounds > 0 {
			errs = append(errs, lines.Encode(struct {
				Kind string `json:"kind"`
				verdict
			}{"target", v}))
		}
	}
	for _, text := range r.Notes {
		errs = append(errs, lines.Encode(struct {
			Kind string `json:"kind"`
			Text string `json:"text"`
		}{"note", text}))
	}
	for _, g := range r.groups() {
		for _, way := range allWays {
			trials := r.rounds(g, way)
			if len(trials) == 0 {
				continue
			}
			values := map[string]spread{}
			for _, m := range metrics {
				values[m.name] = m.over(trials)
			}
			errs = append(errs, lines.Encode(struct {
				Kind string `json:"kind"`
				cell
				Rounds int               `json:"rounds"`
				Values map[string]spread `json:"values"`
			}{"summary", trials[0].cell, len(trials), values}))
		}
	}
	return out.Bytes(), errors.Join(errs...)
}
