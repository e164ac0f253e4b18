//go:build amd64 || arm64

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
)

func main() {
	childMain()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

const usageText = `usage: campaign overcommit|rollouts [flags]
       campaign overcommit -h   lists the flags
`

// errViolated: the trial ran to its end, and found something.
var errViolated = errors.New("the promises were not kept")

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	trials := map[string]func(context.Context, []string, io.Writer, io.Writer) error{
		"overcommit": runOvercommit,
		"rollouts":   runRollouts,
	}
	if len(args) == 0 || trials[args[0]] == nil {
		fmt.Fprint(stderr, usageText)
		return 2
	}
	switch err := trials[args[0]](ctx, args[1:], stdout, stderr); {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errUsage):
		return 2
	default:
		fmt.Fprintf(stderr, "campaign: %v\n", err)
		return 1
	}
}

var errUsage = errors.New("usage")

// parse reads the flags of a trial, which takes no other arguments.
func parse(fs *flag.FlagSet, args []string, stderr io.Writer) error {
	fs.SetOutput(stderr)
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return errUsage
	}
	if fs.NArg() > 0 {
		fmt.Fprintf(stderr, "campaign %s: no arguments are taken\n", fs.Name())
		return errUsage
	}
	return nil
}

// writeReport writes a report beside its figures: NAME.md and NAME.json.
func writeReport(name string, markdown, figures []byte) error {
	if name == "" {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(name+".md", markdown, 0o644); err != nil {
		return err
	}
	return os.WriteFile(name+".json", figures, 0o644)
}

// printViolations prints the first of them; a report has them all.
func printViolations(w io.Writer, all []string) {
	for i, v := range all {
		if i == 20 {
			fmt.Fprintf(w, "  ... and %d more\n", len(all)-i)
			return
		}
		fmt.Fprintf(w, "  VIOLATION: %s\n", v)
	}
}
