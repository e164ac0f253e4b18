package main

import (
	"errors"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/registry"
)

func (a *app) lsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List the models",
		Long: `Ls lists the models of the registry. On a terminal it ends with the bytes used,
the budget, what is free on the tmpfs, and the directory.

LEASED says whether some process holds the model at this moment; shmctl holders
says which. AGE counts from the end of the load.`,
		Example: `  shmctl ls
  shmctl ls -q | xargs -d '\n' -n1 shmctl stat --
  shmctl ls -o json | jq '.models[] | select(.leased | not) | .key'`,
		Args: takes(0, 0, ""),
		RunE: func(*cobra.Command, []string) error { return a.ls() },
	}
}

type lsJSON struct {
	schema
	Dir    string      `json:"dir"`
	Models []modelJSON `json:"models"`
	Stats  *statsJSON  `json:"stats"` // null when there is no registry
}

type modelLineJSON struct {
	schema
	modelJSON
}

func (a *app) ls() error {
	var es []registry.Entry
	var stats *registry.Stats
	r, err := a.open()
	switch {
	case errors.Is(err, registry.ErrNoRegistry):
		a.noteNoRegistry()
	case err != nil:
		return err
	default:
		defer r.Close()
		if a.output == formatJSON || a.output == formatTable && isTerminal(a.stdout) {
			all, err := r.Overview()
			if err != nil {
				return err
			}
			es, stats = all.Entries, &all.Stats
		} else if es, err = r.Entries(); err != nil { // nobody will see the rest
			return err
		}
	}

	switch a.output {
	case formatJSON:
		doc := lsJSON{schema: newSchema(), Dir: a.registryDir(), Models: []modelJSON{}}
		for _, e := range es {
			doc.Models = append(doc.Models, toModelJSON(e))
		}
		if stats != nil {
			s := toStatsJSON(*stats)
			doc.Stats = &s
		}
		return a.writeJSON(doc)
	case formatJSONL:
		for _, e := range es {
			if err := a.writeJSON(modelLineJSON{newSchema(), toModelJSON(e)}); err != nil {
				return err
			}
		}
		return nil
	case formatName:
		for _, e := range es {
			if err := a.writeLines(e.Key); err != nil {
				return err
			}
		}
		return nil
	}

	var rows [][]string
	for _, e := range es {
		rows = append(rows, a.lsRow(e))
	}
	if err := a.writeTable([]string{"KEY", "STATE", "GEN", "SIZE", "FILES", "LEASED", "AGE", "ORIGIN"}, rows); err != nil {
		return err
	}
	if stats == nil || !isTerminal(a.stdout) {
		return nil
	}
	return a.writeLines("", a.footer(*stats))
}

func (a *app) lsRow(e registry.Entry) []string {
	gen, size, files, age, origin := "-", "-", "-", "-", "-"
	if e.Generation != 0 {
		gen = strconv.FormatUint(e.Generation, 10)
	}
	if e.Bytes != 0 || e.Info != nil {
		size = a.size(e.Bytes)
	}
	if e.Info != nil {
		files = strconv.Itoa(len(e.Info.Files))
		age = a.age(e.Info.LoadedAt)
		origin = originText(e.Info.Origin)
	}
	return []string{e.Key, e.State, gen, size, files, yesNo(e.Leased), age, origin}
}

// footer sums up the registry: what is used of what may be used, and where.
func (a *app) footer(s registry.Stats) string {
	line := plural(s.Models, "model") + ", "
	if s.SupersededBytes > 0 {
		line += a.size(s.ModelBytes) + ", and " + a.size(s.SupersededBytes) + " in replaced generations that are still in use: "
	}
	line += a.size(s.Used) + " used of a budget of " + a.size(s.Budget) + ", " + a.size(s.Free) + " free"
	if s.Reserved > 0 {
		line += ", " + a.size(s.Reserved) + " reserved by loads"
	}
	return visible(line + " in " + a.registryDir())
}

func originText(o registry.Origin) string {
	if o.Path != "" {
		return o.Path
	}
	return "version " + o.Version
}

// noteNoRegistry is for the commands that take no registry for an empty one.
func (a *app) noteNoRegistry() {
	a.note("there is no registry at %s", a.registryDir())
}
