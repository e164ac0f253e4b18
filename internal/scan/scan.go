// Package scan finds processes that hold copies of models in memory of their
// own, although they could share one.
//
// It compares bytes. Of each larger region of each process that may be read, a
// sample of the pages is compared with the models; a page counts only if at
// least a quarter of it is the same, byte for byte, as a place of a model, so a
// model of the same architecture with other weights never matches. Where the
// copy begins is not known and need not be aligned: a malloc'd buffer starts 16
// bytes into a page, a Python bytes object at 32, and a tensor anywhere. So the
// places of a model that are 32 distinctive bytes long, one in every page, are
// kept in an index by hash, and a page is looked up at each of its bytes. One
// hit tells where the whole copy must lie; after that pages are only compared.
//
// What this cannot find: weights that were converted (another type, repacked,
// quantised again), copies smaller than a region that is looked at, copies in
// swap, in huge pages of hugetlbfs or on a device. Pages of one repeated value,
// zero above all, never match.
//
// Nothing is stopped or written, and only pages that are in memory are read.
// The kernel walks the page tables of the process, as it does for any reader of
// smaps.
package scan

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/onecopy/onecopy/internal/procfs"
)

// Model is what to look for.
type Model struct {
	Name       string
	Registered bool     // its files lie in a registry: whoever maps them is attached
	Files      []string // paths
	Leases     []string // further files whose mapping means that a process is attached
}

// Options of Run; zero values are the defaults.
type Options struct {
	MinRegion   int64         // bytes in memory of a region that is looked at; 0: 1 MiB
	Samples     int           // pages of a region that are compared; 0: 2,048
	IndexMemory int64         // bytes for the index; 0: 64 MiB. Less makes small copies hard to find
	Time        time.Duration // stop looking after this; 0: no limit
	Threads     int           // 0: 1
	PIDs        []int         // only these; nil: all but this process
}

// Report is what was found.
type Report struct {
	Processes []Process // with anything to say, the largest private copies first
	Models    []Total   // in the order of the models

	Examined   int  // processes
	NotVisible int  // processes that must not be read
	SameUser   int  // those of NotVisible that are of this user
	Root       bool // this process is root's: what it cannot see needs more than that
	Outside    bool // this is not the machine's PID namespace: those outside are not even counted
	Complete   bool // false: the time was over
	SkippedFor int  // processes that were not, or not wholly, looked at for that
	Elapsed    time.Duration
}

// Process is one process that has to do with a model.
type Process struct {
	PID     int
	Command string
	UID     int
	Uses    []Use
}

// Use is what a process has of one model, in bytes.
type Use struct {
	Model     int   // index
	Private   int64 // estimated: memory of its own with the model's bytes. What fork shares is divided
	PageCache int64 // estimated: the same bytes in a file of a disk that it maps; already shared
	OtherShm  int64 // estimated: the same bytes in another file of shared memory
	Samples   int   // pages compared in the regions of Private
	Matched   int   // pages of those that had the model's bytes
	Attached  bool  // it maps the registry's files
	Resident  int64 // of those, in its page table
}

// Share of the samples that matched.
func (u Use) Share() float64 {
	if u.Samples == 0 {
		return 0
	}
	return float64(u.Matched) / float64(u.Samples)
}

// Total is what all processes have of one model.
type Total struct {
	Bytes       int64 // of its files
	Copies      int   // processes with private copies
	Private     int64
	PageCache   int   // processes that share it through the page cache
	OtherShm    int64 // in files of shared memory outside the registry, each counted once
	Attached    int   // processes
	Both        int   // processes that are attached and hold a private copy too
	Reclaimable int64 // Private and OtherShm, less the one copy that would still be needed
}

// Errors of Run.
var ErrNothing = errors.New("nothing to look for")

const (
	defaultMinRegion = 1 << 20
	defaultSamples   = 2048
	defaultIndex     = 64 << 20
)

// Run looks for the models. The error is that of a model's file, or of ctx.
func Run(ctx context.Context, models []Model, o Options) (*Report, error) {
	start := time.Now()
	o.MinRegion = cmp.Or(o.MinRegion, defaultMinRegion)
	o.Samples = cmp.Or(o.Samples, defaultSamples)
	o.IndexMemory = cmp.Or(o.IndexMemory, defaultIndex)
	x, err := newIndex(ctx, models, o.IndexMemory)
	if err != nil {
		return nil, err
	}
	defer x.close()
	s := &scanner{index: x, opts: o, shm: sharedMemory()}
	s.mu.empty, s.mu.shm = map[piece]bool{}, map[shmCopy]int64{}
	for i, m := range models {
		for _, path := range m.Leases {
			if id, err := identify(path); err == nil {
				x.attach[id] = i
			}
		}
	}
	pids := o.PIDs
	if pids == nil {
		if pids, err = procfs.PIDs(); err != nil {
			return nil, err
		}
		pids = slices.DeleteFunc(pids, func(pid int) bool { return pid == os.Getpid() })
	}
	scanCtx := ctx
	if o.Time > 0 {
		var cancel context.CancelFunc
		scanCtx, cancel = context.WithDeadline(ctx, start.Add(o.Time))
		defer cancel()
	}
	r := s.all(scanCtx, pids)
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r.Models = totals(models, x, r.Processes, s.mu.shm)
	r.Elapsed = time.Since(start)
	return r, nil
}

// scanner is one Run.
type scanner struct {
	index *index
	opts  Options
	shm   map[uint64]bool // devices

	mu struct {
		sync.Mutex
		empty map[piece]bool    // nothing of a model is in it
		shm   map[shmCopy]int64 // bytes
	}
}

// piece is a part of a file that many processes may map.
type piece struct {
	file   procfs.FileID
	offset uint64
	size   uint64
}

type shmCopy struct {
	file   procfs.FileID
	offset uint64
	model  int
}

// all looks at the processes, the largest first: when the time is over, the most
// has been seen.
func (s *scanner) all(ctx context.Context, pids []int) *Report {
	r := &Report{Root: os.Geteuid() == 0, Outside: !procfs.SeesEverybody()}
	var procs []procfs.Proc
	for _, pid := range pids {
		p, err := procfs.Process(pid)
		switch {
		case err != nil:
			if procfs.Hidden(pid, err) {
				r.NotVisible++
			}
		case p.VmRSS >= s.opts.MinRegion:
			procs = append(procs, p)
		default:
			r.Examined++ // nothing of the size is in it
		}
	}
	slices.SortFunc(procs, func(a, b procfs.Proc) int {
		return cmp.Or(cmp.Compare(b.VmRSS, a.VmRSS), cmp.Compare(a.PID, b.PID))
	})

	var mu sync.Mutex
	var wg sync.WaitGroup
	work := make(chan procfs.Proc)
	for range max(1, s.opts.Threads) {
		wg.Go(func() {
			e := newExaminer(s)
			for p := range work {
				uses, err := e.process(ctx, p.PID)
				mu.Lock()
				switch {
				case ctx.Err() != nil:
					r.SkippedFor++
				case err == nil:
					r.Examined++
				case errors.Is(err, fs.ErrPermission) && procfs.Hidden(p.PID, err):
					r.NotVisible++
					if p.UID == os.Geteuid() {
						r.SameUser++
					}
				}
				if len(uses) > 0 {
					r.Processes = append(r.Processes, Process{p.PID, p.Command, p.UID, uses})
				}
				mu.Unlock()
			}
		})
	}
	for _, p := range procs {
		work <- p
	}
	close(work)
	wg.Wait()
	r.Complete = r.SkippedFor == 0
	slices.SortFunc(r.Processes, func(a, b Process) int {
		return cmp.Or(cmp.Compare(b.private(), a.private()), cmp.Compare(a.PID, b.PID))
	})
	return r
}

func (p Process) private() (sum int64) {
	for _, u := range p.Uses {
		sum += u.Private
	}
	return sum
}

func totals(models []Model, x *index, ps []Process, shm map[shmCopy]int64) []Total {
	ts := make([]Total, len(models))
	for _, f := range x.files {
		ts[f.model].Bytes += f.size
	}
	for _, p := range ps {
		for _, u := range p.Uses {
			t := &ts[u.Model]
			t.Private += u.Private
			t.Copies += count(u.Private > 0)
			t.PageCache += count(u.PageCache > 0)
			t.Attached += count(u.Attached)
			t.Both += count(u.Attached && u.Private > 0)
		}
	}
	for c, n := range shm {
		ts[c.model].OtherShm += n
	}
	for i := range ts {
		t := &ts[i]
		t.Reclaimable = t.Private + t.OtherShm
		if !models[i].Registered {
			// The one that all would share has yet to be loaded.
			t.Reclaimable = max(0, t.Reclaimable-t.Bytes)
		}
	}
	return ts
}

func count(b bool) int {
	if b {
		return 1
	}
	return 0
}

// fileError says which model a file belongs to.
func fileError(m Model, err error) error { return fmt.Errorf("%s: %w", m.Name, err) }
