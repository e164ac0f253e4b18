package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/dustin/go-humanize"
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/jedib0t/go-pretty/v6/text"
	"golang.org/x/term"
)

// Output formats.
const (
	formatTable = "table"
	formatJSON  = "json"
	formatJSONL = "jsonl"
	formatName  = "name" // only what identifies each thing, one a line
)

var formats = []string{formatTable, formatJSON, formatJSONL, formatName}

func (a *app) json() bool { return a.output == formatJSON || a.output == formatJSONL }

// note writes a remark to stderr: something worth knowing that is no error.
// Neither a quiet user nor a program that parses wants it.
func (a *app) note(format string, args ...any) {
	if a.quiet || a.json() {
		return
	}
	fmt.Fprintf(a.stderr, "shmctl: %s\n", visible(fmt.Sprintf(format, args...)))
}

// report writes an error to stderr.
func (a *app) report(code, text, hint string) {
	if a.json() {
		e := errorJSON{}
		e.Error.Code, e.Error.Message = code, text
		if hint != "" {
			e.Error.Hint = &hint
		}
		b, _ := json.Marshal(e) // strings only: cannot fail
		fmt.Fprintf(a.stderr, "%s\n", b)
		return
	}
	for line := range strings.Lines(text) {
		fmt.Fprintf(a.stderr, "shmctl: %s\n", visible(strings.TrimRight(line, "\n")))
	}
	if hint != "" {
		fmt.Fprintf(a.stderr, "shmctl: hint: %s\n", visible(hint))
	}
}

// writeJSON writes one document: indented for -o json, one line for jsonl.
func (a *app) writeJSON(v any) error {
	e := json.NewEncoder(a.stdout)
	e.SetEscapeHTML(false)
	if a.output == formatJSON {
		e.SetIndent("", "  ")
	}
	return e.Encode(v)
}

// writeLines writes names or other plain lines.
func (a *app) writeLines(lines ...string) error {
	for _, l := range lines {
		if _, err := fmt.Fprintln(a.stdout, l); err != nil {
			return err
		}
	}
	return nil
}

// writeTable writes borderless, left-aligned columns. Cells come from file
// names and command lines of other people: nothing in them reaches the terminal
// unprintable.
func (a *app) writeTable(header []string, rows [][]string) error {
	t := table.NewWriter()
	style := table.Style{Name: "shmctl"}
	style.Box.PaddingRight = "   "
	style.Format.Header = text.FormatDefault
	style.Format.HeaderAlign, style.Format.RowAlign = text.AlignLeft, text.AlignLeft
	style.Color.Header = text.Colors{text.Bold}
	t.SetStyle(style)
	t.SuppressTrailingSpaces()
	if !a.noHeaders {
		t.AppendHeader(cells(header, false))
	}
	for _, r := range rows {
		t.AppendRow(cells(r, true))
	}
	if t.Length() == 0 && a.noHeaders {
		return nil
	}
	_, err := fmt.Fprintln(a.stdout, t.Render())
	return err
}

func cells(ss []string, clean bool) table.Row {
	row := make(table.Row, len(ss))
	for i, s := range ss {
		if clean {
			s = visible(s)
		}
		row[i] = s
	}
	return row
}

// writeFields writes "name  value" pairs, the form of one thing's details.
func (a *app) writeFields(pairs [][2]string) error {
	width := 0
	for _, p := range pairs {
		width = max(width, len(p[0]))
	}
	for _, p := range pairs {
		name := text.Colors{text.Bold}.Sprintf("%-*s", width, p[0])
		if _, err := fmt.Fprintf(a.stdout, "%s   %s\n", name, visible(p[1])); err != nil {
			return err
		}
	}
	return nil
}

// visible replaces what a terminal would act on instead of showing it.
func visible(s string) string {
	ok := func(r rune) bool { return unicode.IsPrint(r) && r != unicode.ReplacementChar }
	if strings.IndexFunc(s, func(r rune) bool { return !ok(r) }) < 0 {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if ok(r) {
			b.WriteRune(r)
		} else {
			q := strconv.QuoteRuneToASCII(r)
			b.WriteString(q[1 : len(q)-1])
		}
	}
	return b.String()
}

func isTerminal(f any) bool {
	file, ok := f.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}

// setColours decides about colour and tells the table writer, which has its own
// ideas about NO_COLOR.
func (a *app) setColours() {
	if a.coloured(isTerminal(a.stdout)) {
		text.EnableColors()
	} else {
		text.DisableColors()
	}
}

func (a *app) coloured(terminal bool) bool {
	force := a.getenv("CLICOLOR_FORCE")
	switch {
	case a.color != "auto":
		return a.color == "always"
	case a.getenv("NO_COLOR") != "":
		return false
	case force != "" && force != "0":
		return true
	}
	return terminal && a.getenv("TERM") != "dumb"
}

// size of bytes for people, or as a number with --bytes.
func (a *app) size(n int64) string {
	switch {
	case a.rawBytes:
		return strconv.FormatInt(n, 10)
	case n < 0:
		return "-" + humanize.IBytes(uint64(-n))
	}
	return humanize.IBytes(uint64(n))
}

// age of a moment: the coarsest unit that says enough.
func (a *app) age(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	switch d := max(0, a.now().Sub(t)); {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", d/time.Hour)
	default:
		return fmt.Sprintf("%dd", d/(24*time.Hour))
	}
}

func when(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format(time.RFC3339)
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// plural counts things: "1 file", "2 files".
func plural(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// confirm makes sure that something may be removed: a person is asked; without
// one, --yes has to say so.
func (a *app) confirm(yes bool, question func() string) error {
	switch {
	case yes:
		return nil
	case !isTerminal(a.stdin):
		return usagef("--yes does it without asking, --dry-run only says what would go", "stdin is no terminal, so nobody can be asked")
	case !a.ask(question()):
		return errors.New("nothing was removed")
	}
	return nil
}

// ask puts a question on stderr and reads a line. Anything but yes is no.
func (a *app) ask(question string) bool {
	fmt.Fprintf(a.stderr, "%s [y/N] ", visible(question))
	var line []byte
	buf := make([]byte, 1) // one byte at a time: the rest of stdin is not ours
	for {
		n, err := a.stdin.Read(buf)
		if n == 0 || buf[0] == '\n' {
			if errors.Is(err, io.EOF) {
				fmt.Fprintln(a.stderr)
			}
			break
		}
		line = append(line, buf[0])
	}
	switch strings.ToLower(strings.TrimSpace(string(line))) {
	case "y", "yes":
		return true
	}
	return false
}
