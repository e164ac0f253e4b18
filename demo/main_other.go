//go:build !linux

package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "demo: sharing model memory between processes needs Linux")
	os.Exit(1)
}
