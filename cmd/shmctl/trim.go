package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/registry"
)

func (a *app) trimCommand() *cobra.Command {
	var to string
	var dry, yes bool
	cmd := &cobra.Command{
		Use:   "trim --to SIZE",
		Short: "Evict idle models until the registry is small enough",
		Long: `Trim evicts models that nobody uses and that are not pinned, least recently used
first and only as a whole, until the registry uses at most SIZE. What gc would
remove goes first. If everything that could go is not enough, trim says so and
fails with exit code 5.

On a terminal it asks first; without one it takes --yes, or --dry-run, which only
says what would go.`,
		Example: `  shmctl trim --to 8GiB --yes
  shmctl trim --to 0 --dry-run    everything that is idle`,
		Args: takes(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error { return a.trim(cmd, to, dry, yes) },
	}
	f := cmd.Flags()
	f.StringVar(&to, "to", "", "`size` that the registry may use, such as 8GiB")
	f.BoolVarP(&dry, "dry-run", "n", false, "only say what would be removed")
	f.BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

type trimJSON struct {
	schema
	DryRun     bool     `json:"dry_run"`
	Removed    []string `json:"removed"` // keys
	FreedBytes int64    `json:"freed_bytes"`
	UsedBytes  int64    `json:"used_bytes"`
	HeldBytes  int64    `json:"held_bytes"` // in use or pinned, when that is too much; else 0
}

func (a *app) trim(cmd *cobra.Command, size string, dry, yes bool) error {
	if size == "" {
		return usagef("", "trim needs --to SIZE")
	}
	to, err := parseSize(size)
	if err != nil {
		return err
	}
	r, err := a.open()
	if err != nil {
		return err
	}
	defer r.Close()
	ctx, stop := a.context(cmd)
	defer stop()
	rep, err := r.PlanTrim(ctx, to)
	if err != nil {
		return err
	}
	if !dry {
		nothing := len(rep.Removed) == 0 && isTerminal(a.stdin) // no reason to ask
		if err := a.confirm(yes || nothing, func() string {
			return fmt.Sprintf("evict %s (%s)?", plural(len(rep.Removed), "model"), a.size(rep.Freed))
		}); err != nil {
			return err
		}
		if rep, err = r.Trim(ctx, to); err != nil {
			return err
		}
	}
	switch {
	case a.json():
		err = a.writeJSON(trimJSON{newSchema(), dry, append([]string{}, rep.Removed...), rep.Freed, rep.Used, rep.Held})
	case a.output == formatName:
		err = a.writeLines(rep.Removed...)
	default:
		for _, key := range rep.Removed {
			if err = a.writeLines(visible(key + ": " + wouldBe(dry, "evicted"))); err != nil {
				return err
			}
		}
		err = a.writeLines(fmt.Sprintf("%s %s, %s used", wouldBe(dry, "freed"), a.size(rep.Freed), a.size(rep.Used)))
	}
	if err == nil && rep.Held > 0 {
		err = withHint(fmt.Errorf("%w or pinned: %s that are left, more than %s", registry.ErrInUse, a.size(rep.Held), a.size(to)), "shmctl holders shows who; shmctl unpin KEY lets a pinned model go")
	}
	return err
}

func wouldBe(dry bool, done string) string {
	if dry {
		return "would be " + done
	}
	return done
}

// parseSize reads 512MiB, 2G or a number of bytes.
func parseSize(s string) (int64, error) {
	n, err := humanize.ParseBytes(s)
	// The library drops commas, and 1,5GiB would be 15.
	if err != nil || n > math.MaxInt64 || strings.HasPrefix(s, "-") || strings.Contains(s, ",") {
		return 0, usagef("write 512MiB, 8G or a number of bytes", "size %q: not a size", s)
	}
	return int64(n), nil
}

// parseShare reads 60% as 0.6.
func parseShare(s string) (share float64, ok bool, err error) {
	num, percent := strings.CutSuffix(s, "%")
	if !percent {
		return 0, false, nil
	}
	p, err := strconv.ParseFloat(num, 64)
	if err != nil || !(p > 0 && p <= 100) {
		return 0, true, usagef("", "budget %q: want more than 0%% and at most 100%%", s)
	}
	return p / 100, true, nil
}
