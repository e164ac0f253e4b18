//go:build linux

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// The manual pages in docs/man and the reference in docs/reference are made from
// the commands: go test ./cmd/shmctl -run TestReference -update
//
// It is a test, because the commands are in package main, and so that the
// program itself does not carry what makes manual pages.
func TestReference(t *testing.T) {
	pages := referencePages(t)
	for _, dir := range []string{"../../docs/man", "../../docs/reference"} {
		if *update {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		files, _ := filepath.Glob(dir + "/*")
		for _, f := range files {
			if pages[f] == nil {
				t.Errorf("%s describes no command", f)
			}
		}
	}
	for path, want := range pages {
		if *update {
			if err := os.WriteFile(path, want, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Error(err)
		}
		if d := cmp.Diff(string(want), string(got)); d != "" {
			t.Errorf("%s is stale: go test ./cmd/shmctl -run TestReference -update (-want +got)\n%s", path, d)
		}
	}
}

func referencePages(t *testing.T) map[string][]byte {
	t.Helper()
	pages := map[string][]byte{}
	root := newApp(nil, nil, nil, nil).command()
	root.DisableAutoGenTag = true
	date := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	var visit func(*cobra.Command)
	visit = func(cmd *cobra.Command) {
		if cmd.Name() == "help" || cmd.Hidden {
			return
		}
		base := strings.ReplaceAll(cmd.CommandPath(), " ", "-")
		var man, md bytes.Buffer
		header := &doc.GenManHeader{Section: "1", Source: "onecopy", Manual: "onecopy", Date: &date}
		if err := doc.GenMan(cmd, header, &man); err != nil {
			t.Fatal(err)
		}
		if cmd == root {
			man.WriteString("The system call of the same name is shmctl(2); it has to do with System V shared memory only.\n")
		}
		link := func(name string) string { return strings.ReplaceAll(name, "_", "-") }
		if err := doc.GenMarkdownCustom(cmd, &md, link); err != nil {
			t.Fatal(err)
		}
		if cmd.CommandPath() == "shmctl top" {
			md.WriteString("\n### PICTURE\n\n![shmctl top in a terminal](../top.svg)\n\n" +
				"Made by `go test ./cmd/shmctl -run TestPicture -update`.\n")
		}
		pages["../../docs/man/"+base+".1"] = man.Bytes()
		pages["../../docs/reference/"+base+".md"] = md.Bytes()
		for _, sub := range cmd.Commands() {
			visit(sub)
		}
	}
	visit(root)
	return pages
}
