package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/scan"
	"github.com/onecopy/onecopy/registry"
)

// scanFlags are the flags of scan.
type scanFlags struct {
	minRegion string
	samples   int
	maxTime   time.Duration
}

func (a *app) scanCommand() *cobra.Command {
	var s scanFlags
	cmd := &cobra.Command{
		Use:   "scan [FILE|KEY...]",
		Short: "Find processes that hold private copies of models",
		Long: `Scan looks into the memory of every process that it may read for copies of
models: of those named by KEY, or the files or folders named by FILE, or of all
that are loaded. A name that is a key in the registry is that; anything else is
a path. It works before anything is loaded, and without a registry.

It samples the pages of each larger region and compares them byte for byte with
the models, wherever in the memory a copy begins. Zero pages never match, and
neither does another model of the same architecture. What was converted (another
type, repacked, quantised) is not found. Nothing is stopped or written.

PRIVATE is the memory of its own that a process fills with the model, estimated;
MATCH is the share of the samples in those regions that are the model's. SHARED
says how the process has the model without a copy: attached (through the
registry), page cache (it maps a file on a disk), or shm (another file of shared
memory, which is one more copy). The totals say what would be free if all used
the registry. For a model that is not loaded yet, that is one copy less.

Other users' processes, and with kernel.yama.ptrace_scope one's own too, can be
read with CAP_SYS_PTRACE only: run it as root. Those that could not be read are
counted. -o name prints the pids of processes with private copies. Finding
copies is no error: the exit code is 0.`,
		Example: `  shmctl scan                          copies of everything that is loaded
  sudo shmctl scan bert
  shmctl scan ./all-MiniLM-L6-v2       before it is loaded
  shmctl scan -o json | jq '.models[] | {name, reclaimable_bytes}'`,
		Args:              takes(0, -1, "[FILE|KEY...]"),
		ValidArgsFunction: a.completeScan,
		RunE:              func(cmd *cobra.Command, args []string) error { return a.scan(cmd, &s, args) },
	}
	f := cmd.Flags()
	f.StringVar(&s.minRegion, "min-region", "1MiB", "smallest `size` of a region that is looked at")
	f.IntVar(&s.samples, "samples", 2048, "`number` of pages compared in a region")
	f.DurationVar(&s.maxTime, "max-time", 30*time.Second, "look for at most this `duration`, the largest processes first")
	return cmd
}

// completeScan offers the keys that are there, and files.
func (a *app) completeScan(cmd *cobra.Command, args []string, part string) ([]cobra.Completion, cobra.ShellCompDirective) {
	keys, _ := a.completeKeys(-1)(cmd, args, part)
	return keys, cobra.ShellCompDirectiveDefault
}

func (s *scanFlags) options() (scan.Options, error) {
	n, err := parseSize(s.minRegion)
	switch {
	case err != nil || n == 0 || n > 1<<50:
		return scan.Options{}, usagef("a size is a number with an optional unit, such as 512KiB", "--min-region %q: want a size", s.minRegion)
	case s.samples < 1 || s.samples > 1<<20:
		return scan.Options{}, usagef("", "--samples %d: want 1 to %d", s.samples, 1<<20)
	case s.maxTime <= 0:
		return scan.Options{}, usagef("", "--max-time %v: want more than 0", s.maxTime)
	}
	return scan.Options{
		MinRegion: n, Samples: s.samples, Time: s.maxTime, Threads: min(4, runtime.GOMAXPROCS(0)),
	}, nil
}

func (a *app) scan(cmd *cobra.Command, s *scanFlags, args []string) error {
	o, err := s.options()
	if err != nil {
		return err
	}
	models, err := a.scanModels(args)
	if err != nil {
		return err
	}
	r := &scan.Report{Complete: true}
	if len(models) > 0 {
		ctx, stop := a.context(cmd)
		defer stop()
		if r, err = scan.Run(ctx, models, o); err != nil {
			return err
		}
	}
	return a.writeScan(models, r)
}

// scanModels finds out what the arguments mean.
func (a *app) scanModels(args []string) ([]scan.Model, error) {
	var entries []registry.Entry
	r, err := a.open()
	switch {
	case err == nil:
		defer r.Close()
		if entries, err = r.Entries(); err != nil {
			return nil, err
		}
	case errors.Is(err, registry.ErrNoRegistry):
		if len(args) == 0 {
			a.noteNoRegistry()
		}
	case len(args) == 0 || !allExist(args):
		return nil, err
	}
	byKey(entries)

	var models []scan.Model
	if len(args) == 0 {
		for _, e := range entries {
			if e.Info != nil {
				models = append(models, registeredModel(e))
			}
		}
		return models, nil
	}
	for n, arg := range args {
		if slices.Contains(args[:n], arg) {
			continue
		}
		i := slices.IndexFunc(entries, func(e registry.Entry) bool { return e.Key == arg })
		if i >= 0 && entries[i].Info != nil {
			models = append(models, registeredModel(entries[i]))
			continue
		}
		m, err := fileModel(arg)
		if errors.Is(err, fs.ErrNotExist) && r != nil {
			return nil, suggestKeys(r, arg, &registry.Error{Op: "scan", Key: arg, Err: fmt.Errorf("%w, and no such file", registry.ErrNotFound)})
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w: %w", errNoFile, err)
		}
		if err != nil {
			return nil, err
		}
		models = append(models, m)
	}
	return models, nil
}

func allExist(paths []string) bool {
	return !slices.ContainsFunc(paths, func(p string) bool { _, err := os.Stat(p); return err != nil })
}

func registeredModel(e registry.Entry) scan.Model {
	m := scan.Model{
		Name: e.Key, Registered: true,
		Leases: []string{filepath.Dir(e.Info.Path) + layout.ManifestExt},
	}
	for _, f := range e.Info.Files {
		m.Files = append(m.Files, filepath.Join(e.Info.Path, filepath.FromSlash(f.Path)))
	}
	return m
}

// fileModel is a file, or all regular files of a folder.
func fileModel(path string) (scan.Model, error) {
	m := scan.Model{Name: path}
	st, err := os.Stat(path)
	if err != nil {
		return m, err
	}
	if !st.IsDir() {
		m.Files = []string{path}
		return m, nil
	}
	err = filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		// A link to a file is one, as for load.
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() {
			m.Files = append(m.Files, p)
		}
		return nil
	})
	if err == nil && len(m.Files) == 0 {
		err = usagef("", "%s: no file in it", path)
	}
	return m, err
}

type scanModelJSON struct {
	Name        string `json:"name"` // key or path
	Registered  bool   `json:"registered"`
	Bytes       int64  `json:"bytes"`
	Copies      int    `json:"copies"` // processes with a private copy
	Private     int64  `json:"private_bytes"`
	OtherShm    int64  `json:"other_shm_bytes"`
	PageCache   int    `json:"page_cache_processes"`
	Attached    int    `json:"attached_processes"`
	Both        int    `json:"attached_and_copied_processes"`
	Reclaimable int64  `json:"reclaimable_bytes"`
}

type scanUseJSON struct {
	PID           int      `json:"pid"`
	Command       string   `json:"command"`
	UID           int      `json:"uid"`
	Name          string   `json:"name"`
	Private       int64    `json:"private_bytes"`
	Match         *float64 `json:"match"` // null without a private copy
	Samples       int      `json:"samples"`
	PageCache     int64    `json:"page_cache_bytes"`
	OtherShm      int64    `json:"other_shm_bytes"`
	Attached      bool     `json:"attached"`
	AttachedBytes int64    `json:"attached_resident_bytes"`
}

type scanJSON struct {
	schema
	Dir            string          `json:"dir"`
	Models         []scanModelJSON `json:"models"`
	Processes      []scanUseJSON   `json:"processes"` // one for each process and model
	Examined       int             `json:"examined_processes"`
	NotVisible     int             `json:"not_visible_processes"`
	NotVisibleMine int             `json:"not_visible_same_user"`
	Needs          *string         `json:"needs"`               // the privilege to see the rest
	Outside        bool            `json:"outside_not_visible"` // a PID namespace of its own
	Complete       bool            `json:"complete"`
	Skipped        int             `json:"skipped_processes"` // the time was over
	Seconds        float64         `json:"seconds"`
}

type scanLineJSON struct {
	schema
	scanUseJSON
}

func (a *app) writeScan(models []scan.Model, r *scan.Report) error {
	doc := scanJSON{
		schema: newSchema(), Dir: a.registryDir(), Models: []scanModelJSON{}, Processes: []scanUseJSON{},
		Examined: r.Examined, NotVisible: r.NotVisible, NotVisibleMine: r.SameUser, Needs: orNull(privilege(r)), Outside: r.Outside,
		Complete: r.Complete, Skipped: r.SkippedFor, Seconds: r.Elapsed.Seconds(),
	}
	for i, t := range r.Models {
		doc.Models = append(doc.Models, scanModelJSON{
			models[i].Name, models[i].Registered, t.Bytes, t.Copies, t.Private, t.OtherShm,
			t.PageCache, t.Attached, t.Both, t.Reclaimable,
		})
	}
	for _, p := range r.Processes {
		for _, u := range p.Uses {
			j := scanUseJSON{
				PID: p.PID, Command: p.Command, UID: p.UID, Name: models[u.Model].Name,
				Private: u.Private, Samples: u.Samples, PageCache: u.PageCache, OtherShm: u.OtherShm,
				Attached: u.Attached, AttachedBytes: u.Resident,
			}
			if u.Private > 0 {
				share := u.Share()
				j.Match = &share
			}
			doc.Processes = append(doc.Processes, j)
		}
	}
	switch a.output {
	case formatJSON:
		return a.writeJSON(doc)
	case formatJSONL:
		for _, p := range doc.Processes {
			if err := a.writeJSON(scanLineJSON{newSchema(), p}); err != nil {
				return err
			}
		}
		return nil
	case formatName:
		var pids []string
		for _, p := range doc.Processes {
			if pid := strconv.Itoa(p.PID); p.Private > 0 && !slices.Contains(pids, pid) {
				pids = append(pids, pid)
			}
		}
		return a.writeLines(pids...)
	}
	return a.writeScanTable(doc)
}

func (a *app) writeScanTable(doc scanJSON) error {
	var rows [][]string
	for _, p := range doc.Processes {
		private, match := "-", "-"
		if p.Match != nil {
			private, match = a.size(p.Private), fmt.Sprintf("%.0f %%", 100**p.Match)
		}
		rows = append(rows, []string{
			strconv.Itoa(p.PID), shortCommand(p.Command), strconv.Itoa(p.UID), p.Name, private, match, sharedText(p),
		})
	}
	if err := a.writeTable([]string{"PID", "COMMAND", "UID", "MODEL", "PRIVATE", "MATCH", "SHARED"}, rows); err != nil {
		return err
	}
	for i, m := range doc.Models {
		if i == 0 {
			if err := a.writeLines(""); err != nil {
				return err
			}
		}
		if err := a.writeLines(visible(a.scanTotal(m))); err != nil {
			return err
		}
	}
	if doc.NotVisible > 0 {
		a.note("%s could not be read: %s", processes(doc.NotVisible), *doc.Needs)
	}
	if doc.Outside {
		a.note("%s", outsideNote)
	}
	if !doc.Complete {
		were := "were"
		if doc.Skipped == 1 {
			were = "was"
		}
		a.note("the time was over before %s %s looked at: --max-time", processes(doc.Skipped), were)
	}
	return nil
}

// sharedText says how a process has a model without, or besides, a copy.
func sharedText(p scanUseJSON) string {
	text := ""
	add := func(s string) {
		if text != "" {
			text += ", "
		}
		text += s
	}
	switch {
	case p.Attached && p.Private > 0:
		add("attached, yet copied")
	case p.Attached:
		add("attached")
	}
	if p.PageCache > 0 {
		add("page cache")
	}
	if p.OtherShm > 0 {
		add("shm")
	}
	return cmp.Or(text, "-")
}

// scanTotal is the sentence about one model.
func (a *app) scanTotal(m scanModelJSON) string {
	text := fmt.Sprintf("%s (%s): ", m.Name, a.size(m.Bytes))
	if m.Copies == 0 && m.OtherShm == 0 {
		text += "no private copies"
	} else {
		if m.Copies > 0 {
			hold := "hold"
			if m.Copies == 1 {
				hold = "holds"
			}
			text += fmt.Sprintf("%s %s %s of private copies, ", processes(m.Copies), hold, a.size(m.Private))
		}
		if m.OtherShm > 0 {
			text += fmt.Sprintf("%s in other shared memory, ", a.size(m.OtherShm))
		}
		text += a.size(m.Reclaimable) + " reclaimable"
	}
	if m.Attached > 0 {
		text += fmt.Sprintf("; %d attached", m.Attached)
	}
	if m.Both > 0 {
		text += fmt.Sprintf(", of which %d copied it all the same", m.Both)
	}
	if m.PageCache > 0 {
		text += fmt.Sprintf("; %d share it through the page cache", m.PageCache)
	}
	return text
}

func processes(n int) string {
	if n == 1 {
		return "1 process"
	}
	return fmt.Sprintf("%d processes", n)
}

// privilege is what it takes to read the processes that could not be read.
func privilege(r *scan.Report) string {
	switch {
	case r.NotVisible == 0:
		return ""
	case r.Root:
		return "CAP_SYS_PTRACE is missing, or they belong to another user namespace"
	case r.SameUser == r.NotVisible:
		return "CAP_SYS_PTRACE: run it as root, or set sysctl kernel.yama.ptrace_scope=0"
	}
	return "CAP_SYS_PTRACE: run it as root"
}
