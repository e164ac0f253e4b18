package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/registry"
)

func (a *app) statCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "stat KEY",
		Short: "Show everything about one model",
		Long: `Stat shows what the registry knows about one model: its files with sizes and
digests, its generation, where it came from, when it was loaded and used, and
the processes that hold it. For those with CAP_SYS_ADMIN it also shows to which
control groups the memory is charged: those that touched it first.

"pages" is measured at the moment: how much of the model lies in 2 MiB pages,
and whether programs that map a file by its path (llama.cpp, safetensors, numpy)
get them too, or else which command lets them. Files below 2 MiB have none.`,
		Example: `  shmctl stat bert
  shmctl stat bert -o json | jq -r '.files[] | .digest + "  " + .path'`,
		Args:              takes(1, 1, "KEY"),
		ValidArgsFunction: a.completeKeys(1),
		RunE:              func(_ *cobra.Command, args []string) error { return a.stat(args[0]) },
	}
}

type chargeJSON struct {
	Cgroup string `json:"cgroup"` // "" is none, "?" one that is gone or not visible
	Bytes  int64  `json:"bytes"`
}

type statJSON struct {
	schema
	Dir string `json:"dir"`
	modelJSON
	Files   []fileJSON   `json:"files"` // null while nothing readable is published
	Holders []holderJSON `json:"holders"`

	HiddenProcs int          `json:"hidden_processes"` // that could not be looked into
	Charges     []chargeJSON `json:"charges"`          // null when this user cannot know
	Pages       *pagesJSON   `json:"pages"`            // null while nothing is published
}

func (a *app) stat(key string) error {
	r, err := a.open()
	if err != nil {
		return err
	}
	defer r.Close()
	e, err := r.Entry(key)
	if err != nil {
		return suggestKeys(r, key, err)
	}
	rep, err := r.HolderReport(key)
	if err != nil {
		return err
	}

	charges, _ := r.Charges(key) // takes a privilege that few have
	pages := measurePages(r, key)

	switch a.output {
	case formatJSON, formatJSONL:
		doc := statJSON{schema: newSchema(), Dir: r.Dir(), modelJSON: toModelJSON(e), Holders: toHoldersJSON(rep.Holders), HiddenProcs: rep.Hidden, Pages: a.toPagesJSON(pages)}
		for _, c := range charges {
			doc.Charges = append(doc.Charges, chargeJSON{c.Cgroup, c.Bytes})
		}
		if e.Info != nil {
			doc.Files = toFilesJSON(e.Info.Files)
		}
		return a.writeJSON(doc)
	case formatName:
		return a.writeLines(e.Key)
	}
	fields := a.statFields(e)
	if pages != nil {
		fields = append(fields, [2]string{"pages", a.pagesText(*pages)})
	}
	for _, c := range charges {
		fields = append(fields, [2]string{"charged", a.size(c.Bytes) + " to " + cmp.Or(c.Cgroup, "no control group")})
	}
	if err := a.writeFields(fields); err != nil {
		return err
	}
	if e.Info != nil {
		if err := a.writeFiles(e.Info.Files); err != nil {
			return err
		}
	}
	if len(rep.Holders) == 0 && rep.Unseen == 0 {
		return nil
	}
	if err := a.writeLines(""); err != nil {
		return err
	}
	return a.writeHolders(rep)
}

// measurePages is nil when there is nothing to measure: the model may go at any
// time.
func measurePages(r *registry.Registry, key string) *registry.PageReport {
	rep, err := r.HugePages(key)
	if err != nil {
		return nil
	}
	return &rep
}

func (a *app) statFields(e registry.Entry) [][2]string {
	fs := [][2]string{{"key", e.Key}, {"state", e.State}}
	add := func(name, value string) { fs = append(fs, [2]string{name, value}) }
	addTime := func(name string, t time.Time) {
		if !t.IsZero() {
			add(name, when(t)+" ("+a.age(t)+" ago)")
		}
	}
	if e.Generation != 0 {
		add("generation", strconv.FormatUint(e.Generation, 10))
	}
	add("size", a.size(e.Bytes))
	if i := e.Info; i != nil {
		add("path", i.Path)
		add("origin", originText(i.Origin))
		if i.Origin.Path != "" && i.Origin.Version != "" {
			add("version", i.Origin.Version)
		}
		for _, k := range slices.Sorted(maps.Keys(i.Origin.Environment)) {
			add("environment", k+"="+i.Origin.Environment[k])
		}
		add("backing", i.Backing)
		add("epoch", hex64(i.Epoch))
		add("loaded", fmt.Sprintf("%s (%s ago, took %s)", when(i.LoadedAt), a.age(i.LoadedAt), seconds(i.LoadTime)))
		add("filled", a.fillText(i.Fill))
	}
	add("leased", yesNo(e.Leased))
	add("pinned", yesNo(e.Pinned))
	switch {
	case e.TTL > 0:
		add("ttl", e.TTL.String())
	case e.TTL < 0:
		add("ttl", "never")
	}
	addTime("last attach", e.LastAttach)
	addTime("last release", e.LastRelease)
	addTime("idle since", e.IdleSince)
	if e.LoaderPID != 0 {
		add("loader", fmt.Sprintf("pid %d", e.LoaderPID))
	}
	if e.Reserved > 0 {
		add("reserved", a.size(e.Reserved))
	}
	if e.Deaths > 0 {
		add("loader deaths", strconv.Itoa(e.Deaths))
	}
	if !e.RetryAfter.IsZero() {
		add("retry after", when(e.RetryAfter))
	}
	return fs
}

// fillText says by which way the bytes took into memory.
func (a *app) fillText(f registry.FillStats) string {
	s := fmt.Sprintf("%s in huge pages, %s copied", a.size(f.Collapsed), a.size(f.Copied))
	if f.Direct > 0 {
		s += fmt.Sprintf(", %s read past the page cache", a.size(f.Direct))
	}
	if f.Fallbacks > 0 {
		s += ", " + plural(f.Fallbacks, "fallback")
	}
	return s
}

func seconds(d time.Duration) string {
	switch {
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < time.Minute:
		return d.Round(10 * time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}

func (a *app) writeFiles(files []registry.File) error {
	if err := a.writeLines(""); err != nil {
		return err
	}
	var rows [][]string
	for _, f := range files {
		rows = append(rows, []string{f.Path, a.size(f.Size), f.Digest})
	}
	return a.writeTable([]string{"FILE", "SIZE", "DIGEST"}, rows)
}
