// Shmctl looks into a onecopy registry and keeps it in order: it loads models,
// lists them, says who uses them, removes them, and runs programs on them.
//
// The output rules, in one place (ui.go holds them in code):
//
//   - stdout is data; everything else goes to stderr as "shmctl: text", lower
//     case, without a final period. An error may be followed by a line
//     "shmctl: hint: ...".
//   - Every reader takes -o table|json|jsonl|name. JSON is a contract: see
//     json.go. With JSON output errors are JSON too, on stderr.
//   - The exit code says what kind of thing went wrong: see exit.go.
//   - Nothing is asked, coloured or drawn unless a terminal is there to see it.
//
// All knowledge of registries is in package registry; the only command that
// reads the table itself is dump, through internal/layout.
package main

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/onecopy/onecopy/registry"
)

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400) // most invocations end before a collection would pay
	}
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr, os.Environ()))
}

// run is the whole program; it returns the exit code.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer, env []string) int {
	return newApp(stdin, stdout, stderr, env).run(args)
}

// app is one invocation.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	env            []string
	now            func() time.Time

	dir        string
	output     string
	noHeaders  bool
	quiet      bool
	rawBytes   bool
	color      string
	timeout    time.Duration
	trustOwner uint32

	signals signals

	// progress and waiting, when set, see every step of a load: tests use them
	// to hold a load at a known point.
	progress func(ctx context.Context, done, total int64)
	waiting  func()
}

func newApp(stdin io.Reader, stdout, stderr io.Writer, env []string) *app {
	return &app{stdin: stdin, stdout: stdout, stderr: stderr, env: env, now: time.Now}
}

func (a *app) run(args []string) int {
	root := a.command()
	root.SetArgs(append([]string{}, args...)) // nil would mean os.Args to cobra
	root.SetIn(a.stdin)
	out := &firstError{Writer: a.stdout}
	root.SetOut(out)
	root.SetErr(a.stderr)
	cmd, err := root.ExecuteC()
	if err == nil {
		err = out.err
	}
	if err == nil {
		return exitOK
	}
	// A mistake in the arguments shows before the flags are all read; the
	// error should still be written the way that was asked for.
	if a.output == "" || cmd.Flags().Lookup("output") == nil || !cmd.Flags().Changed("output") {
		a.output = askedOutput(args, a.getenv("ONECOPY_OUTPUT"))
	}
	return a.fail(cmd, err)
}

// firstError keeps the first error of a writer: help, which cobra writes, ends
// without one.
type firstError struct {
	io.Writer
	err error
}

func (w *firstError) Write(b []byte) (int, error) {
	n, err := w.Writer.Write(b)
	if w.err == nil {
		w.err = err
	}
	return n, err
}

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use:   "shmctl",
		Short: "Share one copy of a model's weights among all processes of this machine",
		Long: `Shmctl looks into a onecopy registry and keeps it in order.

A registry is a directory on a tmpfs (by default /dev/shm/onecopy-<uid>) that
holds one copy of every loaded model for all processes of this machine. Models
stay loaded when the process that loaded them ends, until they are removed.

Exit codes: 0 done; 1 other, and problems found by check; 2 usage; 3 not found;
4 permission; 5 in use; 6 corrupt or of another version; 7 no space; 8 source
failed or changed; 9 timeout; 130 interrupted. exec: 125 shmctl itself failed,
126 not executable, 127 not found, else the command's own.`,
		Example: `  shmctl load bert ./all-MiniLM-L6-v2       load a model folder once
  shmctl ls                                 what is loaded, how big, in use or not
  shmctl exec bert -- python serve.py {}    run a program on the shared copy
  shmctl rm bert                            remove it when nobody uses it`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("shmctl --help lists the commands", "no command given")
			}
			return unknownCommand(cmd, args[0])
		},
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return a.prepare(cmd) },
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		hint := cmd.CommandPath() + " --help lists the flags"
		var unknown *pflag.NotExistError
		if errors.As(err, &unknown) {
			var names []string
			cmd.Flags().VisitAll(func(f *pflag.Flag) { names = append(names, f.Name) })
			if near := nearest(unknown.GetSpecifiedName(), names); len(near) > 0 {
				hint = "did you mean " + quotedList(prefixed("--", near)) + "?"
			}
		}
		return usagef(hint, "%v", err)
	})
	f := root.PersistentFlags()
	f.StringVar(&a.dir, "dir", "", "registry `directory` (default /dev/shm/onecopy-<uid>)")
	f.StringVarP(&a.output, "output", "o", formatTable, "`format`: table, json, jsonl or name")
	f.BoolVar(&a.noHeaders, "no-headers", false, "no header line in tables")
	f.BoolVarP(&a.quiet, "quiet", "q", false, "no notes or progress, and names only (-o name)")
	f.BoolVar(&a.rawBytes, "bytes", false, "sizes as plain numbers of bytes")
	f.StringVar(&a.color, "color", "auto", "`when` to colour: auto, always or never")
	f.DurationVar(&a.timeout, "timeout", 0, "give up after this `duration`, such as 30s (default: 10m for another process's load)")
	f.Uint32Var(&a.trustOwner, "trust-owner", 0, "a `uid` besides one's own and root whose registry may be read")
	fromEnv(f, "dir", "output", "no-headers", "quiet", "bytes", "color", "timeout", "trust-owner")

	complete(root, "output", formats...)
	complete(root, "color", "auto", "always", "never")
	_ = root.MarkPersistentFlagDirname("dir") // fails only for a flag that does not exist

	root.AddCommand(
		a.loadCommand(), a.lsCommand(), a.statCommand(), a.pathCommand(), a.catCommand(),
		a.execCommand(), a.rmCommand(), a.gcCommand(), a.checkCommand(), a.holdersCommand(),
		a.pinCommand(), a.unpinCommand(), a.touchCommand(), a.ttlCommand(), a.trimCommand(),
		a.waitCommand(), a.rolloutCommand(), a.configCommand(), a.metricsCommand(), a.topCommand(),
		a.scanCommand(), a.doctorCommand(), a.dumpCommand(), a.versionCommand(),
	)
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd("completion") // the argument makes it take effect
	for _, c := range root.Commands() {
		if c.Name() == "completion" {
			c.Example = "  source <(shmctl completion bash)"
			c.Args, c.RunE = cobra.ArbitraryArgs, helpOn
			for _, shell := range c.Commands() {
				shell.Example = "  shmctl completion " + shell.Name()
			}
		}
		if c.Name() == "help" {
			c.Example = "  shmctl help load"
			c.Run, c.RunE = nil, func(c *cobra.Command, args []string) error {
				on, rest, err := c.Root().Find(args)
				if err != nil {
					return err
				}
				return helpOn(on, rest)
			}
		}
	}
	return root
}

// helpOn shows the help of a command, of which the rest must name nothing more.
func helpOn(cmd *cobra.Command, rest []string) error {
	if len(rest) > 0 {
		return unknownCommand(cmd, rest[0])
	}
	return cmd.Help()
}

// unknownCommand is the mistake of naming a command that parent has not.
func unknownCommand(parent *cobra.Command, name string) error {
	hint := "see " + parent.CommandPath() + " --help"
	if parent.HasSubCommands() {
		hint = parent.CommandPath() + " --help lists the commands"
	}
	parent.SuggestionsMinimumDistance = 2
	if near := parent.SuggestionsFor(name); len(near) > 0 {
		hint = "did you mean " + quotedList(near) + "?"
	}
	return usagef(hint, "unknown command %q", name)
}

// prepare completes the flags from the environment and checks them.
func (a *app) prepare(cmd *cobra.Command) error {
	if err := a.readEnv(cmd); err != nil {
		return err
	}
	if !slices.Contains(formats, a.output) {
		return usagef("", "output format %q: want %s", a.output, strings.Join(formats, ", "))
	}
	if a.quiet && !cmd.Flags().Changed("output") && a.output == formatTable {
		a.output = formatName
	}
	if !slices.Contains([]string{"auto", "always", "never"}, a.color) {
		return usagef("", "colour %q: want auto, always or never", a.color)
	}
	if a.timeout < 0 {
		return usagef("", "timeout %v is negative", a.timeout)
	}
	a.setColours()
	return nil
}

// complete offers the values of a flag.
func complete(cmd *cobra.Command, flag string, values ...string) {
	f := cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)
	_ = cmd.RegisterFlagCompletionFunc(flag, f) // fails only for a flag that does not exist
}

const envAnnotation = "onecopy_env"

// fromEnv lets each of the flags be set by ONECOPY_<NAME> and says so in its
// help. Flags that order something done (--replace, --yes) are not among them:
// a forgotten variable must not replace or remove a model.
func fromEnv(f *pflag.FlagSet, names ...string) {
	for _, name := range names {
		flag := f.Lookup(name)
		v := "ONECOPY_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
		flag.Usage += " [$" + v + "]"
		flag.Annotations = map[string][]string{envAnnotation: {v}}
	}
}

func (a *app) readEnv(cmd *cobra.Command) (err error) {
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		names := f.Annotations[envAnnotation]
		if len(names) == 0 || f.Changed || err != nil {
			return
		}
		if v := a.getenv(names[0]); v != "" {
			if bad := f.Value.Set(v); bad != nil {
				err = usagef("", "%s=%q: %v", names[0], v, bad)
			}
		}
	})
	return err
}

// getenv returns the last setting of a variable, as a shell would.
func (a *app) getenv(name string) string {
	for _, kv := range slices.Backward(a.env) {
		if k, v, ok := strings.Cut(kv, "="); ok && k == name {
			return v
		}
	}
	return ""
}

// askedOutput finds the output format in arguments that could not be parsed.
func askedOutput(args []string, env string) string {
	out := env
	for i, arg := range args {
		if arg == "--" {
			break
		}
		for _, p := range []string{"--output=", "-o=", "-o"} {
			if v, ok := strings.CutPrefix(arg, p); ok && v != "" {
				out = v
				break
			}
		}
		if (arg == "-o" || arg == "--output") && i+1 < len(args) {
			out = args[i+1]
		}
	}
	return out
}

// registryDir is where the registry is, or would be. It is absolute: paths below
// it are handed to other programs.
func (a *app) registryDir() string {
	dir := a.dir
	if dir == "" {
		dir = registry.DefaultDir()
	}
	if abs, err := filepath.Abs(dir); err == nil {
		dir = abs
	}
	return dir
}

// open opens a registry that must exist: inspectors create nothing.
func (a *app) open() (*registry.Registry, error) {
	return a.openWith(registry.Options{MustExist: true})
}

func (a *app) openWith(o registry.Options) (*registry.Registry, error) {
	o.TrustOwner = a.trustOwner
	o.LoadTimeout = a.timeout
	return registry.Open(a.registryDir(), &o)
}

// takes returns a check of the number of arguments; usage names them.
func takes(least, most int, usage string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) >= least && (most < 0 || len(args) <= most) {
			return nil
		}
		got := "nothing"
		if len(args) > 0 {
			got = plural(len(args), "argument")
		}
		if usage == "" {
			usage = "no arguments"
		}
		return usagef("see "+cmd.CommandPath()+" --help", "%s takes %s, got %s", cmd.Name(), usage, got)
	}
}
