// Package invariants says whether this build checks what must always hold.
//
// Checks that cost time or memory, or that turn a misuse into a fault at once,
// are written as
//
//	if invariants.Enabled { ... }
//
// and are compiled only with the build tag "invariants". They may stop the
// process; they must never change what a correct program observes.
package invariants
