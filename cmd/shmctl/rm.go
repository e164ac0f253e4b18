package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/registry"
)

func (a *app) rmCommand() *cobra.Command {
	var yes, dry bool
	cmd := &cobra.Command{
		Use:     "rm KEY...",
		Aliases: []string{"remove"},
		Short:   "Remove models that nobody uses",
		Long: `Rm removes models and gives their memory back. A model that some process holds
is not removed: rm then fails with exit code 5 and names the holders.

On a terminal it asks first; without one it takes --yes, or --dry-run, which only
says what would happen. A key that fails does not keep the others from being
removed; the exit code is that of the first failure.`,
		Example: `  shmctl rm bert
  shmctl rm --yes bert whisper
  shmctl rm --dry-run bert
  shmctl ls -q | xargs -d '\n' shmctl rm --yes --    everything that is not in use`,
		Args:              takes(1, -1, "KEY..."),
		ValidArgsFunction: a.completeKeys(-1),
		RunE:              func(cmd *cobra.Command, args []string) error { return a.rm(cmd, args, dry, yes) },
	}
	cmd.Flags().BoolVarP(&dry, "dry-run", "n", false, "only say what would be removed")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

type rmJSON struct {
	schema
	Removed []string `json:"removed"`
	DryRun  bool     `json:"dry_run"`
}

type rmLineJSON struct {
	schema
	Removed string `json:"removed"`
	DryRun  bool   `json:"dry_run"`
}

func (a *app) rm(cmd *cobra.Command, keys []string, dry, yes bool) error {
	r, err := a.open()
	if err != nil {
		return err
	}
	defer r.Close()
	if !dry {
		if err := a.confirm(yes, func() string { return a.rmQuestion(r, keys) }); err != nil {
			return err
		}
	}
	remove := r.Remove
	if dry {
		remove = r.PlanRemove
	}

	ctx, stop := a.context(cmd)
	defer stop()
	removed := []string{}
	var first error
	for _, key := range keys {
		err := remove(ctx, key)
		if err == nil {
			removed = append(removed, key)
			switch a.output {
			case formatJSONL:
				err = a.writeJSON(rmLineJSON{newSchema(), key, dry})
			case formatName:
				err = a.writeLines(key)
			case formatTable:
				err = a.writeLines(visible(key + ": " + wouldBe(dry, "removed")))
			}
			if err != nil {
				return err
			}
			continue
		}
		err = suggestKeys(r, key, err)
		if first == nil {
			first = err
		} else {
			// Only one error can end the command; the first decides the exit
			// code, so it is reported last, by run.
			_, code := a.classify(err)
			a.report(code, err.Error(), a.hintOf(err))
		}
		if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			break
		}
	}
	if a.output == formatJSON {
		if err := a.writeJSON(rmJSON{newSchema(), removed, dry}); err != nil {
			return err
		}
	}
	return first
}

func (a *app) rmQuestion(r *registry.Registry, keys []string) string {
	what := keys[0]
	if len(keys) > 1 {
		what = plural(len(keys), "model")
	}
	var bytes int64
	for _, key := range keys {
		if e, err := r.Entry(key); err == nil {
			bytes += e.Bytes
		}
	}
	return fmt.Sprintf("remove %s (%s)?", what, a.size(bytes))
}
