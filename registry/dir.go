package registry

import (
	"fmt"
	"os"
)

// DirEnv is the environment variable that DefaultDir reads.
const DirEnv = "ONECOPY_DIR"

// DefaultDir is the registry that programs of one user share if nobody says
// otherwise: $ONECOPY_DIR, else /dev/shm/onecopy-<uid>. It is the only function
// of this module that reads the environment.
func DefaultDir() string {
	if d := os.Getenv(DirEnv); d != "" {
		return d
	}
	return fmt.Sprintf("/dev/shm/onecopy-%d", os.Geteuid())
}
