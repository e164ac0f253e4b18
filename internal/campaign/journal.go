//go:build linux && (amd64 || arm64)

package main

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// journal is a file of one line per event. Each line is one write, so that what
// happened before a kill -9 is there after it.
type journal struct{ f *os.File }

func newJournal(path string) (*journal, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o600)
	return &journal{f}, err
}

func (j *journal) write(words ...any) error {
	_, err := j.f.WriteString(fmt.Sprintln(words...))
	return err
}

// events calls fn with the words of each line. A last line without its end was
// being written when its process was killed.
func events(path string, fn func(words []string) error) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	n := 0
	sc := bufio.NewScanner(strings.NewReader(string(b)))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		n++
		words := strings.Fields(sc.Text())
		if len(words) == 0 {
			continue
		}
		if err := fn(words); err != nil {
			return fmt.Errorf("%s:%d: %w", path, n, err)
		}
	}
	return sc.Err()
}

// ints reads words as numbers.
func ints(words []string) ([]int64, error) {
	ns := make([]int64, len(words))
	for i, w := range words {
		n, err := strconv.ParseInt(w, 10, 64)
		if err != nil {
			return nil, err
		}
		ns[i] = n
	}
	return ns, nil
}

// access is one use of a model by one process: times are of clock, 0 is never.
type access struct {
	worker  int
	key     int
	silent  bool  // it did not say its size before the load
	begun   int64 // the call
	claimed int64 // its load function was called: the memory was granted
	got     int64 // the call returned with the model
	failed  int64 // it returned without one
	full    bool  // ... for want of memory
	reason  string
	gen     uint64
	loaded  bool
	drop    int64 // the lease is given back
	gone    int64 // it was
}

// end of what an access may have held; killed is the end of its process.
func (a *access) end(killed int64) int64 {
	switch {
	case a.gone != 0:
		return a.gone
	case a.failed != 0:
		return a.failed
	}
	return killed
}

// Events of a worker: kind, number of the access, time, and what else there is.
const (
	evBegin   = "begin"   // key, whether its size is kept back
	evClaim   = "claim"   //
	evHit     = "hit"     // generation
	evLoad    = "load"    // generation
	evFull    = "full"    // error
	evFail    = "fail"    // error
	evDrop    = "drop"    //
	evGone    = "gone"    //
	evWrong   = "wrong"   // what is wrong with the bytes
	evChecked = "checked" // number of tags that were read and found right
)

// workerLog is what one process wrote.
type workerLog struct {
	accesses []*access
	wrong    []string
	checked  int64
}

func readWorker(path string, worker int) (l workerLog, err error) {
	byID := map[string]*access{}
	err = events(path, func(w []string) error {
		if len(w) < 3 {
			return nil // cut off by a kill
		}
		at, err := strconv.ParseInt(w[2], 10, 64)
		if err != nil {
			return err
		}
		a := byID[w[1]]
		if w[0] == evBegin {
			if len(w) < 5 {
				return nil // cut off by a kill
			}
			a = &access{worker: worker, begun: at, silent: w[4] == "true"}
			byID[w[1]] = a
			l.accesses = append(l.accesses, a)
			a.key, err = strconv.Atoi(w[3])
			return err
		}
		if a == nil {
			return fmt.Errorf("access %s has no beginning", w[1])
		}
		switch w[0] {
		case evClaim:
			a.claimed = at
		case evHit, evLoad:
			a.got, a.loaded = at, w[0] == evLoad
			if len(w) == 4 {
				a.gen, err = strconv.ParseUint(w[3], 10, 64)
			}
		case evFull, evFail:
			a.failed, a.full, a.reason = at, w[0] == evFull, strings.Join(w[3:], " ")
		case evDrop:
			a.drop = at
		case evGone:
			a.gone = at
		case evWrong:
			l.wrong = append(l.wrong, strings.Join(w[3:], " "))
		case evChecked:
			n, err := ints(w[3:4])
			if err != nil {
				return err
			}
			l.checked += n[0]
		default:
			return fmt.Errorf("no event %q", w[0])
		}
		return err
	})
	return l, err
}
