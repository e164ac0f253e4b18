//go:build linux

package lockfile_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/onecopy/onecopy/internal/proctest"
	"github.com/onecopy/onecopy/lockfile"
)

func init() {
	proctest.Program("hold", hold)
	proctest.Program("count", count)
	proctest.Program("spawn-and-hold", spawnAndHold)
	proctest.Program("create", create)
	proctest.Program("waiters", waiters)
}

func TestMain(m *testing.M) { proctest.Main(m) }

// result reports an error of a program.
func result(err error) int {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// hold waits for the lock and keeps it until stdin is closed.
func hold(args []string) int {
	h, err := lockfile.At(args[0]).Wait()
	if err != nil {
		return result(err)
	}
	fmt.Println("held")
	io.Copy(io.Discard, os.Stdin)
	return result(h.Unlock())
}

// waiting starts a goroutine that waits for the lock, and returns when the
// kernel has blocked it.
func waiting(t *testing.T, path string) <-chan *lockfile.Held {
	t.Helper()
	granted := make(chan *lockfile.Held, 1)
	go func() {
		h, err := lockfile.At(path).Wait()
		if err != nil {
			t.Error(err)
		}
		granted <- h
	}()
	proctest.AwaitBlocked(t, path, 1)
	return granted
}

func TestKilledHolder(t *testing.T) {
	path := newPath(t)
	f := lockfile.At(path)
	for range 5 {
		p := proctest.Start(t, "hold", path)
		p.Line(t)
		locked(t, f, path)
		granted := waiting(t, path)
		p.Kill()
		unlock(t, <-granted)
		unlock(t, must(t)(f.TryLock()))
	}
}

func TestStoppedHolder(t *testing.T) {
	path := newPath(t)
	p := proctest.Start(t, "hold", path)
	p.Line(t)
	p.Stop()
	locked(t, lockfile.At(path), path) // a hung holder is a holder
	granted := waiting(t, path)
	p.Cont()
	p.Stdin.Close()
	unlock(t, <-granted)
	if code := p.Wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// waiters blocks n goroutines on the lock.
func waiters(args []string) int {
	n, _ := strconv.Atoi(args[1])
	for range n {
		go lockfile.At(args[0]).Wait()
	}
	io.Copy(io.Discard, os.Stdin)
	return 0
}

// A process that dies while it waits leaves nothing in the way of the others.
func TestKilledWaiters(t *testing.T) {
	path := newPath(t)
	f := lockfile.At(path)
	h := must(t)(f.TryLock())
	p := proctest.Start(t, "waiters", path, "16")
	proctest.AwaitBlocked(t, path, 16)
	p.Kill()
	granted := waiting(t, path)
	unlock(t, h)
	unlock(t, <-granted)
}

// count adds to the number in a file, under the lock.
func count(args []string) int {
	path, rounds := args[0], args[1]
	n, _ := strconv.Atoi(rounds)
	proctest.Barrier(filepath.Dir(path), 8)
	for i := range n {
		f := lockfile.At(path)
		acquire := f.Wait
		if i%2 == 0 {
			acquire = func() (*lockfile.Held, error) { return f.Lock(context.Background()) }
		}
		h, err := acquire()
		if err != nil {
			return result(err)
		}
		b, err := os.ReadFile(path + ".sum")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return result(err)
		}
		sum, _ := strconv.Atoi(string(b))
		if err := os.WriteFile(path+".sum", fmt.Append(nil, sum+1), 0o600); err != nil {
			return result(err)
		}
		if err := h.Unlock(); err != nil {
			return result(err)
		}
	}
	return 0
}

// Eight processes at one barrier create the lock file together and exclude each
// other from the start.
func TestExclusionBetweenProcesses(t *testing.T) {
	path := newPath(t)
	const processes, rounds = 8, 200
	var ps []*proctest.Proc
	for range processes {
		ps = append(ps, proctest.Start(t, "count", path, strconv.Itoa(rounds)))
	}
	for _, p := range ps {
		if code := p.Wait(); code != 0 {
			t.Errorf("exit code %d", code)
		}
	}
	if b, err := os.ReadFile(path + ".sum"); string(b) != strconv.Itoa(processes*rounds) {
		t.Errorf("sum %s, want %d (%v)", b, processes*rounds, err)
	}
}

// The lock file is removed while somebody waits, and a third party creates and
// locks it again. The waiter gets the old inode's lock when the first holder
// leaves, and must not take it for the lock.
func TestReplacedWhileWaiting(t *testing.T) {
	path := newPath(t)
	f := lockfile.At(path)
	first := must(t)(f.TryLock())
	granted := waiting(t, path)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	second := must(t)(f.TryLock())
	unlock(t, first)
	proctest.AwaitBlocked(t, path, 1) // now behind the second holder
	select {
	case <-granted:
		t.Fatal("two holders of one lock")
	default:
	}
	unlock(t, second)
	third := <-granted
	locked(t, f, path)
	unlock(t, third)
}

// Whoever waits for a file that is removed is told so.
func TestRemovedWhileWaiting(t *testing.T) {
	path := newPath(t)
	write(t, path)
	f := lockfile.Existing(path)
	h := must(t)(f.TryLock())
	result := make(chan error)
	go func() {
		_, err := f.Wait()
		result <- err
	}()
	proctest.AwaitBlocked(t, path, 1)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	unlock(t, h)
	if err := <-result; !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v, want fs.ErrNotExist", err)
	}
}

// Every holder removes the file before it unlocks: without the comparison of
// inodes, those who waited on it would go on beside those who create it anew.
func TestRemovedByEveryHolder(t *testing.T) {
	path := newPath(t)
	var inside atomic.Int32
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			f := lockfile.At(path)
			for range 100 {
				acquire := f.Wait
				if i%2 == 0 {
					acquire = func() (*lockfile.Held, error) { return f.Lock(context.Background()) }
				}
				h, err := acquire()
				if err != nil {
					t.Error(err)
					return
				}
				if n := inside.Add(1); n != 1 {
					t.Errorf("%d holders", n)
				}
				runtime.Gosched() // let an intruder in
				inside.Add(-1)
				os.Remove(path)
				unlock(t, h)
			}
		})
	}
	wg.Wait()
}

// Signals that hit the waiting thread neither end the wait nor grant the lock.
func TestSignalsDuringWait(t *testing.T) {
	path := newPath(t)
	h := must(t)(lockfile.At(path).TryLock())
	granted := waiting(t, path)
	for range 200 {
		if err := proctest.SignalThreads(); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-granted:
		t.Fatal("granted while the lock was held")
	default:
	}
	proctest.AwaitBlocked(t, path, 1)
	unlock(t, h)
	unlock(t, <-granted)
}

// While other goroutines start processes, a copy of every descriptor lives in a
// child between its fork and its exec. An unlocked lock must be free all the
// same.
func TestExecStorm(t *testing.T) {
	path := newPath(t)
	program, err := exec.LookPath("true")
	if err != nil {
		t.Skip(err)
	}
	defer proctest.Storm(t, 8, func() error { return exec.Command(program).Run() })()
	f := lockfile.At(path)
	for range 1000 {
		h, err := f.TryLock()
		if err != nil {
			t.Error(err)
			break
		}
		unlock(t, h)
	}
}

// spawnAndHold takes the lock and starts a process that outlives it.
func spawnAndHold(args []string) int {
	h, err := lockfile.At(args[0]).TryLock()
	if err != nil {
		return result(err)
	}
	child := exec.Command("cat") // ends when the test closes our stdin
	child.Stdin, child.Stdout = os.Stdin, os.Stdout
	if err := child.Start(); err != nil {
		return result(err)
	}
	fmt.Println("held")
	child.Wait()
	return result(h.Unlock())
}

func TestChildDoesNotInheritTheLock(t *testing.T) {
	path := newPath(t)
	p := proctest.Start(t, "spawn-and-hold", path)
	p.Line(t)
	locked(t, lockfile.At(path), path)
	p.Kill()
	unlock(t, must(t)(lockfile.At(path).TryLock()))
	// The child was there all the time.
	fmt.Fprintln(p.Stdin, "still here")
	if got := p.Line(t); got != "still here" {
		t.Errorf("the child says %q", got)
	}
}

// create locks a file that is missing, under a umask.
func create(args []string) int {
	mask, _ := strconv.ParseUint(args[1], 8, 32)
	syscall.Umask(int(mask))
	h, err := lockfile.At(args[0]).TryLock()
	if err != nil {
		return result(err)
	}
	return result(h.Unlock())
}

func TestCreatedForTheOwnerOnly(t *testing.T) {
	for _, umask := range []string{"0", "022", "0777"} {
		path := newPath(t)
		if code := proctest.Start(t, "create", path, umask).Wait(); code != 0 {
			t.Errorf("umask %s: exit code %d", umask, code)
			continue
		}
		fi, err := os.Lstat(path)
		if err != nil {
			t.Error(err)
			continue
		}
		if fi.Mode() != 0o600 || fi.Size() != 0 {
			t.Errorf("umask %s: mode %v, size %d; want -rw------- and 0", umask, fi.Mode(), fi.Size())
		}
	}
}
