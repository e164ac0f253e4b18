//go:build !unix

package main

import "time"

var started = time.Now()

// processorTime is not known here: as if one processor did nothing else.
func processorTime() time.Duration { return time.Since(started) }
