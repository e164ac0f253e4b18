//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/onecopy/onecopy/registry"
)

const (
	langGo     = "go"
	langPython = "python"
)

// cell is what a trial is one of several rounds of.
type cell struct {
	Size    int64  `json:"model_bytes"`
	Lang    string `json:"lang"`
	Way     string `json:"way"`
	Workers int    `json:"workers"`
	Users   int    `json:"users_per_worker"`
}

func (c cell) copies() int64 { return int64(c.Workers) * int64(c.Users) }

// need is the memory that a trial of the cell takes beyond what is in use before it.
func (c cell) need() int64 {
	switch c.Way {
	case wayPrivate, "safetensors-load", "safetensors-open":
		return c.copies() * c.Size
	case wayEmpty:
		return c.Size
	}
	return 0
}

// trial is one measured run. Times are from the moment before the first worker of the run was started; "first"
// and "last" are the first and the last worker to get there. Bytes are sums over all workers.
type trial struct {
	cell
	Round int `json:"round"`

	Memory     int64 `json:"memory_bytes"`      // PSS of the model's pages
	Registry   int64 `json:"registry_bytes"`    // PSS of the registry's table and manifest
	Tables     int64 `json:"page_table_bytes"`  // VmPTE less an idle worker's
	Huge       int64 `json:"huge_mapped_bytes"` // resident model bytes mapped by 2 MiB entries
	Tmpfs      int64 `json:"tmpfs_bytes"`       // what the registry's folder occupies
	PageCache  int64 `json:"page_cache_bytes"`  // the source file in the page cache; -1 unknown
	IdleTables int64 `json:"idle_page_table_bytes"`

	StartFirst  float64 `json:"start_first_ms"` // the worker's own first statement
	StartLast   float64 `json:"start_last_ms"`
	UsableFirst float64 `json:"usable_first_ms"` // the first byte of the model
	UsableLast  float64 `json:"usable_last_ms"`
	ReadFirst   float64 `json:"read_first_ms"` // the last byte of the model
	ReadLast    float64 `json:"read_last_ms"`
	AttachMid   float64 `json:"attach_median_ms"` // own first statement to first byte
	AttachMax   float64 `json:"attach_max_ms"`
	Scan1Mid    float64 `json:"first_scan_median_ms"` // first byte to last byte
	Scan1Max    float64 `json:"first_scan_max_ms"`
	Scan2Mid    float64 `json:"second_scan_median_ms"` // all workers released at once
	Scan2Max    float64 `json:"second_scan_max_ms"`
	AgainLast   float64 `json:"again_last_ms"` // kill -9 of all to the last worker's first byte; 0 not measured
	CPU         float64 `json:"cpu_ms"`        // user and system time of all workers until the kill

	// One process with several users only.
	AccessNS float64 `json:"access_ns,omitempty"`
	UseNS    float64 `json:"use_ns,omitempty"`
	FirstNS  float64 `json:"first_ns,omitempty"`

	peers bool // the way is one of peers.py
}

// bench holds what all trials share.
type bench struct {
	self   string // this program, for Go workers
	python string // the interpreter, "" when there is none
	// Of the Python workers: their environment, and why they cannot use the package onecopy ("" if they can).
	pythonEnv []string
	noPackage string
	script    string // worker.py
	work      string // folder on the local disk
	shm       string // folder on the tmpfs
	peers     map[string]*peer
}

// loaded is a model in a registry of its own.
type loaded struct {
	dir  string
	reg  *registry.Registry
	path string // the one file of the model
}

// load is the record of one load into an empty registry.
type load struct {
	Size      int64   `json:"model_bytes"`
	Round     int     `json:"round"`
	MS        float64 `json:"load_ms"`
	Collapsed int64   `json:"collapsed_bytes"`
	Copied    int64   `json:"copied_bytes"`
	Direct    int64   `json:"direct_bytes"`
	Fallbacks int     `json:"fallbacks"`
}

// load puts the model into an empty registry and then holds no lease: the model stays without any process.
func (b *bench) load(ctx context.Context, m modelFile, round int) (*loaded, load, error) {
	rec := load{Size: m.size, Round: round}
	dir, err := os.MkdirTemp(b.shm, "registry-")
	if err != nil {
		return nil, rec, err
	}
	if err := errors.Join(prewarm(m.size), m.warm()); err != nil {
		return nil, rec, err
	}
	l := &loaded{dir: dir}
	if l.reg, err = registry.Open(dir, nil); err != nil {
		return nil, rec, err
	}
	begin := monotonic()
	model, err := l.reg.GetOrLoad(ctx, modelKey, registry.Source{Path: m.path})
	if err != nil {
		return nil, rec, errors.Join(err, l.remove())
	}
	rec.MS = milliseconds(monotonic() - begin)
	fill := model.Info().Fill
	rec.Collapsed, rec.Copied, rec.Direct, rec.Fallbacks = fill.Collapsed, fill.Copied, fill.Direct, fill.Fallbacks
	l.path = filepath.Join(model.Path(), model.Files()[0].Path)
	return l, rec, model.Close()
}

func (l *loaded) remove() error {
	return errors.Join(l.reg.Close(), os.RemoveAll(l.dir))
}

// run runs one trial. reg is the registry that has the model already, used by the way onecopy only.
func (b *bench) run(ctx context.Context, c cell, m modelFile, reg *loaded, round int) (t trial, err error) {
	t = trial{cell: c, Round: round}
	at := where{}
	dir := ""
	if p := b.peers[c.Way]; p != nil && p.Data == "" {
		t.peers = true
	} else if p != nil {
		at.modelPath = p.Data
		if at.model, err = identify(p.Data); err != nil {
			return t, err
		}
	}
	switch c.Way {
	case wayMmap:
		at.modelPath = m.path
		if at.model, err = identify(m.path); err != nil {
			return t, err
		}
	case wayOnecopy, wayPath:
		dir = reg.dir
		at.registry, at.modelPath = reg.dir, reg.path
		if at.model, err = identify(reg.path); err != nil {
			return t, err
		}
	case wayEmpty:
		if dir, err = os.MkdirTemp(b.shm, "registry-"); err != nil {
			return t, err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
		at.registry = dir
	}
	idle, libraries, err := b.idle(ctx, c)
	if t.peers {
		at.libraries = libraries
	}
	if err != nil {
		return t, err
	}
	t.IdleTables = idle.tables
	if err := errors.Join(prewarm(max(c.need(), 64<<20)), m.warm(), b.peers[c.Way].warm()); err != nil {
		return t, err
	}

	next := func() (command, error) { return b.worker(c, m, dir, reg) }
	check := m.check * uint64(c.Users)
	begin := monotonic()
	workers, err := startFleet(ctx, c.Workers, next)
	if err != nil {
		return t, err
	}
	defer func() { workers.kill() }()
	first, err := workers.reports(check)
	if err != nil {
		return t, err
	}
	t.times(first, begin)

	// The workers stand still now: each waits for a command.
	if c.Way == wayEmpty {
		if at.model, at.modelPath, err = published(dir); err != nil {
			return t, err
		}
	}
	if err := t.memory(workers, at, idle, dir, m); err != nil {
		return t, err
	}

	if err := workers.tell("read"); err != nil {
		return t, err
	}
	second, err := workers.reports(check)
	if err != nil {
		return t, err
	}
	scans := durations(second, func(r report) int64 { return r.Full - r.Start })
	t.Scan2Mid, t.Scan2Max = median(scans), last(scans)

	if c.Users > 1 {
		return t, t.access(workers[0], first[0])
	}

	// The clock runs from before the first kill: freeing private copies is part of starting again.
	begin = monotonic()
	t.CPU = milliseconds(int64(workers.kill()))
	if c.Way == wayEmpty {
		return t, nil // the registry is no longer empty: this would be the way onecopy
	}
	if workers, err = startFleet(ctx, c.Workers, next); err != nil {
		return t, err
	}
	again, err := workers.reports(check)
	if err != nil {
		return t, err
	}
	t.AgainLast = last(durations(again, func(r report) int64 { return r.Usable - begin }))
	return t, nil
}

// worker returns the command line of one worker of the cell.
func (b *bench) worker(c cell, m modelFile, dir string, reg *loaded) (command, error) {
	if c.Lang == langGo {
		return command{argv: []string{b.self, workerCommand, c.Way, m.path, dir, strconv.Itoa(c.Users)}}, nil
	}
	return b.pythonWorker(c, m, dir, reg)
}

// idle measures a worker that has no model, but the libraries of the cell's way: its pages, and which files they
// are of.
func (b *bench) idle(ctx context.Context, of cell) (pages, map[fileID]bool, error) {
	c := cell{Lang: of.Lang, Way: wayIdle, Workers: 1}
	switch {
	case b.peers[of.Way] != nil:
		c.Way += ":" + of.Way
	case of.Lang == langPython && usesPackage(of.Way):
		c.Way += ":onecopy"
	}
	workers, err := startFleet(ctx, 1, func() (command, error) { return b.worker(c, modelFile{}, "", nil) })
	if err != nil {
		return pages{}, nil, err
	}
	defer workers.kill()
	if _, err := workers.reports(0); err != nil {
		return pages{}, nil, err
	}
	pid := workers[0].cmd.Process.Pid
	files, err := mappedFiles(pid)
	if err != nil {
		return pages{}, nil, err
	}
	p, err := measure(pid, where{})
	return p, files, err
}

// published finds the model in a registry that a worker filled.
func published(dir string) (fileID, string, error) {
	reg, err := registry.Open(dir, nil)
	if err != nil {
		return fileID{}, "", err
	}
	defer reg.Close()
	model, err := reg.Get(modelKey)
	if err != nil {
		return fileID{}, "", err
	}
	defer model.Close()
	path := filepath.Join(model.Path(), model.Files()[0].Path)
	id, err := identify(path)
	return id, path, err
}

func (t *trial) times(reports []report, begin int64) {
	starts := durations(reports, func(r report) int64 { return r.Start - begin })
	usable := durations(reports, func(r report) int64 { return r.Usable - begin })
	full := durations(reports, func(r report) int64 { return r.Full - begin })
	attach := durations(reports, func(r report) int64 { return r.Usable - r.Start })
	scans := durations(reports, func(r report) int64 { return r.Full - r.Usable })
	t.StartFirst, t.StartLast = starts[0], last(starts)
	t.UsableFirst, t.UsableLast = usable[0], last(usable)
	t.ReadFirst, t.ReadLast = full[0], last(full)
	t.AttachMid, t.AttachMax = median(attach), last(attach)
	t.Scan1Mid, t.Scan1Max = median(scans), last(scans)
}

func (t *trial) memory(workers fleet, at where, idle pages, dir string, m modelFile) error {
	var sum pages
	for _, p := range workers {
		one, err := measure(p.cmd.Process.Pid, at)
		if err != nil {
			return p.failed(err)
		}
		sum.add(one)
	}
	n := int64(len(workers))
	t.Memory, t.Registry, t.Huge = sum.model, sum.registry, sum.huge
	if t.Way == wayPrivate {
		// Private copies are in anonymous memory: all of it, less what a worker without a model has.
		t.Memory = sum.anonymous - n*idle.anonymous
	}
	if t.peers {
		// Whatever kind of memory it is, with all that the library needs for it, but not the library: its
		// pages are shared, the more the more workers there are.
		t.Memory = max(sum.total-n*idle.anonymous, 0)
	}
	t.Tables = max(sum.tables-n*idle.tables, 0)
	t.PageCache = m.cached()
	if dir == "" {
		return nil
	}
	var err error
	t.Tmpfs, err = usage(dir)
	return err
}

// access asks the one worker what one more user costs.
func (t *trial) access(worker *process, first report) error {
	if err := worker.tell("access"); err != nil {
		return worker.failed(err)
	}
	rep, err := worker.report()
	if err != nil {
		return err
	}
	t.AccessNS, t.UseNS, t.FirstNS = rep.AccessNS, rep.UseNS, float64(first.FirstNS)
	return nil
}

// durations are milliseconds in ascending order.
func durations(reports []report, of func(report) int64) []float64 {
	var all []float64
	for _, r := range reports {
		all = append(all, milliseconds(of(r)))
	}
	return sorted(all)
}

func milliseconds(ns int64) float64 { return float64(ns) / float64(time.Millisecond) }

// skipped is a cell that was not run, with the reason.
type skipped struct {
	cell
	Reason string `json:"reason"`
}

// room returns why a cell cannot be run now, or "".
func (b *bench) room(c cell) string {
	free, err := available()
	if err != nil {
		return err.Error()
	}
	// A part stays free for the page cache of the source and for everybody else.
	if need := c.need() + c.Size; c.need() > 0 && need > free*9/10 {
		return fmt.Sprintf("needs %s of memory with the page cache; %s of the available %s may be used", mega(need), mega(free*9/10), mega(free))
	}
	return ""
}
