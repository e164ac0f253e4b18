package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"
	"time"
)

func TestDefaultDir(t *testing.T) {
	t.Setenv(DirEnv, "/somewhere/else")
	if got := DefaultDir(); got != "/somewhere/else" {
		t.Errorf("with %s: %q", DirEnv, got)
	}
	t.Setenv(DirEnv, "")
	if got, want := DefaultDir(), fmt.Sprintf("/dev/shm/onecopy-%d", os.Geteuid()); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// Every error that a user can do something about says what.
func TestHints(t *testing.T) {
	for err, part := range map[error]string{
		ErrNoRegistry:                      "shmctl load",
		ErrNotFound:                        "shmctl ls",
		ErrInUse:                           "shmctl holders",
		&InUseError{}:                      "shmctl holders",
		ErrNoSpace:                         "shmctl rm",
		&NoSpaceError{}:                    "--shm-size",
		ErrTableFull:                       "shmctl rm",
		&SourceChangedError{Field: "path"}: "--replace",
		ErrLoadFailed:                      "dmesg",
		&LoadFailedError{}:                 "dmesg",
		ErrReadOnly:                        "owns the registry",
		ErrUntrusted:                       "ONECOPY_DIR",
		ErrVersion:                         "version",
		ErrCorrupt:                         "shmctl check",
		ErrGone:                            "shmctl check",
		ErrBusy:                            "shmctl holders",
		ErrTimeout:                         "more time",
		waitedError{ErrTimeout}:            "another process is loading",
		ErrLimit:                           "limit",
		fs.ErrPermission:                   "user who owns",
		fmt.Errorf("far away: %w", ErrNoRegistry): "shmctl load",
	} {
		err = &Error{Op: "load", Key: "k", Err: err}
		if h := Hint(err); !strings.Contains(h, part) {
			t.Errorf("%v: hint %q does not say %q", err, h, part)
		}
	}
	for _, err := range []error{
		nil, errors.New("else"), context.Canceled, ErrClosed,
		fs.ErrPermission, // of something else
		&Error{Op: "load", Key: "k", Err: fmt.Errorf("%w: %w", ErrSource, fs.ErrPermission)},
		&Error{Op: "load", Key: "k", Err: fmt.Errorf("%w: %w", ErrProof, fs.ErrPermission)},
	} {
		if h := Hint(err); h != "" {
			t.Errorf("%v: hint %q", err, h)
		}
	}
}

func TestErrorTexts(t *testing.T) {
	for err, want := range map[error]string{
		&Error{Op: "get", Key: "a/b", Err: ErrNotFound}:            `get "a/b": not loaded`,
		&Error{Op: "bytes", Key: "k", Path: "w.bin", Err: ErrGone}: `bytes "k" w.bin: removed while in use`,
		&Error{Op: "open", Path: "/dev/shm/x", Err: ErrNoRegistry}: `open /dev/shm/x: no registry here`,
		&InUseError{}:              "in use by a process that is not visible from here",
		&InUseError{Loading: true}: "in use: it is being loaded",
		&InUseError{Holders: []Holder{{PID: 7}, {PID: 8, Command: "python"}}}:                                                         "in use by pid 7, pid 8 (python)",
		&InUseError{Holders: []Holder{{PID: 1}, {PID: 2}, {PID: 3}, {PID: 4}, {PID: 5}, {PID: 6}, {PID: 7}}}:                          "in use by pid 1, pid 2, pid 3, pid 4, pid 5 and 2 more",
		&LoadFailedError{Deaths: 3, RetryAfter: 10 * time.Second}:                                                                     "loaders keep dying: 3 were killed in a row (out of memory?); the next attempt is allowed in 10s",
		&NoSpaceError{Need: 3 << 30, Free: 1 << 20, Budget: 2 << 30, Used: 1023, Evictable: 1024, Leased: 5, Headroom: -1, Dir: "/d"}: "not enough memory: the model needs 3.0 GiB; /d has 1.0 MiB free, the registry uses 1023 B of its budget of 2.0 GiB; 1.0 KiB are idle and can be evicted, 5 B are in use",
		&NoSpaceError{Reserved: 1 << 20, Headroom: 0, Dir: "/d"}:                                                                      "not enough memory: the model needs 0 B; /d has 0 B free, the registry uses 0 B of its budget of 0 B, running loads still need 1.0 MiB, the cgroup of this process has 0 B left; 0 B are idle and can be evicted, 0 B are in use",
	} {
		if err.Error() != want {
			t.Errorf("got  %s\nwant %s", err, want)
		}
	}
}

func TestErrorsAreTheirSentinels(t *testing.T) {
	for err, sentinel := range map[error]error{
		&InUseError{}: ErrInUse, &NoSpaceError{}: ErrNoSpace, &LoadFailedError{}: ErrLoadFailed,
		&SourceChangedError{}: ErrSourceChanged, ErrTimeout: context.DeadlineExceeded,
	} {
		if wrapped := opErr("load", "k", err); !errors.Is(wrapped, sentinel) {
			t.Errorf("%v is not %v", wrapped, sentinel)
		}
	}
	if err := opErr("load", "k", context.DeadlineExceeded); !errors.Is(err, ErrTimeout) {
		t.Errorf("%v is not ErrTimeout", err)
	}
	if opErr("load", "k", nil) != nil {
		t.Error("an error out of nothing")
	}
	once := opErr("get", "k", ErrNotFound)
	if opErr("load", "k", once) != once {
		t.Error("wrapped twice")
	}
}
