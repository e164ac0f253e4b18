//go:build linux

package main

import (
	"fmt"
	"math"
	"slices"
	"strconv"
)

// spread is the median of a metric over the rounds, with its range.
type spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

func sorted(values []float64) []float64 {
	values = slices.Clone(values)
	slices.Sort(values)
	return values
}

// median takes ascending values.
func median(values []float64) float64 {
	n := len(values)
	if n == 0 {
		return 0
	}
	return (values[(n-1)/2] + values[n/2]) / 2
}

func last(values []float64) float64 { return values[len(values)-1] }

// metric is one column of the results.
type metric struct {
	name string // in JSON
	of   func(trial) float64
	text func(float64) string
}

// The metrics of the tables, in the order of the columns.
var (
	memory    = metric{"memory_bytes", func(t trial) float64 { return float64(t.Memory) }, megaText}
	saved     = metric{"saved_percent", func(t trial) float64 { return 100 * (1 - float64(t.Memory)/float64(t.copies()*t.Size)) }, percent}
	tables    = metric{"page_table_bytes", func(t trial) float64 { return float64(t.Tables) }, kiloText}
	start     = metric{"start_last_ms", func(t trial) float64 { return t.StartLast }, short}
	usable1   = metric{"usable_first_ms", func(t trial) float64 { return t.UsableFirst }, short}
	usableN   = metric{"usable_last_ms", func(t trial) float64 { return t.UsableLast }, short}
	read1     = metric{"read_first_ms", func(t trial) float64 { return t.ReadFirst }, short}
	readN     = metric{"read_last_ms", func(t trial) float64 { return t.ReadLast }, short}
	scan1     = metric{"first_scan_max_ms", func(t trial) float64 { return t.Scan1Max }, short}
	scan2     = metric{"second_scan_max_ms", func(t trial) float64 { return t.Scan2Max }, short}
	again     = metric{"again_last_ms", func(t trial) float64 { return t.AgainLast }, short}
	cpu       = metric{"cpu_ms", func(t trial) float64 { return t.CPU }, short}
	attach    = metric{"attach_median_ms", func(t trial) float64 { return t.AttachMid }, short}
	huge      = metric{"huge_mapped_bytes", func(t trial) float64 { return float64(t.Huge) }, megaText}
	overhead  = metric{"registry_bytes", func(t trial) float64 { return float64(t.Registry) }, kiloText}
	tmpfs     = metric{"tmpfs_bytes", func(t trial) float64 { return float64(t.Tmpfs) }, megaText}
	pageCache = metric{"page_cache_bytes", func(t trial) float64 { return float64(t.PageCache) }, megaText}
	access    = metric{"access_ns", func(t trial) float64 { return t.AccessNS }, nanoseconds}
	use       = metric{"use_ns", func(t trial) float64 { return t.UseNS }, nanoseconds}
	firstUser = metric{"first_ns", func(t trial) float64 { return t.FirstNS }, nanoseconds}
)

var metrics = []metric{memory, saved, tables, start, usable1, usableN, read1, readN, scan1, scan2, again, cpu,
	attach, huge, overhead, tmpfs, pageCache, access, use, firstUser}

// over is the metric's spread over the rounds of a cell.
func (m metric) over(rounds []trial) spread {
	var values []float64
	for _, t := range rounds {
		values = append(values, m.of(t))
	}
	return spreadOf(values)
}

func spreadOf(values []float64) spread {
	values = sorted(values)
	if len(values) == 0 {
		return spread{}
	}
	return spread{median(values), values[0], last(values)}
}

// short keeps three digits and never less than a hundredth.
func short(v float64) string {
	switch {
	case v >= 9999.5:
		return grouped(int64(math.Round(v)))
	case v >= 99.5:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 9.95:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}

func grouped(v int64) string {
	if v < 1000 {
		return strconv.FormatInt(v, 10)
	}
	return fmt.Sprintf("%s,%03d", grouped(v/1000), v%1000)
}

// Bytes are decimal throughout: 1 MB is 1,000,000 bytes.
func megaText(v float64) string { return short(v / 1e6) }
func kiloText(v float64) string { return grouped(int64(math.Round(v / 1e3))) }

// percent has no minus before a zero: PSS is in whole kilobytes and a file in whole pages.
func percent(v float64) string {
	if math.Abs(v) < 0.05 {
		v = 0
	}
	return strconv.FormatFloat(v, 'f', 1, 64)
}

// mega is a size as people write it: 48 MB, 1.5 GB.
func mega(size int64) string {
	unit, value := "MB", float64(size)/1e6
	if value >= 1000 {
		unit, value = "GB", value/1000
	}
	return strconv.FormatFloat(math.Round(value*100)/100, 'f', -1, 64) + " " + unit
}

func nanoseconds(v float64) string {
	switch {
	case v >= 1e6:
		return short(v/1e6) + " ms"
	case v >= 1e3:
		return short(v/1e3) + " µs"
	}
	return short(v) + " ns"
}
