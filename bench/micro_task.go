//go:build linux

package main

import (
	"bytes"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/registry"
)

// taskAttach attaches, reads one byte and ends without closing anything, as a killed worker does.
func taskAttach(_ terminal, args []string) error {
	if err := need(args, "REGISTRY"); err != nil {
		return err
	}
	data, err := attachModel(args[0])
	if err != nil {
		return err
	}
	sink = data[0]
	return nil
}

// sink keeps the compiler from leaving out a read.
var sink byte

func attachModel(dir string) ([]byte, error) {
	reg, err := registry.Open(dir, nil)
	if err != nil {
		return nil, err
	}
	m, err := reg.Get(modelKey)
	if err != nil {
		return nil, err
	}
	return m.Bytes(m.Files()[0].Path)
}

// mapFile maps a whole file as any program does.
func mapFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	data, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	return data, os.NewSyscallError("mmap", err)
}

// readAll reads every byte as fast as the memory gives it, and returns what depends on all of them.
func readAll(data []byte) int { return bytes.Count(data, []byte{0}) }

// taskScan maps a file, or the model of a registry, and reads it twice. With further lines on its standard
// input it reads it once more for each.
func taskScan(t terminal, args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("takes FILE REGISTRY, one of them empty")
	}
	before, err := ownTables()
	if err != nil {
		return err
	}
	begin := monotonic()
	var data []byte
	if args[1] != "" {
		data, err = attachModel(args[1])
	} else {
		data, err = mapFile(args[0])
	}
	if err != nil {
		return err
	}
	v := values{"attach_ns": float64(monotonic() - begin)}
	read := func(name string) int {
		begin := monotonic()
		n := readAll(data)
		v[name] = milliseconds(monotonic() - begin)
		return n
	}
	first, second := read("scan1_ms"), read("scan2_ms")
	if first != second {
		return fmt.Errorf("two scans differ: %d and %d zero bytes", first, second)
	}
	after, err := ownTables()
	if err != nil {
		return err
	}
	v["tables_bytes"], v["zeros"] = float64(after-before), float64(first)
	if err := t.answer(v); err != nil {
		return err
	}
	for t.wait() {
		v := values{}
		begin := monotonic()
		v["zeros"] = float64(readAll(data))
		v["scan_ms"] = milliseconds(monotonic() - begin)
		if err := t.answer(v); err != nil {
			return err
		}
	}
	return nil
}

// ownTables is what the page tables of this process occupy.
func ownTables() (int64, error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	return kilobytes(status, "VmPTE")
}

// benchmarkLine is one result of go test -bench.
type benchmarkLine struct {
	name   string
	values values
}

// parseBenchmarks reads lines such as
//
//	BenchmarkUseCached-2   	32430540	        31.33 ns/op	       0 B/op	       0 allocs/op
func parseBenchmarks(text string) []benchmarkLine {
	var all []benchmarkLine
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 4 || !strings.HasPrefix(fields[0], "Benchmark") {
			continue
		}
		name := strings.TrimPrefix(fields[0], "Benchmark")
		if i := strings.LastIndex(name, "-"); i > 0 {
			name = name[:i] // the number of processors
		}
		b := benchmarkLine{name: name, values: values{}}
		for i := 2; i+1 < len(fields); i += 2 {
			var v float64
			if _, err := fmt.Sscan(fields[i], &v); err != nil {
				continue
			}
			switch fields[i+1] {
			case "ns/op":
				b.values["ns"] = v
			case "allocs/op":
				b.values["allocs"] = v
			}
		}
		all = append(all, b)
	}
	return all
}
