//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
)

// A marked model says in every block of every file whose it is: of which key, and
// of which of all runs of a load function. So nobody can take it for another one.

const markBytes = 64

var markRuns atomic.Uint64 // load functions that this process has run

// markedKeys have models of one file and of several, small ones and one with
// windows of 2 MiB.
var markedKeys = []string{"org/one", "org/large", "org/folder", "org/other"}

var markedFiles = map[string]map[string]int{
	"org/one":    {"w.bin": 200 << 10},
	"org/large":  {"w.bin": 5 << 20},
	"org/folder": {"a.bin": 5000, "sub/b.bin": 300 << 10, "sub/c.bin": markBytes},
	"org/other":  {"a.bin": 5000, "b.bin": 70 << 10},
}

func mark(key, run, file string) []byte {
	b := make([]byte, markBytes)
	copy(b, fmt.Sprintf("%s %s %s\n", key, run, file))
	return b
}

// markedSource makes the model of key. What is loaded is used, whoever loaded it.
func markedSource(key string) Source {
	return Source{Version: "marked", OnChange: ChangeIgnore, Load: func(_ context.Context, w *Writer) error {
		run := fmt.Sprintf("%d.%d", os.Getpid(), markRuns.Add(1))
		for name, size := range markedFiles[key] {
			f, err := w.Create(name, int64(size))
			if err != nil {
				return err
			}
			b := bytes.Repeat(mark(key, run, name), size/markBytes+1)
			if _, err := f.Write(b[:size]); err != nil {
				return err
			}
		}
		return nil
	}}
}

// errWrongBytes is what must never happen.
var errWrongBytes = errors.New("wrong bytes")

// readMarked reads all of a model that was got for key and returns the run that
// made it.
func readMarked(m *Model, key string) (run string, err error) {
	for _, f := range m.Files() {
		b, err := m.Bytes(f.Path)
		if err != nil {
			return "", err
		}
		if len(b) != markedFiles[key][f.Path] || len(b) < markBytes {
			return "", fmt.Errorf("%w: %s of %s has %d", errWrongBytes, f.Path, key, len(b))
		}
		words := strings.Fields(string(bytes.TrimRight(b[:markBytes], "\x00")))
		if len(words) != 3 || words[0] != key || words[2] != f.Path || run != "" && run != words[1] {
			return "", fmt.Errorf("%w: %s of %s, run %q, begins with %q", errWrongBytes, f.Path, key, run, b[:markBytes])
		}
		run = words[1]
		want := mark(key, run, f.Path)
		for i := 0; i < len(b); i += markBytes {
			if n := min(markBytes, len(b)-i); !bytes.Equal(b[i:i+n], want[:n]) {
				return "", fmt.Errorf("%w: %s of %s differs at byte %d", errWrongBytes, f.Path, key, i)
			}
		}
	}
	if run == "" {
		return "", fmt.Errorf("%w: %s has no files", errWrongBytes, key)
	}
	return run, nil
}

// typed reports whether err is what the package promises of every error: an
// *Error, with one of the documented kinds or an errno.
func typed(err error) bool {
	var e *Error
	var errno syscall.Errno
	return errors.As(err, &e) && (len(reportOf(err).Is) > 0 || errors.As(err, &errno) || errors.Is(err, context.Canceled))
}
