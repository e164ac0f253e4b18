// Package marked replaces the generated parts of pages that people write.
package marked

import (
	"fmt"
	"os"
	"strings"
)

// Part names a generated part of a page: <!-- NAME:begin --> ... <!-- NAME:end -->.
type Part string

// Begin and End are the marks.
func (p Part) Begin() string { return "<!-- " + string(p) + ":begin -->" }
func (p Part) End() string   { return "<!-- " + string(p) + ":end -->" }

// Replace replaces the text between the marks of a file; with no text it only looks
// for the marks. Errors: those of os.ReadFile and os.WriteFile, and a file without
// the marks.
func (p Part) Replace(path, text string) error {
	old, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, ok1 := strings.Cut(string(old), p.Begin())
	_, after, ok2 := strings.Cut(rest, p.End())
	if !ok1 || !ok2 {
		return fmt.Errorf("%s has no %s ... %s", path, p.Begin(), p.End())
	}
	if text == "" {
		return nil
	}
	return os.WriteFile(path, []byte(before+p.Begin()+"\n"+text+p.End()+after), 0o644)
}
