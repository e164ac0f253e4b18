// Uncovered reads a coverage profile and says what no test has reached.
//
//	uncovered [-min PERCENT] [-justified FILE] [-list FILE] PROFILE
//
// It prints the share of each package's statements that ran, and writes every
// place that did not to the list. Two things make it fail: a package below the
// minimum, and an error return that no test reached and no line of the justified
// file speaks for. Such a line names a function, how many of its error returns
// stay unreached, and why:
//
//	registry/place_linux.go:place.createTable:1: getrandom fails on no kernel that runs Go
//
// scripts/cover.sh makes the profile. A run as another user, or on another kernel,
// reaches other lines: what is justified and was reached all the same is a note.
package main

import (
	"flag"
	"fmt"
	"io"
	"os"
)

func main() {
	var o options
	flag.Float64Var(&o.min, "min", 90, "percent of statements that each package needs")
	flag.StringVar(&o.justified, "justified", "", "file that says why some error returns are not reached")
	flag.StringVar(&o.list, "list", "", "file to write everything to that was not reached")
	flag.StringVar(&o.root, "root", ".", "folder of the module")
	flag.Parse()
	if flag.NArg() != 1 {
		flag.Usage()
		os.Exit(2)
	}
	o.profile = flag.Arg(0)
	if err := run(os.Stdout, o); err != nil {
		fmt.Fprintln(os.Stderr, "uncovered:", err)
		os.Exit(1)
	}
}

type options struct {
	min                            float64
	profile, justified, list, root string
}

func run(w io.Writer, o options) error {
	files, err := readProfile(o.profile, o.root)
	if err != nil {
		return err
	}
	reasons, err := readReasons(o.justified)
	if err != nil {
		return err
	}
	list := io.Discard
	if o.list != "" {
		f, err := os.Create(o.list)
		if err != nil {
			return err
		}
		defer f.Close()
		list = f
	}
	problems := 0
	for _, p := range packagesOf(files) {
		verdict := ""
		if p.percent() < o.min {
			verdict = fmt.Sprintf("  below %g%%", o.min)
			problems++
		}
		fmt.Fprintf(w, "%-18s %6.2f%% of %d statements%s\n", p.name, p.percent(), p.all, verdict)
	}
	for _, f := range files {
		lines, err := f.unreached(o.root)
		if err != nil {
			return err
		}
		for _, l := range lines {
			fmt.Fprintln(list, l)
		}
		for _, fn := range f.functions {
			key := f.path + ":" + fn.name
			r := reasons[key]
			if r == nil {
				r = &reason{}
			}
			r.seen = true
			switch n := len(fn.returns); {
			case n > r.returns:
				fmt.Fprintf(w, "%s: %d error returns are not reached, %d justified:\n", key, n, r.returns)
				for _, at := range fn.returns {
					fmt.Fprintf(w, "\t%s\n", at)
				}
				problems++
			case n < r.returns:
				fmt.Fprintf(w, "note: %s: %d error returns are justified, %d are not reached\n", key, r.returns, n)
			}
		}
	}
	for key, r := range reasons {
		if !r.seen {
			fmt.Fprintf(w, "%s: justified, but there is no such function\n", key)
			problems++
		}
	}
	if problems > 0 {
		return fmt.Errorf("%d problems", problems)
	}
	return nil
}
