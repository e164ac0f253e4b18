//go:build amd64 || arm64

package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/registry"
)

// trace chooses the model of each access.
type trace string

const (
	zipf  trace = "zipf"  // some models are used much more than others
	scan  trace = "scan"  // all processes together walk through all models, in a ring
	mixed trace = "mixed" // zipf, and now and then somebody walks
)

var traces = []trace{zipf, scan, mixed}

// loadPlan is what a worker of overcommit is told.
type loadPlan struct {
	Dir      string
	Journal  string
	Position string // a file with a byte for each step of scan that somebody made
	Number   int    // of this process, never given twice
	Seed     uint64
	Trace    trace
	Sizes    []int64
	Think    time.Duration // mean pause between two accesses
	Hog      int64         // bytes that this one collects before it gives all back; 0: it is none
}

// rng is what a process decides by: the same for the same seed and process.
func rng(seed uint64, number int) *rand.Rand {
	return rand.New(rand.NewPCG(seed, uint64(number)))
}

// maxLong is how long a lease is held beside other accesses, at most.
const maxLong = 2 * time.Second

func loadWorker(arg json.RawMessage) error {
	var p loadPlan
	if err := json.Unmarshal(arg, &p); err != nil {
		return err
	}
	ended := untilEnd()
	log, err := newJournal(p.Journal)
	if err != nil {
		return err
	}
	position, err := os.OpenFile(p.Position, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	reg, err := registry.Open(p.Dir, nil)
	if err != nil {
		return err
	}
	w := &worker{plan: p, log: log, reg: reg, random: rng(p.Seed, p.Number), position: position}
	w.zipf = rand.NewZipf(w.random, 1.1, 4, uint64(len(p.Sizes)-1))
	for {
		select {
		case <-ended:
			if err := w.dropAll(); err != nil {
				return err
			}
			return reg.Close()
		default:
		}
		if err := w.step(); err != nil {
			return err
		}
		time.Sleep(time.Duration(w.random.Int64N(2*int64(p.Think) + 1)))
	}
}

type worker struct {
	plan     loadPlan
	log      *journal
	reg      *registry.Registry
	random   *rand.Rand
	zipf     *rand.Zipf
	position *os.File
	next     int // access
	steps    int // of the trace
	long     []lease
	hoard    int64
}

// lease is held across accesses.
type lease struct {
	id, key int
	m       *registry.Model
	until   time.Time
}

func (w *worker) choose() (int, error) {
	n := len(w.plan.Sizes)
	w.steps++
	if w.plan.Hog > 0 { // each one only once, whatever the others do
		return (w.plan.Number*31 + w.steps) % n, nil
	}
	if w.plan.Trace == scan || w.plan.Trace == mixed && w.steps/50%4 == 3 {
		// The kernel appends one byte after the other: no two get the same place.
		if _, err := w.position.Write([]byte{0}); err != nil {
			return 0, err
		}
		at, err := w.position.Seek(0, io.SeekCurrent)
		return int(at) % n, err
	}
	return int(w.zipf.Uint64()*7919) % n, nil
}

// step is one access, and the end of leases whose time is over.
func (w *worker) step() error {
	key, err := w.choose()
	if err != nil {
		return err
	}
	w.next++
	id, size := w.next, w.plan.Sizes[key]
	say := func(event string, more ...any) error {
		return w.log.write(append([]any{event, id, clock()}, more...)...)
	}
	announced, declared := size, size
	switch w.random.IntN(16) {
	case 0:
		announced = 0 // not known before the load, but then
	case 1:
		announced, declared = 0, -1 // not known before all of it is written
	}
	if err := say(evBegin, key, announced == 0); err != nil {
		return err
	}
	m, err := w.reg.GetOrLoad(context.Background(), modelKey(key), registry.Source{
		Version: "1", Size: announced,
		Load: func(_ context.Context, to *registry.Writer) error {
			if err := say(evClaim); err != nil {
				return err
			}
			return writeModel(to, key, size, declared)
		},
	})
	switch {
	case errors.Is(err, registry.ErrNoSpace):
		if err := say(evFull, err); err != nil || w.plan.Hog == 0 {
			return err
		}
		w.hoard = 0
		return w.dropAll()
	case err != nil:
		return say(evFail, err)
	}
	event := evHit
	if !m.Info().AlreadyPresent {
		event = evLoad
	}
	if err := say(event, m.Generation()); err != nil {
		return err
	}
	if err := w.verify(id, key, m, 8); err != nil {
		return err
	}
	l := lease{id, key, m, time.Now()}
	switch {
	case w.plan.Hog > 0:
		l.until = l.until.Add(time.Hour)
		if w.hoard += size; w.hoard >= w.plan.Hog {
			w.hoard = 0
			w.long = append(w.long, l)
			return w.dropAll()
		}
	case w.random.IntN(40) == 0:
		l.until = l.until.Add(time.Duration(w.random.Int64N(int64(maxLong))))
	}
	w.long = append(w.long, l)
	return w.dropUntil(time.Now())
}

// dropUntil gives back what has been held long enough, after a look at all of it.
func (w *worker) dropUntil(t time.Time) error {
	var keep []lease
	for _, l := range w.long {
		if l.until.After(t) {
			keep = append(keep, l)
			continue
		}
		if err := w.drop(l); err != nil {
			return err
		}
	}
	w.long = keep
	return nil
}

func (w *worker) dropAll() error { return w.dropUntil(time.Now().Add(2 * time.Hour)) }

func (w *worker) drop(l lease) error {
	if err := w.verify(l.id, l.key, l.m, int(w.plan.Sizes[l.key]/tagEvery)); err != nil {
		return err
	}
	if err := w.log.write(evDrop, l.id, clock()); err != nil {
		return err
	}
	if err := l.m.Close(); err != nil {
		return err
	}
	return w.log.write(evGone, l.id, clock())
}

// verify reads n tags of a model: all of them if it has not more.
func (w *worker) verify(id, key int, m *registry.Model, n int) error {
	b, err := m.Bytes(modelFile)
	if err != nil {
		return w.log.write(evWrong, id, clock(), err)
	}
	if int64(len(b)) != w.plan.Sizes[key] {
		return w.log.write(evWrong, id, clock(), modelKey(key), "has", len(b), "bytes, not", w.plan.Sizes[key])
	}
	pages := len(b) / tagEvery
	for i := range min(n, pages) {
		page := i
		if n < pages {
			page = w.random.IntN(pages)
		}
		if got, want := binary.LittleEndian.Uint64(b[page*tagEvery:]), tag(key, page); got != want {
			return w.log.write(evWrong, id, clock(), fmt.Sprintf("%s, page %d: %#x, not %#x", modelKey(key), page, got, want))
		}
	}
	return w.log.write(evChecked, id, clock(), min(n, pages))
}

const (
	modelFile = "weights.bin"
	tagEvery  = 4096
)

// tag is what each page of a model begins with.
func tag(key, page int) uint64 { return uint64(key+1)<<32 | uint64(page) }

func writeModel(to *registry.Writer, key int, size, declared int64) error {
	f, err := to.Create(modelFile, declared)
	if err != nil {
		return err
	}
	chunk := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(chunk)) {
		chunk = chunk[:min(int64(len(chunk)), size-off)]
		for i := 0; i < len(chunk); i += tagEvery {
			binary.LittleEndian.PutUint64(chunk[i:], tag(key, int(off+int64(i))/tagEvery))
		}
		if _, err := f.Write(chunk); err != nil {
			return err
		}
	}
	return nil
}

// costOf is what the file system counts for a model: its payload, manifest and
// digests, in whole pages.
func costOf(size int64) int64 { return (size+4095)/4096*4096 + 2*4096 }

// observePlan is what the observer is told.
type observePlan struct {
	Dir, Journal string
	Every        time.Duration
}

// observe looks at the table's bytes and the file system again and again, and
// takes no lock. It knows nothing of package registry.
func observe(arg json.RawMessage) error {
	var p observePlan
	if err := json.Unmarshal(arg, &p); err != nil {
		return err
	}
	ended := untilEnd()
	log, err := newJournal(p.Journal)
	if err != nil {
		return err
	}
	b, err := mapShared(p.Dir+"/"+layout.Folder+"/"+layout.TableFile, unix.PROT_READ)
	if err != nil {
		return err
	}
	table, err := layout.NewTable(b)
	if err != nil {
		return err
	}
	last := make([]layout.Word, table.Slots())
	tick := time.NewTicker(p.Every)
	defer tick.Stop()
	for {
		from := clock()
		for slot := range table.Slots() {
			word, key := settled(table, slot)
			if word == last[slot] {
				continue
			}
			last[slot] = word
			if err := log.write("slot", slot, uint64(word), key); err != nil {
				return err
			}
		}
		u, err := measure(p.Dir)
		if err != nil {
			return err
		}
		if err := log.write("sample", from, clock(), u.all, u.table, u.linked); err != nil {
			return err
		}
		select {
		case <-ended:
			return nil
		case <-tick.C:
		}
	}
}

// settled reads a word and the key that was there with it.
func settled(t *layout.Table, slot int) (layout.Word, string) {
	for {
		w := t.Word(slot)
		key, _ := t.Key(slot)
		if t.Word(slot) == w {
			return w, key
		}
	}
}

// mapShared maps the whole of a file.
func mapShared(path string, prot int) ([]byte, error) {
	flags := os.O_RDONLY
	if prot&unix.PROT_WRITE != 0 {
		flags = os.O_RDWR
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return unix.Mmap(int(f.Fd()), 0, int(fi.Size()), prot, unix.MAP_SHARED)
}
