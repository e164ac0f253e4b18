//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// Who may do what: SECURITY.md as a table, and every pair of users tried.

// The users of the matrix, each of them in each of the groups under each umask.
var (
	matrixUIDs   = []int{0, 20001, 20002}
	matrixGIDs   = []int{30001, 30002}
	matrixUmasks = []int{0, 0o022, 0o027, 0o077, 0o777}
	matrixModes  = []os.FileMode{0o700, 0o755}
)

// matrixUser is a process of one user that does what it is told.
type matrixUser struct {
	uid, gid, umask int
	p               *proctest.Proc
}

func (u *matrixUser) String() string {
	return fmt.Sprintf("uid %d, group %d, umask %#o", u.uid, u.gid, u.umask)
}

// matrixOrder: make a registry, load the model "k" there, or visit it.
type matrixOrder struct {
	Do    string
	Dir   string
	Mode  os.FileMode
	Trust uint32
}

// matrixAnswer has the outcome of each call by its name.
type matrixAnswer struct {
	Err  string // of the order itself
	Did  map[string]report
	Text string // what Get gave
}

// matrixMember: uid, gid, umask. It serves orders until stdin ends.
var matrixMember = child("matrix-member", func(args []string) error {
	var uid, gid, umask int
	if _, err := fmt.Sscan(strings.Join(args, " "), &uid, &gid, &umask); err != nil {
		return err
	}
	for _, err := range []error{syscall.Setgroups(nil), syscall.Setresgid(gid, gid, gid), syscall.Setresuid(uid, uid, uid)} {
		if err != nil {
			return err
		}
	}
	unix.Umask(umask)
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		var o matrixOrder
		if err := json.Unmarshal(in.Bytes(), &o); err != nil {
			return err
		}
		a := matrixAnswer{Did: map[string]report{}}
		var err error
		if o.Do == "visit" {
			err = o.visit(&a)
		} else {
			err = o.load()
		}
		if err != nil {
			a.Err = err.Error()
		}
		if err := say(a); err != nil {
			return err
		}
	}
	return in.Err()
})

func (o *matrixOrder) load() error {
	r, err := Open(o.Dir, &Options{Mode: o.Mode, Slots: layout.MinSlots})
	if err != nil {
		return err
	}
	m, err := r.GetOrLoad(ctxb, "k", madeSource("1", map[string][]byte{"sub/w.bin": []byte("weights")}))
	if err != nil {
		return err
	}
	return errors.Join(m.Close(), r.Close())
}

// visit makes every kind of call, and then tries without the library what it would
// not do.
func (o *matrixOrder) visit(a *matrixAnswer) error {
	r, err := Open(o.Dir, &Options{MustExist: true, TrustOwner: o.Trust})
	a.Did["open"] = matrixReport(err)
	if err == nil {
		defer r.Close()
		m, err := r.Get("k")
		a.Did["get"] = matrixReport(err)
		if err == nil {
			b, err := m.Bytes("sub/w.bin")
			if err != nil {
				return err
			}
			a.Text = string(b)
			m.Close()
		}
		m, err = r.GetOrLoad(ctxb, "k", Source{Version: "1", Load: small("1").Load})
		a.Did["get or load"] = matrixReport(err)
		if err == nil {
			m.Close()
		}
		problems, err := r.Check(ctxb, CheckOptions{Data: true})
		if len(problems) > 0 {
			return fmt.Errorf("check: %+v", problems)
		}
		a.Did["check"] = matrixReport(err)
		m, err = r.GetOrLoad(ctxb, "new", small("1"))
		a.Did["load"] = matrixReport(err)
		if err == nil {
			m.Close()
			if err := r.Remove(ctxb, "new"); err != nil {
				return err
			}
		}
		var held *Model // or there would be nothing to undo
		if held, err = r.Get("k"); err != nil {
			return err
		}
		again := small("1")
		again.Replace = true
		m, err = r.GetOrLoad(ctxb, "k", again)
		a.Did["replace"] = matrixReport(err)
		if err == nil {
			m.Close()
		}
		a.Did["undo"] = matrixReport(undo(ctxb, r, "k"))
		held.Close()
		a.Did["pin"] = matrixReport(errors.Join(r.Pin(ctxb, "k"), r.Unpin(ctxb, "k")))
		_, err = r.GC(ctxb)
		a.Did["gc"] = matrixReport(err)
		a.Did["remove"] = matrixReport(r.Remove(ctxb, "k"))
	}
	for name, path := range map[string]string{"top": "", "v1": "v1", "m": "v1/m", "w": "v1/w"} {
		f, err := os.OpenFile(filepath.Join(o.Dir, path, "mine"), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
		a.Did["create in "+name] = matrixReport(err)
		if err == nil {
			f.Close()
			os.Remove(f.Name())
		}
	}
	for _, path := range []string{"v1/registry", "v1/w/table", "v1/w"} {
		flags := os.O_RDWR
		if path == "v1/w" {
			flags = os.O_RDONLY
		}
		f, err := os.OpenFile(filepath.Join(o.Dir, path), flags, 0)
		a.Did["open "+path] = matrixReport(err)
		if err == nil {
			f.Close()
		}
	}
	a.Did["chmod"] = matrixReport(os.Chmod(filepath.Join(o.Dir, "v1/registry"), 0o644))
	return nil
}

func matrixReport(err error) report {
	rep := reportOf(err)
	if errors.Is(err, fs.ErrPermission) {
		rep.Is = append(rep.Is, "permission")
	}
	return rep
}

// expected says, by the rules of SECURITY.md, how each call of a visit ends: "" is
// well, otherwise the errors that it is, of which one is enough. Groups and umasks
// do not appear in it.
func expected(visitor, owner int, mode os.FileMode, trusted bool) map[string]string {
	want := map[string]string{}
	all := func(outcome string, names ...string) {
		for _, n := range names {
			want[n] = outcome
		}
	}
	raw := []string{"create in top", "create in v1", "create in m", "create in w", "open v1/registry", "open v1/w/table", "open v1/w", "chmod"}
	read := []string{"open", "get", "get or load", "check"}
	write := []string{"load", "replace", "undo", "pin", "gc", "remove"}
	switch {
	case visitor == owner:
		all("", append(append(raw, read...), write...)...)
	case visitor == 0: // root reads, removes and collects, and never loads
		all("", append(raw, read...)...)
		all("ErrReadOnly", "load", "replace", "undo")
		all("", "pin", "gc", "remove")
	default:
		all("permission", raw...)
		switch {
		case owner != 0 && !trusted:
			want["open"] = "ErrUntrusted"
		case mode == 0o700:
			want["open"] = "permission"
		default:
			all("", read...)
			all("ErrReadOnly", write...)
		}
	}
	return want
}

func (u *matrixUser) do(t *testing.T, o matrixOrder) (a matrixAnswer) {
	t.Helper()
	b, err := json.Marshal(o)
	must(t, err)
	if _, err := u.p.Stdin.Write(append(b, '\n')); err != nil {
		t.Fatalf("%v: %v\n%s", u, err, u.p.Stderr())
	}
	line := u.p.Line(t)
	if err := json.Unmarshal([]byte(line), &a); err != nil {
		t.Fatalf("%v: %s", u, line)
	}
	if a.Err != "" {
		t.Fatalf("%v: %+v: %s", u, o, a.Err)
	}
	return a
}

func TestPermissionMatrix(t *testing.T) {
	needRoot(t)
	umasks := matrixUmasks
	if testing.Short() {
		umasks = umasks[3:]
	}
	for _, umask := range umasks {
		var users []*matrixUser
		for _, uid := range matrixUIDs {
			for _, gid := range matrixGIDs {
				p := proctest.Start(t, matrixMember, fmt.Sprint(uid), fmt.Sprint(gid), fmt.Sprint(umask))
				users = append(users, &matrixUser{uid, gid, umask, p})
			}
		}
		for _, owner := range users {
			for _, mode := range matrixModes {
				dir := proctest.TmpRegistry(t)
				load := matrixOrder{Do: "load", Dir: dir, Mode: mode}
				owner.do(t, load)
				owner.wantFiles(t, dir, mode, true)
				for _, visitor := range users {
					visitor.visit(t, owner, dir, mode, false)
					owner.do(t, load) // what was removed
					if visitor.uid != owner.uid && visitor.uid != 0 && owner.uid != 0 {
						visitor.visit(t, owner, dir, mode, true)
					}
				}
				owner.wantFiles(t, dir, mode, false) // lock files may be of another group of his
				wantSound(t, dir)
				if t.Failed() {
					t.Fatalf("in the registry of %v, mode %#o", owner, mode)
				}
			}
		}
		for _, u := range users {
			u.p.Stdin.Close()
			if code := u.p.Wait(); code != 0 {
				t.Errorf("%v: code %d\n%s", u, code, u.p.Stderr())
			}
		}
	}
}

func (u *matrixUser) visit(t *testing.T, owner *matrixUser, dir string, mode os.FileMode, trusted bool) {
	t.Helper()
	o := matrixOrder{Do: "visit", Dir: dir}
	if trusted {
		o.Trust = uint32(owner.uid)
	}
	a := u.do(t, o)
	want := expected(u.uid, owner.uid, mode, trusted)
	for name, outcome := range want {
		rep, tried := a.Did[name]
		switch {
		case !tried:
			t.Errorf("%v, trusted %v: %s was not tried", u, trusted, name)
		case outcome == "" && rep.Text != "", outcome != "" && !rep.is(outcome):
			t.Errorf("%v, trusted %v: %s: %+v, want %q", u, trusted, name, rep, outcome)
		case outcome == "ErrReadOnly", name == "open" && outcome != "":
			if owns := fmt.Sprintf("uid %d", owner.uid); !strings.Contains(rep.Text, owns) {
				t.Errorf("%v: %s does not say %q: %s", u, name, owns, rep.Text)
			}
		}
	}
	for name := range a.Did {
		if _, ok := want[name]; !ok {
			t.Errorf("%v, trusted %v: %s should not have been possible", u, trusted, name)
		}
	}
	if want["get"] == "" && want["open"] == "" && a.Text != "weights" {
		t.Errorf("%v: got %q", u, a.Text)
	}
}

// wantFiles demands the modes and owners of everything in the owner's registry,
// whatever his umask was.
func (u *matrixUser) wantFiles(t *testing.T, dir string, mode os.FileMode, group bool) {
	t.Helper()
	seen := 0
	must(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		want := os.FileMode(0o444) // models
		switch {
		case name == "v1/w":
			want = 0o700
		case d.IsDir():
			want = mode
		case name == "v1/registry":
			want = 0o644
		case strings.HasPrefix(name, "v1/w/"):
			want = 0o600
		}
		if got := os.FileMode(st.Mode & 0o7777); got != want {
			t.Errorf("%v: %s has mode %#o, want %#o", u, name, got, want)
		}
		if int(st.Uid) != u.uid || group && int(st.Gid) != u.gid {
			t.Errorf("%v: %s belongs to uid %d, group %d", u, name, st.Uid, st.Gid)
		}
		seen++
		return nil
	}))
	if seen < 10 {
		t.Errorf("%v: only %d files", u, seen)
	}
}
