//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"fmt"
	"strconv"
	"testing"

	"github.com/onecopy/onecopy/internal/proctest"
)

// forking: dir, key. It gets the model, forks a child that only waits for the end
// of stdin, says its number, and waits to be killed.
var forking = child("forking", func(args []string) error {
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	if _, err := r.Get(args[1]); err != nil {
		return err
	}
	pid, err := proctest.Fork()
	if err != nil {
		return err
	}
	fmt.Println(pid)
	select {}
})

// A child of fork has its parent's mappings, and with them its leases, for as long
// as it lives; whoever wants to know who holds the model is told.
func TestLeaseOfAForkedChild(t *testing.T) {
	r := newRegistry(t, nil)
	mustLoad(t, r, "k", small("1")).Close()
	p := proctest.Start(t, forking, r.Dir(), "k")
	pid, err := strconv.Atoi(p.Line(t))
	if err != nil {
		t.Fatalf("%v\n%s", err, p.Stderr())
	}
	p.Kill()
	err = r.Remove(ctxb, "k")
	wantErr(t, err, ErrInUse)
	wantText(t, err, fmt.Sprintf("pid %d", pid))
	hs, err := r.Holders("k")
	if err != nil || len(hs) != 1 || hs[0].PID != pid || hs[0].Via != "mapping" {
		t.Errorf("%+v, %v", hs, err)
	}
	if rep, err := r.GC(ctxb); err != nil || rep.Orphans != 0 {
		t.Errorf("%+v, %v", rep, err)
	}
	src := small("2")
	src.Replace = true
	mustLoad(t, r, "k", src)
	if s := stats(t, r); s.Superseded != 1 {
		t.Errorf("%+v", s)
	}
	p.Stdin.Close()
	proctest.AwaitEnd(t, pid)
	if rep, err := r.GC(ctxb); err != nil || rep.Orphans != 1 {
		t.Errorf("%+v, %v", rep, err)
	}
}
