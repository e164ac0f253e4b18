//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"testing"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// What a running replacement has filled has no name yet, and it has told the table
// that little is still to come: the budget counts all that it was promised.
func TestPromiseOfARunningReplacement(t *testing.T) {
	was := noteEvery
	noteEvery = mib
	t.Cleanup(func() { noteEvery = was })
	r := newRegistry(t, &Options{Budget: 16 * mib})
	old := mustLoad(t, r, "k", sized(2*mib))
	running, goOn, done := make(chan struct{}), make(chan struct{}), make(chan error)
	src := one("w.bin", 6*mib, func(f *FileWriter) error {
		if err := fillUp(f, 5*mib); err != nil {
			return err
		}
		close(running)
		<-goOn
		return fillUp(f, mib)
	})
	src.Size, src.Replace = 6*mib, true
	go func() {
		m, err := r.GetOrLoad(ctxb, "k", src)
		if err == nil {
			m.Close()
		}
		done <- err
	}()
	<-running
	p := r.host.place
	f, _, err := p.find("k")
	must(t, err)
	if told := p.table.Hint(f.Slot, layout.HintReserved); told > 2*mib {
		t.Fatalf("the table was not told that %d bytes are still to come", told)
	}
	// 2 MiB are in use, 6 promised: 8 are left.
	_, err = r.GetOrLoad(ctxb, "other", sized(9*mib))
	wantErr(t, err, ErrNoSpace)
	wantText(t, err, "running loads still need 6.")
	loadIdle(t, r, "another", sized(4*mib))
	close(goOn)
	must(t, <-done)
	must(t, old.Close())
	if f, _, _ = p.find("k"); p.table.Hint(f.Slot, layout.HintPromised) != 0 {
		t.Error("promised after the end")
	}
	loadIdle(t, r, "other", sized(5*mib))
}

// The dead were promised nothing.
func TestPromiseToAKilledReplacer(t *testing.T) {
	dir := proctest.TmpRegistry(t)
	r := openRegistry(t, dir, &Options{Budget: 10 * mib})
	loadIdle(t, r, "k", small("1"))
	editTable(t, dir, func(e layout.Editor) {
		f, _ := e.Lookup("k")
		e.SetHint(f.Slot, layout.HintPromised, 9*mib)
	})
	loadIdle(t, r, "other", sized(6*mib))
	f, _, err := r.host.place.find("k")
	must(t, err)
	if n := r.host.place.table.Hint(f.Slot, layout.HintPromised); n != 0 {
		t.Errorf("still promised %d bytes", n)
	}
}
