//go:build crashpoint && linux

package main

import "github.com/onecopy/onecopy/internal/crashpoint"

func init() {
	crashpoint.Hook = func(step string) {
		if step == "load.lock-key" {
			awaited.Load().owns()
		}
	}
}
