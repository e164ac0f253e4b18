//go:build linux

package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

func (r *results) hasWorkers() bool { return len(r.Trials)+len(r.Skips) > 0 }

func (r *results) hasTargets() bool {
	for _, v := range r.verdicts() {
		if v.Rounds > 0 {
			return true
		}
	}
	return false
}

// print writes everything for a terminal.
func (r *results) print(out io.Writer) error {
	if r.hasWorkers() {
		if err := r.table(out); err != nil {
			return err
		}
	} else {
		fmt.Fprintf(out, "%s\n", r.Machine)
	}
	for _, p := range parts {
		for i, g := range r.grids(p.view) {
			if i == 0 {
				fmt.Fprintf(out, "\n%s\n\n%s\n", p.view.title, strings.ReplaceAll(p.view.about, "`", ""))
			}
			if err := g.print(out); err != nil {
				return err
			}
		}
		for _, line := range r.intervals(p.view) {
			fmt.Fprintf(out, "- %s\n", line)
		}
		for i, line := range r.worse(p.view) {
			if i == 0 {
				fmt.Fprintf(out, "\nWhere onecopy is not better\n")
			}
			fmt.Fprintf(out, "- %s\n", line)
		}
	}
	if r.hasTargets() {
		fmt.Fprintf(out, "\nTargets\n")
		if err := r.targetGrid(false).print(out); err != nil {
			return err
		}
	}
	for i, line := range r.Notes {
		if i == 0 {
			fmt.Fprintf(out, "\nNotes\n")
		}
		fmt.Fprintf(out, "- %s\n", line)
	}
	return nil
}

// print is the grid for a terminal.
func (g grid) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "\n%s\n", g.title)
	for _, row := range g.rows {
		fmt.Fprintf(w, "%s\n", strings.Join(row, "\t"))
	}
	return w.Flush()
}

// figures are the tables of all parts, as Markdown.
func (r *results) figures() string {
	var out strings.Builder
	out.WriteString(r.origin())
	for _, p := range parts {
		for i, g := range r.grids(p.view) {
			if i == 0 {
				fmt.Fprintf(&out, "\n## %s\n\n%s\n", p.view.title, p.view.about)
			}
			out.WriteString(g.markdown())
		}
		bullets(&out, "", r.intervals(p.view))
		bullets(&out, "Where onecopy is not better:", r.worse(p.view))
	}
	if r.hasWorkers() {
		fmt.Fprintf(&out, "\n## Workers\n\n%s", r.workers())
	}
	bullets(&out, "Notes of the run:", r.Notes)
	return out.String()
}

// all is the page with everything.
func (r *results) all() string {
	var out strings.Builder
	out.WriteString("# What was measured\n\n")
	if r.hasTargets() {
		fmt.Fprintf(&out, "## Targets\n%s\n", r.targetGrid(false).markdown())
	}
	out.WriteString(r.figures())
	return out.String()
}

func bullets(out *strings.Builder, title string, lines []string) {
	if len(lines) == 0 {
		return
	}
	if title != "" {
		fmt.Fprintf(out, "\n%s\n", title)
	}
	fmt.Fprintf(out, "\n- %s\n", strings.Join(lines, "\n- "))
}

// worse lists the ratios of the ways of onecopy to others that are not in its favour by more than 2 %.
func (r *results) worse(v view) []string {
	var lines []string
	for _, name := range r.cases(v.part) {
		for _, way := range r.waysOf(v.part, name) {
			if !strings.HasPrefix(way, wayModel) {
				continue
			}
			var found []string
			for _, c := range v.columns {
				s, ok := c.spread(r, v.part, name, way)
				if c.base == "" || !ok {
					continue
				}
				bad := s.Median > 1.02
				if c.inverse || c.more {
					bad = s.Median < 0.98
				}
				if bad {
					found = append(found, fmt.Sprintf("%s %s", c.head, c.cell(r, v.part, name, way)))
				}
			}
			if len(found) > 0 {
				lines = append(lines, fmt.Sprintf("%s, %s: %s", name, way, strings.Join(found, "; ")))
			}
		}
	}
	return lines
}

// intervals are the 95 % intervals of the median ratios, where a column wants them.
func (r *results) intervals(v view) []string {
	var lines []string
	for _, name := range r.cases(v.part) {
		for _, way := range r.waysOf(v.part, name) {
			for _, c := range v.columns {
				if !c.interval || way == c.base {
					continue
				}
				values := ratios(r.series(v.part, name, way, c.metric), r.series(v.part, name, c.base, c.metric))
				if len(values) < 2 {
					continue
				}
				low, high := interval(values)
				lines = append(lines, fmt.Sprintf("%s, %s: %s, median %s, 95 %% interval %s to %s, %d rounds",
					name, way, c.head, c.text(median(values)), c.text(low), c.text(high), len(values)))
			}
		}
	}
	return lines
}
