package main

import (
	"context"
	"errors"
	"time"

	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/registry"
)

func (a *app) waitCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "wait KEY",
		Short: "Wait until a model is loaded",
		Long: `Wait ends when a model is there, whoever loads it, even if neither the load nor
the registry has begun. It gives up after --timeout (default 10m) with exit code
9. It loads nothing and holds nothing: to run a program on the model use exec.`,
		Example: `  shmctl wait bert --timeout 2m && python serve.py
  shmctl load bert ./model & shmctl wait bert`,
		Args:              takes(1, 1, "KEY"),
		ValidArgsFunction: a.completeKeys(1),
		RunE:              func(cmd *cobra.Command, args []string) error { return a.wait(cmd, args[0]) },
	}
}

// waitStep is the longest pause between two looks. Nobody announces a
// publication: that would be a write on the path of all.
const waitStep = 100 * time.Millisecond

func (a *app) wait(cmd *cobra.Command, key string) error {
	if a.timeout == 0 {
		a.timeout = 10 * time.Minute
	}
	ctx, stop := a.context(cmd)
	defer stop()
	for pause := time.Millisecond; ; pause = min(2*pause, waitStep) {
		e, err := a.ready(key)
		switch {
		case err == nil:
			if a.json() {
				return a.writeJSON(modelLineJSON{newSchema(), toModelJSON(e)})
			}
			if a.output == formatName {
				return a.writeLines(key)
			}
			return a.writeLines(visible(key + ": ready, " + a.size(e.Bytes)))
		case !errors.Is(err, registry.ErrNotFound) && !errors.Is(err, registry.ErrNoRegistry):
			return err
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return withHint(&registry.Error{Op: "wait", Key: key, Err: registry.ErrTimeout}, "shmctl ls shows what is loaded or loading; --timeout waits longer")
			}
			return ctx.Err()
		case <-t.C:
		}
	}
}

// ready returns the entry of key if it is published.
func (a *app) ready(key string) (registry.Entry, error) {
	r, err := a.open()
	if err != nil {
		return registry.Entry{}, err
	}
	defer r.Close()
	e, err := r.Entry(key)
	if err == nil && (e.State != "ready" || e.Info == nil) {
		err = registry.ErrNotFound
	}
	return e, err
}
