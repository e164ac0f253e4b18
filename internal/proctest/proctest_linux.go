package proctest

import (
	"bufio"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// dieWithParent makes the kernel kill a process when its test binary dies.
func dieWithParent(cmd *exec.Cmd) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
}

// signalOf returns the signal that ended a process, 0 if it exited.
func signalOf(ps *os.ProcessState) int {
	if ws, ok := ps.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return int(ws.Signal())
	}
	return 0
}

// Stop stops the process with SIGSTOP and waits until it has stopped.
func (p *Proc) Stop() {
	p.t.Helper()
	p.Signal(syscall.SIGSTOP)
	p.AwaitStop(p.t)
}

// Cont lets a stopped process go on.
func (p *Proc) Cont() {
	p.t.Helper()
	p.Signal(syscall.SIGCONT)
}

// AwaitStop waits until the process is stopped, for instance by a crash point,
// and fails the test if it ends instead.
func (p *Proc) AwaitStop(t TB) {
	t.Helper()
	stopped := make(chan error, 1)
	go func() {
		// Without reaping anything: os/exec collects the exit.
		var info unix.Siginfo
		_, err := uninterrupted(func() (int, error) {
			return 0, unix.Waitid(unix.P_PID, p.PID(), &info, unix.WSTOPPED|unix.WEXITED|unix.WNOWAIT, nil)
		})
		const stoppedCode = 5 // CLD_STOPPED
		if err == nil && info.Code != stoppedCode {
			err = errors.New("it ended")
		}
		stopped <- err
	}()
	select {
	case err := <-stopped:
		if err != nil {
			t.Fatalf("%s (pid %d) did not stop: %v", p.name, p.PID(), err)
		}
	case <-deadlineOf(t):
		p.hung(t, "its stop")
	}
}

// dumpStacks asks a Go process for its stacks and waits until it has ended.
func dumpStacks(p *Proc) {
	_ = p.cmd.Process.Signal(syscall.SIGCONT) // best effort, all of it
	_ = p.cmd.Process.Signal(syscall.SIGQUIT)
	select {
	case <-p.exited:
	case <-time.After(drainTime):
	}
}

// AwaitBlocked waits until n lock requests block in the kernel on the flock of
// the file at path. Requests that only try, again and again, are not seen.
//
// The kernel reports waiters in /proc/locks and notifies nobody of them, so this
// looks there until they appear.
func AwaitBlocked(t TB, path string, n int) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatalf("proctest: stat %s: %v", path, err)
	}
	file := fmt.Sprintf("%02x:%02x:%d", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)), st.Ino)
	deadline := deadlineOf(t)
	for {
		got, err := blocked(file)
		if err != nil {
			t.Fatalf("proctest: %v", err)
		}
		if got >= n {
			return
		}
		select {
		case <-time.After(time.Millisecond):
		case <-deadline:
			t.Fatalf("%s: %d blocked lock requests at the end of the test's time, want %d", path, got, n)
		}
	}
}

// blocked counts lines such as
//
//	3: -> FLOCK  ADVISORY  WRITE 8675 fe:00:9978163 0 EOF
func blocked(file string) (n int, err error) {
	f, err := os.Open("/proc/locks")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		w := strings.Fields(sc.Text())
		if len(w) >= 7 && w[1] == "->" && w[2] == "FLOCK" && w[6] == file {
			n++
		}
	}
	return n, sc.Err()
}

// shm is where test registries live.
const shm = "/dev/shm"

// TmpRegistry returns a path under /dev/shm at which nothing exists yet. What
// the test puts there is removed when the test is over. Call it before [Start],
// so that processes end before their files go. The test is skipped where
// /dev/shm is not a tmpfs.
func TmpRegistry(t TB) string {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(shm, &st); err != nil || int64(st.Type) != unix.TMPFS_MAGIC {
		t.Skipf("needs a tmpfs at %s (error: %v)", shm, err)
	}
	random := make([]byte, 8)
	_, _ = rand.Read(random) // never fails
	dir := filepath.Join(shm, "onecopy-test-"+hex.EncodeToString(random))
	t.Cleanup(func() {
		// Tests take permissions away; give them back to be able to clean up.
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				_ = os.Chmod(path, 0o700)
			}
			return nil // RemoveAll will say what is wrong
		})
		if err := os.RemoveAll(dir); err != nil {
			t.Logf("proctest: %v", err)
		}
	})
	return dir
}

// OpenFDs returns the number of open descriptors of this process.
func OpenFDs(t TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatalf("proctest: %v", err)
	}
	n := 0
	for _, e := range entries {
		// The descriptor that reads the list is gone by now.
		if fd, err := strconv.Atoi(e.Name()); err == nil {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
				n++
			}
		}
	}
	return n
}

// AwaitEnd waits until a process that is no child of the test's has ended.
func AwaitEnd(t TB, pid int) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return
	}
	if err != nil {
		t.Fatalf("proctest: pid %d: %v", pid, err)
	}
	defer unix.Close(fd)
	deadline := deadlineOf(t)
	for {
		n, err := uninterrupted(func() (int, error) {
			return unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		})
		if err != nil {
			t.Fatalf("proctest: pid %d: %v", pid, err)
		}
		if n > 0 {
			return
		}
		select {
		case <-deadline:
			t.Fatalf("pid %d is still there at the end of the test's time", pid)
		default:
		}
	}
}

// SignalThreads interrupts every thread of this process, with the signal by which
// the runtime preempts goroutines: it expects it at any time.
func SignalThreads() error {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	for _, task := range tasks {
		tid, _ := strconv.Atoi(task.Name())
		_ = unix.Tgkill(os.Getpid(), tid, unix.SIGURG) // it may have ended
	}
	return nil
}

// Storm does something in n goroutines, again and again until it fails or stop is
// called, which waits for them.
func Storm(t testing.TB, n int, do func() error) (stop func()) {
	t.Helper()
	var over atomic.Bool
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			for !over.Load() {
				if err := do(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	return func() {
		over.Store(true)
		wg.Wait()
	}
}
