//go:build linux

package main

import (
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
)

// The board is memory that the controller shares with its workers, so that what a
// process did is known after it was killed. It is no part of a registry.
//
// It has a line of 16 words for each worker, then a ring of deaths, then a word for
// each load lock of the steady registry: the process that took it last. The Python
// worker writes the same words: worker.py has the numbers too.
const (
	wordDoing     = iota // 1 while an operation of the protocol runs
	wordOps              // operations begun
	wordLoads            // load functions entered, or sources opened
	wordReplaces         // of them, for a key that had a generation
	wordBig              // of them, with two or more windows
	wordModels           // models whose bytes were compared with their source
	wordBytes            // bytes compared
	wordWaits            // loads for which the load lock was had because its owner had died meanwhile
	wordLate             // of them, with the lock later than lateAfter after the death
	wordSlowest          // the longest time between the two, in ns
	wordBegan            // the longest time from a death until the next load began, in ns
	wordKillsMark        // other workers killed right after evict.mark
	wordKillsLink        // and right after load.link-payload
	wordShifted          // workers whose clock was wrong
	wordOverrun          // the longest time that a call took beyond its deadline, in ns
	lineWords     = 16

	ringDeaths = 4096
)

type board struct {
	words []atomic.Uint64
	slots int
}

func boardSize(slots int) int { return 8 * (slots*lineWords + 1 + 2*ringDeaths + layout.Stripes) }

func openBoard(path string, slots int) (*board, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := f.Truncate(int64(boardSize(slots))); err != nil {
		return nil, err
	}
	b, err := unix.Mmap(int(f.Fd()), 0, boardSize(slots), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mmap %s: %w", path, err)
	}
	return &board{unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(&b[0])), len(b)/8), slots}, nil
}

func (b *board) word(slot, word int) *atomic.Uint64 { return &b.words[slot*lineWords+word] }

// longest keeps the longest time that a worker has seen.
func (b *board) longest(slot, word int, ns uint64) {
	w := b.word(slot, word)
	w.Store(max(w.Load(), ns))
}

// take returns a line and clears it.
func (b *board) take(slot int) (line [lineWords]uint64) {
	for i := range line {
		line[i] = b.word(slot, i).Swap(0)
	}
	return line
}

// died notes when a process was dead, or was about to be.
func (b *board) died(pid int, at int64) {
	ring := b.words[b.slots*lineWords:]
	i := (ring[0].Add(1) - 1) % ringDeaths
	ring[1+2*i].Store(0)
	ring[2+2*i].Store(uint64(at))
	ring[1+2*i].Store(uint64(pid))
}

// deathOf returns when a process died, if that is not too long ago.
func (b *board) deathOf(pid int) (at int64, ok bool) {
	ring := b.words[b.slots*lineWords:]
	for i := range ringDeaths {
		if ring[1+2*i].Load() == uint64(pid) {
			return int64(ring[2+2*i].Load()), true
		}
	}
	return 0, false
}

// owner is the word of a load lock: who takes the lock puts his number there.
func (b *board) owner(stripe int) *atomic.Uint64 {
	return &b.words[b.slots*lineWords+1+2*ringDeaths+stripe]
}

// monotonic is a clock that all processes of a machine share.
func monotonic() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return ts.Nano()
}
