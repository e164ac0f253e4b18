//go:build !linux

package scan

import (
	"errors"

	"github.com/onecopy/onecopy/internal/procfs"
)

func identify(string) (procfs.FileID, error) { return procfs.FileID{}, errors.ErrUnsupported }

func sharedMemory() map[uint64]bool { return nil }
