//go:build linux

package main

import (
	"os"
	"strings"
	"testing"
)

// The README says what the report says.
func TestReadmeIsOfTheReport(t *testing.T) {
	report, err := os.ReadFile("../../docs/reports/torture.md")
	if err != nil {
		t.Fatal(err)
	}
	want, err := brief(string(report))
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(page), want) {
		t.Errorf("README.md lacks this; make torture writes it:\n%s", want)
	}
}

func TestBrief(t *testing.T) {
	for _, report := range []string{"", "# Something else\n", "# 5 kills in 3s\n", "# 5 kills in 3s\n| violations | 0 |\n"} {
		if text, err := brief(report); err == nil {
			t.Errorf("%q: %s", report, text)
		}
	}
}
