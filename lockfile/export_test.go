package lockfile

// Retry is the loop around interrupted system calls.
var Retry = retry

// Inherit makes h look as it does in a child of a fork: acquired by another
// process.
func (h *Held) Inherit() { h.pid++ }
