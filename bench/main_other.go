//go:build !linux

package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "bench: sharing model memory between processes needs Linux; there is nothing to measure here")
	os.Exit(1)
}
