//go:build amd64 || arm64

package main

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"time"
)

// summary is the outcome of rollouts.
type summary struct {
	Machine    string        `json:"machine"`
	Date       string        `json:"date"`
	Flags      string        `json:"flags"`
	Options    *rollouts     `json:"options"`
	Took       time.Duration `json:"took_ns"`
	Requests   int           `json:"requests"`
	Failed     int           `json:"failed"`
	Mixed      int           `json:"mixed"`
	Stale      int           `json:"stale"`
	Median     time.Duration `json:"request_median_ns"`
	P99        time.Duration `json:"request_p99_ns"`
	Slowest    time.Duration `json:"request_max_ns"`
	Copy       int64         `json:"one_copy_bytes"`
	Peak       int64         `json:"peak_bytes"`
	Violations []string      `json:"violations"`
	Rollouts   []rollout     `json:"rollouts"`
}

func (t *trial) summary(took time.Duration) *summary {
	c := t.ask
	s := &summary{
		Machine: machine(), Date: time.Now().UTC().Format(time.DateOnly), Flags: t.o.flags(), Options: t.o, Took: took,
		Requests: c.requests, Failed: c.failed, Mixed: c.mixed, Stale: c.stale,
		Copy: t.one, Peak: t.meter.most, Violations: t.violations, Rollouts: t.rollouts,
	}
	s.Median, s.P99, s.Slowest = ranks(c.took)
	return s
}

// ranks are the median, the 99th percentile and the largest.
func ranks(ds []time.Duration) (median, p99, most time.Duration) {
	if len(ds) == 0 {
		return 0, 0, 0
	}
	ds = slices.Sorted(slices.Values(ds))
	return ds[len(ds)/2], ds[len(ds)*99/100], ds[len(ds)-1]
}

// kinds are the ways in which a rollout can have ended.
var kinds = []struct {
	name string
	is   func(rollout) bool
}{
	{"published", func(r rollout) bool { return r.Fate == left }},
	{"refused by the canary", func(r rollout) bool { return r.Fate == refused }},
	{"killed, not published", func(r rollout) bool { return r.Fate == killed && !r.Published }},
	{"killed, published all the same", func(r rollout) bool { return r.Fate == killed && r.Published }},
}

// ofKind are the figures of the rollouts that ended in one way.
type ofKind struct {
	n, swept, late      int
	took, follow, clean []time.Duration
}

func (s *summary) kind(is func(rollout) bool) (k ofKind) {
	for _, r := range s.Rollouts {
		if !is(r) {
			continue
		}
		k.n++
		k.took = append(k.took, r.Took)
		if r.Published {
			k.follow = append(k.follow, r.Switch)
		}
		if r.Swept {
			k.swept++
			continue
		}
		k.clean = append(k.clean, r.OneCopy)
		if r.OneCopy > time.Second {
			k.late++
		}
	}
	return k
}

func (s *summary) print(w io.Writer) {
	fmt.Fprintf(w, "rollouts, seed %d: %.0f s, %d rollouts, %d requests: %d failed, %d mixed, %d stale\n",
		s.Options.Seed, s.Took.Seconds(), len(s.Rollouts), s.Requests, s.Failed, s.Mixed, s.Stale)
	fmt.Fprintf(w, "  requests: median %v, 99 %% %v, slowest %v; peak memory %s, one copy is %s\n",
		round(s.Median), round(s.P99), round(s.Slowest), mib(s.Peak), mib(s.Copy))
	for _, kind := range kinds {
		k := s.kind(kind.is)
		_, _, follow := ranks(k.follow)
		median, _, clean := ranks(k.clean)
		fmt.Fprintf(w, "  %d %s: all servers followed within %v; one copy again after %v (median %v), %d only after shmctl gc\n",
			k.n, kind.name, round(follow), round(clean), round(median), k.swept)
	}
	printViolations(w, s.Violations)
}

func round(d time.Duration) time.Duration { return d.Round(10 * time.Microsecond) }

func (s *summary) markdown(o *rollouts, own bool) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "# Rollouts under load, with publishers that are killed\n\n")
	fmt.Fprintf(&b, "Measured on %s with\n\n```console\n$ make build && go run ./internal/campaign rollouts %s\n```\n\n%s.\n\n", s.Date, s.Flags, s.Machine)
	fmt.Fprintf(&b, "%d processes serve one model of %s over HTTP, %d connections each, while `shmctl rollout` replaces it %d times: it\n"+
		"runs a canary, which one time in ten refuses, and half of them are killed with SIGKILL at a random moment. Every page\n"+
		"of every generation carries its number, and an answer carries the numbers from %d places of %d files.\n\n",
		o.Processes, mib(s.Copy), o.Clients, len(s.Rollouts), len(parts)*4, len(parts))
	fmt.Fprintf(&b, "| | |\n| --- | ---: |\n| requests | %d |\n| failed | %d |\n| answers that mix generations | %d |\n"+
		"| answers older than what was published before the request | %d |\n| median, 99 %%, slowest request | %v, %v, %v |\n| most memory in use | %s |\n| violations | %d |\n\n",
		s.Requests, s.Failed, s.Mixed, s.Stale, round(s.Median), round(s.P99), round(s.Slowest), mib(s.Peak), len(s.Violations))
	by := "`st_blocks` of its files"
	if own {
		by = "`statfs` of a tmpfs of its own"
	}
	fmt.Fprintf(&b, "Back to one copy, by %s, counted from the last server's switch, or from the end of the publisher if nothing was\n"+
		"published. What a killed publisher leaves without having published it belongs to nobody; if nobody calls for a second, the\n"+
		"trial runs `shmctl gc`, and the last column says how often.\n\n", by)
	b.WriteString("| rollouts | | publisher ran (median) | last server followed (max) | one copy (median) | one copy (max) | over 1 s | after `shmctl gc` |\n" +
		"| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	for _, kind := range kinds {
		k := s.kind(kind.is)
		took, _, _ := ranks(k.took)
		_, _, follow := ranks(k.follow)
		median, _, most := ranks(k.clean)
		fmt.Fprintf(&b, "| %s | %d | %v | %v | %v | %v | %d | %d |\n", kind.name, k.n, round(took), round(follow), round(median), round(most), k.late, k.swept)
	}
	for _, v := range s.Violations {
		fmt.Fprintf(&b, "\n- %s", v)
	}
	return b.Bytes()
}
