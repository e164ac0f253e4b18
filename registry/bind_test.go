package registry

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// parsed is a process-local object that points into a model.
type parsed struct {
	words  []string
	closed atomic.Int64
}

type parser struct {
	builds, closes atomic.Int64
	binding        *Binding[*parsed]
}

func newParser(r *Registry) *parser {
	p := &parser{}
	p.binding = Bind(r, func(_ context.Context, m *Model) (*parsed, error) {
		p.builds.Add(1)
		b, err := m.Bytes("w.bin")
		return &parsed{words: strings.Fields(string(b))}, err
	}, func(o *parsed) {
		p.closes.Add(1)
		o.closed.Add(1)
	})
	return p
}

func (p *parser) want(t *testing.T, builds, closes int64) {
	t.Helper()
	if p.builds.Load() != builds || p.closes.Load() != closes {
		t.Errorf("%d built and %d closed, want %d and %d", p.builds.Load(), p.closes.Load(), builds, closes)
	}
}

func mustBind(t *testing.T, p *parser, key string, src Source) *Ref[*parsed] {
	t.Helper()
	ref, err := p.binding.GetOrLoad(ctxb, key, src)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ref.Close() })
	return ref
}

func TestBindBuildsOnceForManyGoroutines(t *testing.T) {
	r := newRegistry(t, nil)
	p := newParser(r)
	var ready, done sync.WaitGroup
	start, refs := make(chan struct{}), make(chan *Ref[*parsed], 64)
	for range 64 {
		ready.Add(1)
		done.Go(func() {
			ready.Done()
			<-start
			ref, err := p.binding.GetOrLoad(ctxb, "k", small("1"))
			if err != nil {
				t.Error(err)
				return
			}
			if got := strings.Join(ref.Value.words, " "); got != "weights 1" {
				t.Errorf("got %q", got)
			}
			refs <- ref
		})
	}
	ready.Wait()
	close(start)
	done.Wait()
	close(refs)
	p.want(t, 1, 0)
	var first *parsed
	n := 0
	for ref := range refs {
		if first == nil {
			first = ref.Value
		}
		if ref.Value != first {
			t.Error("two objects")
		}
		if n++; n == 64 {
			p.want(t, 1, 0) // until the last one goes
		}
		ref.Close()
		ref.Close() // counts once
	}
	p.want(t, 1, 1)
	if s := p.binding.Stats(); s.Builds != 1 || s.Hits != 63 || s.BytesSaved != 63*int64(len("weights 1")) {
		t.Errorf("%+v", s)
	}
}

func TestBindIsClosedWithItsLastUserAndBuiltAgain(t *testing.T) {
	r := newRegistry(t, nil)
	p := newParser(r)
	a, b := mustBind(t, p, "k", small("1")), mustBind(t, p, "k", small("1"))
	a.Close()
	p.want(t, 1, 0)
	if len(b.Value.words) != 2 {
		t.Error("the object of the other user is gone")
	}
	b.Close()
	p.want(t, 1, 1)
	mustBind(t, p, "k", small("1"))
	p.want(t, 2, 1)
}

func TestBindKeepsTheModel(t *testing.T) {
	r := newRegistry(t, nil)
	p := newParser(r)
	ref := mustBind(t, p, "k", small("1"))
	wantErr(t, r.Remove(ctxb, "k"), ErrInUse)
	wantBytes(t, ref.Model, "w.bin", []byte("weights 1"))
	ref.Close()
	if err := r.Remove(ctxb, "k"); err != nil {
		t.Error(err)
	}
}

func TestBindBuildsAgainForANewGeneration(t *testing.T) {
	r := newRegistry(t, nil)
	p := newParser(r)
	old := mustBind(t, p, "k", small("1"))
	src := small("2")
	src.OnChange = ChangeReplace
	fresh := mustBind(t, p, "k", src)
	p.want(t, 2, 0)
	if old.Value.words[1] != "1" || fresh.Value.words[1] != "2" {
		t.Errorf("%q, %q", old.Value.words, fresh.Value.words)
	}
	if old.Model.Generation() == fresh.Model.Generation() {
		t.Error("one generation")
	}
	old.Close()
	if p.want(t, 2, 1); old.Value.closed.Load() != 1 {
		t.Error("the wrong object was closed")
	}
	again := mustBind(t, p, "k", small("2"))
	if again.Value != fresh.Value {
		t.Error("closing the old object made the new one be forgotten")
	}
}

func TestBindKeysAreIndependent(t *testing.T) {
	r := newRegistry(t, nil)
	p := newParser(r)
	a, b := mustBind(t, p, "a", small("1")), mustBind(t, p, "b", small("1"))
	if a.Value == b.Value {
		t.Error("two keys share an object")
	}
	p.want(t, 2, 0)
}

func TestBindErrorOfTheBuilder(t *testing.T) {
	r := newRegistry(t, nil)
	failed := errors.New("not parsable")
	builds := 0
	b := Bind(r, func(context.Context, *Model) (int, error) {
		if builds++; builds == 1 {
			return 0, failed
		}
		return builds, nil
	}, func(int) { t.Error("close of an object that was never built") })
	if _, err := b.GetOrLoad(ctxb, "k", small("1")); !errors.Is(err, failed) {
		t.Fatalf("%v", err)
	}
	if err := r.Remove(ctxb, "k"); err != nil { // the failed build keeps nothing
		t.Error(err)
	}
	b = Bind(r, b.build, nil)
	ref, err := b.GetOrLoad(ctxb, "k", small("1"))
	if err != nil || ref.Value != 2 {
		t.Fatalf("the next call: %v", err)
	}
	ref.Close() // without a close function
}

// Whatever a builder returns is an error of bind, with all of its text.
func TestBindWrapsTheErrorOfTheBuilder(t *testing.T) {
	r := newRegistry(t, nil)
	slow := fmt.Errorf("session: %w", context.DeadlineExceeded)
	_, inner := r.Get("another")
	for _, failed := range []error{slow, inner} {
		b := Bind(r, func(context.Context, *Model) (int, error) { return 0, failed }, nil)
		_, err := b.GetOrLoad(ctxb, "k", small("1"))
		wantErr(t, err, failed)
		wantText(t, err, `bind "k": `, failed.Error())
		if errors.Is(err, ErrTimeout) {
			t.Errorf("%q is ErrTimeout", err)
		}
	}
	ctx := &expires{Context: ctxb}
	b := Bind(r, func(context.Context, *Model) (int, error) {
		ctx.over.Store(true)
		return 0, slow
	}, nil)
	_, err := b.GetOrLoad(ctx, "k", small("1"))
	wantErr(t, err, ErrTimeout, slow)
}

func TestBindErrorOfTheLoad(t *testing.T) {
	r := newRegistry(t, nil)
	p := newParser(r)
	_, err := p.binding.GetOrLoad(ctxb, "k", Source{Path: "/does/not/exist"})
	wantErr(t, err, ErrSource)
	p.want(t, 0, 0)
}

func TestBindPanicOfTheBuilder(t *testing.T) {
	r := newRegistry(t, nil)
	mustLoad(t, r, "k", small("1")).Close()
	building, goOn := make(chan struct{}), make(chan struct{})
	b := Bind(r, func(context.Context, *Model) (*int, error) {
		close(building)
		<-goOn
		panic("as told")
	}, nil)
	builder := make(chan any)
	go func() {
		defer func() { builder <- recover() }()
		_, _ = b.GetOrLoad(ctxb, "k", small("1"))
	}()
	<-building
	waiter := make(chan error)
	go func() {
		ref, err := b.GetOrLoad(ctxb, "k", small("1"))
		if err == nil && ref.Value == nil {
			err = errors.New("a zero value")
		}
		waiter <- err
	}()
	awaitUsers(t, b, "k", 2)
	close(goOn)
	if x := <-builder; x != "as told" {
		t.Errorf("recovered %v", x)
	}
	if err := <-waiter; err == nil {
		t.Error("the waiter believes in an object that was never built")
	}
	if err := r.Remove(ctxb, "k"); err != nil {
		t.Error(err)
	}
}

func TestBindPanicOfTheCloser(t *testing.T) {
	r := newRegistry(t, nil)
	b := Bind(r, func(context.Context, *Model) (int, error) { return 1, nil }, func(int) { panic("as told") })
	ref, err := b.GetOrLoad(ctxb, "k", small("1"))
	if err != nil {
		t.Fatal(err)
	}
	func() {
		defer func() {
			if x := recover(); x != "as told" {
				t.Errorf("recovered %v", x)
			}
		}()
		ref.Close()
	}()
	if err := r.Remove(ctxb, "k"); err != nil { // the lease is gone
		t.Error(err)
	}
}

// awaitUsers waits until n callers share the object of key.
func awaitUsers[T any](t *testing.T, b *Binding[T], key string, n int) {
	t.Helper()
	for {
		b.mu.Lock()
		o := b.objects[key]
		refs := 0
		if o != nil {
			refs = o.refs
		}
		b.mu.Unlock()
		if refs == n {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// A waiter that leaves does not take the object away from the others.
func TestBindWaiterLeavesWithItsContext(t *testing.T) {
	r := newRegistry(t, nil)
	building, goOn := make(chan struct{}), make(chan struct{})
	var builds atomic.Int64
	b := Bind(r, func(context.Context, *Model) (string, error) {
		if builds.Add(1) == 1 {
			close(building)
		}
		<-goOn
		return "built", nil
	}, nil)
	type result struct {
		ref *Ref[string]
		err error
	}
	get := func(ctx context.Context) chan result {
		c := make(chan result, 1)
		go func() {
			ref, err := b.GetOrLoad(ctx, "k", small("1"))
			c <- result{ref, err}
		}()
		return c
	}
	builder := get(ctxb)
	<-building
	ctx, cancel := context.WithCancel(ctxb)
	leaver := get(ctx)
	awaitUsers(t, b, "k", 2)
	cancel()
	wantErr(t, (<-leaver).err, context.Canceled)
	waiter := get(ctxb)
	awaitUsers(t, b, "k", 2)
	close(goOn)
	for _, c := range []chan result{builder, waiter} {
		res := <-c
		if res.err != nil || res.ref.Value != "built" {
			t.Errorf("%+v", res)
			continue
		}
		res.ref.Close()
	}
	if builds.Load() != 1 {
		t.Errorf("built %d times", builds.Load())
	}
}

// The builder's own context ends: that is no error of the object.
func TestBindWaiterBuildsWhenTheBuilderIsCancelled(t *testing.T) {
	r := newRegistry(t, nil)
	building := make(chan struct{})
	var builds atomic.Int64
	b := Bind(r, func(ctx context.Context, m *Model) (int64, error) {
		n := builds.Add(1)
		if n == 1 {
			close(building)
			<-ctx.Done()
		}
		return n, ctx.Err()
	}, nil)
	ctx, cancel := context.WithCancel(ctxb)
	builder := make(chan error)
	go func() {
		_, err := b.GetOrLoad(ctx, "k", small("1"))
		builder <- err
	}()
	<-building
	waiter := make(chan error)
	go func() {
		ref, err := b.GetOrLoad(ctxb, "k", small("1"))
		if err == nil {
			if ref.Value != 2 {
				err = errors.New("not built again")
			}
			ref.Close()
		}
		waiter <- err
	}()
	awaitUsers(t, b, "k", 2)
	cancel()
	wantErr(t, <-builder, context.Canceled)
	if err := <-waiter; err != nil {
		t.Error(err)
	}
}
