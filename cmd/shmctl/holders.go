package main

import (
	"cmp"
	"errors"
	"path"
	"regexp"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/registry"
)

func (a *app) holdersCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "holders [KEY]",
		Short: "Show which processes hold models",
		Long: `Holders shows the processes that hold a model, or any model: their pid, command
and user, since when they run, how much of the model is in their memory
(RESIDENT) and their share of it (PSS: each page divided by the number of
processes that map it).

The list is for people. It is put together from /proc, so it is incomplete for
processes that the caller may not look into, and nothing is ever decided by it:
whether a model is in use is what the kernel's locks say. Processes that could
not be looked into are counted; those outside of the caller's PID namespace cannot
even be counted, and that is said. VIA is how a process holds the model: by its
mapping, a descriptor, or (unlinked) a mapping of files that have no name any
more. CGROUP is the last part of the control group, which names the container or
service; -o json has all of it.

-o name prints the pids.`,
		Example: `  shmctl holders
  shmctl holders bert
  shmctl holders -q bert | xargs kill`,
		Args:              takes(0, 1, "[KEY]"),
		ValidArgsFunction: a.completeKeys(1),
		RunE: func(_ *cobra.Command, args []string) error {
			key := ""
			if len(args) == 1 {
				key = args[0]
			}
			return a.holders(key)
		},
	}
}

type holdersJSON struct {
	schema
	Dir         string       `json:"dir"`
	DisplayOnly bool         `json:"display_only"` // always true: locks decide
	Holders     []holderJSON `json:"holders"`

	HiddenProcs   int   `json:"hidden_processes"`    // that could not be looked into
	Unseen        int   `json:"unseen_generations"`  // leased, by nobody in holders
	Outside       bool  `json:"outside_not_visible"` // a PID namespace of its own: no process outside is visible, nor counted
	UnlinkedBytes int64 `json:"unlinked_bytes"`      // of files without a name that somebody maps
}

type holderLineJSON struct {
	schema
	holderJSON
}

func (a *app) holders(key string) error {
	var rep registry.HolderReport
	r, err := a.open()
	switch {
	case errors.Is(err, registry.ErrNoRegistry):
		a.noteNoRegistry()
	case err != nil:
		return err
	default:
		defer r.Close()
		if rep, err = r.HolderReport(key); err != nil {
			return err
		}
		// A model that was removed or replaced may still have holders; a name
		// that was mistyped has none.
		if key != "" && len(rep.Holders) == 0 {
			if _, err := r.Entry(key); err != nil {
				return suggestKeys(r, key, err)
			}
		}
	}

	hs := rep.Holders
	switch a.output {
	case formatJSON:
		return a.writeJSON(holdersJSON{newSchema(), a.registryDir(), true, toHoldersJSON(hs), rep.Hidden, rep.Unseen, rep.Outside, rep.Unlinked})
	case formatJSONL:
		for _, h := range toHoldersJSON(hs) {
			if err := a.writeJSON(holderLineJSON{newSchema(), h}); err != nil {
				return err
			}
		}
		return nil
	case formatName:
		seen := map[int]bool{}
		for _, h := range hs {
			if h.Visible && !seen[h.PID] {
				seen[h.PID] = true
				if err := a.writeLines(strconv.Itoa(h.PID)); err != nil {
					return err
				}
			}
		}
		return nil
	}
	return a.writeHolders(rep)
}

// writeHolders writes the table of holders; those that cannot be looked into
// are counted, not guessed.
func (a *app) writeHolders(rep registry.HolderReport) error {
	var rows [][]string
	hidden := 0
	for _, h := range rep.Holders {
		if !h.Visible {
			hidden++
			continue
		}
		key, pss := h.Key, a.size(h.Proportional)
		if h.Via == "unlinked" {
			key, pss = cmp.Or(key, "(no name)"), "-"
		}
		rows = append(rows, []string{
			strconv.Itoa(h.PID), shortCommand(h.Command), strconv.Itoa(h.UID), when(h.Since), container(h.Cgroup),
			a.size(h.Resident), pss, h.Via, key, strconv.FormatUint(h.Generation, 10),
		})
	}
	if err := a.writeTable([]string{"PID", "COMMAND", "UID", "SINCE", "CGROUP", "RESIDENT", "PSS", "VIA", "KEY", "GEN"}, rows); err != nil {
		return err
	}
	if hidden > 0 {
		a.note("%s not visible to this user", plural(hidden, "holder"))
	}
	if rep.Unseen > 0 {
		a.note("%s leased by processes that are not visible from here", plural(rep.Unseen, "generation"))
	}
	if rep.Unlinked > 0 {
		a.note("%s are mapped without a name: the memory goes with the last who maps it", a.size(rep.Unlinked))
	}
	if rep.Hidden > 0 {
		a.note("%s could not be looked into", processes(rep.Hidden))
	}
	if rep.Outside {
		a.note("%s", outsideNote)
	}
	a.note("for display only: the kernel's locks decide")
	return nil
}

var containerID = regexp.MustCompile(`[0-9a-f]{64}`)

// container is what of a control group's path tells containers and services
// apart: its last part, with the name of a container as short as docker ps has it.
func container(group string) string {
	name := path.Base(group)
	for _, suffix := range []string{".scope", ".service", ".slice"} {
		name = strings.TrimSuffix(name, suffix)
	}
	name = containerID.ReplaceAllStringFunc(name, func(id string) string { return id[:12] })
	if name == "/" || name == "." {
		return "-"
	}
	return clipText(name, 32)
}

// outsideNote is for all who list processes.
const outsideNote = "this is a PID namespace of its own: processes outside of it are not visible, nor counted"

// shortCommand makes a command line fit a column: without the folder of the
// program, and not longer than most are.
func shortCommand(line string) string {
	const most = 40
	program, args, _ := strings.Cut(line, " ")
	return clipText(strings.TrimSpace(path.Base(program)+" "+args), most)
}

func clipText(s string, most int) string {
	r := []rune(s)
	if len(r) > most {
		return string(r[:most-3]) + "..."
	}
	return s
}
