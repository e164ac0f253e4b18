package lockfile

import "sync"

// The kernel excludes two descriptions of one process as well as two processes,
// but the Go memory model knows nothing of it. An edge carries "unlock happens
// before the next lock" into the model, and so to the race detector.
//
// The mutexes are held for an instant, never during a system call, and never
// decide who holds a lock. That two files may share one costs nothing but a few
// edges too many, so a fixed array is enough and no path is remembered.
var edges [128]sync.RWMutex

// edge is the happens-before edge of one acquisition.
type edge struct {
	mu *sync.RWMutex
	m  mode
}

func edgeOf(inode uint64, m mode) edge {
	return edge{mu: &edges[inode%uint64(len(edges))], m: m}
}

// acquire orders all earlier releases before what follows. It is called after
// the kernel has granted the lock.
func (e edge) acquire() { e.touch() }

// release orders what came before it before all later acquisitions. It is called
// before the kernel is told to unlock.
func (e edge) release() { e.touch() }

// touch follows the rules of RWMutex: two shared holders are not ordered by
// their lock, so a write under a shared lock stays visible as a race.
func (e edge) touch() {
	if e.m == shared {
		e.mu.RLock()
		defer e.mu.RUnlock()
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
}
