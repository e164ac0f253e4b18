package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jedib0t/go-pretty/v6/text"
	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/internal/doctor"
	"github.com/onecopy/onecopy/registry"
)

func (a *app) doctorCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "doctor",
		Short: "Explain what of this machine helps or hinders sharing",
		Long: `Doctor looks at this machine the way a registry in the given directory depends
on it: the tmpfs and its size and mount options, what the kernel can do (locks,
leases and 2 MiB pages are tried, on a file without a name), limits of control
groups and processes, swap and overcommit, services that clean /dev/shm, what
lies in the registry that does not belong there, and weights that several users
have loaded for themselves.

Every finding has a severity: ok; info, when something could be better; warn,
when something will fail or cost memory one day; fail, when models cannot be
shared at all. All but ok say why it matters and, where there is one, the
command that changes it. Run it as the user, and in the container or unit, whose
processes are to share.

Nothing is changed, and no registry has to exist. The exit code is 0 when
nothing is worse than info, else 1. -o name prints the checks that found
something.`,
		Example: `  shmctl doctor
  shmctl doctor --dir /run/onecopy/1000
  shmctl doctor -o json | jq -r '.findings[] | select(.fix) | .fix'`,
		Args: takes(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error { return a.doctor(cmd) },
	}
}

type findingJSON struct {
	Check    string  `json:"check"`
	Severity string  `json:"severity"` // ok, info, warn or fail
	Text     string  `json:"text"`
	Reason   *string `json:"reason"`
	Fix      *string `json:"fix"` // a command
}

type doctorJSON struct {
	schema
	Dir      string        `json:"dir"`
	Worst    string        `json:"worst"`
	Findings []findingJSON `json:"findings"`
}

type findingLineJSON struct {
	schema
	findingJSON
}

func (a *app) doctor(cmd *cobra.Command) error {
	ctx, stop := a.context(cmd)
	defer stop()
	known, unreadable := a.registryFacts(ctx)
	fs := doctor.Machine().Examine(a.registryDir(), known)
	if unreadable != nil && doctor.Worst(fs) < doctor.Fail { // else that is why
		reason := "No process of this user can attach a model from it"
		if hint := a.hintOf(unreadable); hint != "" { // which is advice, not a command
			reason += "; " + hint
		}
		fs = append(fs, doctor.Finding{
			Check: "registry", Severity: doctor.Fail, Text: "the registry cannot be opened: " + unreadable.Error(), Reason: reason + ".",
		})
	}
	if err := a.writeFindings(fs); err != nil {
		return err
	}
	bad := 0
	for _, f := range fs {
		if f.Severity > doctor.Info {
			bad++
		}
	}
	if bad > 0 {
		return fmt.Errorf("%w: %d", errProblems, bad)
	}
	return nil
}

// registryFacts is what there is to know about the registry. That there is none
// is no error.
func (a *app) registryFacts(ctx context.Context) (*doctor.Registry, error) {
	r, err := a.open()
	if errors.Is(err, registry.ErrNoRegistry) || errors.Is(err, errors.ErrUnsupported) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer r.Close()
	s, err := r.Stats()
	if err != nil {
		return nil, err
	}
	es, err := r.Entries()
	if err != nil {
		return nil, err
	}
	known := &doctor.Registry{Models: s.Models, Used: s.Used, Reserved: s.Reserved, Budget: s.Budget}
	for _, e := range es {
		known.Largest = max(known.Largest, e.Bytes)
		if e.Info != nil {
			known.Files += len(e.Info.Files)
		}
	}
	ps, err := r.Check(ctx, registry.CheckOptions{})
	if err != nil {
		return nil, err
	}
	for _, p := range ps {
		// Files that do not belong there are found by doctor itself.
		if p.Key != "" || p.Kind != "leftover" && p.Kind != "version" {
			known.Problems++
		}
	}
	return known, nil
}

func (a *app) writeFindings(fs []doctor.Finding) error {
	docs := make([]findingJSON, len(fs))
	for i, f := range fs {
		docs[i] = findingJSON{f.Check, f.Severity.String(), f.Text, orNull(f.Reason), orNull(f.Fix)}
	}
	switch a.output {
	case formatJSON:
		return a.writeJSON(doctorJSON{newSchema(), a.registryDir(), doctor.Worst(fs).String(), docs})
	case formatJSONL:
		for _, d := range docs {
			if err := a.writeJSON(findingLineJSON{newSchema(), d}); err != nil {
				return err
			}
		}
		return nil
	case formatName:
		last := ""
		for _, f := range fs {
			if f.Severity > doctor.OK && f.Check != last {
				last = f.Check
				if err := a.writeLines(last); err != nil {
					return err
				}
			}
		}
		return nil
	}
	for _, f := range fs {
		if err := a.writeFinding(f); err != nil {
			return err
		}
	}
	return nil
}

// severityColours only repeat what the word says.
var severityColours = map[doctor.Severity]text.Colors{
	doctor.OK: {text.FgGreen}, doctor.Info: {text.FgCyan}, doctor.Warn: {text.FgYellow}, doctor.Fail: {text.FgRed, text.Bold},
}

const (
	findingIndent = 20 // severity and check
	findingWidth  = 100
)

// writeFinding writes "severity check text", and below it the reason, and the
// command unbroken so that it can be pasted.
func (a *app) writeFinding(f doctor.Finding) error {
	margin := strings.Repeat(" ", findingIndent)
	lines := []string{fmt.Sprintf("%s %-14s %s", severityColours[f.Severity].Sprintf("%-4s", f.Severity), f.Check, visible(f.Text))}
	for _, l := range wrap(visible(f.Reason), findingWidth-findingIndent) {
		lines = append(lines, margin+l)
	}
	if f.Fix != "" {
		lines = append(lines, margin+"fix: "+visible(f.Fix))
	}
	return a.writeLines(lines...)
}

// wrap breaks a text into lines of at most width runes, where words allow.
func wrap(s string, width int) (lines []string) {
	line, length := "", 0
	for _, w := range strings.Fields(s) {
		n := len([]rune(w))
		if length > 0 && length+1+n > width {
			lines = append(lines, line)
			line, length = "", 0
		}
		if length > 0 {
			line += " "
			length++
		}
		line += w
		length += n
	}
	if length > 0 {
		lines = append(lines, line)
	}
	return lines
}
