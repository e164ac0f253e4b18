//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// Processes that share a tmpfs and not much else, as containers do: other numbers
// for the same process, the same number for others, other paths, other uids.

// contained: mounts, program, its arguments. In a mount namespace of its own it
// makes the mounts, of which each is a word: "proc", "bind:FROM:TO", "hide:DIR" or
// "tmpfs:DIR:OPTIONS"; then it is the program, under the same process number.
var contained = child("contained", func(args []string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private: %w", err)
	}
	for m := range strings.FieldsSeq(args[0]) {
		w := strings.Split(m, ":")
		var err error
		switch w[0] {
		case "proc":
			err = unix.Mount("proc", "/proc", "proc", 0, "")
		case "bind":
			err = unix.Mount(w[1], w[2], "", unix.MS_BIND, "")
		case "hide":
			err = unix.Mount("hidden", w[1], "tmpfs", 0, "size=4k")
		case "tmpfs":
			err = unix.Mount("tmpfs", w[1], "tmpfs", 0, w[2])
		}
		if err != nil {
			return fmt.Errorf("%s: %w", m, err)
		}
	}
	env := append(os.Environ(), "ONECOPY_PROCTEST_PROGRAM="+args[1])
	return unix.Exec("/proc/self/exe", append([]string{os.Args[0]}, args[2:]...), env)
})

// needNamespaces skips the test where no process can be started like this.
func needNamespaces(t *testing.T, attr *syscall.SysProcAttr) {
	t.Helper()
	needRoot(t)
	cmd := exec.Command("/proc/self/exe", "-test.run=^$")
	cmd.SysProcAttr = attr
	if err := cmd.Run(); err != nil {
		t.Skipf("no process can be started in such namespaces: %v", err)
	}
}

// inContainer starts a program in namespaces of its own.
func inContainer(t *testing.T, flags uintptr, mounts, program string, args ...string) *proctest.Proc {
	t.Helper()
	cmd := proctest.Env().Command(t, contained, append([]string{mounts, program}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
	return proctest.StartCmd(t, program, cmd)
}

// container is what differs most: process numbers, and mounts.
const container = unix.CLONE_NEWPID | unix.CLONE_NEWNS

// insider: dir, key. It says what it sees from within its container, and what it
// can do there.
var insider = child("insider", func(args []string) error {
	r, err := Open(args[0], &Options{LoadTimeout: 50 * time.Millisecond})
	if err != nil {
		return err
	}
	a := insideView{PID: os.Getpid()}
	if a.Entry, err = r.Entry(args[1]); err != nil {
		return err
	}
	if a.Report, err = r.HolderReport(args[1]); err != nil {
		return err
	}
	if a.GC, err = r.GC(ctxb); err != nil {
		return err
	}
	if a.Problems, err = r.Check(ctxb, CheckOptions{Data: true}); err != nil {
		return err
	}
	a.Remove = reportOf(r.Remove(ctxb, args[1]))
	if a.Entry.State == layout.Loading.String() {
		_, err = r.GetOrLoad(ctxb, args[1], small("of the insider"))
		a.Load = reportOf(err)
	}
	return errors.Join(say(a), r.Close())
})

type insideView struct {
	PID          int
	Entry        Entry
	Report       HolderReport
	GC           GCReport
	Problems     []Problem
	Remove, Load report
}

// Two containers, in each of which process 1 uses the registry. Who is process 1
// is what a slot's hint says of a loader; it misleads nobody.
func TestTwoContainersWithEqualPIDs(t *testing.T) {
	needNamespaces(t, &syscall.SysProcAttr{Cloneflags: container})
	r := newRegistry(t, nil)
	dir, count := r.Dir(), t.TempDir()+"/count"
	loader := inContainer(t, container, "proc", stuckLoader, dir, "k", "")
	if line := loader.Line(t); line != "loading" {
		t.Fatalf("%s\n%s", line, loader.Stderr())
	}

	// Process 1 of another container is neither the loader, nor does it take the
	// loader for dead.
	a := lastWord[insideView](t, inContainer(t, container, "proc", insider, dir, "k"))
	if a.PID != 1 || a.Entry.State != "loading" || a.Entry.LoaderPID != 1 {
		t.Fatalf("the numbers are not equal: %+v", a)
	}
	if a.GC.Reclaimed != 0 || len(a.GC.Removed) > 0 || len(a.Problems) > 0 || len(a.Report.Holders) > 0 {
		t.Errorf("%+v", a)
	}
	if !a.Load.is("ErrTimeout") || !strings.Contains(a.Load.Text, "pid 1 is loading it") {
		t.Errorf("a wait: %+v", a.Load)
	}
	if !a.Remove.is("ErrInUse") {
		t.Errorf("%+v", a.Remove)
	}
	waiter := inContainer(t, container, "proc", waitingLoader, dir, "k", count)
	proctest.AwaitBlocked(t, keyLockPath(dir, "k"), 1)
	loader.Kill()
	if a := lastWord[herdAnswer](t, waiter); !a.Loaded || a.Text != "of a waiter" {
		t.Errorf("%+v", a)
	}
	if b, err := os.ReadFile(count); err != nil || string(b) != "1\n" {
		t.Errorf("it was loaded by %q, %v", b, err)
	}
	if e, err := r.Entry("k"); err != nil || e.Deaths != 0 || e.State != "ready" {
		t.Errorf("%+v, %v", e, err)
	}

	// Both hold it: outside they are two, each of them sees itself, a third one
	// nobody; and nobody can remove it.
	one := inContainer(t, container, "proc", holder, dir, "k")
	two := inContainer(t, container, "proc", holder, dir, "k")
	one.Line(t)
	two.Line(t)
	hs, err := r.Holders("k")
	if err != nil || len(hs) != 2 || hs[0].PID == hs[1].PID || hs[0].PID != min(one.PID(), two.PID()) {
		t.Errorf("outside: %+v, %v", hs, err)
	}
	a = lastWord[insideView](t, inContainer(t, container, "proc", insider, dir, "k"))
	if len(a.Report.Holders) > 0 || a.Report.Unseen != 1 || !a.Report.Outside || !a.Entry.Leased || len(a.Problems) > 0 {
		t.Errorf("%+v", a)
	}
	if !a.Remove.is("ErrInUse") || !strings.Contains(a.Remove.Text, "not visible") {
		t.Errorf("%+v", a.Remove)
	}
	own := lastWord[[]Holder](t, inContainer(t, container, "proc", selfHolder, dir, "k"))
	if len(own) != 1 || own[0].PID != 1 || own[0].Via != "mapping" {
		t.Errorf("one that looks at itself: %+v", own)
	}
	one.Kill()
	two.Kill()
	a = lastWord[insideView](t, inContainer(t, container, "proc", insider, dir, "k"))
	if a.Remove.Text != "" || a.Entry.Leased || a.Report.Unseen != 0 {
		t.Errorf("when nobody holds it: %+v", a)
	}
}

// selfHolder: dir, key. It says who holds the model that it has got.
var selfHolder = child("self-holder", func(args []string) error {
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	m, err := r.Get(args[1])
	if err != nil {
		return err
	}
	hs, err := r.Holders(args[1])
	return errors.Join(err, say(hs), m.Close(), r.Close())
})

// moved: dir, key. It works on a registry that has another path in its namespace.
var moved = child("moved", func(args []string) error {
	dir, key := args[0], args[1]
	if _, err := os.Stat(args[2]); err == nil {
		return fmt.Errorf("%s is not hidden", args[2])
	}
	r, err := Open(dir, &Options{MustExist: true})
	if err != nil {
		return err
	}
	m, err := r.Get(key)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(m.Path() + "/w.bin")
	if err != nil || string(b) != "weights 1" || !strings.HasPrefix(m.Path(), dir) {
		return fmt.Errorf("%s: %q, %w", m.Path(), b, err)
	}
	if err := m.Close(); err != nil {
		return err
	}
	a := movedAnswer{Remove: reportOf(r.Remove(ctxb, key))}
	src := small("2")
	src.OnChange = ChangeReplace
	for _, k := range []string{key, "made/elsewhere"} {
		m, err := r.GetOrLoad(ctxb, k, src)
		if err != nil {
			return err
		}
		a.Generation = m.Generation()
		if err := m.Close(); err != nil {
			return err
		}
	}
	if a.Holders, err = r.Holders(key); err != nil {
		return err
	}
	a.Problems, err = r.Check(ctxb, CheckOptions{Data: true})
	return errors.Join(err, say(a), r.Close())
})

type movedAnswer struct {
	Remove     report
	Generation uint64
	Holders    []Holder
	Problems   []Problem
}

// Two mount namespaces, in which the same tmpfs has two paths.
func TestTwoMountNamespaces(t *testing.T) {
	needNamespaces(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS})
	r := newRegistry(t, nil)
	mustLoad(t, r, "k", small("1")).Close()
	p := proctest.Start(t, holder, r.Dir(), "k")
	p.Line(t)

	shm, elsewhere := filepath.Dir(r.Dir()), t.TempDir()
	dir := filepath.Join(elsewhere, filepath.Base(r.Dir()))
	a := lastWord[movedAnswer](t, inContainer(t, unix.CLONE_NEWNS, "bind:"+shm+":"+elsewhere+" hide:"+shm, moved, dir, "k", r.Dir()))
	if !a.Remove.is("ErrInUse") || !strings.Contains(a.Remove.Text, fmt.Sprintf("pid %d", p.PID())) {
		t.Errorf("%+v", a.Remove)
	}
	if len(a.Problems) > 0 || len(a.Holders) != 1 || a.Holders[0].PID != p.PID() {
		t.Errorf("%+v", a)
	}
	m := mustGet(t, r, "k")
	wantBytes(t, m, "w.bin", []byte("weights 2"))
	if m := mustGet(t, r, "made/elsewhere"); m.Generation() != a.Generation {
		t.Errorf("generation %d here, %d there", m.Generation(), a.Generation)
	}
	if s := stats(t, r); s.Superseded != 1 {
		t.Errorf("%+v", s)
	}
	p.Stdin.Close()
	if a := lastWord[herdAnswer](t, p); a.Text != "weights 1" || !a.Loaded {
		t.Errorf("the user of the old generation: %+v, want the old bytes, and Stale", a)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the other path is to be seen here: %v", err)
	}
}

// rootless: dir, of root's 0755 registry. It is root in a user namespace in which
// there is no other user, and has a registry of its own.
var rootless = child("rootless", func(args []string) error {
	a := rootlessAnswer{UID: os.Geteuid()}
	_, err := Open(args[1], &Options{MustExist: true})
	a.Roots = reportOf(err)
	_, err = Open(args[1], &Options{MustExist: true, TrustOwner: 65534})
	a.Trusted = reportOf(err)

	r, err := Open(args[0], &Options{Mode: 0o755})
	if err != nil {
		return err
	}
	m, err := r.GetOrLoad(ctxb, "k", small("1"))
	if err != nil {
		return err
	}
	again, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	got, err := again.Get("k")
	if err != nil {
		return err
	}
	b, err := got.Bytes("w.bin")
	if err != nil {
		return err
	}
	a.Text = string(b)
	if err := errors.Join(got.Close(), again.Close()); err != nil {
		return err
	}
	if a.Holders, err = r.Holders("k"); err != nil {
		return err
	}
	if a.Problems, err = r.Check(ctxb, CheckOptions{Data: true}); err != nil {
		return err
	}
	if err := say(a); err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	// Another generation and a model that others of this user have loaded meanwhile.
	stale := m.Stale()
	other, err := r.Get("made/outside")
	if err != nil {
		return err
	}
	b, err = other.Bytes("w.bin")
	return errors.Join(err, say(herdAnswer{Text: string(b), Loaded: stale}), other.Close(), m.Close(), r.Close())
})

type rootlessAnswer struct {
	UID            int
	Roots, Trusted report
	Text           string
	Holders        []Holder
	Problems       []Problem
}

// sameUser: dir, key. It is the user outside who is root within.
var sameUser = child("same-user", func(args []string) error {
	if err := become(foreignUID); err != nil {
		return err
	}
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	m, err := r.Get(args[1])
	if err != nil {
		return err
	}
	b, err := m.Bytes("w.bin")
	if err != nil {
		return err
	}
	src := small("2")
	src.OnChange = ChangeReplace
	for _, key := range []string{args[1], "made/outside"} {
		m, err := r.GetOrLoad(ctxb, key, src)
		if err != nil {
			return err
		}
		if err := m.Close(); err != nil {
			return err
		}
	}
	return errors.Join(say(string(b)), m.Close(), r.Close())
})

// otherUser: dir, key. It is a third one, who trusts the registry's owner.
var otherUser = child("other-user", func(args []string) error {
	if err := become(foreignUID + 1); err != nil {
		return err
	}
	r, err := Open(args[0], &Options{TrustOwner: foreignUID})
	if err != nil {
		return err
	}
	return errors.Join(say(answerOf(r.Get(args[1]))), r.Close())
})

// wantOwner demands that all below dir belongs to one user.
func wantOwner(t *testing.T, dir string, uid uint32) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		if err == nil && st.Uid != uid {
			t.Errorf("%s belongs to uid %d, want %d", path, st.Uid, uid)
		}
		return err
	}))
}

// A container without privileges: root within is an ordinary user outside. What it
// makes is that user's.
func TestRootlessUserNamespace(t *testing.T) {
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: foreignUID, Size: 1}}
	attr := syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids, GidMappingsEnableSetgroups: true,
		Credential: &syscall.Credential{Uid: 0, Gid: 0},
	}
	probe := attr
	needNamespaces(t, &probe)
	roots := foreignRegistry(t)
	dir := proctest.TmpRegistry(t)

	cmd := proctest.Env().Command(t, rootless, dir, roots.Dir())
	cmd.Path = "/proc/self/exe" // the user may not enter the folder that it lies in
	cmd.SysProcAttr = &attr
	p := proctest.StartCmd(t, rootless, cmd)
	var a rootlessAnswer
	if line := p.Line(t); json.Unmarshal([]byte(line), &a) != nil {
		t.Fatalf("%s\n%s", line, p.Stderr())
	}
	if a.UID != 0 || a.Text != "weights 1" || len(a.Problems) > 0 || len(a.Holders) != 1 || a.Holders[0].UID != 0 {
		t.Errorf("within: %+v", a)
	}
	for _, rep := range []report{a.Roots, a.Trusted} {
		if !rep.is("ErrUntrusted") || !strings.Contains(rep.Text, "not visible in this user namespace") {
			t.Errorf("root's registry, from within: %+v", rep)
		}
	}
	wantOwner(t, dir, foreignUID)
	if b := runChild[string](t, sameUser, dir, "k"); b != "weights 1" {
		t.Errorf("the same user outside: %q", b)
	}
	if a := runChild[herdAnswer](t, otherUser, dir, "made/outside"); a.Text != "weights 2" {
		t.Errorf("another user who trusts him: %+v", a)
	}
	r, err := Open(dir, nil)
	must(t, err)
	defer r.Close()
	hs, err := r.Holders("k")
	if err != nil || len(hs) != 1 || hs[0].PID != p.PID() || hs[0].UID != foreignUID {
		t.Errorf("outside: %+v, %v", hs, err)
	}
	_, err = r.GetOrLoad(ctxb, "roots", small("1"))
	wantErr(t, err, ErrReadOnly)
	wantText(t, err, fmt.Sprintf("uid %d", foreignUID))
	p.Stdin.Close()
	if a := lastWord[herdAnswer](t, p); a.Text != "weights 2" || !a.Loaded {
		t.Errorf("within, in the end: %+v, want the other's bytes, and Stale", a)
	}
	wantOwner(t, dir, foreignUID)
	wantSound(t, dir)
}
