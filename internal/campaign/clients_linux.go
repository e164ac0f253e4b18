//go:build amd64 || arm64

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// clients ask the servers without pause and judge each answer.
type clients struct {
	floor atomic.Uint64 // the newest generation that is known to be published

	mu         sync.Mutex
	requests   int
	failed     int
	mixed      int
	stale      int
	wrong      []string          // what was wrong, the first of it
	tagOf      map[uint64]uint64 // by generation, as it was served
	took       []time.Duration
	transports []*http.Transport
	running    sync.WaitGroup
}

func (c *clients) note(count *int, text string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	*count++
	if len(c.wrong) < 20 {
		c.wrong = append(c.wrong, fmt.Sprintf(text, args...))
	}
}

// start sends requests to one server over n connections until ctx ends.
func (c *clients) start(ctx context.Context, socket string, n int, pause time.Duration) {
	tr := &http.Transport{
		MaxIdleConnsPerHost: n,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}
	c.transports = append(c.transports, tr)
	for range n {
		c.running.Go(func() {
			for ctx.Err() == nil {
				c.ask(&http.Client{Transport: tr})
				select {
				case <-ctx.Done():
				case <-time.After(pause):
				}
			}
		})
	}
}

// ask sends one request. It has no deadline: a server that hangs is killed with
// the trial, and counts as failed then.
func (c *clients) ask(h *http.Client) {
	floor, begun := c.floor.Load(), time.Now()
	res, err := h.Get("http://server/")
	if err != nil {
		c.note(&c.failed, "no answer: %v", err)
		return
	}
	var a answer
	err = json.NewDecoder(res.Body).Decode(&a)
	res.Body.Close()
	switch {
	case err != nil:
		c.note(&c.failed, "not an answer: %v", err)
	case res.StatusCode != http.StatusOK || a.Error != "":
		c.note(&c.failed, "status %d: %s", res.StatusCode, a.Error)
	default:
		c.judge(a, floor, time.Since(begun))
	}
}

// judge looks at one answer to a request that was sent when floor was published.
func (c *clients) judge(a answer, floor uint64, took time.Duration) {
	want := len(parts) * 4
	switch {
	case len(a.Tags) != want:
		c.note(&c.failed, "%d tags of %d", len(a.Tags), want)
	case slices.Min(a.Tags) != slices.Max(a.Tags):
		c.note(&c.mixed, "generation %d: tags %v in one answer", a.Generation, a.Tags)
	case a.Generation < floor:
		c.note(&c.stale, "generation %d was served after %d was published", a.Generation, floor)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requests++
	c.took = append(c.took, took)
	if len(a.Tags) == 0 {
		return
	}
	switch before, ok := c.tagOf[a.Generation]; {
	case !ok:
		c.tagOf[a.Generation] = a.Tags[0]
	case before != a.Tags[0]:
		c.mixed++
		c.wrong = append(c.wrong, fmt.Sprintf("generation %d says both %d and %d", a.Generation, before, a.Tags[0]))
	}
}

// wait returns when the last request was answered.
func (c *clients) wait() {
	c.running.Wait()
	for _, tr := range c.transports {
		tr.CloseIdleConnections()
	}
}
