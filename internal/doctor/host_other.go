//go:build !(linux && (amd64 || arm64))

package doctor

import (
	"errors"
	"os"
)

// Machine is the one that we run on, where nothing can be shared.
func Machine() Host {
	return Host{
		UID:      os.Geteuid(),
		Statfs:   func(string) (Space, error) { return Space{}, errors.ErrUnsupported },
		Lstat:    func(string) (Owner, error) { return Owner{}, errors.ErrUnsupported },
		Headroom: func() (int64, string, bool) { return 0, "", false },
		Probe:    func(dir string) Probe { return Probe{Dir: dir, Skipped: errors.ErrUnsupported} },
	}
}
