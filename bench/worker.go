//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/registry"
)

// The names of the ways, as in flags and results. wayIdle is a worker that has no model at all: what it
// uses is taken off what the others use.
const (
	wayPrivate = "private"
	wayMmap    = "mmap"
	wayOnecopy = "onecopy"
	wayEmpty   = "onecopy-empty"
	wayPath    = "onecopy-path"
	wayObject  = "onecopy-object" // one of peers.py: get_or_load
	wayIdle    = "idle"
)

// workerCommand is the hidden subcommand under which this program starts itself as a worker:
//
//	bench worker WAY SOURCE REGISTRY USERS
//
// A worker answers one line of JSON when it has read its model once and one per command on its standard
// input ("read", "access"), and ends at the end of its input.
const workerCommand = "worker"

// modelKey is the model's key in the registry of the benchmark.
const modelKey = "bench/model"

// report is one line of a worker. All stamps are nanoseconds of CLOCK_MONOTONIC.
type report struct {
	Start  int64  `json:"start"`  // the program's own first statement, or the start of a further read
	Usable int64  `json:"usable"` // the first byte of the model was read
	Full   int64  `json:"full"`   // the last byte of the model was read
	Check  uint64 `json:"check"`
	Error  string `json:"error,omitempty"`

	// Only after "access": the cost of one further access in this process.
	AccessNS float64 `json:"access_ns,omitempty"`
	UseNS    float64 `json:"use_ns,omitempty"`
	// Only in a worker that loaded: what its first user waited for.
	FirstNS int64 `json:"first_ns,omitempty"`
}

func monotonic() int64 {
	var ts unix.Timespec
	// It cannot fail for this clock.
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return ts.Nano()
}

// user is one user's access to the model.
type user struct {
	data  []byte
	close func() error
}

// goWorker is a worker process while it lives.
type goWorker struct {
	way, source string
	reg         *registry.Registry
	users       []user
	buf         []byte
}

// workerMain is the whole life of a Go worker.
func workerMain(args []string, stdin io.Reader, stdout io.Writer) int {
	start := monotonic()
	out := json.NewEncoder(stdout)
	w := &goWorker{buf: make([]byte, chunkBytes)}
	first, err := w.open(args)
	if err != nil {
		_ = out.Encode(report{Error: err.Error()})
		return 1
	}
	first.Start = start
	w.read(&first)
	if err := out.Encode(first); err != nil {
		return 1
	}
	for lines := bufio.NewScanner(stdin); lines.Scan(); {
		next := report{Start: monotonic()}
		switch lines.Text() {
		case "read":
			w.read(&next)
		case "access":
			if err := w.access(&next); err != nil {
				next.Error = err.Error()
			}
		}
		if err := out.Encode(next); err != nil {
			return 1
		}
	}
	// A leak would be the benchmark's own mistake, and Close of the registry would tell.
	for _, u := range w.users {
		if err := u.close(); err != nil {
			fmt.Fprintln(os.Stderr, "bench worker:", err)
			return 1
		}
	}
	if w.reg != nil {
		if err := w.reg.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "bench worker:", err)
			return 1
		}
	}
	return 0
}

// open gives every user the model and reads the first byte as each of them.
func (w *goWorker) open(args []string) (report, error) {
	var rep report
	if len(args) != 4 {
		return rep, fmt.Errorf("%s takes WAY SOURCE REGISTRY USERS", workerCommand)
	}
	w.way, w.source = args[0], args[1]
	users, err := strconv.Atoi(args[3])
	if err != nil {
		return rep, err
	}
	if w.way == wayIdle {
		return rep, nil
	}
	begin := monotonic()
	if w.way == wayOnecopy || w.way == wayEmpty {
		if w.reg, err = registry.Open(args[2], nil); err != nil {
			return rep, err
		}
	}
	for range users {
		u, err := w.attach()
		if err != nil {
			return rep, err
		}
		w.users = append(w.users, u)
		rep.Check += uint64(u.data[0]) // the first byte is read here
		if len(w.users) == 1 {
			rep.FirstNS = monotonic() - begin
		}
	}
	rep.Usable = monotonic()
	return rep, nil
}

// attach is one way to get the weights, as one would write it in a program.
func (w *goWorker) attach() (user, error) {
	switch w.way {
	case wayPrivate:
		data, err := os.ReadFile(w.source)
		return user{data, func() error { return nil }}, err
	case wayMmap:
		f, err := os.Open(w.source)
		if err != nil {
			return user{}, err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return user{}, err
		}
		data, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
		return user{data, func() error { return unix.Munmap(data) }}, os.NewSyscallError("mmap", err)
	case wayOnecopy, wayEmpty:
		var m *registry.Model
		var err error
		if w.way == wayEmpty {
			m, err = w.reg.GetOrLoad(context.Background(), modelKey, registry.Source{Path: w.source})
		} else {
			m, err = w.reg.Get(modelKey)
		}
		if err != nil {
			return user{}, err
		}
		data, err := m.Bytes(m.Files()[0].Path)
		return user{data, m.Close}, err
	}
	return user{}, fmt.Errorf("unknown way %q", w.way)
}

// read reads the whole model as each user.
func (w *goWorker) read(rep *report) {
	rep.Check = 0
	for _, u := range w.users {
		rep.Check += scan(u.data, w.buf)
	}
	rep.Full = monotonic()
}

// access measures what one more user of the model costs in this process.
func (w *goWorker) access(rep *report) error {
	enough := 200 * time.Millisecond
	if w.way == wayPrivate {
		enough = 0 // one more copy is memory enough
	}
	var err error
	rep.AccessNS, err = perCall(enough, func() error {
		u, err := w.attach()
		if err != nil {
			return err
		}
		rep.Check += uint64(u.data[0])
		return u.close()
	})
	if err != nil || w.reg == nil {
		return err
	}
	name := ""
	rep.UseNS, err = perCall(enough, func() error {
		return w.reg.Use(modelKey, func(m *registry.Model) error {
			if name == "" {
				name = m.Files()[0].Path
			}
			data, err := m.Bytes(name)
			if err != nil {
				return err
			}
			rep.Check += uint64(data[0])
			return nil
		})
	})
	w.reg.Release(modelKey)
	return err
}

// perCall doubles the number of calls until they take long enough to be measured.
func perCall(enough time.Duration, call func() error) (float64, error) {
	for calls := 1; ; calls *= 2 {
		begin := monotonic()
		for range calls {
			if err := call(); err != nil {
				return 0, err
			}
		}
		if took := monotonic() - begin; took >= int64(enough) {
			return float64(took) / float64(calls), nil
		}
	}
}
