package proctest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Barrier waits until n participants, in any processes, have called it with the
// same directory; then all of them go on. The next n calls are the next round.
// Waiting is a read(2) that blocks in the kernel.
//
// A participant that is killed while it waits counts as arrived; one that is
// killed before leaves the others waiting until their test ends them. Barrier
// panics if the directory cannot be used.
func Barrier(dir string, n int) {
	if err := barrier(dir, n); err != nil {
		panic(fmt.Sprintf("proctest: barrier in %s: %v", dir, err))
	}
}

func barrier(dir string, n int) error {
	gate, last, err := arrive(dir, n)
	if err != nil {
		return err
	}
	defer unix.Close(gate)
	if last {
		// One byte for each of the others. They all hold the FIFO open, so
		// the bytes outlive this descriptor.
		_, err = uninterrupted(func() (int, error) { return unix.Write(gate, make([]byte, n-1)) })
		return err
	}
	_, err = uninterrupted(func() (int, error) { return unix.Read(gate, make([]byte, 1)) })
	return err
}

// arrive counts the caller in. Each round has a FIFO of its own, so that somebody
// who is early for the next one cannot take a byte of this one.
//
// The FIFO is opened before the caller is counted: whoever is last then finds
// every other reader in place, and nobody can miss the bytes.
func arrive(dir string, n int) (gate int, last bool, err error) {
	count, err := os.OpenFile(filepath.Join(dir, "count"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return 0, false, err
	}
	defer count.Close() // ends the lock
	fd := int(count.Fd())
	if _, err := uninterrupted(func() (int, error) { return 0, unix.Flock(fd, unix.LOCK_EX) }); err != nil {
		return 0, false, err
	}
	arrived := 0
	buf := make([]byte, 32)
	if k, _ := count.ReadAt(buf, 0); k > 0 {
		if arrived, err = strconv.Atoi(strings.TrimSpace(string(buf[:k]))); err != nil {
			return 0, false, err
		}
	}
	path := filepath.Join(dir, fmt.Sprintf("gate-%d", arrived/n))
	if err := unix.Mkfifo(path, 0o600); err != nil && !errors.Is(err, unix.EEXIST) {
		return 0, false, &os.PathError{Op: "mkfifo", Path: path, Err: err}
	}
	// Reading and writing at once, because that never waits for a partner.
	gate, err = uninterrupted(func() (int, error) { return unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0) })
	if err != nil {
		return 0, false, &os.PathError{Op: "open", Path: path, Err: err}
	}
	arrived++
	if _, err := count.WriteAt(fmt.Appendf(nil, "%31d\n", arrived), 0); err != nil {
		unix.Close(gate)
		return 0, false, err
	}
	return gate, arrived%n == 0, nil
}

func uninterrupted(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
