//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"errors"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/procfs"
	"github.com/onecopy/onecopy/lockfile"
)

// leasedOutside reports whether somebody leases a generation for which
// /proc/locks has no lock. In a PID namespace of its own, as in a container, it
// does not list those of the processes outside; then the lock is tried, which
// takes microseconds. A reader that meets it tries again.
func (p *place) leasedOutside(gen uint64) bool {
	if procfs.SeesEverybody() {
		return false
	}
	f, _, err := p.m.Open(layout.GenName(p.table.Identity().Epoch, gen) + layout.ManifestExt)
	if err != nil {
		return false
	}
	defer f.Close()
	return errors.Is(lockfile.TryExclusive(f), lockfile.ErrLocked)
}
