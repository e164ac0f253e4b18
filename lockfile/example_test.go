//go:build unix

package lockfile_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"time"

	"github.com/onecopy/onecopy/lockfile"
)

func Example() {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)

	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	table := lockfile.At(filepath.Join(dir, "table"))
	held, err := table.Lock(ctx)
	if err != nil {
		log.Fatal(err)
	}
	// Nobody else, in this process or another, is here now.

	_, err = table.TryLock()
	fmt.Println(errors.Is(err, lockfile.ErrLocked))

	fmt.Println(held.Unlock())
	// Output:
	// true
	// <nil>
}

func ExampleExisting() {
	_, err := lockfile.Existing("/nonexistent/segment").TryRLock()
	fmt.Println(err)
	// Output: rlock /nonexistent/segment: no such file or directory
}
