//go:build linux

package lockfile_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/onecopy/onecopy/internal/proctest"
	"github.com/onecopy/onecopy/lockfile"
	"golang.org/x/sys/unix"
)

// newDir returns a directory on the file system that the locks are made for.
func newDir(t testing.TB) string {
	t.Helper()
	dir := proctest.TmpRegistry(t)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func newPath(t testing.TB) string { return filepath.Join(newDir(t), "lock") }

func write(t testing.TB, path string) {
	t.Helper()
	if err := os.WriteFile(path, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// must returns a granted lock.
func must(t testing.TB) func(*lockfile.Held, error) *lockfile.Held {
	return func(h *lockfile.Held, err error) *lockfile.Held {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
}

func unlock(t testing.TB, h *lockfile.Held) {
	t.Helper()
	if err := h.Unlock(); err != nil {
		t.Error(err)
	}
}

// refused checks an error that a try or wait returned.
func refused(t testing.TB, h *lockfile.Held, err error, want error, op, path string) {
	t.Helper()
	if h != nil {
		t.Errorf("%s %s was granted, want %v", op, path, want)
		return
	}
	if !errors.Is(err, want) {
		t.Errorf("%s %s: error %v, want %v", op, path, err, want)
	}
	var pe *fs.PathError
	if !errors.As(err, &pe) || pe.Op != op || pe.Path != path {
		t.Errorf("error %q does not name operation %q and path %q", err, op, path)
	}
	if n := strings.Count(fmt.Sprint(err), path); n != 1 {
		t.Errorf("error %q names the path %d times", err, n)
	}
}

func locked(t testing.TB, f *lockfile.File, path string) {
	t.Helper()
	h, err := f.TryLock()
	refused(t, h, err, lockfile.ErrLocked, "lock", path)
}

// The counter is a plain variable: the race detector must see that the lock
// orders its users, and the sum that it excludes them.
func TestExclusionInOneProcess(t *testing.T) {
	path := newPath(t)
	ways := map[string]func(*lockfile.File) (*lockfile.Held, error){
		"Lock": func(f *lockfile.File) (*lockfile.Held, error) { return f.Lock(context.Background()) },
		"Wait": (*lockfile.File).Wait,
		"TryLock": func(f *lockfile.File) (*lockfile.Held, error) {
			for {
				h, err := f.TryLock()
				if !errors.Is(err, lockfile.ErrLocked) {
					return h, err
				}
				time.Sleep(10 * time.Microsecond)
			}
		},
	}
	const goroutines, rounds = 3, 100
	shared := lockfile.At(path)
	counter := 0
	var wg sync.WaitGroup
	for _, acquire := range ways {
		for i := range goroutines {
			f := shared // one File for all, or one each: no difference
			if i > 0 {
				f = lockfile.At(path)
			}
			wg.Go(func() {
				for range rounds {
					h, err := acquire(f)
					if err != nil {
						t.Error(err)
						return
					}
					counter++
					unlock(t, h)
				}
			})
		}
	}
	wg.Wait()
	if want := len(ways) * goroutines * rounds; counter != want {
		t.Errorf("counter %d, want %d", counter, want)
	}
}

func TestSharedAndExclusive(t *testing.T) {
	path := newPath(t)
	f := lockfile.At(path)
	const readers, rounds = 4, 100
	value := 0
	var wg sync.WaitGroup
	for range readers {
		wg.Go(func() {
			for range rounds {
				h, err := f.RLock(context.Background())
				if err != nil {
					t.Error(err)
					return
				}
				if value%2 != 0 {
					t.Error("a reader saw half a change")
				}
				unlock(t, h)
			}
		})
	}
	wg.Go(func() {
		for range rounds {
			h, err := f.Wait()
			if err != nil {
				t.Error(err)
				return
			}
			value++
			value++
			unlock(t, h)
		}
	})
	wg.Wait()
}

// Who does not want the lock any more when his turn comes keeps nobody waiting.
func TestWaitUnless(t *testing.T) {
	noDescriptorLost(t)
	path := newPath(t)
	f := lockfile.At(path)
	h := must(t)(f.TryLock())
	type result struct {
		held *lockfile.Held
		err  error
	}
	var wanted atomic.Bool
	wanted.Store(true)
	asked, results := make(chan bool, 2), make(chan result)
	for range 2 {
		go func() {
			held, err := f.WaitUnless(func() bool {
				no := !wanted.Swap(false) // only the first one wants it
				asked <- no
				return no
			})
			results <- result{held, err}
		}()
	}
	if len(asked) > 0 {
		t.Error("asked while somebody else had the lock")
	}
	unlock(t, h)
	first := <-results
	if <-asked || first.err != nil || first.held == nil {
		t.Fatalf("the one who wants it: %v, %v", first.held, first.err)
	}
	unlock(t, first.held)
	if second := <-results; !<-asked || second.err != nil || second.held != nil {
		t.Errorf("the one who does not: %v, %v", second.held, second.err)
	}
	unlock(t, must(t)(f.TryLock()))
}

func TestTryAgainstHolders(t *testing.T) {
	path := newPath(t)
	f := lockfile.At(path)

	t.Run("exclusive holder", func(t *testing.T) {
		h := must(t)(f.TryLock())
		done := make(chan bool)
		go func() { // another goroutine is somebody else, and so is this one
			defer close(done)
			locked(t, f, path)
		}()
		<-done
		locked(t, f, path)
		r, err := f.TryRLock()
		refused(t, r, err, lockfile.ErrLocked, "rlock", path)
		unlock(t, h)
		unlock(t, must(t)(f.TryLock()))
	})
	t.Run("shared holders", func(t *testing.T) {
		a, b := must(t)(f.TryRLock()), must(t)(f.RLock(context.Background()))
		locked(t, f, path)
		unlock(t, a)
		locked(t, f, path) // the first Unlock freed only its own
		unlock(t, b)
		unlock(t, must(t)(f.TryLock()))
	})
}

func TestUnlockTwice(t *testing.T) {
	path := newPath(t)
	f := lockfile.At(path)
	old := must(t)(f.TryLock())
	if old.Path() != path {
		t.Errorf("Path() = %q", old.Path())
	}
	unlock(t, old)
	h := must(t)(f.TryLock())
	if err := old.Unlock(); !errors.Is(err, lockfile.ErrNotHeld) {
		t.Errorf("second Unlock: %v, want ErrNotHeld", err)
	}
	locked(t, f, path) // and it did not take the new holder's lock away
	unlock(t, h)
}

func TestUnlockInAnotherProcess(t *testing.T) {
	path := newPath(t)
	f := lockfile.At(path)
	h := must(t)(f.TryLock())
	h.Inherit()
	for range 2 {
		if err := h.Unlock(); !errors.Is(err, lockfile.ErrNotHeld) {
			t.Errorf("Unlock in a child: %v, want ErrNotHeld", err)
		}
	}
	locked(t, f, path)
	if h.Path() != path { // h lives until here, and its description with it
		t.Error(h.Path())
	}
}

func TestContext(t *testing.T) {
	path := newPath(t)
	f := lockfile.At(path)
	h := must(t)(f.TryLock())

	t.Run("deadline", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		defer cancel()
		got, err := f.Lock(ctx)
		refused(t, got, err, context.DeadlineExceeded, "lock", path)
	})
	t.Run("cancel with a cause", func(t *testing.T) {
		cause := errors.New("enough")
		ctx, cancel := context.WithCancelCause(context.Background())
		time.AfterFunc(20*time.Millisecond, func() { cancel(cause) })
		got, err := f.RLock(ctx)
		refused(t, got, err, context.Canceled, "rlock", path)
		refused(t, got, err, cause, "rlock", path)
	})
	unlock(t, h)
	t.Run("done before, lock free", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		got, err := f.Lock(ctx)
		refused(t, got, err, context.Canceled, "lock", path)
	})
}

func TestLockIsGrantedToPollers(t *testing.T) {
	path := newPath(t)
	f := lockfile.At(path)
	h := must(t)(f.TryLock())
	granted := make(chan error)
	go func() {
		got, err := f.Lock(context.Background())
		if err == nil {
			err = got.Unlock()
		}
		granted <- err
	}()
	select {
	case err := <-granted:
		t.Fatalf("returned while the lock was held: %v", err)
	case <-time.After(20 * time.Millisecond): // long enough to reach the slow polls
	}
	unlock(t, h)
	if err := <-granted; err != nil {
		t.Error(err)
	}
}

func TestExistingIsNeverCreated(t *testing.T) {
	path := newPath(t)
	f := lockfile.Existing(path)
	for op, try := range map[string]func() (*lockfile.Held, error){"lock": f.TryLock, "rlock": f.TryRLock} {
		h, err := try()
		refused(t, h, err, fs.ErrNotExist, op, path)
	}
	h, err := f.Wait()
	refused(t, h, err, fs.ErrNotExist, "lock", path)
	if errors.Is(err, lockfile.ErrGone) {
		t.Errorf("a missing removable file is not ErrGone: %v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file was created (%v)", err)
	}
}

// Locking a file that is there for another purpose does not change it, and needs
// no permission to write it.
func TestExistingIsNotChanged(t *testing.T) {
	path := newPath(t)
	write(t, path)
	if err := os.Chmod(path, 0o444); err != nil {
		t.Fatal(err)
	}
	unlock(t, must(t)(lockfile.Existing(path).TryLock()))
	b, err := os.ReadFile(path)
	fi, statErr := os.Lstat(path)
	if string(b) != "content" || err != nil || statErr != nil || fi.Mode() != 0o444 {
		t.Errorf("content %q, mode %v, errors %v, %v", b, fi.Mode(), err, statErr)
	}
}

func TestDirectoryGone(t *testing.T) {
	dir := newDir(t)
	sub := filepath.Join(dir, "w")
	path := filepath.Join(sub, "table")
	h, err := lockfile.At(path).TryLock()
	refused(t, h, err, lockfile.ErrGone, "lock", path)

	// The same with the directory's descriptor: it stays open, its name goes.
	if err := os.Mkdir(sub, 0o700); err != nil {
		t.Fatal(err)
	}
	d, err := os.Open(sub)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	path = fmt.Sprintf("/proc/self/fd/%d/table", d.Fd())
	unlock(t, must(t)(lockfile.At(path).TryLock()))
	if err := os.RemoveAll(sub); err != nil {
		t.Fatal(err)
	}
	h, err = lockfile.At(path).Lock(context.Background())
	refused(t, h, err, lockfile.ErrGone, "lock", path)
	h, err = lockfile.At(path).Wait()
	refused(t, h, err, lockfile.ErrGone, "lock", path)
}

// A path through a directory's descriptor is used as it is: it names the same
// lock after the directory was moved.
func TestPathThroughDescriptor(t *testing.T) {
	dir := newDir(t)
	before, after := filepath.Join(dir, "before"), filepath.Join(dir, "after")
	if err := os.MkdirAll(filepath.Join(before, "w"), 0o700); err != nil {
		t.Fatal(err)
	}
	d, err := os.Open(before)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	path := fmt.Sprintf("/proc/self/fd/%d/w/table", d.Fd())
	unlock(t, must(t)(lockfile.At(path).TryLock()))
	if err := os.Rename(before, after); err != nil {
		t.Fatal(err)
	}
	h := must(t)(lockfile.At(path).TryLock())
	named := filepath.Join(after, "w", "table")
	locked(t, lockfile.Existing(named), named)
	unlock(t, h)
}

// somethingElse makes what may lie at a path instead of a regular file.
var somethingElse = map[string]func(path string) error{
	"directory":        func(path string) error { return os.Mkdir(path, 0o700) },
	"FIFO":             func(path string) error { return unix.Mkfifo(path, 0o600) },
	"symlink to file":  func(path string) error { return os.Symlink(os.Args[0], path) },
	"dangling symlink": func(path string) error { return os.Symlink(path+".nowhere", path) },
	"symlink to self":  func(path string) error { return os.Symlink(path, path) },
	"socket":           func(path string) error { return unix.Mknod(path, unix.S_IFSOCK|0o600, 0) },
}

func TestNotARegularFile(t *testing.T) {
	for what, make := range somethingElse {
		t.Run(what, func(t *testing.T) {
			path := newPath(t)
			if err := make(path); err != nil {
				t.Fatal(err)
			}
			for _, f := range []*lockfile.File{lockfile.At(path), lockfile.Existing(path)} {
				h, err := f.TryLock()
				refused(t, h, err, fs.ErrInvalid, "lock", path)
				h, err = f.RLock(context.Background())
				refused(t, h, err, fs.ErrInvalid, "rlock", path)
				h, err = f.Wait()
				refused(t, h, err, fs.ErrInvalid, "lock", path)
			}
			if _, err := os.Lstat(path + ".nowhere"); !errors.Is(err, fs.ErrNotExist) {
				t.Error("a symbolic link was followed to create its target")
			}
		})
	}
}

// A FIFO or a symbolic link that appears between the look and the open must not
// block either, and it is never what gets locked.
func TestSwappedWhileLocking(t *testing.T) {
	noDescriptorLost(t)
	dir := newDir(t)
	path, regular := filepath.Join(dir, "lock"), filepath.Join(dir, "regular")
	write(t, regular)
	var stop atomic.Bool
	var swapper sync.WaitGroup
	swapper.Go(func() {
		for i := 0; !stop.Load(); i++ {
			next := filepath.Join(dir, "next")
			var err error
			switch i % 4 {
			case 0, 2:
				err = os.Link(regular, next)
			case 1:
				err = unix.Mkfifo(next, 0o600)
			case 3:
				err = os.Symlink(regular, next)
			}
			if err == nil {
				err = os.Rename(next, path)
			}
			if err != nil {
				t.Error(err)
				return
			}
			os.Remove(next) // rename does nothing between two links of one file
		}
	})
	f := lockfile.Existing(path)
	for range 3000 {
		h, err := f.TryLock()
		if err != nil {
			continue
		}
		locked(t, lockfile.Existing(regular), regular)
		unlock(t, h)
	}
	stop.Store(true)
	swapper.Wait()
}

func TestManyDescriptors(t *testing.T) {
	const many = 1200
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil || limit.Cur < many+100 {
		t.Skipf("needs %d descriptors, has %d (%v)", many+100, limit.Cur, err)
	}
	for range many {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
	}
	path := newPath(t)
	f := lockfile.At(path)
	h := must(t)(f.Lock(context.Background()))
	locked(t, f, path)
	unlock(t, h)
	unlock(t, must(t)(f.Wait()))
}

// noDescriptorLost checks at the end of the test that all descriptors were
// closed, and not by the garbage collector.
func noDescriptorLost(t *testing.T) {
	t.Helper()
	percent := debug.SetGCPercent(-1)
	before := proctest.OpenFDs(t)
	t.Cleanup(func() {
		if after := proctest.OpenFDs(t); after > before {
			t.Errorf("%d descriptors, before %d", after, before)
		}
		debug.SetGCPercent(percent)
	})
}

func TestNoDescriptorIsLost(t *testing.T) {
	path := newPath(t)
	f := lockfile.At(path)
	unlock(t, must(t)(f.TryLock()))
	noDescriptorLost(t)
	for range 20 {
		h := must(t)(f.TryLock())
		locked(t, f, path)
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		_, err := f.RLock(ctx)
		cancel()
		if err == nil {
			t.Fatal("granted")
		}
		os.Remove(path)
		h2 := must(t)(f.Lock(context.Background()))
		unlock(t, h)
		unlock(t, h2)
		lockfile.Existing(filepath.Dir(path)).TryLock()
		lockfile.Existing(path + "x").TryLock()
	}
}

func TestOpenFiles(t *testing.T) {
	path := newPath(t)
	write(t, path)
	open := func() *os.File {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	check := func(what string, err, want error) {
		t.Helper()
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	a, b, c := open(), open(), open()
	check("first shared", lockfile.TryShared(a), nil)
	check("second shared", lockfile.TryShared(b), nil)
	err := lockfile.TryExclusive(c)
	check("exclusive against shared", err, lockfile.ErrLocked)
	if want := "lock " + path + ": " + lockfile.ErrLocked.Error(); fmt.Sprint(err) != want {
		t.Errorf("text %q, want %q", err, want)
	}
	a.Close()
	b.Close()
	check("exclusive", lockfile.TryExclusive(c), nil)
	check("shared against exclusive", lockfile.TryShared(open()), lockfile.ErrLocked)
	locked(t, lockfile.Existing(path), path)
	c.Close()
	check("closed file", lockfile.TryShared(c), fs.ErrClosed)
}

func TestRetry(t *testing.T) {
	calls := 0
	err := lockfile.Retry(func() error {
		if calls++; calls < 4 {
			return unix.EINTR
		}
		return unix.EIO
	})
	if calls != 4 || !errors.Is(err, unix.EIO) {
		t.Errorf("%d calls, error %v", calls, err)
	}
}

func BenchmarkLockUnlock(b *testing.B) {
	f := lockfile.At(newPath(b))
	for b.Loop() {
		h, err := f.TryLock()
		if err != nil {
			b.Fatal(err)
		}
		if err := h.Unlock(); err != nil {
			b.Fatal(err)
		}
	}
}

// A file that is replaced whenever somebody has locked it.
func TestReplacedForEver(t *testing.T) {
	path := newPath(t)
	times := 0
	h, err := lockfile.At(path).WaitUnless(func() bool {
		times++
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
		return false
	})
	if h != nil || !errors.Is(err, lockfile.ErrGone) || !strings.Contains(err.Error(), "replaced") {
		t.Errorf("%v, %v", h, err)
	}
	if times < 100 {
		t.Errorf("gave up after %d times", times)
	}
}
