package main

import (
	"math"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/registry"
)

func (a *app) configCommand() *cobra.Command {
	var dry bool
	get := func(*cobra.Command, []string) error { return a.configGet() }
	cmd := &cobra.Command{
		Use:   "config [get|set]",
		Short: "Show or set a registry's budget and default time to live",
		Long: `Config shows, or sets, the limits of the registry. They are stored in it and
count for all processes.

  budget   what all generations together may use: a size, or a share of the
           tmpfs in percent (default 80%)
  ttl      idle time after which a model without a time of its own expires:
           a duration, or never (default); see shmctl ttl --help

A budget below what is loaded evicts nothing by itself: the next load does, or
shmctl trim.`,
		Example: `  shmctl config
  shmctl config set budget=16GiB ttl=1h
  shmctl config set budget=50%`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef("see shmctl config --help", "config takes get or set, got %q", args[0])
			}
			return nil
		},
		RunE: get,
	}
	set := &cobra.Command{
		Use:   "set NAME=VALUE...",
		Short: "Set limits",
		Long:  `Set changes the limits that are named and leaves the others.`,
		Example: `  shmctl config set budget=16GiB
  shmctl config set ttl=never`,
		Args:              takes(1, -1, "NAME=VALUE..."),
		ValidArgsFunction: cobra.FixedCompletions([]string{"budget=", "ttl="}, cobra.ShellCompDirectiveNoSpace|cobra.ShellCompDirectiveNoFileComp),
		RunE:              func(cmd *cobra.Command, args []string) error { return a.configSet(cmd, args, dry) },
	}
	set.Flags().BoolVarP(&dry, "dry-run", "n", false, "only say what would be set")
	cmd.AddCommand(&cobra.Command{
		Use: "get", Short: "Show the limits", Long: "Get shows the limits, as config alone does.",
		Example: "  shmctl config get -o json", Args: takes(0, 0, ""), RunE: get,
	}, set)
	return cmd
}

type configJSON struct {
	schema
	Dir         string   `json:"dir"`
	BudgetBytes int64    `json:"budget_bytes"` // in effect
	BudgetShare *float64 `json:"budget_share"` // of the tmpfs; null when the budget is a number of bytes
	TTLSeconds  *float64 `json:"ttl_seconds"`  // null: never
}

func (a *app) configGet() error {
	r, err := a.open()
	if err != nil {
		return err
	}
	defer r.Close()
	c, err := r.Config()
	if err != nil {
		return err
	}
	return a.writeConfig(r, c)
}

func (a *app) configSet(cmd *cobra.Command, args []string, dry bool) error {
	r, err := a.open()
	if err != nil {
		return err
	}
	defer r.Close()
	c, err := r.Config()
	if err != nil {
		return err
	}
	for _, arg := range args {
		name, value, _ := strings.Cut(arg, "=")
		switch name {
		case "budget":
			err = setBudget(&c, value)
		case "ttl":
			c.TTL, err = parseTTL(value)
			switch {
			case value == "default":
				err = usagef("", "ttl %q: this is the default that is set here; write never", value)
			case err != nil: // whose own hint is for models
				err = withHint(err, "write 90s, 15m or 12h, or never")
			}
			c.TTL = max(c.TTL, 0) // never is 0 for a registry
		default:
			hint := "there are budget and ttl"
			if near := nearest(name, []string{"budget", "ttl"}); len(near) > 0 {
				hint = "did you mean " + quotedList(near) + "?"
			}
			err = usagef(hint, "unknown setting %q", arg)
		}
		if err != nil {
			return err
		}
	}
	s, err := r.Stats()
	if err != nil {
		return err
	}
	if c.Budget > s.Size {
		return usagef("a share such as budget=80% follows the size of the tmpfs; more room: "+a.moreRoom(),
			"budget %s: the tmpfs has only %s", a.size(c.Budget), a.size(s.Size))
	}
	ctx, stop := a.context(cmd)
	defer stop()
	set := r.SetConfig
	if dry {
		set = r.PlanConfig
	}
	if err := set(ctx, c); err != nil {
		return err
	}
	if !dry {
		a.noteTightBudget(r)
	}
	return a.writeConfig(r, c)
}

func setBudget(c *registry.Config, value string) error {
	share, ok, err := parseShare(value)
	if ok || err != nil {
		c.Budget, c.BudgetShare = 0, share
		return err
	}
	n, err := parseSize(value)
	if err == nil && n == 0 {
		err = usagef("shmctl trim --to 0 evicts everything that is idle", "budget %q: nothing could be loaded", value)
	}
	c.Budget, c.BudgetShare = n, 0
	return err
}

// noteTightBudget says what a budget does not do by itself.
func (a *app) noteTightBudget(r *registry.Registry) {
	s, err := r.Stats()
	if err != nil {
		return
	}
	if s.Used > s.Budget {
		a.note("%s are used, more than the budget: shmctl trim --to %d evicts idle models now", a.size(s.Used), s.Budget)
	}
}

func (a *app) writeConfig(r *registry.Registry, c registry.Config) error {
	s, err := r.Stats()
	if err != nil {
		return err
	}
	bytes, budget := c.Budget, a.size(c.Budget)
	if bytes == 0 {
		bytes = int64(float64(s.Size) * c.BudgetShare)
		budget = strconv.FormatFloat(math.Round(c.BudgetShare*1e6)/1e4, 'f', -1, 64) + "% of the tmpfs, " + a.size(bytes)
	}
	ttl := "never"
	doc := configJSON{newSchema(), r.Dir(), bytes, orNull(c.BudgetShare), nil}
	if c.TTL > 0 {
		ttl = c.TTL.String()
		sec := c.TTL.Seconds()
		doc.TTLSeconds = &sec
	}
	switch {
	case a.json():
		return a.writeJSON(doc)
	case a.output == formatName:
		return a.writeLines("budget", "ttl")
	}
	return a.writeFields([][2]string{{"budget", budget}, {"ttl", ttl}})
}
