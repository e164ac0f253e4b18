//go:build linux

package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// column is a metric with its heading.
type column struct {
	metric
	head, unit string
}

var workerColumns = []column{
	{memory, "memory", "MB"},
	{saved, "saved", "%"},
	{tables, "tables", "kB"},
	{start, "start", "last"},
	{usable1, "usable", "first"},
	{usableN, "usable", "last"},
	{read1, "read", "first"},
	{readN, "read", "last"},
	{scan1, "scan", "1st"},
	{scan2, "scan", "2nd"},
	{again, "again", "last"},
	{cpu, "cpu", "sum"},
}

var userColumns = []column{
	{memory, "memory", "MB"},
	{saved, "saved", "%"},
	{tables, "tables", "kB"},
	{firstUser, "first", "user"},
	{access, "one more", "user"},
	{use, "Use", "borrowed"},
}

const legend = `memory: PSS of the model's pages, all workers together (anonymous, page cache or tmpfs: as the way says)
saved: against one private copy per worker or user
tables: page tables (VmPTE) of all workers, less those of idle workers
start, usable, read: ms from the start of the first process until a worker's own first statement, the first and
the last byte of the model; first and last worker
scan: ms from the first byte to the last, slowest worker; the second time all workers are released at once
again: ms from kill -9 of all workers until the last of as many new ones is usable
cpu: ms of processor time of all workers, with their start and both scans
Each row is the median of the rounds, the range is below it. 1 MB is 1,000,000 bytes.
`

// table writes the results for a terminal.
func (r *results) table(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "%s\n\n%s", r.Machine, legend)
	for _, g := range r.groups() {
		columns := workerColumns
		if g.users > 1 {
			columns = userColumns
		}
		fmt.Fprintf(w, "\n%s\n", g.title())
		row(w, "", columns, func(c column) string { return c.head })
		row(w, "", columns, func(c column) string { return c.unit })
		for _, way := range allWays {
			if reason := r.skipped(g, way); reason != "" {
				fmt.Fprintf(w, "%s  skipped: %s\n", pad(g.label(way)), reason)
			}
			rounds := r.rounds(g, way)
			if len(rounds) == 0 {
				continue
			}
			row(w, g.label(way), columns, func(c column) string { return c.cell(rounds, spread.middle) })
			if len(rounds) > 1 {
				row(w, "", columns, func(c column) string { return c.cell(rounds, spread.span) })
			}
		}
		w.Flush()
	}
	fmt.Fprintln(w)
	for _, size := range r.loadedSizes() {
		fmt.Fprintln(w, r.loadText(size))
	}
	fmt.Fprintf(w, "\nMemory saved\n")
	for _, line := range r.headline() {
		fmt.Fprintf(w, "- %s\n", line)
	}
	fmt.Fprintf(w, "\nWhere onecopy is not better\n")
	for _, line := range append(r.costs(), r.notBetter()...) {
		fmt.Fprintf(w, "- %s\n", line)
	}
	if remarks := r.remarks(); len(remarks) > 0 {
		fmt.Fprintf(w, "\nRemarks\n- %s\n", strings.Join(remarks, "\n- "))
	}
	return w.Flush()
}

func (s spread) middle(text func(float64) string) string { return text(s.Median) }

// cell is the text of one cell; nothing was measured where all is zero.
func (c column) cell(rounds []trial, part func(spread, func(float64) string) string) string {
	s := c.over(rounds)
	if s == (spread{}) && slices.Contains([]string{again.name, use.name, cpu.name}, c.name) {
		return "-"
	}
	return part(s, c.text)
}

const wayWidth = 17

func pad(way string) string { return fmt.Sprintf("%-*s", wayWidth, way) }

func row(w io.Writer, way string, columns []column, text func(column) string) {
	cells := []string{pad(way)}
	for _, c := range columns {
		cells = append(cells, text(c))
	}
	fmt.Fprintf(w, "%s\t\n", strings.Join(cells, "\t"))
}

// costs are what onecopy always costs beside mapping a file.
func (r *results) costs() []string {
	var lines []string
	for _, size := range r.loadedSizes() {
		ms, _ := r.loads(size)
		lines = append(lines, fmt.Sprintf("%s: the load itself, %s ms once per machine, which mapping the file does not have, and %s of tmpfs that cannot be evicted while the file's page cache can",
			mega(size), short(ms.Median), mega(size)))
	}
	return lines
}

func (m machine) String() string {
	python := m.Python
	if python == "" {
		python = "none"
	}
	return fmt.Sprintf(`%s, %d cores, %s of memory, Linux %s, %s; Go %s, Python %s
transparent huge pages: enabled=%s defrag=%s shmem_enabled=%s; load average at the start: %s
registry on %s (%s, %s); source on %s (%s)`,
		m.CPU, m.Cores, mega(m.Memory), m.Kernel, m.Arch, strings.TrimPrefix(m.Go, "go"), python,
		m.THP["enabled"], m.THP["defrag"], m.THP["shmem_enabled"], m.Load,
		m.Shm.Type, m.Shm.Options, mega(m.Shm.Size), m.Source.Type, m.Source.Options)
}
