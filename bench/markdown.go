//go:build linux

package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/onecopy/onecopy/internal/marked"
)

const (
	markBench   = marked.Part("bench")
	markTargets = marked.Part("targets")
	markFigures = marked.Part("figures")
)

// pages fails when a page that is to be written has no marks: before an hour of work, not after it.
func (o options) pages() error {
	var errs []error
	if o.readme != "" {
		errs = append(errs, markBench.Replace(o.readme, ""))
	}
	if o.performance != "" {
		errs = append(errs, markTargets.Replace(o.performance, ""), markFigures.Replace(o.performance, ""))
	}
	return errors.Join(errs...)
}

// origin says when, how and on what machine the figures were taken.
func (r *results) origin() string {
	command := strings.Join(append([]string{"go run ./bench"}, r.Machine.Args...), " ")
	return fmt.Sprintf("Measured on %s with\n\n```console\n$ %s\n```\n\n```text\n%s\n```\n", r.Machine.Started.Format("2006-01-02"), command, r.Machine)
}

// brief are the numbers of workers that the README speaks of, if they were measured.
var brief = []int{3, 10}

// readme is the results of workers for the README: what was saved, where onecopy is not better, and the tables of the
// largest model and the most workers.
func (r *results) readme() string {
	short := *r
	keep := func(c cell) bool { return c.Users > 1 || slices.Contains(brief, c.Workers) }
	if slices.ContainsFunc(r.Trials, func(t trial) bool { return t.Users == 1 && keep(t.cell) }) {
		short.Trials = slices.DeleteFunc(slices.Clone(r.Trials), func(t trial) bool { return !keep(t.cell) })
		short.Skips = slices.DeleteFunc(slices.Clone(r.Skips), func(s skipped) bool { return !keep(s.cell) })
	}
	var last group
	for _, g := range short.groups() {
		if g.users == 1 && (g.size > last.size || g.size == last.size && g.workers > last.workers) {
			last = g
		}
	}
	var out strings.Builder
	out.WriteString(short.origin() + "\n")
	short.workersText(&out, func(g group) bool { return g.users == 1 && g.size == last.size && g.workers == last.workers })
	return out.String()
}

// workers are all results of workers.
func (r *results) workers() string {
	var out strings.Builder
	r.workersText(&out, func(group) bool { return true })
	return out.String()
}

// workersText writes the tables of some groups, and all conclusions.
func (r *results) workersText(out *strings.Builder, shown func(group) bool) {
	fmt.Fprintf(out, "**Memory saved**\n\n")
	for _, line := range r.headline() {
		fmt.Fprintf(out, "- %s\n", line)
	}
	fmt.Fprintf(out, "\n**Where onecopy is not better**\n\n")
	for _, line := range append(r.costs(), r.notBetter()...) {
		fmt.Fprintf(out, "- %s\n", line)
	}
	if remarks := r.remarks(); len(remarks) > 0 {
		fmt.Fprintf(out, "\n**Remarks**\n\n- %s\n", strings.Join(remarks, "\n- "))
	}
	fmt.Fprintf(out, "\n**Figures.** Each cell is the median of the rounds with the range; 1 MB is 1,000,000 bytes.\n")
	fmt.Fprintf(out, "`private` is a copy of its own in each worker, `mmap` maps the file of the local disk with a warm page cache (the\n")
	fmt.Fprintf(out, "honest rival), `onecopy` finds the model loaded, and with `onecopy-empty` one of the workers loads it. Python workers of\n")
	fmt.Fprintf(out, "`onecopy-path` map the path and know nothing of the library, as under `shmctl exec`. Memory is the PSS of\n")
	fmt.Fprintf(out, "the model's pages, page tables are VmPTE less that of idle workers, both for all workers together. Times are ms from the start of\n")
	fmt.Fprintf(out, "the first process to the last worker's own first statement (started), first byte (usable) and last byte (read), and from `kill -9`\n")
	fmt.Fprintf(out, "of all workers to the last new worker's first byte (again); scans are those of the slowest worker.\n")
	if slices.ContainsFunc(r.Trials, func(t trial) bool { return slices.Contains(allPeers, t.Way) }) {
		fmt.Fprintf(out, "The other ways are libraries for Python, used as their documentation shows; their memory is the PSS of whole workers, without the\n")
		fmt.Fprintf(out, "files that a worker maps which has only imported the library and less its anonymous memory, so it contains what the library needs\n")
		fmt.Fprintf(out, "to hold the model, and no share of a server's memory. `onecopy-object` is `get_or_load` of an array.\n")
	}
	for _, size := range r.loadedSizes() {
		fmt.Fprintf(out, "\n%s.\n", r.loadText(size))
	}
	r.markdownGroups(out, workerColumnsShort, func(g group) bool { return g.users == 1 && shown(g) })
	r.markdownGroups(out, userColumns, func(g group) bool { return g.users > 1 && shown(g) })
}

// workerColumnsShort leaves out what the last worker's columns tell, too. The JSON lines have everything.
var workerColumnsShort = []column{
	{memory, "memory", "MB"},
	{saved, "saved", "%"},
	{tables, "page tables", "kB"},
	{start, "started", "ms"},
	{usableN, "usable", "ms"},
	{readN, "read", "ms"},
	{scan1, "1st scan", "ms"},
	{scan2, "2nd scan", "ms"},
	{again, "again", "ms"},
}

func (r *results) markdownGroups(out *strings.Builder, columns []column, belongs func(group) bool) {
	for _, g := range r.groups() {
		if !belongs(g) {
			continue
		}
		fmt.Fprintf(out, "\n%s:\n\n| way |", g.title())
		for _, c := range columns {
			fmt.Fprintf(out, " %s, %s |", c.head, c.unit)
		}
		fmt.Fprintf(out, "\n| --- |%s\n", strings.Repeat(" ---: |", len(columns)))
		for _, way := range allWays {
			if reason := r.skipped(g, way); reason != "" {
				fmt.Fprintf(out, "| %s | skipped: %s |%s\n", g.label(way), reason, strings.Repeat(" |", len(columns)-1))
			}
			rounds := r.rounds(g, way)
			if len(rounds) == 0 {
				continue
			}
			fmt.Fprintf(out, "| %s |", g.label(way))
			for _, c := range columns {
				middle, span := c.cell(rounds, spread.middle), c.cell(rounds, spread.span)
				if middle == span {
					span = ""
				} else {
					span = " (" + span + ")"
				}
				fmt.Fprintf(out, " %s%s |", middle, span)
			}
			fmt.Fprintln(out)
		}
	}
}
