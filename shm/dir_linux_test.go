//go:build amd64 || arm64

package shm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/proctest"
)

func TestOpenDirCreates(t *testing.T) {
	for _, perm := range []uint32{0o700, 0o755} {
		for _, umask := range []int{0, 0o022, 0o777} {
			path := proctest.TmpRegistry(t)
			old := unix.Umask(umask)
			d, err := OpenDir(path, DirOptions{Create: true, Perm: perm})
			unix.Umask(old)
			noErr(t, err)
			defer d.Close()
			fi, err := os.Stat(path)
			noErr(t, err)
			if fi.Mode().Perm() != fs.FileMode(perm) || d.Perm() != perm {
				t.Errorf("umask %#o: mode %v, Perm %#o, want %#o", umask, fi.Mode(), d.Perm(), perm)
			}
			if d.Owner() != uint32(os.Geteuid()) || d.Path() != path {
				t.Errorf("owner %d, path %s", d.Owner(), d.Path())
			}
			again, err := OpenDir(path, DirOptions{Create: true, Perm: 0o700})
			noErr(t, err)
			again.Close()
		}
	}
}

func TestOpenDirThatIsMissing(t *testing.T) {
	_, err := OpenDir(proctest.TmpRegistry(t), DirOptions{})
	wantErr(t, err, fs.ErrNotExist)
	_, err = OpenDir(proctest.TmpRegistry(t)+"/a/b", DirOptions{Create: true, Perm: 0o700})
	wantErr(t, err, fs.ErrNotExist)
}

func TestOpenDirRelative(t *testing.T) {
	d := newDir(t)
	t.Chdir(filepath.Dir(d.Path()))
	rel, err := OpenDir(filepath.Base(d.Path()), DirOptions{})
	noErr(t, err)
	defer rel.Close()
	if rel.Path() != d.Path() {
		t.Errorf("%s, want %s", rel.Path(), d.Path())
	}
}

func TestOpenDirRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		make func(path string) error
		says string
	}{
		"symbolic link":  {func(p string) error { return os.Symlink("/dev/shm", p) }, "symbolic link"},
		"file":           {func(p string) error { return os.WriteFile(p, nil, 0o600) }, "is a file"},
		"FIFO":           {func(p string) error { return unix.Mkfifo(p, 0o600) }, "FIFO"},
		"group-writable": {func(p string) error { return errors.Join(os.Mkdir(p, 0o700), os.Chmod(p, 0o770)) }, "chmod go-w"},
		"world-writable": {func(p string) error { return errors.Join(os.Mkdir(p, 0o700), os.Chmod(p, 0o707)) }, "chmod go-w"},
	} {
		path := proctest.TmpRegistry(t)
		noErr(t, c.make(path))
		for _, create := range []bool{false, true} {
			_, err := OpenDir(path, DirOptions{Create: create, Perm: 0o700})
			if err == nil {
				t.Errorf("%s: opened", name)
				continue
			}
			wantErr(t, err, ErrUntrusted)
			wantText(t, err, c.says, fmt.Sprintf("uid %d", os.Geteuid()))
		}
		os.RemoveAll(path)
	}
}

func TestOpenDirOnADisk(t *testing.T) {
	var st unix.Statfs_t
	noErr(t, unix.Statfs(t.TempDir(), &st))
	if st.Type == unix.TMPFS_MAGIC {
		t.Skip("the temporary directory is a tmpfs")
	}
	_, err := OpenDir(t.TempDir(), DirOptions{})
	wantErr(t, err, errors.ErrUnsupported)
	path := t.TempDir() + "/new"
	_, err = OpenDir(path, DirOptions{Create: true, Perm: 0o700})
	wantErr(t, err, errors.ErrUnsupported)
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it was made all the same: %v", err)
	}
}

func TestOpenDirForEverybody(t *testing.T) {
	_, err := OpenDir("/dev/shm", DirOptions{})
	wantErr(t, err, ErrUntrusted)
	if !strings.Contains(err.Error(), "directory of your own below it") {
		t.Error(err)
	}
}

func TestOpenDirOfAnotherOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	path := proctest.TmpRegistry(t)
	noErr(t, os.Mkdir(path, 0o755))
	noErr(t, os.Chown(path, 4711, 4711))
	d, err := OpenDir(path, DirOptions{}) // root may look at all
	noErr(t, err)
	defer d.Close()
	if d.Owner() != 4711 {
		t.Errorf("owner %d", d.Owner())
	}
	// Nobody knows who the overflow user is.
	noErr(t, os.Chown(path, 65534, 65534))
	_, err = OpenDir(path, DirOptions{TrustOwner: 65534})
	wantErr(t, err, ErrUntrusted)
	wantText(t, err, "not visible")
}

func TestSub(t *testing.T) {
	d := newDir(t)
	_, err := d.Sub("s", 0o755, false)
	wantErr(t, err, fs.ErrNotExist)
	s, err := d.Sub("s", 0o755, true)
	noErr(t, err)
	defer s.Close()
	if s.Path() != d.Path()+"/s" || s.Perm() != 0o755 || s.Device() != d.Device() {
		t.Errorf("%s, %#o", s.Path(), s.Perm())
	}
	noErr(t, os.Chmod(s.Path(), 0o500))
	again, err := d.Sub("s", 0o700, true)
	noErr(t, err)
	defer again.Close()
	if fi, err := os.Stat(s.Path()); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("not repaired: %v, %v", fi.Mode(), err)
	}
	noErr(t, os.Symlink("/dev/shm", d.Path()+"/link"))
	_, err = d.Sub("link", 0o700, true)
	wantErr(t, err, ErrUntrusted)
	if os.Geteuid() == 0 {
		noErr(t, os.Chown(s.Path(), 4711, 4711))
		_, err = d.Sub("s", 0o700, true)
		wantErr(t, err, ErrUntrusted)
		wantText(t, err, "uid 4711")
	}
}

// A directory that a hostile umask shut to its own maker.
func TestSubWithoutAnyPermission(t *testing.T) {
	d := newDir(t)
	noErr(t, os.Mkdir(d.Path()+"/s", 0))
	s, err := d.Sub("s", 0o700, true)
	noErr(t, err)
	defer s.Close()
	if s.Perm() != 0o700 {
		t.Errorf("%#o", s.Perm())
	}
}

func TestOpenRefuses(t *testing.T) {
	d := newDir(t)
	at := func(name string) string { return d.Path() + "/" + name }
	noErr(t, os.WriteFile(at("fine"), []byte("x"), 0o644))
	noErr(t, os.Symlink("fine", at("link")))
	noErr(t, unix.Mkfifo(at("fifo"), 0o600))
	noErr(t, os.Mkdir(at("folder"), 0o700))
	noErr(t, os.WriteFile(at("writable"), nil, 0o600))
	noErr(t, os.Chmod(at("writable"), 0o620))
	noErr(t, os.WriteFile(at("twice"), nil, 0o600))
	noErr(t, os.Link(at("twice"), at("twice2")))
	if os.Geteuid() == 0 {
		noErr(t, os.WriteFile(at("foreign"), nil, 0o600))
		noErr(t, os.Chown(at("foreign"), 4711, 4711))
	} else {
		noErr(t, os.Symlink("fine", at("foreign")))
	}
	for _, open := range []func(string) (*os.File, *unix.Stat_t, error){d.Open, d.OpenWritable} {
		f, st, err := open("fine")
		noErr(t, err)
		if st.Size != 1 || f.Name() != at("fine") {
			t.Errorf("%d bytes, %s", st.Size, f.Name())
		}
		f.Close()
		_, _, err = open("missing")
		wantErr(t, err, fs.ErrNotExist)
		for _, name := range []string{"link", "fifo", "writable", "twice", "foreign"} {
			_, _, err := open(name)
			wantErr(t, err, ErrUntrusted)
			wantText(t, err, at(name))
		}
	}
	_, _, err := d.Open("folder")
	wantErr(t, err, ErrUntrusted)
}

func TestCreate(t *testing.T) {
	d := newDir(t)
	old := unix.Umask(0o777)
	err := d.Create("f", []byte("contents"), 0o644)
	unix.Umask(old)
	noErr(t, err)
	fi, err := os.Stat(d.Path() + "/f")
	noErr(t, err)
	if b, err := os.ReadFile(d.Path() + "/f"); err != nil || string(b) != "contents" || fi.Mode() != 0o644 {
		t.Errorf("%q, %v, %v", b, fi.Mode(), err)
	}
	err = d.Create("f", []byte("others"), 0o644)
	wantErr(t, err, fs.ErrExist)
	if b, _ := os.ReadFile(d.Path() + "/f"); string(b) != "contents" {
		t.Errorf("replaced by %q", b)
	}
}

func TestNamesAndTreeUsage(t *testing.T) {
	d := newDir(t)
	noErr(t, d.Mkdir("a", 0o700))
	noErr(t, d.Mkdir("a/b", 0o700))
	noErr(t, os.WriteFile(d.Path()+"/a/x", randomBytes(1, 10_000), 0o600))
	noErr(t, os.WriteFile(d.Path()+"/a/b/y", randomBytes(1, 4096), 0o600))
	noErr(t, os.WriteFile(d.Path()+"/z", randomBytes(1, 1), 0o600))
	noErr(t, os.Symlink("/dev/shm", d.Path()+"/a/link"))
	names, err := d.Names()
	noErr(t, err)
	slices.Sort(names)
	if got := strings.Join(names, " "); got != "a z" {
		t.Errorf("%s", got)
	}
	for name, want := range map[string]int64{"a": 12288 + 4096, "z": 4096, "missing": 0, "a/link": 0} {
		if got := d.TreeUsage(name); got != want {
			t.Errorf("%s: %d bytes, want %d", name, got, want)
		}
	}
}

func TestNamesOfARemovedDirectory(t *testing.T) {
	d := newDir(t)
	noErr(t, os.Remove(d.Path()))
	if names, err := d.Names(); err != nil || len(names) > 0 {
		t.Errorf("%v, %v", names, err)
	}
}

func TestRemoveTree(t *testing.T) {
	d := newDir(t)
	outside := t.TempDir()
	noErr(t, os.WriteFile(outside+"/precious", nil, 0o600))
	noErr(t, d.Mkdir("a", 0o700))
	noErr(t, d.Mkdir("a/b", 0o700))
	noErr(t, os.WriteFile(d.Path()+"/a/b/y", nil, 0o400))
	noErr(t, os.Symlink(outside, d.Path()+"/a/link"))
	noErr(t, os.Symlink(outside, d.Path()+"/link"))
	noErr(t, unix.Mkfifo(d.Path()+"/a/fifo", 0o600))
	noErr(t, d.Mkdir("a/shut", 0))
	noErr(t, os.WriteFile(d.Path()+"/file", nil, 0o400))
	for _, name := range []string{"a", "link", "file", "missing"} {
		noErr(t, d.RemoveTree(name))
	}
	if names, err := d.Names(); err != nil || len(names) > 0 {
		t.Errorf("left %v, %v", names, err)
	}
	if _, err := os.Stat(outside + "/precious"); err != nil {
		t.Errorf("a link was followed: %v", err)
	}
	noErr(t, d.Unlink("missing"))
}

func TestDirThatWasRemoved(t *testing.T) {
	d := newDir(t)
	if !d.Alive() {
		t.Error("not alive")
	}
	noErr(t, os.RemoveAll(d.Path()))
	if d.Alive() {
		t.Error("alive")
	}
	_, err := d.NewPending("x")
	if err == nil {
		t.Skip("this kernel makes anonymous files in a removed directory")
	}
	wantErr(t, err, fs.ErrNotExist)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("%v: that is no missing feature", err)
	}
}

func TestEntries(t *testing.T) {
	d := newDir(t)
	for want := range 4 {
		if n, ok := d.Entries(); n != want || !ok {
			t.Errorf("%d entries, %v; there are %d", n, ok, want)
		}
		if want == 2 {
			noErr(t, d.Mkdir("folder", 0o700))
		} else {
			noErr(t, d.Create(fmt.Sprint(want), nil, 0o600))
		}
	}
	noErr(t, d.RemoveTree("folder"))
	if n, ok := d.Entries(); n != 3 || !ok {
		t.Errorf("%d entries, %v; there are 3", n, ok)
	}
}

func TestFree(t *testing.T) {
	d := newDir(t)
	free, size, err := d.Free()
	if err != nil || free <= 0 || size < free {
		t.Errorf("%d of %d, %v", free, size, err)
	}
}

func TestHoldIsSharedByAll(t *testing.T) {
	d := newDir(t)
	d.TryHold()
	again, err := OpenDir(d.Path(), DirOptions{})
	noErr(t, err)
	again.TryHold()
	cleaner, err := os.Open(d.Path())
	noErr(t, err)
	defer cleaner.Close()
	try := func() error { return unix.Flock(int(cleaner.Fd()), unix.LOCK_EX|unix.LOCK_NB) }
	if err := try(); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("systemd-tmpfiles would age a directory in use: %v", err)
	}
	again.Close()
	if err := try(); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("held by one: %v", err)
	}
}

func TestProbeLocks(t *testing.T) {
	d := newDir(t)
	for range 2 {
		noErr(t, d.ProbeLocks())
	}
	if names, err := d.Names(); err != nil || len(names) > 0 {
		t.Errorf("the probe left %v, %v", names, err)
	}
}

func TestErrorsOfLimits(t *testing.T) {
	for errno, want := range map[error]error{
		unix.ENOSPC: ErrNoSpace, unix.EMFILE: ErrLimit, unix.ENFILE: ErrLimit, unix.EACCES: fs.ErrPermission, unix.ENOENT: fs.ErrNotExist,
	} {
		err := pathErr("open", "/x", errno)
		wantErr(t, err, want, errno)
	}
	if err := MapError(unix.ENOMEM); !errors.Is(err, ErrLimit) || !strings.Contains(err.Error(), "vm.max_map_count") {
		t.Errorf("%v", err)
	}
}

func TestRelativePathWithoutAFolder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "gone")
	noErr(t, os.Mkdir(dir, 0o700))
	t.Chdir(dir)
	noErr(t, os.Remove(dir))
	if d, err := OpenDir("registry", DirOptions{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v, %v", d, err)
	}
}
