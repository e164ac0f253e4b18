package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/registry"
)

// loadFlags are the flags of load, some of which exec shares.
type loadFlags struct {
	replace  bool
	onChange string
	slots    int
	mode     string
	threads  int
	verbose  bool
}

func (l *loadFlags) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&l.onChange, "on-change", "error", "`what` to do when the source is not what was loaded: error, replace or ignore")
	fromEnv(f, "on-change")
	complete(cmd, "on-change", "error", "replace", "ignore")
	l.registerCreate(cmd)
}

// registerCreate registers the flags that are about how a registry is made and a
// load is done.
func (l *loadFlags) registerCreate(cmd *cobra.Command) {
	f := cmd.Flags()
	f.IntVar(&l.slots, "slots", 0, "`number` of models a new registry can hold (default 1024)")
	f.StringVar(&l.mode, "mode", "0700", "`mode` of a new registry's directory: 0700, or 0755 for readers of other users")
	f.IntVar(&l.threads, "threads", 0, "load with this `number` of threads (default: up to 2)")
	fromEnv(f, "slots", "mode", "threads")
	complete(cmd, "mode", "0700", "0755")
}

// options are those of a registry that may have to be created.
func (l *loadFlags) options() (registry.Options, error) {
	o := registry.Options{Slots: l.slots, Threads: l.threads}
	switch l.mode {
	case "0700", "700":
		o.Mode = 0o700
	case "0755", "755":
		o.Mode = 0o755
	default:
		return o, usagef("", "mode %q: want 0700 or 0755", l.mode)
	}
	if l.slots != 0 && (l.slots < layout.MinSlots || l.slots > layout.MaxSlots) {
		return o, usagef("", "--slots %d: want %d to %d", l.slots, layout.MinSlots, layout.MaxSlots)
	}
	if l.threads < 0 {
		return o, usagef("", "--threads %d is negative", l.threads)
	}
	return o, nil
}

func (l *loadFlags) source(path string) (registry.Source, error) {
	src := registry.Source{Path: path, Replace: l.replace}
	switch l.onChange {
	case "error":
		src.OnChange = registry.ChangeError
	case "replace":
		src.OnChange = registry.ChangeReplace
	case "ignore":
		src.OnChange = registry.ChangeIgnore
	default:
		return src, usagef("", "--on-change %q: want error, replace or ignore", l.onChange)
	}
	return src, nil
}

func (a *app) loadCommand() *cobra.Command {
	var l loadFlags
	cmd := &cobra.Command{
		Use:   "load KEY PATH",
		Short: "Load a model's file or folder once for all processes",
		Long: `Load puts a model into the registry, creating the registry when there is none.
PATH is a file or a folder; the model gets exactly its files.

Loading what is already there does nothing and succeeds. While another process
loads the same key, load waits for it and shares its result. When the source is
no longer what was loaded, load fails with exit code 8 and says what changed,
unless --on-change or --replace says what to do. A replaced model stays valid
for those who hold it.

An interrupted load leaves nothing behind.`,
		Example: `  shmctl load bert ./all-MiniLM-L6-v2
  shmctl load smollm SmolLM2-135M-Instruct.Q4_1.gguf
  shmctl load --replace bert ./all-MiniLM-L6-v2    a new generation
  shmctl load --mode 0755 bert ./model             readable by other users`,
		Args: takes(2, 2, "KEY PATH"),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, part string) ([]cobra.Completion, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return nil, cobra.ShellCompDirectiveDefault // PATH
			}
			return a.completeKeys(1)(cmd, args, part)
		},
		RunE: func(cmd *cobra.Command, args []string) error { return a.load(cmd, &l, args[0], args[1]) },
	}
	f := cmd.Flags()
	f.BoolVar(&l.replace, "replace", false, "always load, as a new generation")
	f.BoolVarP(&l.verbose, "verbose", "v", false, "say how the bytes were loaded, and in which pages they lie")
	l.register(cmd)
	return cmd
}

type loadJSON struct {
	schema
	Result     string          `json:"result"` // loaded, replaced or present
	Key        string          `json:"key"`
	Generation uint64          `json:"generation"`
	Bytes      int64           `json:"bytes"`
	Published  *generationJSON `json:"published"`
	Pages      *pagesJSON      `json:"pages"` // measured with --verbose, else null
}

func (a *app) load(cmd *cobra.Command, l *loadFlags, key, path string) error {
	o, err := l.options()
	if err != nil {
		return err
	}
	src, err := l.source(path)
	if err != nil {
		return err
	}
	if l.verbose {
		o.Logger = a.logger()
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
	m, err := a.getOrLoad(ctx, r, key, src)
	if err != nil {
		return err
	}
	defer m.Close()
	s, err := r.Stats()
	if err != nil {
		return err
	}

	info, result := m.Info(), "loaded"
	switch {
	case info.AlreadyPresent:
		result = "present"
	case s.Replaced > 0:
		result = "replaced"
	}
	var pages *registry.PageReport
	if l.verbose {
		pages = measurePages(r, key)
	}
	switch {
	case a.json():
		return a.writeJSON(loadJSON{newSchema(), result, key, info.Generation, info.Bytes, toGenerationJSON(info), a.toPagesJSON(pages)})
	case a.output == formatName:
		return a.writeLines(key)
	}
	if err := a.writeLines(visible(a.loadText(result, info))); err != nil {
		return err
	}
	if l.verbose && result != "present" {
		a.note("filled: %s", a.fillText(info.Fill))
	}
	if pages != nil {
		a.note("pages: %s", a.pagesText(*pages))
	}
	return nil
}

// logger writes the library's log to stderr, in the form that stderr has.
func (a *app) logger() *slog.Logger {
	if a.json() {
		return slog.New(slog.NewJSONHandler(a.stderr, nil))
	}
	return slog.New(slog.NewTextHandler(a.stderr, nil))
}

func (a *app) loadText(result string, i registry.Info) string {
	what := fmt.Sprintf("%s in %s, generation %d", a.size(i.Bytes), plural(len(i.Files), "file"), i.Generation)
	if result == "present" {
		return fmt.Sprintf("%s: already present, %s", i.Key, what)
	}
	rate := ""
	if s := i.LoadTime.Seconds(); s > 0 {
		rate = fmt.Sprintf(", %s/s", a.size(int64(float64(i.Bytes)/s)))
	}
	return fmt.Sprintf("%s: %s %s in %s%s", i.Key, result, what, seconds(i.LoadTime), rate)
}

// getOrLoad loads with progress shown.
func (a *app) getOrLoad(ctx context.Context, r *registry.Registry, key string, src registry.Source) (*registry.Model, error) {
	p := a.newProgress(key)
	src.Progress = func(done, total int64) {
		p.update(done, total)
		if a.progress != nil {
			a.progress(ctx, done, total)
		}
	}
	stop := a.noteWaiting(r, key, p)
	m, err := r.GetOrLoad(ctx, key, src)
	stop()
	p.finish()
	return m, err
}

// waitNoteAfter is how long a load may look idle before we look why.
const waitNoteAfter = time.Second

// noteWaiting says once that another process is loading the key, when this one
// has not begun to load by itself.
func (a *app) noteWaiting(r *registry.Registry, key string, p *progress) (stop func()) {
	delay := waitNoteAfter
	if a.waiting != nil {
		delay = 0
	}
	t := time.AfterFunc(delay, func() {
		if p.begun() {
			return
		}
		e, err := r.Entry(key)
		if err != nil || e.State != "loading" || e.LoaderPID == os.Getpid() {
			return
		}
		who := "another process"
		if e.LoaderPID != 0 {
			who = fmt.Sprintf("pid %d", e.LoaderPID)
		}
		a.note("waiting: %s is loading %s", who, key)
		if a.waiting != nil {
			a.waiting()
		}
	})
	return func() { t.Stop() }
}
