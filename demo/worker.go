//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/registry"
)

// workerCommand is the hidden subcommand under which the demo starts itself as a Go worker:
//
//	onecopy-demo worker KEY FOLDER
const workerCommand = "worker"

// answer is one line of a worker. The stamps are nanoseconds of CLOCK_MONOTONIC.
type answer struct {
	Usable  int64  `json:"usable"` // the first byte was read
	Read    int64  `json:"read"`   // the last byte was read
	Bytes   int64  `json:"bytes"`
	CRC     uint32 `json:"crc"`
	Tensors int    `json:"tensors"`
	First   int    `json:"first"`  // the sum of the files' first bytes: what made it usable
	Loaded  bool   `json:"loaded"` // this worker had to load the model, which must not happen
}

func monotonic() int64 {
	var ts unix.Timespec
	// It cannot fail for this clock.
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return ts.Nano()
}

// workerMain is the whole life of a Go worker.
func workerMain(key, folder string, stdin io.Reader, stdout io.Writer) (err error) {
	reg, err := registry.Open(registry.DefaultDir(), nil)
	if err != nil {
		return err
	}
	defer closing(&err, reg.Close)
	// The one line that an existing worker changes. The model is there, so nothing is loaded.
	model, err := reg.GetOrLoad(context.Background(), key, registry.Source{Path: folder})
	if err != nil {
		return err
	}
	defer closing(&err, model.Close)

	files := map[string][]byte{}
	var a answer
	for _, f := range model.Files() {
		data, err := model.Bytes(f.Path)
		if err != nil {
			return err
		}
		files[f.Path] = data
		a.Bytes += int64(len(data))
	}
	names := sortedNames(files)
	for _, name := range names {
		if len(files[name]) > 0 {
			a.First += int(files[name][0])
		}
	}
	a.Usable = monotonic()
	a.Loaded = !model.Info().AlreadyPresent
	out := json.NewEncoder(stdout)
	for lines := bufio.NewScanner(stdin); ; {
		a.CRC = 0
		for _, name := range names {
			a.CRC = crc32.Update(a.CRC, crc32.IEEETable, files[name])
		}
		a.Read = monotonic()
		if err := out.Encode(a); err != nil {
			return err
		}
		if !lines.Scan() {
			return lines.Err()
		}
	}
}

// closing reports an error of closing unless there is an earlier one.
func closing(err *error, closeIt func() error) {
	if e := closeIt(); *err == nil {
		*err = e
	}
}

func sortedNames[T any](files map[string]T) []string {
	var names []string
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// folderSum is what every worker must find: the size, the number of files and the checksum of a folder, files
// in the order of their names.
func folderSum(folder string) (size int64, count int, crc uint32, err error) {
	paths := map[string]string{}
	err = filepath.WalkDir(folder, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(folder, path)
		paths[rel] = path
		return err
	})
	for _, name := range sortedNames(paths) {
		if err != nil {
			return 0, 0, 0, err
		}
		var n int64
		n, crc, err = fileSum(paths[name], crc)
		size += n
	}
	if err == nil && size == 0 {
		err = fmt.Errorf("%s is empty", folder)
	}
	return size, len(paths), crc, err
}

func fileSum(path string, crc uint32) (int64, uint32, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, crc, err
	}
	defer f.Close()
	var size int64
	for buf := make([]byte, 1<<20); ; {
		n, err := f.Read(buf)
		crc = crc32.Update(crc, crc32.IEEETable, buf[:n])
		size += int64(n)
		if err == io.EOF {
			return size, crc, nil
		}
		if err != nil {
			return size, crc, err
		}
	}
}

// sharedBytes is the PSS of a process's mappings of files below folder: each page counts as one divided by the
// number of processes that map it.
func sharedBytes(pid int, folder string) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return 0, err
	}
	var sum int64
	inside := false
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		switch {
		case len(fields) == 0:
		case !strings.HasSuffix(fields[0], ":"):
			// The first line of a mapping: addresses, mode, offset, device, inode, path.
			inside = len(fields) > 5 && strings.HasPrefix(strings.Join(fields[5:], " "), folder+"/")
		case fields[0] == "Pss:" && inside:
			var kb int64
			if _, err := fmt.Sscan(fields[1], &kb); err != nil {
				return 0, fmt.Errorf("/proc/%d/smaps: %q: %w", pid, line, err)
			}
			sum += kb << 10
		}
	}
	return sum, nil
}
