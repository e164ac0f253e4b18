package main

import (
	"context"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"

	"github.com/spf13/cobra"
)

// signals of this invocation.
type signals struct{ got atomic.Bool }

func (s *signals) caught() bool { return s.got.Load() }

// context returns a context that ends at --timeout and at the first SIGINT, SIGTERM
// or SIGHUP; a second one ends the program at once. Only commands that have
// something to undo call it: the others are killed by the signal, as any
// program is, and the kernel drops their leases.
func (a *app) context(cmd *cobra.Command) (context.Context, context.CancelFunc) {
	parent := cmd.Context()
	if parent == nil {
		parent = context.Background()
	}
	ctx, cancel := context.WithCancel(parent)
	stopTimer := context.CancelFunc(func() {})
	if a.timeout > 0 {
		ctx, stopTimer = context.WithTimeout(ctx, a.timeout)
	}

	// What was ignored when we started stays ignored: that is what nohup and
	// a shell's background jobs ask for, and what exec must hand on.
	var watched []os.Signal
	for _, s := range []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP} {
		if !signal.Ignored(s) {
			watched = append(watched, s)
		}
	}
	c := make(chan os.Signal, 2)
	done := make(chan struct{})
	if len(watched) > 0 {
		signal.Notify(c, watched...)
	}
	go func() {
		for {
			select {
			case <-c:
				if a.signals.got.Swap(true) {
					os.Exit(exitInterrupted)
				}
				cancel()
			case <-done:
				return
			}
		}
	}()
	return ctx, func() {
		signal.Stop(c)
		close(done)
		stopTimer()
		cancel()
	}
}
