//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// Another user who got there first, or who stays for ever.

const hostileUID = foreignUID + 7

// squatter: what, path, other. It takes the name path before its owner-to-be comes;
// other is a directory of the victim, with a file in it.
var squatter = child("squatter", func(args []string) error {
	what, path, other := args[0], args[1], args[2]
	if err := become(hostileUID); err != nil {
		return err
	}
	unix.Umask(0)
	dir := func(mode os.FileMode) error { return errors.Join(os.Mkdir(path, 0o700), os.Chmod(path, mode)) }
	switch what {
	case "directory 0700":
		return dir(0o700)
	case "directory 0755":
		return dir(0o755)
	case "directory 0777":
		return dir(0o777)
	case "directory 1777":
		return dir(0o777 | os.ModeSticky)
	case "registry":
		r, err := Open(path, &Options{Mode: 0o755})
		if err != nil {
			return err
		}
		m, err := r.GetOrLoad(ctxb, "k", small("of the squatter"))
		if err != nil {
			return err
		}
		return errors.Join(m.Close(), r.Close())
	case "link to a directory of his":
		return errors.Join(os.Mkdir(path+".his", 0o755), os.Symlink(path+".his", path))
	case "link to a directory of the victim":
		return os.Symlink(other, path)
	case "dangling link":
		return os.Symlink(path+".made-by-the-victim", path)
	case "FIFO":
		return errors.Join(unix.Mkfifo(path, 0o666), os.Chmod(path, 0o666))
	case "file":
		return os.WriteFile(path, []byte("nothing"), 0o666)
	case "socket":
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrUnix{Name: path})
	}
	return fmt.Errorf("unknown: %s", what)
})

// victim: path, of a registry that it means to make. It says what came of it.
var squatted = child("squatted", func(args []string) error {
	if err := become(foreignUID); err != nil {
		return err
	}
	var reports []report
	for _, o := range []*Options{nil, {MustExist: true}, {Mode: 0o755}} {
		r, err := Open(args[0], o)
		if err == nil {
			r.Close()
		}
		rep := reportOf(err)
		if err != nil && Hint(err) == "" {
			rep.Text += " (no hint)"
		}
		reports = append(reports, rep)
	}
	return say(reports)
})

// TestSquatters: in a directory in which everybody may make names, as /dev/shm is,
// somebody else makes ours. We do not use what he made, follow or change it, and we
// say whose it is. Two of the things can only be made by root, or with
// fs.protected_hardlinks at 0, and root makes them here in the squatter's place;
// what the other fs.protected_* settings of this machine are does not matter, as
// nothing is opened that they are about.
func TestSquatters(t *testing.T) {
	needRoot(t)
	for name, c := range map[string]struct {
		says string
		mode os.FileMode // of the victim's own directory; 0: see squatter
		root func(path, other string) error
	}{
		"directory 0700":                    {says: "permission denied"},
		"directory 0755":                    {says: "use a directory of your own"},
		"directory 0777":                    {says: "use a directory of your own"},
		"directory 1777":                    {says: "use a directory of your own"},
		"registry":                          {says: "use a directory of your own"},
		"link to a directory of his":        {says: "symbolic link"},
		"link to a directory of the victim": {says: "symbolic link"},
		"dangling link":                     {says: "symbolic link"},
		"FIFO":                              {says: "FIFO"},
		"file":                              {says: "file"},
		"socket":                            {says: "socket"},
		"hard link to a file of the victim": {says: "file", root: func(path, other string) error { return os.Link(other+"/file", path) }},
		"device": {says: "device", root: func(path, _ string) error {
			return errors.Join(unix.Mknod(path, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))), os.Lchown(path, hostileUID, hostileUID))
		}},
		"group-writable directory of the victim": {says: "mode 0770", root: func(path, _ string) error {
			return errors.Join(os.Mkdir(path, 0o700), os.Chown(path, foreignUID, hostileUID), os.Chmod(path, 0o770))
		}},
		"directory of the victim that all may write": {says: "mode 0777", root: func(path, _ string) error {
			return errors.Join(os.Mkdir(path, 0o700), os.Chown(path, foreignUID, foreignUID), os.Chmod(path, 0o777))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			shm := proctest.TmpRegistry(t)
			must(t, os.Mkdir(shm, 0o700))
			must(t, os.Chmod(shm, 0o777|os.ModeSticky))
			other := shm + "/other"
			must(t, os.Mkdir(other, 0o755))
			must(t, os.WriteFile(other+"/file", []byte("of the victim"), 0o600))
			for _, path := range []string{other, other + "/file"} {
				must(t, os.Chown(path, foreignUID, foreignUID))
			}
			path := shm + "/registry"
			owner := hostileUID
			if c.root != nil {
				if err := c.root(path, other); err != nil {
					if name == "device" {
						t.Skip(err)
					}
					t.Fatal(err)
				}
				if name != "device" {
					owner = foreignUID
				}
			} else if p := proctest.Start(t, squatter, name, path, other); p.Wait() != 0 {
				t.Fatalf("%s", p.Stderr())
			}
			before := pictureOf(t, shm)
			for _, rep := range runChild[[]report](t, squatted, path) {
				if !rep.is("ErrUntrusted") || !strings.Contains(rep.Text, c.says) || !strings.Contains(rep.Text, fmt.Sprintf("uid %d", owner)) ||
					!strings.Contains(rep.Text, path) || strings.Contains(rep.Text, "no hint") {
					t.Errorf("%+v, want %q and uid %d", rep, c.says, owner)
				}
			}
			if after := pictureOf(t, shm); after != before {
				t.Errorf("changed:\n%s\nbefore:\n%s", after, before)
			}
		})
	}
}

// pictureOf describes all names below dir.
func pictureOf(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	must(t, filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		to, _ := os.Readlink(path)
		fmt.Fprintf(&b, "%s %o %d:%d %d %d %s\n", path, st.Mode, st.Uid, st.Gid, st.Nlink, st.Size, to)
		return nil
	}))
	return b.String()
}

// lockAll: dir, "ex" or "sh". As another user it takes a lock on everything that it
// can open there, and keeps it; it says how many.
var lockAll = child("lock-all", func(args []string) error {
	if err := become(foreignUID); err != nil {
		return err
	}
	how := unix.LOCK_SH
	if args[1] == "ex" {
		how = unix.LOCK_EX
	}
	n := 0
	err := filepath.WalkDir(args[0], func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return nil // not for him
		}
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW, 0)
		if err == nil && unix.Flock(fd, how|unix.LOCK_NB) == nil {
			n++
		}
		return nil
	})
	if err != nil {
		return err
	}
	fmt.Println(n)
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
})

func startLockAll(t *testing.T, dir, how string, atLeast int) *proctest.Proc {
	t.Helper()
	p := proctest.Start(t, lockAll, dir, how)
	line := p.Line(t)
	if n, err := strconv.Atoi(line); err != nil || n < atLeast {
		t.Fatalf("%s locks, want %d\n%s", line, atLeast, p.Stderr())
	}
	return p
}

// findLock is what Check says about the lock on the manifest of a generation.
func findLock(t *testing.T, r *Registry, m Info) (found Problem) {
	t.Helper()
	// The kernel lists a page of its locks at a time, and may leave one out when
	// others come and go meanwhile.
	for range 100 {
		problems, err := r.Check(ctxb, CheckOptions{Data: true})
		must(t, err)
		for _, p := range problems {
			switch {
			case p.Kind != "lock":
				t.Errorf("%+v", p)
			case p.Path == genPath(r.Dir(), m, layout.ManifestExt):
				found = p
			}
		}
		if found.Kind != "" {
			break
		}
	}
	return found
}

// A stranger who may read, and locks exclusively whatever he can open, for ever.
// What he denies is the two models that are there; the owner loads them again.
func TestStrangerWhoLocksEverything(t *testing.T) {
	r := foreignRegistry(t) // with "k"
	mustLoad(t, r, "other", small("o")).Close()
	old, err := r.Entry("k")
	must(t, err)
	p := startLockAll(t, r.Dir(), "ex", 8)

	for _, key := range []string{"k", "other"} {
		_, err := r.Get(key)
		wantErr(t, err, ErrBusy)
	}
	err = r.Remove(ctxb, "other")
	wantErr(t, err, ErrInUse)
	wantText(t, err, fmt.Sprintf("pid %d", p.PID()))
	if found := findLock(t, r, *old.Info); found.Note || found.Key != "k" || found.Repair == "" ||
		!strings.Contains(found.Text, fmt.Sprintf("pid %d ", p.PID())) || !strings.Contains(found.Text, fmt.Sprintf("uid %d", foreignUID)) {
		t.Errorf("check: %+v", found)
	}
	// The table and the load locks are out of his reach.
	mustLoad(t, r, "new", small("n"))
	m := mustLoad(t, r, "k", small("1"))
	wantFiles(t, m, map[string][]byte{"w.bin": []byte("weights 1")})
	if m.Generation() == old.Generation {
		t.Error("the same generation")
	}
	again, err := Open(r.Dir(), nil)
	must(t, err)
	mustGet(t, again, "k").Close()
	must(t, again.Close())
	if rep, err := r.GC(ctxb); err != nil || rep.Orphans != 0 {
		t.Errorf("%+v, %v", rep, err)
	}
	p.Kill()
	if rep, err := r.GC(ctxb); err != nil || rep.Orphans != 1 {
		t.Errorf("%+v, %v", rep, err)
	}
	wantBytes(t, mustGet(t, r, "other"), "w.bin", []byte("weights o"))
}

// One who locks shared, for ever: his locks are leases. He pins memory.
func TestStrangerWhoLeasesEverything(t *testing.T) {
	needRoot(t)
	r := openRegistry(t, proctest.TmpRegistry(t), &Options{Mode: 0o755, Budget: 10 * mib})
	loadIdle(t, r, "k", sized(6*mib))
	e, err := r.Entry("k")
	must(t, err)
	p := startLockAll(t, r.Dir(), "sh", 8)

	m := mustGet(t, r, "k")
	must(t, m.Verify(ctxb))
	m.Close()
	says := fmt.Sprintf("pid %d", p.PID())
	err = r.Remove(ctxb, "k")
	wantErr(t, err, ErrInUse)
	wantText(t, err, says)
	_, err = r.GetOrLoad(ctxb, "big", sized(6*mib))
	wantErr(t, err, ErrNoSpace)
	wantText(t, err, says)
	if found := findLock(t, r, *e.Info); !found.Note || !strings.Contains(found.Text, says+" ") || !strings.Contains(found.Text, fmt.Sprintf("uid %d", foreignUID)) {
		t.Errorf("check: %+v", found)
	}
	src := small("2") // there is room for that
	src.Replace = true
	mustLoad(t, r, "k", src)
	if found := findLock(t, r, *e.Info); !found.Note || found.Key != "k" {
		t.Errorf("check of the old generation: %+v", found)
	}
	p.Kill()
	loadIdle(t, r, "big", sized(6*mib))
	if problems, err := r.Check(ctxb, CheckOptions{}); err != nil || len(problems) > 0 {
		t.Errorf("%+v, %v", problems, err)
	}
}

// hostileNames are no names for a key, and no names for a file.
func hostileNames() map[string]string {
	return map[string]string{
		"empty": "", "NUL": "a\x00b", "NUL at the end": "k\x00", "newline": "a\nb", "escape": "\x1b[2J", "delete": "a\x7f", "C1 control": "a\u0085b",
		"not UTF-8": "a\xffb", "surrogate": "\xed\xa0\x80", "overlong dot": "\xc0\xae\xc0\xae/x",
		"a million characters": strings.Repeat("k", 1_000_000), "a million NULs": strings.Repeat("\x00", 1_000_000),
		"a million steps up": strings.Repeat("../", 333_333) + "x",
	}
}

// Every call that takes a key refuses what is none, at once, in a line that can be
// logged; nothing is made of it.
func TestHostileKeys(t *testing.T) {
	r := newRegistry(t, nil)
	before := pictureOf(t, r.Dir())
	for name, key := range hostileNames() {
		for call, err := range callsWithKey(r, key) {
			wantErr(t, err, ErrKey)
			if text := err.Error(); len(text) > 2000 || strings.ContainsFunc(text, func(c rune) bool { return c < ' ' || c == 0x7f || c == 0xfffd }) {
				t.Errorf("%s of %s: %d bytes of text: %.200q", call, name, len(text), text)
			}
		}
	}
	if after := pictureOf(t, r.Dir()); after != before {
		t.Errorf("changed:\n%s", after)
	}
}

// callsWithKey makes every call that takes a key.
func callsWithKey(r *Registry, key string) map[string]error {
	errs := map[string]error{}
	_, errs["Get"] = r.Get(key)
	_, errs["GetOrLoad"] = r.GetOrLoad(ctxb, key, small("1"))
	_, errs["Rollout"] = r.Rollout(ctxb, key, small("1"), nil)
	errs["Use"] = r.Use(key, func(*Model) error { return nil })
	errs["Remove"] = r.Remove(ctxb, key)
	errs["PlanRemove"] = r.PlanRemove(ctxb, key)
	errs["Pin"] = r.Pin(ctxb, key)
	errs["Unpin"] = r.Unpin(ctxb, key)
	errs["SetTTL"] = r.SetTTL(ctxb, key, 1)
	errs["Touch"] = r.Touch(ctxb, key)
	errs["Undo"] = undo(ctxb, r, key)
	_, errs["Entry"] = r.Entry(key)
	_, errs["Generations"] = r.Generations(key)
	_, errs["HugePages"] = r.HugePages(key)
	_, errs["Charges"] = r.Charges(key)
	if key != "" { // which is all of them
		_, errs["Check"] = r.Check(ctxb, CheckOptions{Key: key})
		_, errs["Holders"] = r.Holders(key)
		_, errs["HolderReport"] = r.HolderReport(key)
	}
	return errs
}

// Keys may look like paths: they never are any. The folder of a model is named
// after its key, by letters that mean nothing to a path.
func TestKeysNeverLeadOutside(t *testing.T) {
	root := proctest.TmpRegistry(t)
	must(t, os.Mkdir(root, 0o700))
	must(t, os.WriteFile(root+"/canary", []byte("alive"), 0o600))
	r := openRegistry(t, root+"/reg", nil)
	for _, key := range []string{
		"..", ".", "/", "//", "../..", "../../canary", root + "/canary", "/etc/passwd", `..\..\canary`, "a/../../../../canary", "~", "-rf", "*",
		"....//....//canary", "%2e%2e%2fcanary", "v1", "registry", "w/table", strings.Repeat("../", 85),
	} {
		m := mustLoad(t, r, key, small(key))
		wantBytes(t, m, "w.bin", []byte("weights "+key))
		if in := v1(r.Dir(), layout.ModelsDir) + "/"; !strings.HasPrefix(filepath.Clean(m.Path())+"/", in) || filepath.Dir(filepath.Dir(filepath.Clean(m.Path())))+"/" != in {
			t.Errorf("%q lies in %s", key, m.Path())
		}
		must(t, m.Close())
		must(t, r.Remove(ctxb, key))
	}
	names, err := os.ReadDir(root)
	if err != nil || len(names) != 2 {
		t.Errorf("%v, %v", names, err)
	}
	if b, err := os.ReadFile(root + "/canary"); err != nil || !bytes.Equal(b, []byte("alive")) {
		t.Errorf("%q, %v", b, err)
	}
}

// The same for names of files: from a load function, and from a folder in which
// somebody could make them.
func TestHostileFileNames(t *testing.T) {
	r := newRegistry(t, nil)
	names := hostileNames()
	for name, path := range map[string]string{
		"up": "..", "up and away": "../x", "within": "a/../b", "absolute": "/etc/passwd", "here": ".", "backslash": `..\x`, "an end": "a/", "two slashes": "a//b",
	} {
		names[name] = path
	}
	for name, path := range names {
		_, err := r.GetOrLoad(ctxb, "k", one(path, 1, func(*FileWriter) error { t.Errorf("%s accepted", name); return nil }))
		wantErr(t, err, ErrPath)
		if text := err.Error(); len(text) > 2000 || strings.ContainsFunc(text, func(c rune) bool { return c < ' ' || c == 0x7f }) {
			t.Errorf("%s: %d bytes of text: %.200q", name, len(text), text)
		}
		dir := t.TempDir()
		if strings.Contains(path, "/") || len(path) > 255 || os.WriteFile(filepath.Join(dir, "x"+path), []byte("x"), 0o600) != nil {
			continue // there is no such file
		}
		if layout.ValidPath("x"+path) == nil {
			continue
		}
		_, err = r.GetOrLoad(ctxb, "k", Source{Path: dir})
		wantErr(t, err, ErrSource)
		_, err = r.GetOrLoad(ctxb, "k", Source{Path: filepath.Join(dir, "x"+path)})
		wantErr(t, err, ErrSource)
	}
	if _, err := r.Get("k"); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v", err)
	}
}
