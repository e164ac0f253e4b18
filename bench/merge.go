//go:build linux

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"slices"
)

// merge adds what earlier runs wrote as JSON lines, so that parts that were measured one at a time make one
// page. The machine is that of the first file. A case that a later file has too is that of the later file;
// a case of the part workers is all of a model's size.
func (r *results) merge(paths []string) error {
	for i, path := range paths {
		one, err := readResults(path)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if i == 0 {
			r.Machine = one.Machine
		} else if one.Machine.Kernel != r.Machine.Kernel || one.Machine.CPU != r.Machine.CPU || one.Machine.Memory != r.Machine.Memory {
			return fmt.Errorf("%s is of another machine", path)
		}
		r.Samples = slices.DeleteFunc(r.Samples, func(s sample) bool {
			return slices.ContainsFunc(one.Samples, func(t sample) bool { return t.Part == s.Part && t.Case == s.Case })
		})
		sizes := map[int64]bool{}
		for _, g := range one.groups() {
			sizes[g.size] = true
		}
		r.Loads = append(slices.DeleteFunc(r.Loads, func(l load) bool { return sizes[l.Size] }), one.Loads...)
		r.Trials = append(slices.DeleteFunc(r.Trials, func(t trial) bool { return sizes[t.Size] }), one.Trials...)
		r.Skips = append(slices.DeleteFunc(r.Skips, func(s skipped) bool { return sizes[s.Size] }), one.Skips...)
		r.Samples = append(r.Samples, one.Samples...)
		for _, note := range one.Notes {
			if !slices.Contains(r.Notes, note) {
				r.Notes = append(r.Notes, note)
			}
		}
		for _, arg := range one.Machine.Args {
			if !slices.Contains(r.Machine.Args, arg) {
				r.Machine.Args = append(r.Machine.Args, arg)
			}
		}
	}
	return nil
}

// readResults is the reverse of jsonLines; what is computed from the rest is computed again.
func readResults(path string) (*results, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r := &results{}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var kind struct{ Kind, Text string }
		if err := json.Unmarshal(lines.Bytes(), &kind); err != nil {
			return nil, err
		}
		switch kind.Kind {
		case "machine":
			err = json.Unmarshal(lines.Bytes(), &r.Machine)
		case "load":
			r.Loads, err = decoded(r.Loads, lines.Bytes())
		case "trial":
			r.Trials, err = decoded(r.Trials, lines.Bytes())
		case "skipped":
			r.Skips, err = decoded(r.Skips, lines.Bytes())
		case "sample":
			r.Samples, err = decoded(r.Samples, lines.Bytes())
		case "note":
			r.Notes = append(r.Notes, kind.Text)
		}
		if err != nil {
			return nil, err
		}
	}
	return r, lines.Err()
}

func decoded[T any](all []T, line []byte) ([]T, error) {
	var one T
	err := json.Unmarshal(line, &one)
	return append(all, one), err
}
