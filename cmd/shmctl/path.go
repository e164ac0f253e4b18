package main

import (
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/registry"
)

func (a *app) pathCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "path KEY [FILE]",
		Short: "Print where a model's files lie",
		Long: `Path prints the folder of a model, or the path of one of its files.

A path holds no lease: the model may be removed or replaced between printing
the path and opening it. To run a program on a model use shmctl exec, which
keeps the model as long as the program runs. -q silences the warning.`,
		Example: `  shmctl path bert
  shmctl path -q bert config.json
  shmctl exec bert -- python serve.py {}    the safe way`,
		Args:              takes(1, 2, "KEY [FILE]"),
		ValidArgsFunction: a.completeKeyAndFile,
		RunE: func(_ *cobra.Command, args []string) error {
			file := ""
			if len(args) == 2 {
				file = args[1]
			}
			return a.path(args[0], file)
		},
	}
}

type pathJSON struct {
	schema
	Key        string `json:"key"`
	Generation uint64 `json:"generation"`
	Path       string `json:"path"`
}

func (a *app) path(key, file string) error {
	r, err := a.open()
	if err != nil {
		return err
	}
	defer r.Close()
	m, err := r.Get(key)
	if err != nil {
		return suggestKeys(r, key, err)
	}
	defer m.Close()

	p := m.Path()
	if file != "" {
		if err := hasFile(m, file); err != nil {
			return err
		}
		p = filepath.Join(p, filepath.FromSlash(file))
	}
	if a.json() {
		return a.writeJSON(pathJSON{newSchema(), key, m.Generation(), p})
	}
	a.note("a path holds no lease, the model may be removed while you use it; see shmctl exec --help")
	return a.writeLines(p)
}

// hasFile checks that a model has a file of that name.
func hasFile(m *registry.Model, file string) error {
	var names []string
	for _, f := range m.Files() {
		if f.Path == file {
			return nil
		}
		names = append(names, f.Path)
	}
	hint := nameKey("shmctl stat KEY lists its files", m.Key())
	if near := nearest(file, names); len(near) > 0 {
		hint = "did you mean " + quotedList(near) + "?"
	}
	return withHint(fmt.Errorf("%q has %w %q", m.Key(), errNoFile, file), hint)
}
