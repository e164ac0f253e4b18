package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
)

// results is everything of a file that is shown.
type results struct {
	machine map[string]any
	samples []sample
	trials  []trial
	targets []target
	notes   []string
}

// sample is one trial of a part; trial is one of the part workers.
type sample struct {
	Part, Case, Way string
	Round           int
	Values          map[string]float64
}

type trial struct {
	Size    int64  `json:"model_bytes"`
	Lang    string `json:"lang"`
	Way     string `json:"way"`
	Workers int    `json:"workers"`
	Users   int    `json:"users_per_worker"`
	values  map[string]float64
}

type target struct {
	What   string
	Figure float64
	Limit  float64
	Least  bool `json:"at_least"`
	Met    bool
	Rounds int
	Target string `json:"target_text"`
	Text   string `json:"figure_text"`
}

func read(in io.Reader) (*results, error) {
	r := &results{}
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 1<<20)
	for n := 1; lines.Scan(); n++ {
		if err := r.line(lines.Bytes()); err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
	}
	return r, lines.Err()
}

func (r *results) line(text []byte) error {
	var kind struct{ Kind, Text string }
	if err := json.Unmarshal(text, &kind); err != nil {
		return err
	}
	switch kind.Kind {
	case "machine":
		return json.Unmarshal(text, &r.machine)
	case "note":
		r.notes = append(r.notes, kind.Text)
	case "sample":
		var s sample
		r.samples = append(r.samples, s)
		return json.Unmarshal(text, &r.samples[len(r.samples)-1])
	case "target":
		var t target
		r.targets = append(r.targets, t)
		return json.Unmarshal(text, &r.targets[len(r.targets)-1])
	case "trial":
		var t trial
		if err := json.Unmarshal(text, &t); err != nil {
			return err
		}
		var all map[string]any
		if err := json.Unmarshal(text, &all); err != nil {
			return err
		}
		t.values = map[string]float64{}
		for name, v := range all {
			if number, ok := v.(float64); ok {
				t.values[name] = number
			}
		}
		r.trials = append(r.trials, t)
	}
	return nil // of other kinds there may be any number
}

// bar is the median of a way with its range.
type bar struct {
	name             string
	median, min, max float64
}

func barOf(name string, values []float64) bar {
	values = slices.Clone(values)
	slices.Sort(values)
	n := len(values)
	return bar{name, (values[(n-1)/2] + values[n/2]) / 2, values[0], values[n-1]}
}

// bars are the ways of a case that have a metric, in their order.
func (r *results) bars(part, name, metric string) []bar {
	var order []string
	values := map[string][]float64{}
	for _, s := range r.samples {
		v, ok := s.Values[metric]
		if !ok || s.Part != part || s.Case != name {
			continue
		}
		if values[s.Way] == nil {
			order = append(order, s.Way)
		}
		values[s.Way] = append(values[s.Way], v)
	}
	var all []bar
	for _, way := range order {
		all = append(all, barOf(way, values[way]))
	}
	return all
}

// cases are the cases of a part, in their order.
func (r *results) cases(part string) []string {
	var all []string
	for _, s := range r.samples {
		if s.Part == part && !slices.Contains(all, s.Case) {
			all = append(all, s.Case)
		}
	}
	return all
}

// curve is one way's medians over the number of workers.
type curve struct {
	name string
	x    []float64
	bars []bar
}

// curves are the ways of the workers with one size and language.
func (r *results) curves(size int64, lang, metric string) []curve {
	values := map[string]map[int][]float64{}
	for _, t := range r.trials {
		if t.Size != size || t.Lang != lang || t.Users != 1 {
			continue
		}
		if values[t.Way] == nil {
			values[t.Way] = map[int][]float64{}
		}
		values[t.Way][t.Workers] = append(values[t.Way][t.Workers], t.values[metric])
	}
	var all []curve
	for _, way := range slices.Sorted(maps.Keys(values)) {
		c := curve{name: way}
		for _, n := range slices.Sorted(maps.Keys(values[way])) {
			c.x = append(c.x, float64(n))
			c.bars = append(c.bars, barOf(way, values[way][n]))
		}
		all = append(all, c)
	}
	return all
}
