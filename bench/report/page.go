package main

import (
	"cmp"
	"fmt"
	"html/template"
	"io"
	"slices"
	"strings"
)

// figure is a plot in the page.
type figure struct {
	Title string
	SVG   template.HTML
}

// section is a part of the page.
type section struct {
	Title   string
	Figures []figure
}

// A chart is what is drawn for each case of a part that has the metric.
var charts = []struct{ part, metric, title, unit string }{
	{"load", "wall_ms", "Load", "ms; less is better"},
	{"load", "cpu_ms", "Processor time of a load", "ms; less is better"},
	{"micro", "scan1_ms", "First full read", "ms; less is better"},
	{"micro", "scan2_ms", "Second full read", "ms; less is better"},
	{"micro", "tables_bytes", "Page tables", "bytes; less is better"},
	{"micro", "first_ms", "Waiting: the first", "ms; less is better"},
	{"micro", "last_ms", "Waiting: the last", "ms; less is better"},
	{"pressure", "scan_ms", "Memory pressure", "ms; less is better"},
	{"tokens", "tokens_per_s", "Tokens", "tokens per second; more is better"},
	{"tokens", "cpu_ms_per_token", "Processor time of a token", "ms; less is better"},
}

// Of the workers, over their number.
var lineCharts = []struct {
	metric, title, unit string
	scale               float64
}{
	{"memory_bytes", "Memory", "MB; less is better", 1e-6},
	{"page_table_bytes", "Page tables", "kB; less is better", 1e-3},
	{"usable_last_ms", "Last worker usable", "ms; less is better", 1},
	{"read_last_ms", "Last worker has read everything", "ms; less is better", 1},
	{"again_last_ms", "All back after kill -9 of all", "ms; less is better", 1},
}

func (r *results) sections() ([]section, error) {
	var all []section
	for _, c := range charts {
		s := section{Title: c.title}
		for _, name := range r.cases(c.part) {
			bars := r.bars(c.part, name, c.metric)
			if len(bars) == 0 {
				continue
			}
			text, err := barPlot(name, c.unit, bars)
			if err != nil {
				return nil, fmt.Errorf("%s, %s: %w", c.title, name, err)
			}
			s.Figures = append(s.Figures, figure{name, template.HTML(text)}) // drawn here, from numbers and escaped names
		}
		if len(s.Figures) > 0 {
			all = append(all, s)
		}
	}
	workers, err := r.workerSections()
	return append(all, workers...), err
}

func (r *results) workerSections() ([]section, error) {
	type group struct {
		size int64
		lang string
	}
	var groups []group
	for _, t := range r.trials {
		if g := (group{t.Size, t.Lang}); t.Users == 1 && !slices.Contains(groups, g) {
			groups = append(groups, g)
		}
	}
	slices.SortFunc(groups, func(a, b group) int { return cmp.Or(cmp.Compare(a.size, b.size), cmp.Compare(a.lang, b.lang)) })
	var all []section
	for _, g := range groups {
		s := section{Title: fmt.Sprintf("Workers: %.4g MB, %s", float64(g.size)/1e6, g.lang)}
		for _, c := range lineCharts {
			text, err := curvePlot(c.title, c.unit, c.scale, r.curves(g.size, g.lang, c.metric))
			if err != nil {
				return nil, fmt.Errorf("%s, %s: %w", s.Title, c.title, err)
			}
			s.Figures = append(s.Figures, figure{c.title, template.HTML(text)})
		}
		all = append(all, s)
	}
	return all, nil
}

// facts are the machine's, as text.
func (r *results) facts() []string {
	var all []string
	for _, name := range []string{"started", "cpu", "cores", "memory_bytes", "kernel", "arch", "go", "python", "transparent_hugepage", "shm", "source", "load_average_at_start", "args"} {
		if v, ok := r.machine[name]; ok {
			all = append(all, fmt.Sprintf("%s: %v", strings.ReplaceAll(name, "_", " "), v))
		}
	}
	return all
}

func (r *results) page(out io.Writer) error {
	sections, err := r.sections()
	if err != nil {
		return err
	}
	return page.Execute(out, struct {
		Facts    []string
		Targets  []target
		Sections []section
		Notes    []string
	}{r.facts(), r.targets, sections, r.notes})
}

var page = template.Must(template.New("page").Parse(`<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>onecopy: what was measured</title>
<style>
body { font: 15px/1.5 sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; } th, td { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left; }
td.no { color: #b00020; font-weight: bold; } figure { display: inline-block; margin: 0 1em 1em 0; }
</style>
</head>
<body>
<h1>onecopy: what was measured</h1>
<ul>{{range .Facts}}<li>{{.}}</li>{{end}}</ul>
{{if .Targets}}<h2>Targets</h2>
<table><tr><th>what</th><th>target</th><th>measured</th><th>rounds</th><th>met</th></tr>
{{range .Targets}}<tr><td>{{.What}}</td><td>{{.Target}}</td><td>{{.Text}}</td><td>{{.Rounds}}</td>{{if .Met}}<td>yes</td>{{else}}<td class="no">no</td>{{end}}</tr>
{{end}}</table>{{end}}
<p>Bars are medians of the rounds, whiskers the range.</p>
{{range .Sections}}<h2>{{.Title}}</h2>
{{range .Figures}}<figure>{{.SVG}}</figure>
{{end}}{{end}}
{{if .Notes}}<h2>Notes</h2><ul>{{range .Notes}}<li>{{.}}</li>{{end}}</ul>{{end}}
</body>
</html>
`))
