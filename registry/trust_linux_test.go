//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/proctest"
)

// Names that somebody else made before us, and users who are not the owner.

func TestHostileDirectories(t *testing.T) {
	other := func(t *testing.T, dir string) { // a folder like ours, for links
		t.Helper()
		if err := os.Mkdir(dir+"-other", 0o700); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir + "-other") })
	}
	for name, c := range map[string]struct {
		make func(t *testing.T, dir string)
		says string
	}{
		"symbolic link": {func(t *testing.T, dir string) { other(t, dir); must(t, os.Symlink(dir+"-other", dir)) }, "symbolic link"},
		"dangling link": {func(t *testing.T, dir string) { must(t, os.Symlink("/nowhere/at/all", dir)) }, "symbolic link"},
		"FIFO":          {func(t *testing.T, dir string) { must(t, unix.Mkfifo(dir, 0o600)) }, "FIFO"},
		"file":          {func(t *testing.T, dir string) { must(t, os.WriteFile(dir, nil, 0o600)) }, "file"},
		"socket": {func(t *testing.T, dir string) {
			l, err := net.Listen("unix", dir)
			must(t, err)
			t.Cleanup(func() { l.Close() })
		}, "socket"},
		"group-writable":        {func(t *testing.T, dir string) { mkdirMode(t, dir, 0o770) }, "mode 0770"},
		"world-writable":        {func(t *testing.T, dir string) { mkdirMode(t, dir, 0o777) }, "mode 0777"},
		"sticky world-writable": {func(t *testing.T, dir string) { mkdirMode(t, dir, 0o777|os.ModeSticky) }, "mode 0777"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := proctest.TmpRegistry(t)
			c.make(t, dir)
			t.Cleanup(func() { os.RemoveAll(dir) })
			for _, o := range []*Options{nil, {MustExist: true}, {Mode: 0o755}} {
				r, err := Open(dir, o)
				if err == nil {
					r.Close()
					t.Fatalf("opened with %+v", o)
				}
				wantErr(t, err, ErrUntrusted)
				wantText(t, err, c.says, fmt.Sprintf("uid %d", os.Geteuid()), dir)
				if Hint(err) == "" {
					t.Error("no hint")
				}
			}
			if entries, err := os.ReadDir(dir + "-other"); err == nil && len(entries) > 0 {
				t.Errorf("a link was followed: %v", entries)
			}
		})
	}
}

func mkdirMode(t *testing.T, dir string, mode os.FileMode) {
	t.Helper()
	must(t, os.Mkdir(dir, 0o700))
	must(t, os.Chmod(dir, mode))
}

// The same within the registry's directory: its owner's process is not to be led
// elsewhere by a name that another user was able to place.
func TestHostileNamesWithinTheDirectory(t *testing.T) {
	for name, make := range map[string]func(t *testing.T, dir string){
		"v1 is a link": func(t *testing.T, dir string) { must(t, os.Symlink("/tmp", dir+"/v1")) },
		"v1 is a file": func(t *testing.T, dir string) { must(t, os.WriteFile(dir+"/v1", nil, 0o600)) },
		"v1 writable":  func(t *testing.T, dir string) { mkdirMode(t, dir+"/v1", 0o777) },
		"table is a link": func(t *testing.T, dir string) {
			mkdirMode(t, dir+"/v1", 0o700)
			must(t, os.Symlink("/etc/passwd", dir+"/v1/registry"))
		},
		"table is a FIFO": func(t *testing.T, dir string) {
			mkdirMode(t, dir+"/v1", 0o700)
			must(t, unix.Mkfifo(dir+"/v1/registry", 0o644))
		},
		"table is a folder": func(t *testing.T, dir string) {
			mkdirMode(t, dir+"/v1", 0o700)
			mkdirMode(t, dir+"/v1/registry", 0o700)
		},
		"table is a socket":   func(t *testing.T, dir string) { mkdirMode(t, dir+"/v1", 0o700); listen(t, dir+"/v1/registry") },
		"table is writable":   func(t *testing.T, dir string) { real(t, dir); must(t, os.Chmod(dir+"/v1/registry", 0o666)) },
		"table has two names": func(t *testing.T, dir string) { real(t, dir); must(t, os.Link(dir+"/v1/registry", dir+"/v1/second")) },
		"m is a link": func(t *testing.T, dir string) {
			real(t, dir)
			must(t, os.RemoveAll(dir+"/v1/m"))
			must(t, os.Symlink("/tmp", dir+"/v1/m"))
		},
		"w is a link": func(t *testing.T, dir string) {
			real(t, dir)
			must(t, os.RemoveAll(dir+"/v1/w"))
			must(t, os.Symlink("/tmp", dir+"/v1/w"))
		},
		"m is writable": func(t *testing.T, dir string) { real(t, dir); must(t, os.Chmod(dir+"/v1/m", 0o777)) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := proctest.TmpRegistry(t)
			must(t, os.MkdirAll(dir, 0o700))
			make(t, dir)
			r, err := Open(dir, nil)
			if err == nil {
				r.Close()
				t.Fatal("opened")
			}
			wantErr(t, err, ErrUntrusted)
			wantText(t, err, dir+"/v1")
			wantNothingOpen(t, dir)
		})
	}
}

func listen(t *testing.T, path string) {
	l, err := net.Listen("unix", path)
	must(t, err)
	t.Cleanup(func() { l.Close() })
}

// real makes a registry.
func real(t *testing.T, dir string) {
	t.Helper()
	r, err := Open(dir, nil)
	must(t, err)
	must(t, r.Close())
}

func TestHostileManifests(t *testing.T) {
	for name, make := range map[string]func(t *testing.T, path string){
		"link":      func(t *testing.T, p string) { must(t, os.Symlink("/etc/passwd", p)) },
		"FIFO":      func(t *testing.T, p string) { must(t, unix.Mkfifo(p, 0o444)) },
		"folder":    func(t *testing.T, p string) { must(t, os.Mkdir(p, 0o755)) },
		"two names": func(t *testing.T, p string) { must(t, os.WriteFile(p, nil, 0o444)); must(t, os.Link(p, p+"-2")) },
		"writable":  func(t *testing.T, p string) { must(t, os.WriteFile(p, nil, 0o666)); must(t, os.Chmod(p, 0o666)) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRegistry(t, nil)
			m := mustLoad(t, r, "k", small("1"))
			m.Close()
			path := genPath(r.Dir(), m.Info(), layout.ManifestExt)
			removeFile(t, path)
			make(t, path)
			_, err := r.Get("k")
			wantErr(t, err, ErrUntrusted)
			_, err = r.GetOrLoad(ctxb, "k", small("1"))
			if err != nil {
				wantErr(t, err, ErrUntrusted)
			}
			// What only the owner can have made is his to remove.
			must(t, os.RemoveAll(path))
			if _, err := r.GC(ctxb); err != nil {
				t.Error(err)
			}
			mustLoad(t, r, "k", small("1"))
		})
	}
}

func TestNotATmpfs(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "reg")
	var st unix.Statfs_t
	must(t, unix.Statfs(t.TempDir(), &st))
	if st.Type == unix.TMPFS_MAGIC {
		t.Skip("the temporary directory is a tmpfs")
	}
	r, err := Open(dir, nil)
	if err == nil {
		r.Close()
		t.Fatal("opened on a disk")
	}
	wantErr(t, err, errors.ErrUnsupported)
	wantText(t, err, "tmpfs", "/dev/shm")
}

func TestMustExist(t *testing.T) {
	dir := proctest.TmpRegistry(t)
	_, err := Open(dir, &Options{MustExist: true})
	wantErr(t, err, ErrNoRegistry)
	wantText(t, err, dir)
	must(t, os.Mkdir(dir, 0o700))
	_, err = Open(dir, &Options{MustExist: true})
	wantErr(t, err, ErrNoRegistry)
	if names, err := os.ReadDir(dir); err != nil || len(names) > 0 {
		t.Errorf("left %v, %v", names, err)
	}
	openRegistry(t, dir, nil)
	r, err := Open(dir, &Options{MustExist: true})
	must(t, err)
	must(t, r.Close())
}

func TestDirectoryModes(t *testing.T) {
	for _, c := range []struct{ ask, dir, w, table os.FileMode }{
		{0, 0o700, 0o700, 0o644}, {0o700, 0o700, 0o700, 0o644}, {0o755, 0o755, 0o700, 0o644},
	} {
		for _, umask := range []int{0, 0o077, 0o777} {
			dir := proctest.TmpRegistry(t)
			old := unix.Umask(umask)
			r, err := Open(dir, &Options{Mode: c.ask})
			var m *Model
			if err == nil {
				m, err = r.GetOrLoad(ctxb, "k", madeSource("1", map[string][]byte{"sub/w.bin": []byte("x")}))
			}
			unix.Umask(old)
			must(t, err)
			for path, mode := range map[string]os.FileMode{
				"": c.dir, "v1": c.dir, "v1/m": c.dir, "v1/w": c.w, "v1/registry": c.table, "v1/w/table": 0o600,
			} {
				wantMode(t, filepath.Join(dir, path), mode)
			}
			wantMode(t, keyLockPath(dir, "k"), 0o600)
			wantMode(t, m.Path(), c.dir)
			wantMode(t, m.Path()+"/sub", c.dir)
			wantMode(t, m.Path()+"/sub/w.bin", 0o444)
			wantMode(t, genPath(dir, m.Info(), layout.ManifestExt), 0o444)
			wantMode(t, genPath(dir, m.Info(), layout.DigestsExt), 0o444)
			must(t, m.Close())
			must(t, r.Close())
		}
	}
	for _, mode := range []os.FileMode{0o777, 0o770, 0o750, 0o1777} {
		if r, err := Open(proctest.TmpRegistry(t), &Options{Mode: mode}); err == nil {
			r.Close()
			t.Errorf("mode %#o accepted", mode)
		}
	}
}

func wantMode(t *testing.T, path string, mode os.FileMode) {
	t.Helper()
	fi, err := os.Lstat(path)
	must(t, err)
	if fi.Mode().Perm() != mode {
		t.Errorf("%s: mode %#o, want %#o", path, fi.Mode().Perm(), mode)
	}
}

// Directories of our own whose mode a hostile umask or a hand spoiled.
func TestOwnDirectoriesAreRepaired(t *testing.T) {
	r := newRegistry(t, nil)
	loadIdle(t, r, "k", small("1"))
	must(t, os.Chmod(r.Dir()+"/v1/w", 0))
	must(t, os.Chmod(r.Dir()+"/v1/m", 0o500))
	again, err := Open(r.Dir(), nil)
	must(t, err)
	defer again.Close()
	wantMode(t, r.Dir()+"/v1/w", 0o700)
	wantMode(t, r.Dir()+"/v1/m", 0o700)
	mustLoad(t, again, "other", small("1"))
}

// foreign runs as another user: dir, trusted uid, order, key.
var foreign = child("foreign", func(args []string) error {
	if err := become(foreignUID); err != nil {
		return err
	}
	trust, err := strconv.ParseUint(args[1], 10, 32)
	if err != nil {
		return err
	}
	r, err := Open(args[0], &Options{TrustOwner: uint32(trust), LoadTimeout: time.Minute})
	if err != nil {
		return say(foreignAnswer{Err: reportOf(err)})
	}
	var a foreignAnswer
	switch key := args[3]; args[2] {
	case "get":
		m, err := r.Get(key)
		a.note(m, err)
	case "load":
		m, err := r.GetOrLoad(ctxb, key, small("1"))
		a.note(m, err)
	case "wait":
		fmt.Println("waiting")
		m, err := r.GetOrLoad(ctxb, key, small("1"))
		a.note(m, err)
	case "wait a moment":
		ctx, cancel := contextFor(100)
		defer cancel()
		m, err := r.GetOrLoad(ctx, key, small("1"))
		a.note(m, err)
	case "replace":
		src := small("2")
		src.OnChange = ChangeReplace
		m, err := r.GetOrLoad(ctxb, key, src)
		a.note(m, err)
	case "replace in any case":
		src := small("2")
		src.Replace = true
		m, err := r.GetOrLoad(ctxb, key, src)
		a.note(m, err)
	case "after deletion":
		m, err := r.Get(key)
		if err != nil {
			return err
		}
		fmt.Println("got")
		_, _ = io.Copy(io.Discard, os.Stdin)
		b, err := m.Bytes("w.bin")
		if err != nil || string(b) != "weights 1" || !m.Stale() {
			return fmt.Errorf("%q, %v, stale %v", b, err, m.Stale())
		}
		m.Close()
		m, err = r.Get(key)
		a.note(m, err)
	case "load after deletion":
		fmt.Println("opened")
		_, _ = io.Copy(io.Discard, os.Stdin)
		m, err := r.GetOrLoad(ctxb, key, small("1"))
		a.note(m, err)
	case "write":
		for name, call := range map[string]func() error{
			"Remove": func() error { return r.Remove(ctxb, key) },
			"GC":     func() error { _, err := r.GC(ctxb); return err },
			"Pin":    func() error { return r.Pin(ctxb, key) },
			"Undo":   func() error { return undo(ctxb, r, key) },
		} {
			if err := call(); !errors.Is(err, ErrReadOnly) {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	case "look":
		entries, err := r.Entries()
		if err != nil || len(entries) != 1 || entries[0].Info == nil {
			return fmt.Errorf("%+v, %w", entries, err)
		}
		if _, err := r.Stats(); err != nil {
			return err
		}
		if _, err := r.Holders(""); err != nil {
			return err
		}
		problems, err := r.Check(ctxb, CheckOptions{Data: true})
		if err != nil || len(problems) > 0 {
			return fmt.Errorf("%+v, %w", problems, err)
		}
	}
	return errors.Join(say(a), r.Close())
})

type foreignAnswer struct {
	Text string
	Err  report
}

func (a *foreignAnswer) note(m *Model, err error) {
	if err == nil {
		var b []byte
		b, err = m.Bytes("w.bin")
		a.Text = string(b)
		m.Close()
	}
	a.Err = reportOf(err)
}

func runForeign(t *testing.T, dir string, trust int, order, key string) foreignAnswer {
	t.Helper()
	return runChild[foreignAnswer](t, foreign, dir, strconv.Itoa(trust), order, key)
}

// foreignRegistry is one of ours that others may read.
func foreignRegistry(t *testing.T) *Registry {
	t.Helper()
	needRoot(t)
	r := openRegistry(t, proctest.TmpRegistry(t), &Options{Mode: 0o755})
	mustLoad(t, r, "k", small("1")).Close()
	return r
}

func TestForeignReader(t *testing.T) {
	r := foreignRegistry(t)
	if a := runForeign(t, r.Dir(), 0, "get", "k"); a.Text != "weights 1" {
		t.Errorf("Get: %+v", a)
	}
	if a := runForeign(t, r.Dir(), 0, "load", "k"); a.Text != "weights 1" {
		t.Errorf("GetOrLoad of what is there: %+v", a)
	}
	a := runForeign(t, r.Dir(), 0, "load", "other")
	if !a.Err.is("ErrReadOnly") || !strings.Contains(a.Err.Text, "uid 0") {
		t.Errorf("GetOrLoad of what is missing: %+v", a)
	}
	if a := runForeign(t, r.Dir(), 0, "get", "other"); !a.Err.is("ErrNotFound") {
		t.Errorf("Get of what is missing: %+v", a)
	}
	if a := runForeign(t, r.Dir(), 0, "replace", "k"); !a.Err.is("ErrReadOnly") {
		t.Errorf("a changed source: %+v", a)
	}
	if a := runForeign(t, r.Dir(), 0, "replace in any case", "k"); !a.Err.is("ErrReadOnly") {
		t.Errorf("Replace: %+v", a)
	}
	if a := runForeign(t, r.Dir(), 0, "write", "k"); a.Err.Text != "" {
		t.Errorf("%+v", a)
	}
	if a := runForeign(t, r.Dir(), 0, "look", ""); a.Err.Text != "" {
		t.Errorf("%+v", a)
	}
}

func TestForeignReaderOfAPrivateDirectory(t *testing.T) {
	needRoot(t)
	r := newRegistry(t, nil) // 0700
	if a := runForeign(t, r.Dir(), 0, "get", "k"); !strings.Contains(a.Err.Text, "permission denied") {
		t.Errorf("%+v", a)
	}
}

func TestForeignReaderWaitsForALoad(t *testing.T) {
	r := foreignRegistry(t)
	loader := startStuck(t, r.Dir(), "slow", "")
	p := proctest.Start(t, foreign, r.Dir(), "0", "wait", "slow")
	p.Line(t)
	loader.Stdin.Close()
	if a := lastWord[herdAnswer](t, loader); !a.Loaded {
		t.Errorf("%+v", a)
	}
	if a := lastWord[foreignAnswer](t, p); a.Text != "of the stuck loader" {
		t.Errorf("%+v", a)
	}
}

func TestForeignReaderNeverMakesARegistry(t *testing.T) {
	r := foreignRegistry(t)
	p := proctest.Start(t, foreign, r.Dir(), "0", "after deletion", "k")
	p.Line(t)
	removeAll(t, r.Dir())
	p.Stdin.Close()
	if a := lastWord[foreignAnswer](t, p); !a.Err.is("ErrNoRegistry") {
		t.Errorf("%+v", a)
	}
	if _, err := os.Lstat(r.Dir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the reader has taken the owner's name: %v", err)
	}
}

func TestUntrustedOwner(t *testing.T) {
	needRoot(t)
	dir := proctest.TmpRegistry(t)
	const owner = foreignUID + 1
	must(t, os.Mkdir(dir, 0o755))
	must(t, os.Chown(dir, owner, owner))
	a := runForeign(t, dir, 0, "get", "k")
	if !a.Err.is("ErrUntrusted") || !strings.Contains(a.Err.Text, fmt.Sprintf("uid %d", owner)) {
		t.Errorf("%+v", a)
	}
	if a := runForeign(t, dir, owner, "get", "k"); a.Err.is("ErrUntrusted") {
		t.Errorf("although the owner is trusted: %+v", a)
	}
}

// Within a directory of ours a file of somebody else is not ours.
func TestTableOfAnotherOwner(t *testing.T) {
	r := foreignRegistry(t)
	dir := r.Dir()
	must(t, r.Close())
	must(t, os.Chown(tablePath(dir), foreignUID, foreignUID))
	_, err := Open(dir, nil)
	wantErr(t, err, ErrUntrusted)
	wantText(t, err, fmt.Sprintf("uid %d", foreignUID))
	must(t, os.Chown(tablePath(dir), 0, 0))
}

// ownerProcess is a user with a registry of his own: dir. It loads "k" and holds it
// until stdin ends.
var ownerProcess = child("owner", func(args []string) error {
	if err := become(foreignUID); err != nil {
		return err
	}
	r, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	m, err := r.GetOrLoad(ctxb, "k", small("1"))
	if err != nil {
		return err
	}
	fmt.Println("holding")
	in := make([]byte, 1)
	if _, err := os.Stdin.Read(in); err != nil {
		return err
	}
	if err := m.Close(); err != nil {
		return err
	}
	fmt.Println("closed")
	if _, err := os.Stdin.Read(in); err != nil {
		return err
	}
	// Root has removed it; the owner loads it again, and is not locked out.
	m, err = r.GetOrLoad(ctxb, "k", small("1"))
	if err != nil {
		return err
	}
	m, err = r.GetOrLoad(ctxb, "another", small("1"))
	if err != nil {
		return err
	}
	fmt.Println("loaded")
	_ = m.Close()
	_, _ = io.Copy(io.Discard, os.Stdin)
	return nil
})

func TestRootInAnotherUsersRegistry(t *testing.T) {
	needRoot(t)
	dir := proctest.TmpRegistry(t)
	p := proctest.Start(t, ownerProcess, dir)
	p.Line(t)
	r, err := Open(dir, nil)
	must(t, err)
	defer r.Close()
	m := mustGet(t, r, "k")
	wantBytes(t, m, "w.bin", []byte("weights 1"))
	m.Close()
	_, err = r.GetOrLoad(ctxb, "other", small("1"))
	wantErr(t, err, ErrReadOnly)
	src := small("1")
	src.Replace = true
	_, err = r.GetOrLoad(ctxb, "k", src)
	wantErr(t, err, ErrReadOnly)
	err = r.Remove(ctxb, "k")
	wantErr(t, err, ErrInUse)
	wantText(t, err, fmt.Sprint(p.PID()))
	_, err = io.WriteString(p.Stdin, "x")
	must(t, err)
	p.Line(t)
	must(t, r.Remove(ctxb, "k"))
	if _, err := r.GC(ctxb); err != nil {
		t.Error(err)
	}
	if problems, err := r.Check(ctxb, CheckOptions{Data: true}); err != nil || len(problems) > 0 {
		t.Errorf("%+v, %v", problems, err)
	}
	// Nothing in there belongs to root now.
	must(t, filepath.Walk(dir, func(path string, fi os.FileInfo, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		if err == nil && st.Uid != foreignUID {
			t.Errorf("%s belongs to uid %d", path, st.Uid)
		}
		return err
	}))
	_, err = io.WriteString(p.Stdin, "x")
	must(t, err)
	if line := p.Line(t); line != "loaded" {
		t.Errorf("%s\n%s", line, p.Stderr())
	}
	p.Stdin.Close()
	if code := p.Wait(); code != 0 {
		t.Errorf("code %d\n%s", code, p.Stderr())
	}
}

// A registry that is deleted may be another user's when it is there again.
func TestAnotherUserMakesTheRegistryAnew(t *testing.T) {
	needRoot(t)
	dir := proctest.TmpRegistry(t)
	r, err := Open(dir, nil)
	must(t, err)
	defer r.Close()
	mustLoad(t, r, "k", small("0")).Close()
	must(t, os.RemoveAll(dir))
	p := proctest.Start(t, ownerProcess, dir)
	p.Line(t)
	m := mustGet(t, r, "k")
	wantBytes(t, m, "w.bin", []byte("weights 1"))
	m.Close()
	wantErr(t, undo(ctxb, r, "k"), ErrReadOnly)
	_, err = r.GetOrLoad(ctxb, "other", small("1"))
	wantErr(t, err, ErrReadOnly)
	wantText(t, err, fmt.Sprint("belongs to uid ", foreignUID))
}

// Nor is this user a stranger for ever in a registry that another one had before.
func TestTheRegistryBecomesOnesOwn(t *testing.T) {
	r := foreignRegistry(t)
	p := proctest.Start(t, foreign, r.Dir(), "0", "load after deletion", "mine")
	p.Line(t)
	removeAll(t, r.Dir())
	proctest.Start(t, ownerProcess, r.Dir()).Line(t)
	p.Stdin.Close()
	if a := lastWord[foreignAnswer](t, p); a.Err.Text != "" || a.Text != "weights 1" {
		t.Errorf("%+v", a)
	}
}

// lockingStranger holds LOCK_EX on a file that it may only read: path.
var lockingStranger = child("locking-stranger", func(args []string) error {
	if err := become(foreignUID); err != nil {
		return err
	}
	f, err := os.Open(args[0])
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return err
	}
	fmt.Println("locked")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
})

func TestStrangerWhoLocksTheManifest(t *testing.T) {
	r := foreignRegistry(t)
	i, err := r.Entry("k")
	must(t, err)
	p := proctest.Start(t, lockingStranger, genPath(r.Dir(), *i.Info, layout.ManifestExt))
	p.Line(t)
	_, err = r.Get("k")
	wantErr(t, err, ErrBusy)
	if Hint(err) == "" {
		t.Error("no hint")
	}
	if a := runForeign(t, r.Dir(), 0, "load", "k"); !a.Err.is("ErrBusy") && !a.Err.is("ErrReadOnly") {
		t.Errorf("another reader: %+v", a)
	}
	// The owner makes a new generation; the stranger only wastes memory.
	m := mustLoad(t, r, "k", small("1"))
	wantFiles(t, m, map[string][]byte{"w.bin": []byte("weights 1")})
	if m.Generation() == i.Generation {
		t.Error("the same generation")
	}
	p.Kill()
	if rep, err := r.GC(ctxb); err != nil || rep.Orphans != 1 {
		t.Errorf("%+v, %v", rep, err)
	}
}

// The lease of a foreign reader counts like any other.
func TestForeignLease(t *testing.T) {
	r := foreignRegistry(t)
	p := proctest.Start(t, foreign, r.Dir(), "0", "after deletion", "k")
	p.Line(t)
	err := r.Remove(ctxb, "k")
	wantErr(t, err, ErrInUse)
	wantText(t, err, fmt.Sprint(p.PID()))
	p.Kill()
	must(t, r.Remove(ctxb, "k"))
}

// A user who cannot enter the directory of the models says so.
func TestPermissionErrorsAreTyped(t *testing.T) {
	r := foreignRegistry(t)
	must(t, os.Chmod(r.Dir()+"/v1/m", 0o700))
	if a := runForeign(t, r.Dir(), 0, "get", "k"); a.Err.Text == "" || !strings.Contains(a.Err.Text, "permission denied") {
		t.Errorf("%+v", a)
	}
	must(t, os.Chmod(r.Dir()+"/v1/m", 0o755))
}

// A mount in the middle of the registry separates the table from its models.
func TestAnotherFileSystemWithin(t *testing.T) {
	needRoot(t)
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		t.Skip(err)
	}
	dir := proctest.TmpRegistry(t)
	real(t, dir)
	exe, err := os.Executable()
	must(t, err)
	// In a mount namespace of its own, which takes the mount away with it.
	cmd := exec.Command(unshare, "-m", "--propagation", "private", "sh", "-c",
		fmt.Sprintf("mount -t tmpfs -o mode=700 tmpfs %s/v1/m && exec %s", dir, exe))
	cmd.Env = append(os.Environ(), "ONECOPY_PROCTEST_PROGRAM="+opener, "OPENER_DIR="+dir)
	rep := lastWord[report](t, proctest.StartCmd(t, opener, cmd))
	if !rep.is("ErrUntrusted") || !strings.Contains(rep.Text, "file system") {
		t.Errorf("%+v", rep)
	}
}

// opener opens the registry that its environment names.
var opener = child("opener", func([]string) error {
	r, err := Open(os.Getenv("OPENER_DIR"), nil)
	if err == nil {
		r.Close()
	}
	return say(reportOf(err))
})
