//go:build linux

package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/onecopy/onecopy/internal/marked"
)

// readme puts what a report says into a page.
func readme(report, page string) error {
	b, err := os.ReadFile(report)
	if err != nil {
		return err
	}
	text, err := brief(string(b))
	if err != nil {
		return fmt.Errorf("%s: %w", report, err)
	}
	return marked.Part("torture").Replace(page, text)
}

// brief is a report in a paragraph.
func brief(report string) (string, error) {
	var kills, took string
	if _, err := fmt.Sscanf(report, "# %s kills in %s", &kills, &took); err != nil {
		return "", fmt.Errorf("no report of a torture: %w", err)
	}
	rows, steps, fewest := map[string]string{}, 0, 0
	for line := range strings.Lines(report) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		switch n, err := strconv.Atoi(cells[min(1, len(cells)-1)]); {
		case len(cells) == 2:
			rows[cells[0]] = cells[1]
		case len(cells) == 3 && err == nil:
			if steps++; steps == 1 || n < fewest {
				fewest = n
			}
		}
	}
	_, workers, _ := strings.Cut(report, " workers in ")
	workers, _, _ = strings.Cut(workers, ".\n")
	inside, violations := rows["of them inside an operation of the protocol"], rows["violations"]
	if steps == 0 || workers == "" || inside == "" || violations == "" {
		return "", fmt.Errorf("a report without steps, workers or violations")
	}
	return fmt.Sprintf("`make torture` killed %s processes with -9 in %s, in %s: %s of them inside an operation of the\n"+
		"protocol, at least %d at each of its %d named steps. Violations that its auditor found: %s.\n"+
		"[The report](docs/reports/torture.md) has the seed, the machine and the counts.\n",
		kills, took, workers, inside, fewest, steps, violations), nil
}
