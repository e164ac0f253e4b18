package main

import (
	"errors"
	"path"
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
whether a model is in use is what the kernel's locks say.

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
}

type holderLineJSON struct {
	schema
	holderJSON
}

func (a *app) holders(key string) error {
	var hs []registry.Holder
	r, err := a.open()
	switch {
	case errors.Is(err, registry.ErrNoRegistry):
		a.noteNoRegistry()
	case err != nil:
		return err
	default:
		defer r.Close()
		if hs, err = r.Holders(key); err != nil {
			return err
		}
		// A model that was removed or replaced may still have holders; a name
		// that was mistyped has none.
		if key != "" && len(hs) == 0 {
			if _, err := r.Entry(key); err != nil {
				return suggestKeys(r, key, err)
			}
		}
	}

	switch a.output {
	case formatJSON:
		return a.writeJSON(holdersJSON{newSchema(), a.registryDir(), true, toHoldersJSON(hs)})
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
	return a.writeHolders(hs)
}

// writeHolders writes the table of holders; those that cannot be looked into
// are counted, not guessed.
func (a *app) writeHolders(hs []registry.Holder) error {
	var rows [][]string
	hidden := 0
	for _, h := range hs {
		if !h.Visible {
			hidden++
			continue
		}
		rows = append(rows, []string{
			strconv.Itoa(h.PID), shortCommand(h.Command), strconv.Itoa(h.UID), when(h.Since),
			a.size(h.Resident), a.size(h.Proportional), h.Via, h.Key, strconv.FormatUint(h.Generation, 10),
		})
	}
	if err := a.writeTable([]string{"PID", "COMMAND", "UID", "SINCE", "RESIDENT", "PSS", "VIA", "KEY", "GEN"}, rows); err != nil {
		return err
	}
	if hidden > 0 {
		a.note("%s not visible to this user", plural(hidden, "holder"))
	}
	a.note("for display only: the kernel's locks decide")
	return nil
}

// shortCommand makes a command line fit a column: without the folder of the
// program, and not longer than most are.
func shortCommand(line string) string {
	const most = 40
	program, args, _ := strings.Cut(line, " ")
	r := []rune(strings.TrimSpace(path.Base(program) + " " + args))
	if len(r) > most {
		return string(r[:most-3]) + "..."
	}
	return string(r)
}
