//go:build linux

package main

import (
	"bytes"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/registry"
)

// Every byte of every model is a piece of one file of noise, the pool, chosen by
// the model's key and version: so each process knows what each model has to be.
const poolSize = 32 << 20

// Half of the models span several load windows, which are small in builds with the
// tag crashpoint.
const (
	keyCount = 24
	versions = 3
	config   = "sub/config.json"
	weights  = "weights.bin"
	empty    = "sub/empty"
)

var keys = func() (keys []string) {
	for i := range keyCount {
		keys = append(keys, fmt.Sprintf("org%d/model-%d", i%3, i))
	}
	return keys
}()

func big(key string) bool { return key[len(key)-1]%2 == 0 }

// name of a model's version: "org1/model-4@2".
func name(key string, version int) string { return fmt.Sprintf("%s@%d", key, version) }

// piece says which part of the pool is the weights of a model.
func piece(name string) (off, n int) {
	h := fnv.New64a()
	h.Write([]byte(name))
	v := h.Sum64()
	n = 8<<10 + int(v%16)*9973
	if key, _, _ := strings.Cut(name, "@"); big(key) {
		n += 4 << 20
	}
	return int(v>>8) % (poolSize - n), n
}

func openPool(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return unix.Mmap(int(f.Fd()), 0, poolSize, unix.PROT_READ, unix.MAP_SHARED)
}

// contents are the files of a model.
func contents(pool []byte, name string) map[string][]byte {
	off, n := piece(name)
	return map[string][]byte{weights: pool[off : off+n], config: []byte(name), empty: {}}
}

// prepare writes the pool, and a folder for each model.
func prepare(dir string, seed uint64) error {
	pool := make([]byte, poolSize)
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	_, _ = rand.NewChaCha8(key).Read(pool)
	if err := os.WriteFile(filepath.Join(dir, "pool"), pool, 0o600); err != nil {
		return err
	}
	for _, key := range keys {
		for v := range versions {
			for path, b := range contents(pool, name(key, v)) {
				path = filepath.Join(sourceDir(dir, name(key, v)), path)
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					return err
				}
				if err := os.WriteFile(path, b, 0o600); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func sourceDir(dir, name string) string {
	return filepath.Join(dir, "sources", strings.ReplaceAll(name, "/", "-"))
}

// verify compares every byte of a model with the pool, and the model with its key.
func verify(pool []byte, m *registry.Model) (n int64, err error) {
	origin := m.Info().Origin
	source := origin.Version
	if origin.Path != "" {
		source = strings.Replace(filepath.Base(origin.Path), "-", "/", 1)
	}
	wrong := func(text string, args ...any) error {
		return fmt.Errorf("%s, generation %d, from %q: %s", m.Key(), m.Generation(), source, fmt.Sprintf(text, args...))
	}
	if key, _, _ := strings.Cut(source, "@"); key != m.Key() {
		return 0, wrong("belongs to another key")
	}
	want := contents(pool, source)
	if len(m.Files()) != len(want) {
		return 0, wrong("%d files, want %d", len(m.Files()), len(want))
	}
	for path, b := range want {
		got, err := m.Bytes(path)
		if err != nil {
			return 0, err
		}
		if !bytes.Equal(got, b) {
			return 0, wrong("wrong bytes in %s", path)
		}
		n += int64(len(b))
	}
	return n, nil
}
