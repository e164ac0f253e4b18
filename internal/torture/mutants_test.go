//go:build linux

package main

import "testing"

// The code that the bugs are put into is still there.
func TestMutantsApply(t *testing.T) {
	for _, m := range mutants {
		if _, err := m.apply("../.."); err != nil {
			t.Error(err)
		}
	}
}
