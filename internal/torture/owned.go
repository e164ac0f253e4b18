//go:build crashpoint && linux

package main

import "github.com/onecopy/onecopy/internal/crashpoint"

// A waiter's wait ends when it owns the load lock. What it does then, before its
// load begins, is work for which it may wait in turn: for the table, for room.
func init() {
	crashpoint.Hook = func(step string) {
		if step == ownedStep {
			owned.Store(monotonic())
		}
	}
}
