package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/internal/layout"
)

// version, commit and date may be set by the linker (-X main.version=...); a
// binary of "go install" knows them from its build information.
var version, commit, date string

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of the program and of the layout",
		Long: `Version prints the version of this program, and the version of the registry's
layout that it reads and writes. Programs of one layout version share a
registry; those of another neither read nor touch it.`,
		Example: `  shmctl version
  shmctl version -o json | jq .layout_version`,
		Args: takes(0, 0, ""),
		RunE: func(*cobra.Command, []string) error { return a.version() },
	}
}

type versionJSON struct {
	schema
	Version       string  `json:"version"`
	Commit        *string `json:"commit"`
	Date          *string `json:"date"`
	Modified      bool    `json:"modified"` // built from a changed tree
	Go            string  `json:"go"`
	Platform      string  `json:"platform"`
	LayoutVersion int     `json:"layout_version"`
}

func buildVersion() versionJSON {
	v := versionJSON{
		schema: newSchema(), Version: version, Commit: orNull(commit), Date: orNull(date),
		Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH, LayoutVersion: layout.Version,
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		if v.Version == "" {
			v.Version = info.Main.Version
		}
		for _, s := range info.Settings {
			switch {
			case s.Key == "vcs.revision" && v.Commit == nil:
				v.Commit = orNull(s.Value)
			case s.Key == "vcs.time" && v.Date == nil:
				v.Date = orNull(s.Value)
			case s.Key == "vcs.modified":
				v.Modified = s.Value == "true"
			}
		}
	}
	if v.Version == "" {
		v.Version = "(devel)"
	}
	return v
}

func (a *app) version() error {
	v := buildVersion()
	switch a.output {
	case formatJSON, formatJSONL:
		return a.writeJSON(v)
	case formatName:
		return a.writeLines(v.Version)
	}
	fs := [][2]string{{"shmctl", v.Version}}
	if v.Commit != nil {
		c := *v.Commit
		if v.Modified {
			c += " (modified)"
		}
		fs = append(fs, [2]string{"commit", c})
	}
	if v.Date != nil {
		fs = append(fs, [2]string{"date", *v.Date})
	}
	return a.writeFields(append(fs,
		[2]string{"go", v.Go + " " + v.Platform},
		[2]string{"layout", fmt.Sprint(v.LayoutVersion)},
	))
}
