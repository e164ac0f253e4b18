// Package shm makes, fills, publishes and maps shared-memory segments: files on
// a tmpfs that are written once and then only read. It knows names and bytes,
// not models; package registry decides what they mean.
//
// A segment begins as a Pending file that no name leads to, so that a killed
// writer leaves nothing. It is filled window by window, in 2 MiB pages where the
// kernel grants them, and sealed: mode 0444, the writer closed, and the kernel's
// proof (F_SETLEASE) that no writable descriptor or mapping of it is left
// anywhere. Only then does it get a name. After that nothing truncates or
// rewrites it; it is only unlinked.
//
// Everything is reached through directory descriptors that were verified once
// (OpenDir), never through a path that somebody else can swap.
package shm
