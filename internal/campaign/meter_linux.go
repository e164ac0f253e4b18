//go:build amd64 || arm64

package main

import (
	"context"
	"net"
	"sync"
	"time"
)

// meter reads the use of the tmpfs again and again.
type meter struct {
	space *space
	over  chan struct{}
	done  chan struct{}

	mu   sync.Mutex
	now  int64 // payload
	at   int64 // clock when it was first found to be that
	most int64
	err  error
}

func startMeter(s *space) *meter {
	m := &meter{space: s, over: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(m.done)
		tick := time.NewTicker(500 * time.Microsecond)
		defer tick.Stop()
		for {
			u, err := s.quickUsage()
			at := clock()
			m.mu.Lock()
			if n := u.payload(s.own); n != m.now || m.at == 0 {
				m.now, m.at = n, at
			}
			m.most = max(m.most, m.now)
			m.err = err
			m.mu.Unlock()
			select {
			case <-m.over:
				return
			case <-tick.C:
			}
		}
	}()
	return m
}

func (m *meter) stop() {
	close(m.over)
	<-m.done
}

// await waits, not longer than patience, until no more than limit is in use, and
// says since when that is so.
func (m *meter) await(ctx context.Context, limit int64, patience time.Duration) (since int64, ok bool, err error) {
	// What is looked at must be later than what the caller has seen.
	asked := clock()
	enough := time.After(patience)
	for {
		m.mu.Lock()
		now, at, err := m.now, m.at, m.err
		m.mu.Unlock()
		if err != nil {
			return 0, false, err
		}
		if now <= limit && clock()-asked > int64(2*time.Millisecond) {
			return at, true, nil
		}
		select {
		case <-ctx.Done():
			return 0, false, ctx.Err()
		case <-enough:
			return 0, false, nil
		case <-time.After(time.Millisecond):
		}
	}
}

func dial(ctx context.Context, socket string) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "unix", socket)
}
