//go:build !unix

package main

import (
	"errors"
	"fmt"
	"os"
)

func execWith(string, []string, []string, *os.File, string) error {
	return fmt.Errorf("exec: %w", errors.ErrUnsupported)
}
