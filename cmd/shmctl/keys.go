package main

import (
	"cmp"
	"errors"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/registry"
)

// suggestKeys adds the near names of a key that is not there. What is there
// may change at any time, so this is advice and its own errors do not count.
func suggestKeys(r *registry.Registry, key string, err error) error {
	if !errors.Is(err, registry.ErrNotFound) {
		return err
	}
	var keys []string
	es, _ := r.Entries()
	for _, e := range es {
		if e.Key != key {
			keys = append(keys, e.Key)
		}
	}
	if near := nearest(key, keys); len(near) > 0 {
		return withHint(err, "did you mean "+quotedList(near)+"?")
	}
	return withHint(err, "shmctl ls lists what is loaded")
}

// nearest returns up to three of the words that somebody who typed word may
// have meant, the nearest first.
func nearest(word string, words []string) []string {
	type candidate struct {
		word string
		dist int
	}
	var near []candidate
	for _, w := range words {
		d := distance(strings.ToLower(word), strings.ToLower(w))
		switch {
		case d <= max(2, len(word)/3) && d < len(word):
		case len(word) >= 3 && strings.Contains(strings.ToLower(w), strings.ToLower(word)):
		default:
			continue
		}
		near = append(near, candidate{w, d})
	}
	slices.SortFunc(near, func(x, y candidate) int {
		return cmp.Or(cmp.Compare(x.dist, y.dist), strings.Compare(x.word, y.word))
	})
	var out []string
	for _, c := range near[:min(3, len(near))] {
		out = append(out, c.word)
	}
	return out
}

// distance is the number of bytes to insert, delete or change to get from one
// word to the other.
func distance(from, to string) int {
	row := make([]int, len(to)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(from) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(to) {
			d := diagonal
			if from[i] != to[j] {
				d = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], d
		}
	}
	return row[len(to)]
}

// completeKeys completes the names of live models for the first most arguments
// (all when most is negative).
func (a *app) completeKeys(most int) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if most >= 0 && len(args) >= most {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var keys []string
		a.forCompletion(cmd, func(r *registry.Registry) {
			es, _ := r.Entries()
			byKey(es)
			for _, e := range es {
				if !slices.Contains(args, e.Key) {
					keys = append(keys, e.Key)
				}
			}
		})
		return keys, cobra.ShellCompDirectiveNoFileComp
	}
}

// completeKeyAndFile completes KEY FILE.
func (a *app) completeKeyAndFile(cmd *cobra.Command, args []string, part string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) != 1 {
		return a.completeKeys(1)(cmd, args, part)
	}
	var files []string
	a.forCompletion(cmd, func(r *registry.Registry) {
		if e, err := r.Entry(args[0]); err == nil && e.Info != nil {
			for _, f := range e.Info.Files {
				files = append(files, f.Path)
			}
		}
	})
	return files, cobra.ShellCompDirectiveNoFileComp
}

// forCompletion runs fn on the registry if there is one: a shell that asks for
// completions has no use for an error.
func (a *app) forCompletion(cmd *cobra.Command, fn func(*registry.Registry)) {
	if a.readEnv(cmd) != nil {
		return
	}
	r, err := a.open()
	if err != nil {
		return
	}
	defer r.Close()
	fn(r)
}
