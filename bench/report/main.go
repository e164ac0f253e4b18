// Command report turns the JSON lines of the benchmark into one HTML page with plots, which needs nothing
// else: no script, no style sheet and no picture from anywhere.
//
//	go run ./bench --json bench.jsonl
//	(cd bench/report && go run . ../../bench.jsonl > ../../bench.html)
//
// It is a module of its own, so that whoever uses onecopy does not get a plotting library with it.
package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: report BENCH.jsonl > PAGE.html")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(1)
	}
}

func run(path string, out io.Writer) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	r, err := read(f)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	w := bufio.NewWriter(out)
	if err := r.page(w); err != nil {
		return err
	}
	return w.Flush()
}
