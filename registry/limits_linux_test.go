//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/proctest"
)

// Limits of a process, and processes that meet at the very beginning.

// together: dir, barrier dir, how many. They open a registry that nobody has made
// yet at the same moment.
var together = child("open-together", func(args []string) error {
	n, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	proctest.Barrier(args[1], n)
	r, err := Open(args[0], nil)
	if err != nil {
		return say(reportOf(err))
	}
	s, err := r.Stats()
	if err != nil {
		return err
	}
	m, err := r.GetOrLoad(ctxb, fmt.Sprint("k/", os.Getpid()%5), small("1"))
	if err != nil {
		return say(reportOf(err))
	}
	m.Close()
	return errors.Join(say(report{Is: []string{fmt.Sprint(s.Epoch)}}), r.Close())
})

func TestManyProcessesMakeOneRegistry(t *testing.T) {
	n := 24
	if testing.Short() {
		n = 8
	}
	dir, tmp := proctest.TmpRegistry(t), t.TempDir()
	var all []*proctest.Proc
	for range n {
		all = append(all, proctest.Start(t, together, dir, tmp, fmt.Sprint(n)))
	}
	epochs := map[string]bool{}
	for _, p := range all {
		rep := lastWord[report](t, p)
		if rep.Text != "" {
			t.Errorf("%+v", rep)
			continue
		}
		epochs[rep.Is[0]] = true
	}
	if len(epochs) != 1 {
		t.Errorf("%d tables", len(epochs))
	}
	wantSound(t, dir)
}

// fewDescriptors: dir, source. It leaves itself no descriptor more, call by call.
var fewDescriptors = child("few-descriptors", func(args []string) error {
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	m, err := r.GetOrLoad(ctxb, "k", small("1"))
	if err != nil {
		return err
	}
	if err := m.Close(); err != nil {
		return err
	}
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		return err
	}
	next, err := os.Open("/dev/null") // the number of the next free descriptor
	if err != nil {
		return err
	}
	free := uint64(next.Fd())
	next.Close()
	var wrong []string
	limited, fine := 0, 0
	for n := free; n < free+12; n++ {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: was.Max}); err != nil {
			return err
		}
		m, err := r.Get("k")
		note := func(what string, err error) {
			switch {
			case err == nil:
				fine++
			case errors.Is(err, ErrLimit):
				limited++
			default:
				wrong = append(wrong, fmt.Sprintf("%d descriptors, %s: %v", n-free, what, err))
			}
		}
		note("Get", err)
		if m != nil {
			m.Close()
		}
		for _, src := range []Source{small("1"), {Path: args[1]}} {
			m, err := r.GetOrLoad(ctxb, "other", src)
			note("GetOrLoad", err)
			if m != nil {
				m.Close()
				note("Remove", r.Remove(ctxb, "other"))
			}
		}
		again, err := Open(args[0], nil)
		note("Open", err)
		if again != nil {
			again.Close()
		}
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		return err
	}
	return errors.Join(say(fewAnswer{wrong, limited, fine}), r.Close())
})

type fewAnswer struct {
	Wrong         []string
	Limited, Fine int
}

func TestTooFewDescriptorsAreATypedError(t *testing.T) {
	dir := proctest.TmpRegistry(t)
	openRegistry(t, dir, nil) // for the checks at the end
	src := fileSource(t, "w.bin", randomBytes(1, 5<<20))
	a := runChild[fewAnswer](t, fewDescriptors, dir, src.Path)
	for _, w := range a.Wrong {
		t.Error(w)
	}
	if a.Limited == 0 || a.Fine == 0 {
		t.Errorf("%d calls met the limit, %d did not: the test tests nothing", a.Limited, a.Fine)
	}
}
