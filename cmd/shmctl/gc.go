package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/registry"
)

func (a *app) gcCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "gc",
		Short: "Give back what the dead left and what has expired",
		Long: `Gc cleans up: what killed processes left half done, replaced generations that
nobody uses any more, models whose time to live is over. It never removes a
healthy model that has not expired, and never one that is in use.

Opening a registry for a load does the same in passing; gc is for when nobody
loads.`,
		Example: `  shmctl gc
  shmctl gc -o json | jq .freed_bytes`,
		Args: takes(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error { return a.gc(cmd) },
	}
}

type gcJSON struct {
	schema
	Reclaimed  int      `json:"reclaimed"`
	Expired    int      `json:"expired"`
	Orphans    int      `json:"orphans"`
	Leftovers  int      `json:"leftovers"`
	FreedBytes int64    `json:"freed_bytes"`
	Removed    []string `json:"removed"`
}

func (a *app) gc(cmd *cobra.Command) error {
	var rep registry.GCReport
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
		if rep, err = r.GC(ctx); err != nil {
			return err
		}
	}
	switch a.output {
	case formatJSON, formatJSONL:
		return a.writeJSON(gcJSON{
			newSchema(), rep.Reclaimed, rep.Expired, rep.Orphans, rep.Leftovers, rep.Freed,
			append([]string{}, rep.Removed...),
		})
	case formatName:
		return a.writeLines(rep.Removed...)
	}
	return a.writeLines(fmt.Sprintf("freed %s: %d reclaimed, %d expired, %s, %s",
		a.size(rep.Freed), rep.Reclaimed, rep.Expired, plural(rep.Orphans, "orphan"), plural(rep.Leftovers, "leftover")))
}
