package main

import (
	"bytes"
	"image/color"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

var (
	ours   = color.RGBA{R: 0x1b, G: 0x7f, B: 0x5c, A: 0xff}
	others = color.RGBA{R: 0x9a, G: 0xa5, B: 0xb1, A: 0xff}
	lines  = []color.RGBA{{0xd9, 0x5f, 0x02, 0xff}, {0x75, 0x70, 0xb3, 0xff}, {0x1b, 0x7f, 0x5c, 0xff}, {0xe7, 0x29, 0x8a, 0xff},
		{0x66, 0xa6, 0x1e, 0xff}, {0xa6, 0x76, 0x1d, 0xff}, {0x66, 0x66, 0x66, 0xff}, {0x1f, 0x78, 0xb4, 0xff}, {0xe6, 0xab, 0x02, 0xff}}
)

// barPlot draws horizontal bars with their ranges, the first one on top.
func barPlot(title, unit string, bars []bar) (string, error) {
	p := plot.New()
	p.Title.Text, p.X.Label.Text = title, unit
	p.X.Min = 0
	names := make([]string, len(bars))
	for i, b := range bars {
		at := len(bars) - 1 - i
		names[at] = b.name
		chart, err := plotter.NewBarChart(plotter.Values{b.median}, vg.Points(14))
		if err != nil {
			return "", err
		}
		chart.Horizontal, chart.XMin, chart.LineStyle.Width = true, float64(at), 0
		chart.Color = others
		if strings.HasPrefix(b.name, "onecopy") {
			chart.Color = ours
		}
		span, err := plotter.NewXErrorBars(ranges{{b, float64(at)}})
		if err != nil {
			return "", err
		}
		p.Add(chart, span)
	}
	p.NominalY(names...)
	return svg(p, vg.Points(560), vg.Points(float64(70+26*len(bars))))
}

// ranges are bars as gonum wants them.
type ranges []struct {
	bar
	at float64
}

func (r ranges) Len() int                    { return len(r) }
func (r ranges) XY(i int) (float64, float64) { return r[i].median, r[i].at }
func (r ranges) XError(i int) (float64, float64) {
	return r[i].min - r[i].median, r[i].max - r[i].median
}

// curvePlot draws a line for each way, over the number of workers.
func curvePlot(title, unit string, scale float64, curves []curve) (string, error) {
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = title, "workers", unit
	p.X.Min, p.Y.Min = 0, 0
	p.Legend.Top, p.Legend.Left = true, true
	for i, c := range curves {
		points := make(plotter.XYs, len(c.x))
		for j := range c.x {
			points[j] = plotter.XY{X: c.x[j], Y: c.bars[j].median * scale}
		}
		line, dots, err := plotter.NewLinePoints(points)
		if err != nil {
			return "", err
		}
		line.Color, dots.Color = lines[i%len(lines)], lines[i%len(lines)]
		line.Width, dots.Shape = vg.Points(1.5), draw.CircleGlyph{}
		p.Add(line, dots)
		p.Legend.Add(c.name, line, dots)
	}
	return svg(p, vg.Points(560), vg.Points(320))
}

// svg draws a plot as an element that can stand inside a page.
func svg(p *plot.Plot, width, height vg.Length) (string, error) {
	canvas := vgsvg.New(width, height)
	p.Draw(draw.New(canvas))
	var out bytes.Buffer
	if _, err := canvas.WriteTo(&out); err != nil {
		return "", err
	}
	_, text, _ := strings.Cut(out.String(), "<svg") // without the head of an XML file
	return "<svg" + text, nil
}
