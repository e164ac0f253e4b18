//go:build linux

package main

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/crashpoint"
)

// report writes what happened; ok is false when anything was lost.
func (c *campaign) report() (ok bool, err error) {
	var b strings.Builder
	line := func(text string, args ...any) { fmt.Fprintf(&b, text+"\n", args...) }
	took := time.Since(c.began).Round(time.Second)
	language := "Go"
	if c.python != nil {
		language = fmt.Sprintf("Go and Python (%s of the kills)", percent(c.Python, c.Kills))
	}
	line("# %d kills in %s", c.Kills, took)
	line("")
	line("Written by `make torture`, seed %d, on %s: %s, %d workers in %s.", c.seed, time.Now().Format(time.DateOnly), machine(), c.procs, language)
	line("Models that need some 50 MiB, and as many of single workers, share budgets of %d and %d MiB on a tmpfs of %d MiB.", steadyBudget>>20, doomedBudget>>20, tmpfsSize>>20)
	line("")
	line("| what | |")
	line("| --- | ---: |")
	line("| violations | %d |", len(c.bad))
	line("| kills, SIGKILL | %d |", c.Kills)
	line("| of them at a named step / at random | %d / %d |", c.Kills-c.Random, c.Random)
	line("| of them inside an operation of the protocol | %s |", percent(c.Inside, c.Kills))
	line("| kills in a second | %.0f |", float64(c.Kills)/time.Since(c.began).Seconds())
	line("| workers stopped at a named step, with the locks that they had there | %d |", c.Stops)
	line("| workers with a wrong clock | %d |", c.Line[wordShifted])
	line("| workers that ended before they came to their step | %d |", c.Past)
	line("| audits, each with every model got by one process alone | %d |", c.Rounds)
	line("| operations | %d |", c.Line[wordOps])
	line("| loads begun | %d |", c.Line[wordLoads])
	line("| of them replacements | %s |", percent(int(c.Line[wordReplaces]), int(c.Line[wordLoads])))
	line("| of them with two or more windows | %s |", percent(int(c.Line[wordBig]), int(c.Line[wordLoads])))
	line("| models compared with their source, byte by byte | %d, %.1f GB |", c.Line[wordModels], float64(c.Line[wordBytes])/1e9)
	line("| waiters that took over from a dead loader | %d |", c.Line[wordWaits])
	line("| of them with the load lock later than %v after the death | %d |", lateAfter, c.Line[wordLate])
	line("| the slowest of them | %v |", time.Duration(c.Line[wordSlowest]).Round(time.Millisecond))
	line("| the longest from a death until the next load began | %v |", time.Duration(c.Line[wordBegan]).Round(time.Millisecond))
	line("| the longest that a call took beyond its deadline | %v |", time.Duration(c.Line[wordOverrun]).Round(time.Millisecond))
	line("")
	line("| step | kills | of Python |")
	line("| --- | ---: | ---: |")
	for _, p := range crashpoint.Points {
		line("| %s | %d | %d |", p, c.Steps[p], c.PySteps[p])
	}
	if len(c.bad) > 0 {
		line("%s- %s", violationsHead, strings.Join(c.bad, "\n- "))
		if c.options.report == "" { // the seed is worth keeping
			c.options.report = fmt.Sprintf("torture-%d.md", c.seed)
		}
	}
	fmt.Print(b.String())
	if c.options.report != "" {
		err = os.WriteFile(c.options.report, []byte(b.String()), 0o644)
	}
	return len(c.bad) == 0, err
}

func percent(n, of int) string {
	if of == 0 {
		return "none"
	}
	return fmt.Sprintf("%.1f %%", 100*float64(n)/float64(of))
}

const violationsHead = "\nViolations:\n\n"

func machine() string {
	var uts unix.Utsname
	_ = unix.Uname(&uts)
	return fmt.Sprintf("%s, Linux %s, %d processors", runtime.GOARCH, unix.ByteSliceToString(uts.Release[:]), runtime.NumCPU())
}
