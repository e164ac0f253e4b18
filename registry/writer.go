package registry

import (
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/onecopy/onecopy/internal/layout"
)

// Writer receives what a load function makes. Its files land in shared memory
// as they are written: a load needs one model of memory, not two.
type Writer struct {
	ctx    context.Context
	create func(path string, size int64) (segmentWriter, error)

	mu    sync.Mutex
	names []string        // in the order of Create
	seen  map[string]bool // path -> is a file; the folders above the files too

	ending sync.RWMutex // held shared by every call
	ended  bool
}

// segmentWriter is what the platform gives for one file.
type segmentWriter interface {
	io.Writer
	io.WriterAt
}

// Create begins a file of the model. size is its exact size in bytes, or
// negative if that is not known; a known size is faster. Bytes of a known size
// that are never written are zero.
//
// Errors: ErrPath, ErrNoSpace, ErrLimit, ErrClosed after the load.
func (w *Writer) Create(path string, size int64) (*FileWriter, error) {
	w.ending.RLock()
	defer w.ending.RUnlock()
	if err := w.alive(); err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.names) == layout.MaxFiles {
		return nil, fmt.Errorf("%w: more than %d files", ErrLimit, layout.MaxFiles)
	}
	if err := w.free(path); err != nil {
		return nil, err
	}
	s, err := w.create(path, size)
	if err != nil {
		return nil, err
	}
	w.names = append(w.names, path)
	w.seen[path] = true
	for i, c := range path {
		if c == '/' {
			w.seen[path[:i]] = false
		}
	}
	return &FileWriter{w: w, s: s}, nil
}

// free is layout.ValidPaths for one path more.
func (w *Writer) free(path string) error {
	if err := layout.ValidPath(path); err != nil {
		return err
	}
	if w.seen == nil {
		w.seen = map[string]bool{}
	}
	_, dup := w.seen[path]
	for i, c := range path {
		dup = dup || c == '/' && w.seen[path[:i]]
	}
	if dup {
		return fmt.Errorf("%w: %q: twice, or both a file and a folder", ErrPath, clip(path, 80))
	}
	return nil
}

// alive needs ending.
func (w *Writer) alive() error {
	if w.ended {
		return fmt.Errorf("%w: the load function has returned", ErrClosed)
	}
	return w.ctx.Err()
}

// end waits for calls that run in goroutines of the load function and refuses
// later ones: nobody may write what is being published.
func (w *Writer) end() {
	w.ending.Lock()
	defer w.ending.Unlock()
	w.ended = true
}

// FileWriter is one file of a model in the making. Its methods may be called
// from several goroutines.
type FileWriter struct {
	w *Writer
	s segmentWriter
}

// Write appends to what Write wrote before. It fails when the load's context
// has ended. Bytes for which there is no memory end the file: that error is the
// error of all later writes, and of the load, whatever the function returns.
func (f *FileWriter) Write(b []byte) (int, error) {
	f.w.ending.RLock()
	defer f.w.ending.RUnlock()
	if err := f.w.alive(); err != nil {
		return 0, err
	}
	return f.s.Write(b)
}

// WriteAt writes at an offset, in any order.
func (f *FileWriter) WriteAt(b []byte, off int64) (int, error) {
	f.w.ending.RLock()
	defer f.w.ending.RUnlock()
	if err := f.w.alive(); err != nil {
		return 0, err
	}
	return f.s.WriteAt(b, off)
}

// Close is not needed, but makes a FileWriter an io.WriteCloser: the file is
// finished when the load function returns.
func (f *FileWriter) Close() error { return nil }
