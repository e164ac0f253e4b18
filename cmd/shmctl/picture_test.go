//go:build linux

package main

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"math"
	"strings"

	"github.com/hinshun/vt10x"
)

// Sizes of a character, and of the margin around them, in a picture.
const (
	cellWidth, cellHeight = 8.43, 17
	pictureMargin         = 16
	boldMode              = 1 << 2 // of vt10x.Glyph.Mode
)

// picture draws what is on a screen as SVG: every run of one weight is a text,
// as wide as its cells are, whatever font the reader has.
func picture(screen vt10x.View) []byte {
	cols, rows := screen.Size()
	w := int(math.Ceil(float64(cols)*cellWidth)) + 2*pictureMargin - 1
	h := rows*cellHeight + pictureMargin + 4
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace" font-size="14">`+"\n", w, h, w, h)
	b.WriteString(`<rect width="100%" height="100%" rx="6" fill="#101418"/>` + "\n" + `<g fill="#d8dee6" xml:space="preserve">` + "\n")
	for y := range rows {
		var run strings.Builder
		start, bold := 0, false
		flush := func() {
			text := strings.TrimRight(run.String(), " ")
			lead := len(text) - len(strings.TrimLeft(text, " "))
			run.Reset()
			if text = text[lead:]; text == "" {
				return
			}
			weight := ""
			if bold {
				weight = ` font-weight="bold" fill="#ffffff"`
			}
			fmt.Fprintf(&b, `<text x="%.0f" y="%d" textLength="%.0f"%s>`, pictureMargin+float64(start+lead)*cellWidth, pictureMargin+y*cellHeight+11,
				float64(len([]rune(text)))*cellWidth, weight)
			_ = xml.EscapeText(&b, []byte(text)) // a buffer takes everything
			b.WriteString("</text>\n")
		}
		for x := range cols {
			g := screen.Cell(x, y)
			if is := g.Mode&boldMode != 0; is != bold && g.Char != ' ' {
				flush()
				start, bold = x, is
			}
			run.WriteRune(max(g.Char, ' '))
		}
		flush()
	}
	b.WriteString("</g>\n</svg>\n")
	return b.Bytes()
}
