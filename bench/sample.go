//go:build linux

package main

import (
	"fmt"
	"slices"
	"strings"
)

// sample is what one trial of any part but workers measured. Samples of one case are compared with each
// other; those of one round were taken one after the other, so that a ratio is one of equal conditions.
type sample struct {
	Part   string             `json:"part"`
	Case   string             `json:"case"`
	Way    string             `json:"way"`
	Round  int                `json:"round"`
	Values map[string]float64 `json:"values"`
}

// series is one metric of one way, by round.
func (r *results) series(part, name, way, metric string) map[int]float64 {
	values := map[int]float64{}
	for _, s := range r.Samples {
		if v, ok := s.Values[metric]; ok && s.Part == part && s.Case == name && s.Way == way {
			values[s.Round] = v
		}
	}
	return values
}

func flat(series map[int]float64) []float64 {
	var all []float64
	for _, v := range series {
		all = append(all, v)
	}
	return sorted(all)
}

// ratios are a / b for each round that has both, in ascending order.
func ratios(a, b map[int]float64) []float64 {
	var all []float64
	for round, v := range a {
		if w, ok := b[round]; ok && w > 0 {
			all = append(all, v/w)
		}
	}
	return sorted(all)
}

// view is how the samples of a part are shown.
type view struct {
	part, title, about string
	columns            []sampleColumn
}

// sampleColumn is a metric, or its ratio to another way's in the same round.
type sampleColumn struct {
	head, metric string
	text         func(float64) string
	base         string // ratio to this way
	inverse      bool   // base / this: a speed, where the metric is a time
	more         bool   // more is better
	interval     bool   // with the 95 % interval of the median
}

func times(v float64) string { return short(v) + "x" }

func (c sampleColumn) spread(r *results, part, name, way string) (spread, bool) {
	own := r.series(part, name, way, c.metric)
	values := flat(own)
	if c.base != "" {
		other := r.series(part, name, c.base, c.metric)
		if c.inverse {
			own, other = other, own
		}
		values = ratios(own, other)
	}
	return spreadOf(values), len(values) > 0
}

// grid is a table that is not yet text.
type grid struct {
	title string
	rows  [][]string // the first one is the head
}

// grids are the tables of a part, one per case.
func (r *results) grids(v view) []grid {
	var all []grid
	for _, name := range r.cases(v.part) {
		g := grid{title: name}
		var used []sampleColumn
		for _, c := range v.columns {
			if slices.ContainsFunc(r.waysOf(v.part, name), func(way string) bool { _, ok := c.spread(r, v.part, name, way); return ok }) {
				used = append(used, c)
			}
		}
		head := []string{"way"}
		for _, c := range used {
			head = append(head, c.head)
		}
		g.rows = append(g.rows, head)
		for _, way := range r.waysOf(v.part, name) {
			row := []string{way}
			for _, c := range used {
				row = append(row, c.cell(r, v.part, name, way))
			}
			g.rows = append(g.rows, row)
		}
		all = append(all, g)
	}
	return all
}

func (c sampleColumn) cell(r *results, part, name, way string) string {
	s, ok := c.spread(r, part, name, way)
	if !ok {
		return "-"
	}
	text := c.text(s.Median)
	if span := s.span(c.text); span != text {
		text += " (" + span + ")"
	}
	return text
}

// cases are the cases of a part in the order in which they were run.
func (r *results) cases(part string) []string {
	var all []string
	for _, s := range r.Samples {
		if s.Part == part && !slices.Contains(all, s.Case) {
			all = append(all, s.Case)
		}
	}
	return all
}

// waysOf are the ways of a case, as they were first run.
func (r *results) waysOf(part, name string) []string {
	var all []string
	for _, s := range r.Samples {
		if s.Part == part && s.Case == name && !slices.Contains(all, s.Way) {
			all = append(all, s.Way)
		}
	}
	return all
}

// markdown is the grid as a table.
func (g grid) markdown() string {
	var out strings.Builder
	if g.title != "" {
		fmt.Fprintf(&out, "\n%s:\n", g.title)
	}
	for i, row := range g.rows {
		if i == 0 {
			out.WriteString("\n")
		}
		fmt.Fprintf(&out, "| %s |\n", strings.Join(row, " | "))
		if i == 0 {
			fmt.Fprintf(&out, "| --- |%s\n", strings.Repeat(" ---: |", len(row)-1))
		}
	}
	return out.String()
}
