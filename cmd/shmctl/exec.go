package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/registry"
)

func (a *app) execCommand() *cobra.Command {
	var l loadFlags
	var path string
	cmd := &cobra.Command{
		DisableFlagsInUseLine: true,

		Use:   "exec KEY [--load PATH] -- COMMAND [ARG...]",
		Short: "Run a program on the shared copy of a model",
		Long: `Exec replaces itself by COMMAND and keeps the model for it: COMMAND inherits an
open file that holds a lease, so the model can neither be removed nor disappear
while COMMAND runs, and COMMAND need not know anything about onecopy.

In the arguments, {} becomes the path of the model's folder: as a whole
argument, before a / at the start of an argument ({}/model.gguf), and after an =
(--model={} or --model={}/model.gguf); nowhere else. COMMAND also finds

  ONECOPY_PATH       the model's folder
  ONECOPY_KEY        its key
  ONECOPY_LEASE_FD   the number of the open file that holds the lease

The lease lives until every process that inherited the open file has closed it
or ended, however it ended. Children of COMMAND inherit it and keep the model
too, a daemon that COMMAND leaves behind included. A program that closes all
descriptors it does not know gives up the lease: files that it has mapped or
open stay readable, but the model may be removed. Python's subprocess closes
them for its children unless pass_fds=[int(os.environ["ONECOPY_LEASE_FD"])].

With --load PATH the model is loaded first if it is not there, as by shmctl load.
A key that begins with "-" goes between two "--".

Exit codes: 125 when shmctl itself failed, 126 when COMMAND cannot be executed,
127 when it was not found, 130 when interrupted before it started, else those of
COMMAND.`,
		Example: `  shmctl exec bert -- python serve.py {}
  shmctl exec smollm -- llama-server -m {}/SmolLM2-135M-Instruct.Q4_1.gguf
  shmctl exec -- -odd-key -- python serve.py {}
  shmctl exec bert --load ./all-MiniLM-L6-v2 -- sh -c 'ls "$ONECOPY_PATH"'`,
		Args: func(cmd *cobra.Command, args []string) error {
			_, _, err := splitExec(cmd.ArgsLenAtDash(), args)
			return err
		},
		ValidArgsFunction: a.completeKeys(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			key, argv, err := splitExec(cmd.ArgsLenAtDash(), args)
			if err != nil {
				return err
			}
			return a.exec(cmd, &l, path, key, argv)
		},
	}
	cmd.Flags().StringVar(&path, "load", "", "load the model from `PATH` first if it is not there")
	l.register(cmd)
	return cmd
}

// splitExec finds KEY and COMMAND around the "--" at args[dash]. A key that looks
// like a flag follows one "--" and stands before a second one.
func splitExec(dash int, args []string) (key string, argv []string, err error) {
	const hint = "the form is: shmctl exec KEY [--load PATH] -- COMMAND [ARG...]"
	if dash == 0 && len(args) > 1 && args[1] == "--" {
		args, dash = slices.Delete(slices.Clone(args), 1, 2), 1
	}
	switch {
	case dash < 0 && len(args) > 1:
		return "", nil, usagef(hint, "no -- before the command %q", args[1])
	case dash < 0 && len(args) == 1, dash >= 0 && len(args) == dash:
		return "", nil, usagef(hint, "no command to run")
	case dash != 1:
		return "", nil, usagef(hint, "exec takes one KEY")
	}
	return args[0], args[1:], nil
}

// commandError is a command that could not be run: 126 or 127.
type commandError struct {
	exit int
	err  error
}

func (e *commandError) Error() string { return e.err.Error() }
func (e *commandError) Unwrap() error { return e.err }

func (a *app) exec(cmd *cobra.Command, l *loadFlags, path, key string, argv []string) error {
	// Before the load: nobody wants to wait for gigabytes to learn of a typo.
	file, err := a.lookPath(argv[0])
	if err != nil {
		return err
	}
	r, m, err := a.modelFor(cmd, l, path, key)
	if err != nil {
		return err
	}
	defer r.Close()
	defer m.Close()
	lease, err := m.Lease()
	if err != nil {
		return err
	}
	defer lease.Close()

	dir := m.Path()
	args := make([]string, len(argv))
	for i, arg := range argv {
		args[i] = substitute(arg, dir)
	}
	env := setenv(a.env, "ONECOPY_PATH", dir)
	env = setenv(env, "ONECOPY_KEY", key)
	return execWith(file, args, env, lease, r.Dir())
}

// modelFor opens the registry and attaches the model, loading it if path is
// given.
func (a *app) modelFor(cmd *cobra.Command, l *loadFlags, path, key string) (r *registry.Registry, m *registry.Model, err error) {
	if path == "" {
		if r, err = a.open(); err != nil {
			return nil, nil, err
		}
		if m, err = r.Get(key); err != nil {
			err = suggestKeys(r, key, err)
			r.Close()
			return nil, nil, err
		}
		return r, m, nil
	}

	o, err := l.options()
	if err != nil {
		return nil, nil, err
	}
	src, err := l.source(path)
	if err != nil {
		return nil, nil, err
	}
	ctx, stop := a.context(cmd)
	defer stop()
	if r, err = a.openWith(o); err != nil {
		return nil, nil, err
	}
	if m, err = a.getOrLoad(ctx, r, key, src); err != nil {
		r.Close()
		return nil, nil, err
	}
	if a.signals.caught() { // too late to stop the load, early enough not to start
		m.Close()
		r.Close()
		return nil, nil, context.Canceled
	}
	return r, m, nil
}

var placeholder = regexp.MustCompile(`(^|=)\{\}($|/)`)

// substitute puts the model's folder for {}: as a whole argument, before a / at
// the start, and after an =. Other programs have their own use for braces, so
// nothing else is touched.
func substitute(arg, dir string) string {
	return placeholder.ReplaceAllStringFunc(arg, func(m string) string {
		return strings.Replace(m, "{}", dir, 1)
	})
}

// setenv returns env with one variable set, once.
func setenv(env []string, name, value string) []string {
	out := make([]string, 0, len(env)+1)
	for _, kv := range env {
		if !strings.HasPrefix(kv, name+"=") {
			out = append(out, kv)
		}
	}
	return append(out, name+"="+value)
}

// lookPath finds a command as the shell would.
func (a *app) lookPath(name string) (string, error) {
	file, err := exec.LookPath(name)
	switch {
	case err == nil, errors.Is(err, exec.ErrDot):
		return file, nil
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, exec.ErrNotFound):
		if denied := findDenied(name, a.getenv("PATH")); denied != "" {
			return "", &commandError{exitExecDenied, fmt.Errorf("%s is not executable", denied)}
		}
		return "", &commandError{exitExecMissing, fmt.Errorf("command %q not found", name)}
	}
	return "", &commandError{exitExecDenied, fmt.Errorf("command %q cannot be executed: %w", name, errors.Unwrap(err))}
}

// findDenied finds a file that would have been the command if it could be
// executed: exec.LookPath passes over it.
func findDenied(name, path string) string {
	if strings.Contains(name, "/") {
		return ""
	}
	for _, dir := range filepath.SplitList(path) {
		p := filepath.Join(dir, name)
		if fi, err := os.Stat(p); err == nil && fi.Mode().IsRegular() {
			return p
		}
	}
	return ""
}
