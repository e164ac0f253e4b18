package shm

import "errors"

// Errors of this package, wrapped in *fs.PathError (op, path) or a text that
// says what to do.
var (
	// ErrUntrusted: the directory, or a file in it, is not what its owner would
	// have made: another owner, a symbolic link, writable by others.
	ErrUntrusted = errors.New("not trusted")
	// ErrNoSpace: the memory that a write needs is not there.
	ErrNoSpace = errors.New("not enough memory")
	// ErrSource: the source cannot be read, or changed while it was read.
	ErrSource = errors.New("source failed")
	// ErrWriter: the kernel says that somebody can still write the file.
	ErrWriter = errors.New("a writer is left")
	// ErrLimit: a limit of the process or the system (descriptors, mappings).
	ErrLimit = errors.New("limit reached")
)
