// Modelcheck runs the configurations of the protocol model and reports for each
// whether the protocol holds, or the shortest way to break it.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/onecopy/onecopy/internal/model"
)

func main() {
	var o options
	flag.BoolVar(&o.all, "all", false, "also the big configurations (minutes, some GB)")
	flag.BoolVar(&o.short, "short", false, "only the configurations that the tests run")
	flag.BoolVar(&o.trace, "trace", false, "print counter-example traces of the mutants")
	flag.StringVar(&o.only, "only", "", "run only configurations whose name contains this")
	flag.IntVar(&o.limit, "limit", 50_000_000, "give up after this many states")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "modelcheck: takes no arguments")
		os.Exit(2)
	}
	if err := check(os.Stdout, o); err != nil {
		fmt.Fprintln(os.Stderr, "modelcheck:", err)
		os.Exit(1)
	}
}

type options struct {
	all, short, trace bool
	only              string
	limit             int
}

func (o options) wants(c model.Config) bool {
	switch {
	case c.Big && !o.all, o.short && !c.Short:
		return false
	}
	return strings.Contains(c.Name, o.only)
}

// check writes the report to w; the error says that a verdict was not the expected one.
func check(w io.Writer, o options) error {
	var hold, broken, unexpected, states, steps, recoveries int
	group := ""
	for _, c := range model.Configs() {
		if !o.wants(c) {
			continue
		}
		if c.Group != group {
			if group != "" {
				fmt.Fprintln(w)
			}
			group = c.Group
			fmt.Fprintln(w, "==", group)
		}
		start := time.Now()
		r := c.Run(o.limit)
		surprise := r.Verdict() != c.Expect
		report(w, c, r, time.Since(start), surprise, o.trace)
		switch {
		case surprise:
			unexpected++
		case r.Verdict() == model.Broken:
			broken++
		default:
			hold++
			states += r.States
			steps += r.Steps
			recoveries += r.Recoveries
		}
	}
	if hold+broken+unexpected == 0 {
		return errors.New("no configuration has such a name")
	}
	fmt.Fprintf(w, "\n%d configurations hold (%d states, %d steps, %d crash-recoveries), %d are broken as they must be\n",
		hold, states, steps, recoveries, broken)
	if unexpected > 0 {
		return fmt.Errorf("%d unexpected results", unexpected)
	}
	return nil
}

func report(w io.Writer, c model.Config, r model.Result, took time.Duration, surprise, trace bool) {
	note := ""
	if surprise {
		note = " *** UNEXPECTED ***"
	}
	fmt.Fprintf(w, "%-36s %-9s %9d states %10d steps (%d faults) %9d recoveries %6.1fs%s\n",
		c.Name, r.Verdict(), r.States, r.Steps, r.FaultSteps, r.Recoveries, took.Seconds(), note)
	if r.Violation == "" {
		return
	}
	fmt.Fprintf(w, "      %s  (after %d steps)\n", r.Violation, len(r.Trace)-1)
	if trace || surprise {
		for _, t := range r.Trace {
			fmt.Fprintf(w, "         %s   %s\n", t.Label, t.State)
		}
	}
}
