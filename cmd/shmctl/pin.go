package main

import (
	"context"
	"errors"
	"time"

	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/registry"
)

func (a *app) pinCommand() *cobra.Command {
	return a.keysCommand(&cobra.Command{
		Use:   "pin KEY...",
		Short: "Keep models from being evicted",
		Long: `Pin keeps models in memory: neither the budget, nor a full table, nor a time to
live removes a pinned model. rm still removes it when nobody uses it, and that
ends the pin. The pin belongs to the key: it survives a replacement.`,
		Example: `  shmctl pin bert
  shmctl ls -o json | jq -r '.models[] | select(.pinned) | .key'`,
	}, "pinned", (*registry.Registry).Pin)
}

func (a *app) unpinCommand() *cobra.Command {
	return a.keysCommand(&cobra.Command{
		Use:     "unpin KEY...",
		Short:   "Let models be evicted again",
		Long:    `Unpin undoes pin. A model that is not pinned stays as it is.`,
		Example: `  shmctl unpin bert`,
	}, "unpinned", (*registry.Registry).Unpin)
}

func (a *app) touchCommand() *cobra.Command {
	return a.keysCommand(&cobra.Command{
		Use:   "touch KEY...",
		Short: "Count as a use of models now",
		Long: `Touch counts as a use: the models are evicted later than others, and their idle
time begins anew. It loads nothing.`,
		Example: `  shmctl touch bert`,
	}, "touched", (*registry.Registry).Touch)
}

func (a *app) ttlCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "ttl KEY DURATION|never|default",
		Short: "Set how long a model may be idle",
		Long: `Ttl sets after which idle time a model expires, whatever the registry's default
is: "never", a duration such as 90s or 12h, or "default" for the one that
"shmctl config" shows. It ends when the model is removed.

Idle time counts from the last release, not from the load. A release is seen
when a process closes the model; of one that is killed, or of another user, it
is not, and then the time counts from the first gc, load or open that finds the
model idle. Nothing runs by itself: an expired model goes at the next load, open
or release by anybody, or at the next gc. With "shmctl gc --watch 10s", or the
timer unit, it goes within one interval.`,
		Example: `  shmctl ttl bert 1h
  shmctl ttl bert never`,
		Args: takes(2, 2, "KEY DURATION"),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, part string) ([]cobra.Completion, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return []string{"never", "default", "15m", "1h", "24h"}, cobra.ShellCompDirectiveNoFileComp
			}
			return a.completeKeys(1)(cmd, args, part)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			ttl, err := parseTTL(args[1])
			if err != nil {
				return err
			}
			return a.forKeys(cmd, args[:1], "time to live set to "+args[1], func(r *registry.Registry, ctx context.Context, key string) error {
				return r.SetTTL(ctx, key, ttl)
			})
		},
	}
}

// parseTTL returns the library's form: 0 is the default, negative is never.
func parseTTL(s string) (time.Duration, error) {
	switch s {
	case "default":
		return 0, nil
	case "never":
		return -1, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, usagef("write 90s, 15m or 12h, never or default", "time to live %q: not a duration", s)
	}
	if d <= 0 {
		return 0, usagef("never keeps the model, default is the registry's own time", "time to live %q: it must be more than 0", s)
	}
	return d, nil
}

// keysCommand completes a command that does one small thing to each KEY.
func (a *app) keysCommand(cmd *cobra.Command, done string, do func(*registry.Registry, context.Context, string) error) *cobra.Command {
	cmd.Args = takes(1, -1, "KEY...")
	cmd.ValidArgsFunction = a.completeKeys(-1)
	cmd.RunE = func(cmd *cobra.Command, args []string) error { return a.forKeys(cmd, args, done, do) }
	return cmd
}

type keysJSON struct {
	schema
	Keys []string `json:"keys"` // for which it was done
}

// forKeys does something to each key and goes on after a failure: the first one
// decides the exit code, so it is reported last, by run.
func (a *app) forKeys(cmd *cobra.Command, keys []string, done string, do func(*registry.Registry, context.Context, string) error) error {
	r, err := a.open()
	if err != nil {
		return err
	}
	defer r.Close()
	ctx, stop := a.context(cmd)
	defer stop()
	did := []string{}
	var first error
	for _, key := range keys {
		err := do(r, ctx, key)
		if err == nil {
			did = append(did, key)
			switch {
			case a.json():
			case a.output == formatName:
				err = a.writeLines(key)
			default:
				err = a.writeLines(visible(key + ": " + done))
			}
			if err != nil {
				return err
			}
			continue
		}
		if err = suggestKeys(r, key, err); first == nil {
			first = err
		} else {
			_, code := a.classify(err)
			a.report(code, err.Error(), a.hintOf(err))
		}
		if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			break
		}
	}
	if a.json() {
		if err := a.writeJSON(keysJSON{newSchema(), did}); err != nil {
			return err
		}
	}
	return first
}
