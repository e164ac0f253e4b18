//go:build race

package registry

// raceEnabled: the race detector reads shared memory in C code, where a fault is
// no panic.
const raceEnabled = true
