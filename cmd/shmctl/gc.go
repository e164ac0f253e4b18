package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/registry"
)

func (a *app) gcCommand() *cobra.Command {
	var watch time.Duration
	var dry bool
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Give back what the dead left and what has expired",
		Long: `Gc cleans up: what killed processes left half done, replaced generations that
nobody uses any more, models whose time to live is over. It never removes a
healthy model that has not expired, and never one that is in use.

Opening a registry for a load does the same in passing; gc is for when nobody
loads. With --watch it goes on and cleans up once per interval, until it is
interrupted: then a model is gone within its time to live and one interval after
the last release, or within one interval more if its last user was killed. It
waits for a registry that is not there yet. Only one process needs to run it,
for instance the timer unit.`,
		Example: `  shmctl gc
  shmctl gc --dry-run
  shmctl gc --watch 10s
  shmctl gc -o json | jq .freed_bytes`,
		Args: takes(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("watch") {
				return a.gc(cmd, dry)
			}
			if watch <= 0 {
				return usagef("", "--watch %v: it must be more than 0", watch)
			}
			if dry {
				return usagef("", "--watch and --dry-run exclude each other")
			}
			return a.gcWatch(cmd, watch)
		},
	}
	f := cmd.Flags()
	f.DurationVar(&watch, "watch", 0, "go on, once per `duration`")
	f.BoolVarP(&dry, "dry-run", "n", false, "only say what would be removed")
	return cmd
}

type gcJSON struct {
	schema
	Reclaimed   int      `json:"reclaimed"`
	Expired     int      `json:"expired"`
	Orphans     int      `json:"orphans"`
	Leftovers   int      `json:"leftovers"`
	FreedBytes  int64    `json:"freed_bytes"`
	Removed     []string `json:"removed"`
	ExpiredKeys []string `json:"expired_keys"`
	DryRun      bool     `json:"dry_run"`
}

func (a *app) gc(cmd *cobra.Command, dry bool) error {
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
		do := r.GC
		if dry {
			do = r.PlanGC
		}
		if rep, err = do(ctx); err != nil {
			return err
		}
	}
	return a.writeGC(rep, dry)
}

// gcWatch cleans up again and again. The registry is opened for each round, so
// that none has to exist, and what was deleted and made anew is followed. Rounds
// that find nothing say nothing.
func (a *app) gcWatch(cmd *cobra.Command, every time.Duration) error {
	ctx, stop := a.context(cmd)
	defer stop()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		rep, err := func() (rep registry.GCReport, err error) {
			r, err := a.open()
			if err != nil {
				return rep, err
			}
			defer r.Close()
			return r.GC(ctx)
		}()
		switch {
		case ctx.Err() != nil && (err != nil || a.signals.caught()):
			return ctx.Err()
		case errors.Is(err, registry.ErrNoRegistry):
		case err != nil:
			return err
		case rep.Reclaimed+rep.Expired+rep.Orphans+rep.Leftovers > 0:
			if err := a.writeGC(rep, false); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

func (a *app) writeGC(rep registry.GCReport, dry bool) error {
	switch a.output {
	case formatJSON, formatJSONL:
		return a.writeJSON(gcJSON{
			newSchema(), rep.Reclaimed, rep.Expired, rep.Orphans, rep.Leftovers, rep.Freed,
			append([]string{}, rep.Removed...), append([]string{}, rep.Keys...), dry,
		})
	case formatName:
		return a.writeLines(rep.Removed...)
	}
	return a.writeLines(fmt.Sprintf("%s %s: %d reclaimed, %d expired, %s, %s", wouldBe(dry, "freed"),
		a.size(rep.Freed), rep.Reclaimed, rep.Expired, plural(rep.Orphans, "orphan"), plural(rep.Leftovers, "leftover")))
}
