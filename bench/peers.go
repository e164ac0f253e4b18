//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// allPeers are the ways of peers.py, in its order.
var allPeers = []string{"numpy-memmap", "safetensors-load", "safetensors-open", "torch-mmap", "joblib-mmap", "ray", "shared-memory", "lmdb", wayObject}

// peer is what the workers of such a way need: a file, or a process that keeps something in memory.
type peer struct {
	Place string `json:"place"` // for the workers
	File  string `json:"file"`  // on the disk; "" when it is in memory
	Data  string `json:"data"`  // the one file whose pages count as memory; "": all that a worker has more than an idle one
	serve *process
}

// warm reads the peer's file, so that it is in the page cache.
func (p *peer) warm() error {
	if p == nil || p.File == "" {
		return nil
	}
	return modelFile{path: p.File}.warm()
}

// findPeers leaves out the ways that the interpreter has no libraries for, by name.
func (s *session) findPeers(ctx context.Context) error {
	if !slices.Contains(s.o.langs, langPython) || s.python == "" {
		s.o.peers = nil
	}
	if len(s.o.peers) == 0 {
		return nil
	}
	check := exec.CommandContext(ctx, s.python, filepath.Join(s.work, "peers.py"), "check")
	check.Env = append(os.Environ(), s.pythonEnv...)
	out, err := check.Output()
	if err != nil {
		return fmt.Errorf("peers.py: %w", err)
	}
	var missing []string
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		var found struct{ Way, Missing string }
		if err := json.Unmarshal(lines.Bytes(), &found); err != nil {
			return fmt.Errorf("peers.py: %w", err)
		}
		if at := slices.Index(s.o.peers, found.Way); at >= 0 && found.Missing != "" {
			s.o.peers = slices.Delete(slices.Clone(s.o.peers), at, at+1)
			missing = append(missing, fmt.Sprintf("%s (no %s)", found.Way, found.Missing))
		}
	}
	if len(missing) > 0 {
		s.note("workers: not compared with %s; make bench-peers installs them", strings.Join(missing, ", "))
	}
	return nil
}

// startPeers makes what the ways need for a model. A way that fails is left out with its reason. stop ends
// them all, also after an error.
func (b *bench) startPeers(ctx context.Context, ways []string, m modelFile, res *results, progress io.Writer) (stop func() error, err error) {
	b.peers = map[string]*peer{}
	folder := filepath.Join(b.work, "peers")
	stop = func() error {
		for _, p := range b.peers {
			p.serve.stdin.Close() // it ends by itself and cleans up
			p.serve.wait()
		}
		b.peers = nil
		return os.RemoveAll(folder)
	}
	if len(ways) == 0 {
		return stop, nil
	}
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return stop, err
	}
	for _, way := range ways {
		fmt.Fprintf(progress, "bench: %s, %s: getting ready\n", mega(m.size), way)
		serve, err := startProcess(ctx, command{argv: []string{b.python, filepath.Join(b.work, "peers.py"), "serve", way, m.path, folder, b.shm}, env: b.pythonEnv})
		if err != nil {
			return stop, err
		}
		p := &peer{serve: serve}
		if err := serve.next(p); err != nil {
			if ctx.Err() != nil {
				return stop, err
			}
			res.skip(cell{Size: m.size, Lang: langPython, Way: way, Workers: 1, Users: 1}, lastLine(err))
			continue
		}
		b.peers[way] = p
	}
	return stop, nil
}

// peersOf are those of the ways that are ready.
func (b *bench) peersOf(ways []string) []string {
	return slices.DeleteFunc(slices.Clone(ways), func(way string) bool { return b.peers[way] == nil })
}
