package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/registry"
)

func (a *app) rolloutCommand() *cobra.Command {
	var l loadFlags
	var canary string
	cmd := &cobra.Command{
		Use:   "rollout KEY PATH",
		Short: "Replace a model by a new generation that was proven first",
		Long: `Rollout loads PATH as a new generation beside the one in use, digests it again,
runs the canary on it and publishes it only if that ends with exit code 0. Until
then, and for ever if anything fails, everybody gets the old generation; nothing
of the new one is left.

The canary is a shell command. It finds the model's folder in $ONECOPY_PATH and
its key in $ONECOPY_KEY, and holds a lease while it runs. Its output goes to
stderr. One that hangs is ended after 10 minutes, or after --timeout, which
counts for load and canary together, with all of its process group.

A publisher that is killed with SIGKILL takes only the shell with it. What the
shell had started goes on, and keeps the new generation in memory until it ends;
nobody else gets it, and shmctl gc removes it then.

Workers notice a rollout by Model.Stale, one atomic load, and switch by getting
the model again. The old generation stays as long as anybody holds it: rollout
status shows who. As long as it stays, rollout undo publishes it again; undoing
an undo is a redo.

A key that is named status or undo goes after "--".`,
		Example: `  shmctl rollout bert ./bert-v2
  shmctl rollout bert ./bert-v2 --timeout 2m --canary 'python smoke.py "$ONECOPY_PATH"'
  shmctl rollout status bert
  shmctl rollout undo bert`,
		Args: takes(2, 2, "KEY PATH"),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, part string) ([]cobra.Completion, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return nil, cobra.ShellCompDirectiveDefault // PATH
			}
			return a.completeKeys(1)(cmd, args, part)
		},
		RunE: func(cmd *cobra.Command, args []string) error { return a.rollout(cmd, &l, canary, args[0], args[1]) },
	}
	cmd.Flags().StringVar(&canary, "canary", "", "shell `command` that must succeed before the model is published")
	l.registerCreate(cmd)
	cmd.AddCommand(&cobra.Command{
		Use:   "status KEY",
		Short: "Show the generations of a model and who holds them",
		Long: `Status lists the generations of a model that are in memory, the newest first, and
who holds each: a rollout is over when only the published one is left.`,
		Example: `  shmctl rollout status bert
  shmctl rollout status bert -o json | jq '[.generations[] | select(.published | not)] | length'`,
		Args:              takes(1, 1, "KEY"),
		ValidArgsFunction: a.completeKeys(1),
		RunE:              func(_ *cobra.Command, args []string) error { return a.rolloutStatus(args[0]) },
	}, &cobra.Command{
		Use:   "undo KEY",
		Short: "Publish the previous generation again",
		Long: `Undo publishes the generation that the present one replaced. That takes one
change of a word, and works as long as the previous generation is in memory and
complete: somebody holds it, or nobody has collected it yet. Undoing twice is
redoing.`,
		Example:           `  shmctl rollout undo bert`,
		Args:              takes(1, 1, "KEY"),
		ValidArgsFunction: a.completeKeys(1),
		RunE:              func(cmd *cobra.Command, args []string) error { return a.rolloutUndo(cmd, args[0]) },
	})
	return cmd
}

type rolloutJSON struct {
	schema
	Result     string  `json:"result"` // published or undone
	Key        string  `json:"key"`
	Generation uint64  `json:"generation"`
	Previous   *uint64 `json:"previous"` // null: there was none
}

func (a *app) rollout(cmd *cobra.Command, l *loadFlags, canary, key, path string) error {
	if cmd.Flags().Changed("canary") && strings.TrimSpace(canary) == "" { // a variable that is not set
		return usagef("leave --canary out to publish without a proof", "--canary is empty")
	}
	o, err := l.options()
	if err != nil {
		return err
	}
	ctx, stop := a.context(cmd)
	defer stop()
	r, err := a.openWith(o)
	if err != nil {
		return err
	}
	defer r.Close()
	if err := r.Sharing(); err != nil {
		return fmt.Errorf("nothing can be shared on this machine: %w", err)
	}
	p := a.newProgress(key)
	src := registry.Source{Path: path, Progress: func(done, total int64) {
		p.update(done, total)
		if a.progress != nil {
			a.progress(ctx, done, total)
		}
	}}
	var prove func(context.Context, *registry.Model) error
	if canary != "" {
		prove = func(ctx context.Context, m *registry.Model) error {
			p.finish()
			return a.runCanary(ctx, canary, m)
		}
	}
	m, err := r.Rollout(ctx, key, src, prove)
	p.finish()
	switch {
	case errors.Is(err, registry.ErrProof) && errors.Is(err, errCanaryHangs):
		return withHint(&registry.Error{Op: "rollout", Key: key, Err: fmt.Errorf("%w: the canary did not end within %v", registry.ErrTimeout, canaryTimeout)},
			"nothing was published; --timeout waits longer")
	case errors.Is(err, registry.ErrProof):
		return withHint(err, "nothing was published: everybody still gets what was there")
	case errors.Is(err, registry.ErrTimeout):
		return withHint(err, "nothing was published; the load or the canary took longer than --timeout")
	case err != nil:
		return err
	}
	defer m.Close()
	return a.writeRollout("published", key, m.Generation(), m.Info().Replaced)
}

func (a *app) writeRollout(result, key string, gen, previous uint64) error {
	switch {
	case a.json():
		return a.writeJSON(rolloutJSON{newSchema(), result, key, gen, orNull(previous)})
	case a.output == formatName:
		return a.writeLines(key)
	}
	text := fmt.Sprintf("%s: generation %d published", key, gen)
	if previous != 0 {
		text += fmt.Sprintf(" instead of %d", previous)
	}
	return a.writeLines(visible(text))
}

// canaryTimeout is for a canary without --timeout: a script must not wait for
// ever.
const canaryTimeout = 10 * time.Minute

var errCanaryHangs = errors.New("the canary hangs")

// runCanary runs a shell command on a model that is not published yet. It gets a
// lease of its own: what it leaves running keeps the memory.
func (a *app) runCanary(ctx context.Context, command string, m *registry.Model) error {
	lease, err := m.Lease()
	if err != nil {
		return err
	}
	defer lease.Close()
	if a.timeout == 0 {
		limited, cancel := context.WithTimeoutCause(ctx, canaryTimeout, errCanaryHangs)
		defer cancel()
		ctx = limited
	}
	runtime.LockOSThread() // asGroup
	defer runtime.UnlockOSThread()
	c := exec.CommandContext(ctx, "/bin/sh", "-c", command)
	c.Env = setenv(setenv(setenv(a.env, "ONECOPY_PATH", m.Path()), "ONECOPY_KEY", m.Key()), "ONECOPY_LEASE_FD", "3")
	c.ExtraFiles = []*os.File{lease}
	c.Stdout, c.Stderr = a.stderr, a.stderr
	c.WaitDelay = 5 * time.Second
	asGroup(c)
	switch err := c.Run(); {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return fmt.Errorf("the canary: %w", err)
	}
	return nil
}

type rolloutStatusJSON struct {
	schema
	Dir         string              `json:"dir"`
	Key         string              `json:"key"`
	Generations []rolloutGeneration `json:"generations"` // the newest first
	Outside     bool                `json:"outside_not_visible"`
}

type rolloutGeneration struct {
	Generation uint64       `json:"generation"`
	Published  bool         `json:"published"`
	Bytes      int64        `json:"bytes"`
	LoadedAt   *time.Time   `json:"loaded_at"`
	Origin     *originJSON  `json:"origin"`
	Holders    []holderJSON `json:"holders"`
}

func (a *app) rolloutStatus(key string) error {
	r, err := a.open()
	if err != nil {
		return err
	}
	defer r.Close()
	gens, err := r.Generations(key)
	if err != nil {
		return suggestKeys(r, key, err)
	}
	rep, err := r.HolderReport(key)
	if err != nil {
		return err
	}
	switch {
	case a.json():
		doc := rolloutStatusJSON{newSchema(), r.Dir(), key, []rolloutGeneration{}, rep.Outside}
		for _, g := range gens {
			doc.Generations = append(doc.Generations, rolloutGeneration{
				g.Generation, g.Published, g.Bytes, utc(g.LoadedAt), toOriginJSON(g.Origin), toHoldersJSON(g.Holders),
			})
		}
		return a.writeJSON(doc)
	case a.output == formatName:
		for _, g := range gens {
			if err := a.writeLines(strconv.FormatUint(g.Generation, 10)); err != nil {
				return err
			}
		}
		return nil
	}
	var rows [][]string
	for _, g := range gens {
		var pids []string
		for _, h := range g.Holders {
			pids = append(pids, strconv.Itoa(h.PID))
		}
		rows = append(rows, []string{
			strconv.FormatUint(g.Generation, 10), yesNo(g.Published), a.size(g.Bytes), a.age(g.LoadedAt),
			strconv.Itoa(len(pids)), clipList(pids, 8), originText(g.Origin),
		})
	}
	if rep.Outside {
		a.note("%s", outsideNote)
	}
	return a.writeTable([]string{"GEN", "PUBLISHED", "SIZE", "AGE", "HOLDERS", "PIDS", "ORIGIN"}, rows)
}

// clipList writes the first words of a list.
func clipList(words []string, most int) string {
	if len(words) == 0 {
		return "-"
	}
	s := strings.Join(words[:min(most, len(words))], ",")
	if len(words) > most {
		s += ",..."
	}
	return s
}

func (a *app) rolloutUndo(cmd *cobra.Command, key string) error {
	r, err := a.open()
	if err != nil {
		return err
	}
	defer r.Close()
	ctx, stop := a.context(cmd)
	defer stop()
	now, previous, err := r.Undo(ctx, key)
	if err != nil {
		if errors.Is(err, registry.ErrNoPrevious) {
			return err
		}
		return suggestKeys(r, key, err)
	}
	return a.writeRollout("undone", key, now, previous)
}
