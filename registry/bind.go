package registry

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
)

// Binding shares objects that are made from models, such as a parsed tensor
// index or a runtime's session, among the goroutines of this process. An object
// is built once per model generation however many goroutines ask for it, shared
// by reference count, and closed with its last user.
type Binding[T any] struct {
	r     *Registry
	build func(context.Context, *Model) (T, error)
	close func(T)

	mu      sync.Mutex
	objects map[string]*object[T] // the current one of each key

	hits, builds atomic.Uint64
	saved        atomic.Int64
}

type object[T any] struct {
	ready chan struct{} // closed when value or err is set
	value T
	err   error
	model *Model // keeps the bytes that value may point into

	// Under Binding.mu.
	refs   int  // builder and users
	broken bool // err is set
}

// Ref is one user's share of an object. It may be used until Close.
type Ref[T any] struct {
	Value T
	Model *Model // the generation that Value was built from; do not close it

	b    *Binding[T]
	o    *object[T]
	once sync.Once
}

var errBuildPanicked = errors.New("the object's builder panicked")

// BindStats of a Binding.
type BindStats struct {
	Hits       uint64 // answered by an object that was there, or being built
	Builds     uint64
	BytesSaved int64 // model bytes that the hits did not load again
}

// Bind makes a Binding. build may keep the model's bytes in what it returns: the
// model stays attached until close was called. close may be nil.
func Bind[T any](r *Registry, build func(context.Context, *Model) (T, error), close func(T)) *Binding[T] {
	return &Binding[T]{r: r, build: build, close: close, objects: map[string]*object[T]{}}
}

// GetOrLoad returns the object of key, loading the model and building the object
// if this process has none for the published generation. An error of build goes
// to all who waited for it, unless it is the end of the builder's own context; the
// next call builds again.
func (b *Binding[T]) GetOrLoad(ctx context.Context, key string, src Source) (*Ref[T], error) {
	m, err := b.r.GetOrLoad(ctx, key, src)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	o := b.objects[key]
	if o != nil && o.model.a == m.a {
		o.refs++
		b.mu.Unlock()
		size := m.a.bytes
		m.Close()
		select {
		case <-o.ready:
		case <-ctx.Done():
			b.drop(key, o)
			return nil, opErr("bind", key, ctx.Err())
		}
		if o.err != nil {
			b.drop(key, o)
			if ended(o.err) && ctx.Err() == nil {
				return b.GetOrLoad(ctx, key, src) // it was the builder's context
			}
			return nil, buildErr(ctx, key, o.err)
		}
		b.hits.Add(1)
		b.saved.Add(size)
		return &Ref[T]{Value: o.value, Model: o.model, b: b, o: o}, nil
	}
	o = &object[T]{ready: make(chan struct{}), model: m, refs: 1}
	b.objects[key] = o
	b.mu.Unlock()

	b.builds.Add(1)
	func() {
		err := errBuildPanicked // until build returns: a waiter must not believe in a zero value
		defer func() {
			if o.err = err; err != nil {
				b.mu.Lock()
				o.broken = true
				b.mu.Unlock()
				defer b.drop(key, o)
			}
			close(o.ready)
		}()
		o.value, err = b.build(ctx, m)
	}()
	if o.err != nil {
		return nil, buildErr(ctx, key, o.err)
	}
	return &Ref[T]{Value: o.value, Model: m, b: b, o: o}, nil
}

// buildErr is an error of build, whatever it wraps.
func buildErr(ctx context.Context, key string, err error) error {
	return &Error{Op: "bind", Key: key, Err: inTime(ctx, err)}
}

// ended reports whether err is the end of a context.
func ended(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// drop gives one reference back and closes the object with the last one.
func (b *Binding[T]) drop(key string, o *object[T]) {
	b.mu.Lock()
	o.refs--
	last := o.refs == 0
	if (last || o.broken) && b.objects[key] == o {
		delete(b.objects, key)
	}
	b.mu.Unlock()
	if last {
		defer o.model.Close() // also when close panics
		if !o.broken && b.close != nil {
			b.close(o.value)
		}
	}
}

// Close gives the share back; it is idempotent.
func (r *Ref[T]) Close() error {
	r.once.Do(func() { r.b.drop(r.o.model.Key(), r.o) })
	return nil
}

// Stats counts since Bind.
func (b *Binding[T]) Stats() BindStats {
	return BindStats{Hits: b.hits.Load(), Builds: b.builds.Load(), BytesSaved: b.saved.Load()}
}
