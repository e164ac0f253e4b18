//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/onecopy/onecopy/registry"
)

func evictCase(size int64) string { return "evict an idle model of " + gibi(size) }

// scaleEvict gets rid of an idle model of real size: for room, and on request.
func (s *session) scaleEvict(ctx context.Context, p shmctl, m modelFile) error {
	ways := []string{wayRoom, wayNoRoom, wayTrim, wayRm}
	return s.alternate(ctx, "scale", evictCase(m.size), s.roundsOr(5), ways, func(way string) (values, error) {
		return s.evictOnce(ctx, p, m, way)
	})
}

func (s *session) evictOnce(ctx context.Context, p shmctl, m modelFile, way string) (v values, err error) {
	const little = 1 << 20
	dir, err := os.MkdirTemp(s.shm, "registry-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := errors.Join(s.prewarm(m.size), m.warm()); err != nil {
		return nil, err
	}
	budget := m.size + little/2
	if way == wayNoRoom {
		budget += 2 * little
	}
	reg, err := registry.Open(dir, &registry.Options{Budget: budget})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, reg.Close()) }()
	big, err := reg.GetOrLoad(ctx, modelKey, registry.Source{Path: m.path})
	if err != nil {
		return nil, err
	}
	if err := big.Close(); err != nil {
		return nil, err
	}
	switch way {
	case wayTrim:
		v, err = timed(ctx, p.argv(dir, "trim", "--yes", "--to", "0")...)
	case wayRm:
		v, err = timed(ctx, p.argv(dir, "rm", "--yes", modelKey)...)
	default:
		v, err = metered(func() error {
			l, err := reg.GetOrLoad(ctx, "bench/little", registry.Source{Version: "1", Size: little, Load: func(_ context.Context, w *registry.Writer) error {
				f, err := w.Create("weights.bin", little)
				if err != nil {
					return err
				}
				_, err = f.Write(make([]byte, little))
				return errors.Join(err, f.Close())
			}})
			if err != nil {
				return err
			}
			return l.Close()
		})
	}
	if err != nil {
		return nil, err
	}
	_, err = reg.Entry(modelKey)
	switch gone := errors.Is(err, registry.ErrNotFound); {
	case way == wayNoRoom && err == nil, way != wayNoRoom && gone:
		return v, nil
	case err != nil && !gone:
		return nil, err
	default:
		return nil, fmt.Errorf("gone is %v after it", gone)
	}
}

func copiesCase(copies int, size int64) string {
	return fmt.Sprintf("scan for %d private copies of %s", copies, gibi(size))
}

// scaleScan lets shmctl look for private copies of a model that is loaded.
func (s *session) scaleScan(ctx context.Context, p shmctl, m modelFile) error {
	// Each copy, that of another model, and the one in the registry.
	if why := s.roomFor(int64(s.o.copies+2) * m.size); why != "" {
		s.note("scale: no scan: %s", why)
		return nil
	}
	l, _, err := s.bench.load(ctx, m, 0)
	if err != nil {
		return err
	}
	other := filepath.Join(s.work, "other.bin")
	err = writeOther(m.path, other)
	if err == nil {
		err = s.scanCopies(ctx, p, m, l, other)
	}
	return errors.Join(err, l.remove(), os.RemoveAll(other))
}

func (s *session) scanCopies(ctx context.Context, p shmctl, m modelFile, l *loaded, other string) error {
	sources := []string{other}
	for range s.o.copies {
		sources = append(sources, m.path)
	}
	next := 0
	workers, err := startFleet(ctx, len(sources), func() (command, error) {
		next++
		return command{argv: []string{s.self, taskCommand, "copy", sources[next-1]}}, nil
	})
	if err != nil {
		return err
	}
	defer func() { workers.kill() }()
	for _, w := range workers {
		if err := w.next(&values{}); err != nil {
			return err
		}
	}
	holds := map[int]bool{}
	for _, w := range workers[1:] {
		holds[w.cmd.Process.Pid] = true
	}
	return s.alternate(ctx, "scale", copiesCase(s.o.copies, m.size), s.roundsOr(3), []string{wayScan}, func(string) (values, error) {
		return scanOnce(ctx, p, l.dir, m.size, holds, workers[0].cmd.Process.Pid)
	})
}

// scanOnce runs a scan and compares what it found with what is there: copies in holds, another model in other.
func scanOnce(ctx context.Context, p shmctl, dir string, size int64, holds map[int]bool, other int) (values, error) {
	argv := p.argv(dir, "scan", modelKey, "-o", "json")
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	begin := monotonic()
	out, err := cmd.Output()
	wall := monotonic() - begin
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, &stderr)
	}
	var doc struct {
		Models []struct {
			Reclaimable int64 `json:"reclaimable_bytes"`
		} `json:"models"`
		Processes []struct {
			PID     int   `json:"pid"`
			Private int64 `json:"private_bytes"`
		} `json:"processes"`
	}
	if err := json.Unmarshal(out, &doc); err != nil {
		return nil, err
	}
	if len(doc.Models) != 1 {
		return nil, fmt.Errorf("%d models in %s", len(doc.Models), out)
	}
	missed, wrong, elsewhere := len(holds), 0, 0
	reclaimable := doc.Models[0].Reclaimable
	for _, one := range doc.Processes {
		switch {
		case one.Private == 0:
		case holds[one.PID]:
			missed--
		case one.PID == other:
			wrong++
		default:
			// The buffer of this process by which the model was written is full of it, and
			// so is the memory of another run of this program.
			elsewhere++
			reclaimable -= one.Private
		}
	}
	want := float64(size) * float64(len(holds))
	return values{
		"wall_ms":       milliseconds(wall),
		"cpu_ms":        milliseconds(int64(cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime())),
		"missed":        float64(missed),
		"wrong":         float64(wrong),
		"elsewhere":     float64(elsewhere),
		"error_percent": 100 * math.Abs(float64(reclaimable)-want) / want,
	}, nil
}

// writeOther writes a model of the same architecture: the same head and the same size, other weights.
func writeOther(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.Create(to)
	if err != nil {
		return err
	}
	defer dst.Close()
	buf := make([]byte, chunkBytes)
	head := 4096
	for {
		n, err := io.ReadFull(src, buf)
		if n > 0 {
			for at := head; at+8 <= n; at += 8 {
				binary.LittleEndian.PutUint64(buf[at:], 0x9e3779b97f4a7c15*binary.LittleEndian.Uint64(buf[at:]))
			}
			head = 0
			if _, err := dst.Write(buf[:n]); err != nil {
				return err
			}
		}
		switch err {
		case nil:
		case io.EOF, io.ErrUnexpectedEOF:
			return dst.Close()
		default:
			return err
		}
	}
}

// taskCopy reads a file into memory of its own and keeps it until its standard input ends.
func taskCopy(t terminal, args []string) error {
	if err := need(args, "FILE"); err != nil {
		return err
	}
	data, err := os.ReadFile(args[0])
	if err != nil {
		return err
	}
	if err := t.answer(values{"bytes": float64(len(data))}); err != nil {
		return err
	}
	for t.wait() {
	}
	sink += data[len(data)-1] // it was kept until here
	return nil
}
