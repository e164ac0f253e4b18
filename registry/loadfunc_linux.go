//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"fmt"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/shm"
)

// segment is a file that a load function is writing.
type segment struct {
	*shm.Writer
	p *shm.Pending
}

// runLoad calls the source's load function and makes segments of what it wrote.
func (l *loader) runLoad(ctx context.Context) (sums [][]byte, err error) {
	var segments []*segment
	defer func() {
		for _, s := range segments {
			s.p.Abort()
		}
	}()
	w := &Writer{ctx: context.WithValue(ctx, loadingKey{}, true)}
	w.create = func(path string, size int64) (segmentWriter, error) {
		p, err := l.p.m.NewPending(path)
		if err != nil {
			return nil, err
		}
		sw, err := p.NewWriter(size, &l.fill)
		if err != nil {
			p.Abort()
			return nil, err
		}
		s := &segment{Writer: sw, p: p}
		segments = append(segments, s)
		return s, nil
	}
	defer w.end()
	err = l.src.Load(w.ctx, w)
	w.end()
	if err != nil {
		return nil, fmt.Errorf("%w: the load function: %w", ErrSource, inTime(ctx, err))
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if len(w.names) == 0 {
		return nil, fmt.Errorf("%w: the load function wrote no file", ErrSource)
	}
	for i, s := range segments {
		size, err := s.Finish(ctx)
		if err != nil {
			return nil, err
		}
		// No second copy can be made here if somebody else could still write
		// the first: what the function wrote is nowhere else.
		sealed, err := l.seal(ctx, s.p)
		if err != nil {
			return nil, err
		}
		l.sealed = append(l.sealed, sealed)
		sum, err := sealed.Sums(ctx, size)
		if err != nil {
			return nil, err
		}
		l.plan.files = append(l.plan.files, layout.ManifestFile{Path: w.names[i], Size: size})
		sums = append(sums, sum)
	}
	return sums, nil
}
