package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/registry"
)

func (a *app) checkCommand() *cobra.Command {
	var data bool
	cmd := &cobra.Command{
		Use:   "check [KEY]",
		Short: "Check every invariant of the registry",
		Long: `Check looks for everything that must not be: files that are missing or have the
wrong size or mode, slots that make no sense, leftovers of the dead. With --data
it also reads every byte and compares it with its digest.

Problems are listed with their repair, and the exit code is 1. A table that
cannot be read at all is exit code 6.`,
		Example: `  shmctl check
  shmctl check --data bert
  shmctl check -o json | jq -r '.problems[].repair'`,
		Args:              takes(0, 1, "[KEY]"),
		ValidArgsFunction: a.completeKeys(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o := registry.CheckOptions{Data: data}
			if len(args) == 1 {
				o.Key = args[0]
			}
			return a.check(cmd, o)
		},
	}
	cmd.Flags().BoolVar(&data, "data", false, "read every byte and compare it with its digest")
	return cmd
}

type problemJSON struct {
	Kind   string  `json:"kind"`
	Key    *string `json:"key"`
	Path   *string `json:"path"`
	Text   string  `json:"text"`
	Repair *string `json:"repair"`
	Note   bool    `json:"note"` // nothing is broken
}

type checkJSON struct {
	schema
	Dir      string        `json:"dir"`
	Problems []problemJSON `json:"problems"`
}

type problemLineJSON struct {
	schema
	problemJSON
}

func (a *app) check(cmd *cobra.Command, o registry.CheckOptions) error {
	var ps []registry.Problem
	r, err := a.open()
	switch {
	case errors.Is(err, registry.ErrNoRegistry):
		a.noteNoRegistry()
	case err != nil:
		return err
	default:
		defer r.Close()
		ctx, stop := a.context(cmd)
		defer stop()
		if ps, err = r.Check(ctx, o); err != nil {
			return suggestKeys(r, o.Key, err)
		}
	}
	if err := a.writeProblems(ps); err != nil {
		return err
	}
	broken := slices.DeleteFunc(slices.Clone(ps), func(p registry.Problem) bool { return p.Note })
	if len(broken) > 0 {
		return fmt.Errorf("%w: %d", errProblems, len(broken))
	}
	return nil
}

func (a *app) writeProblems(ps []registry.Problem) error {
	docs := make([]problemJSON, len(ps))
	for i, p := range ps {
		docs[i] = problemJSON{p.Kind, orNull(p.Key), orNull(p.Path), p.Text, orNull(nameKey(p.Repair, p.Key)), p.Note}
	}
	switch a.output {
	case formatJSON:
		return a.writeJSON(checkJSON{newSchema(), a.registryDir(), docs})
	case formatJSONL:
		for _, d := range docs {
			if err := a.writeJSON(problemLineJSON{newSchema(), d}); err != nil {
				return err
			}
		}
		return nil
	case formatName:
		var kinds []string
		for _, p := range ps {
			if !slices.Contains(kinds, p.Kind) {
				kinds = append(kinds, p.Kind)
			}
		}
		return a.writeLines(kinds...)
	}
	if len(ps) == 0 {
		return a.writeLines("no problems")
	}
	var rows [][]string
	for _, p := range ps {
		rows = append(rows, []string{p.Kind, dash(p.Key), dash(a.relative(p.Path)), p.Text, dash(nameKey(p.Repair, p.Key))})
	}
	return a.writeTable([]string{"KIND", "KEY", "PATH", "PROBLEM", "REPAIR"}, rows)
}

// relative shortens a path to what follows the registry's directory.
func (a *app) relative(path string) string {
	if rel, ok := strings.CutPrefix(path, a.registryDir()+"/"); ok {
		return rel
	}
	return path
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
