//go:build amd64 || arm64

package shm

import (
	"errors"
	"fmt"
	"sync"

	"github.com/edsrzf/mmap-go"
	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/lockfile"
)

var probe struct {
	sync.Mutex
	done map[uint64]error // by device
}

// ProbeLocks checks once per process and file system what everything rests on:
// that flock excludes, and that a mapping keeps the lock of a closed
// descriptor. Only the directory's owner can call it. errors.ErrUnsupported
// when the kernel does not do so.
func (d *Dir) ProbeLocks() error {
	probe.Lock()
	defer probe.Unlock()
	if err, ok := probe.done[d.dev]; ok {
		return err
	}
	err := d.probeLocks()
	if err == nil || errors.Is(err, errors.ErrUnsupported) {
		if probe.done == nil {
			probe.done = map[uint64]error{}
		}
		probe.done[d.dev] = err
	}
	return err
}

func (d *Dir) probeLocks() error {
	p, err := d.NewPending("lock probe")
	if err != nil {
		return err
	}
	defer p.Abort()
	if _, err := p.WriteAt([]byte{1}, 0); err != nil {
		return err
	}
	if err := unix.Fchmod(int(p.f.Fd()), 0o600); err != nil { // whatever the umask is
		return p.wrap("chmod", err)
	}
	holder, err := p.reopen()
	if err != nil {
		return err
	}
	m, err := func() (mmap.MMap, error) {
		defer holder.Close()
		if err := lockfile.TryShared(holder); err != nil {
			return nil, err
		}
		return mmap.Map(holder, mmap.RDONLY, 0)
	}()
	if err != nil {
		return err
	}
	whileMapped := lockfile.TryExclusive(p.f)
	if err := m.Unmap(); err != nil {
		return err
	}
	afterwards := lockfile.TryExclusive(p.f)
	switch {
	case whileMapped == nil:
		return fmt.Errorf("%w: a lock (flock) does not last as long as its mapping on %s: nothing here can tell which models are in use", errors.ErrUnsupported, d.path)
	case !errors.Is(whileMapped, lockfile.ErrLocked): // a fault of the moment proves nothing
		return whileMapped
	case errors.Is(afterwards, lockfile.ErrLocked):
		return fmt.Errorf("%w: a lock (flock) outlives its mapping on %s: no model could ever be removed: %w", errors.ErrUnsupported, d.path, afterwards)
	}
	return afterwards
}
