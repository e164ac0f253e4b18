//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// wayPython is the load of a Python program, by the package onecopy.
const wayPython = "onecopy, Python"

// usesPackage says whether a way of a Python worker needs the package onecopy.
func usesPackage(way string) bool { return way == wayOnecopy || way == wayEmpty }

// preparePackage copies the Python package to where its bytecode may be kept, as an installed package has it, and
// imports it once. Workers would be measured compiling it otherwise.
func (b *bench) preparePackage(ctx context.Context, source string) {
	home := filepath.Join(b.work, "python")
	// An empty PYTHONDONTWRITEBYTECODE is none: peers.py is compiled once, too.
	b.pythonEnv = []string{"PYTHONPATH=" + home, "PYTHONDONTWRITEBYTECODE="}
	if err := os.CopyFS(filepath.Join(home, "onecopy"), os.DirFS(filepath.Join(source, "onecopy"))); err != nil {
		b.noPackage = fmt.Sprintf("no package onecopy in --package %s", source)
		return
	}
	cmd := exec.CommandContext(ctx, b.python, "-c", "import onecopy, onecopy._load")
	cmd.Env = append(os.Environ(), b.pythonEnv...)
	if text, err := cmd.CombinedOutput(); err != nil {
		b.noPackage = fmt.Sprintf("Python cannot import onecopy: %s (make bench-peers installs what it needs)", lastLine(errors.New(string(text))))
	}
}

// pythonWays are the ways of Python workers; those that are left out have a reason in the results.
func (b *bench) pythonWays(o options, res *results, size int64, workers int) []string {
	ways := append(slices.Clone(o.ways), b.peersOf(o.peers)...)
	return slices.DeleteFunc(ways, func(way string) bool {
		left := b.noPackage != "" && usesPackage(way)
		if left {
			res.skip(cell{Size: size, Lang: langPython, Way: way, Workers: workers, Users: 1}, b.noPackage)
		}
		return left
	})
}

// pythonWorker returns the command line of one Python worker.
func (b *bench) pythonWorker(c cell, m modelFile, dir string, reg *loaded) (command, error) {
	cmd := command{argv: []string{b.python, b.script, c.Way, m.path}, env: b.pythonEnv}
	switch p := b.peers[c.Way]; {
	case p != nil:
		cmd.argv = []string{b.python, b.script, "peer:" + c.Way, p.Place}
	case usesPackage(c.Way):
		cmd.argv = append(cmd.argv, dir)
	case c.Way == wayPath:
		// What `shmctl exec` does: the worker inherits a descriptor that holds the lease.
		model, err := reg.reg.Get(modelKey)
		if err != nil {
			return command{}, err
		}
		lease, err := model.Lease()
		if err := errors.Join(err, model.Close()); err != nil {
			return command{}, err
		}
		cmd.argv[3], cmd.extra = reg.path, []*os.File{lease}
	}
	return cmd, nil
}

// loadByPython is a load of a new Python program.
func (s *session) loadByPython(ctx context.Context, path, dir string) (values, error) {
	p, err := startProcess(ctx, command{argv: []string{s.python, s.script, "load", path, dir}, env: s.pythonEnv})
	if err != nil {
		return nil, err
	}
	defer fleet{p}.kill()
	v := values{}
	return v, p.next(&v)
}

// withPython adds the load by Python to the ways, where there is one.
func (s *session) withPython(ways []string) []string {
	if s.python == "" || s.noPackage != "" {
		return ways
	}
	return append(ways, wayPython)
}

// lastLine of a traceback says what happened.
func lastLine(err error) string {
	lines := strings.Split(strings.TrimSpace(err.Error()), "\n")
	return lines[len(lines)-1]
}
