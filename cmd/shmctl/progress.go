package main

import (
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
)

// progressEvery is the time between two lines of progress on a stderr that is
// no terminal.
const progressEvery = 5 * time.Second

// progress shows how far a load is: a bar on a terminal, else a line every few
// seconds, nothing for a quiet user or a program that parses.
type progress struct {
	a   *app
	key string

	mu struct {
		sync.Mutex
		begun bool
		bar   *progressbar.ProgressBar
		last  time.Time // of the last line
	}
}

func (a *app) newProgress(key string) *progress {
	return &progress{a: a, key: key}
}

// update may be called from several goroutines, and with numbers that grow
// while the total is not known (total <= 0).
func (p *progress) update(done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	first := !p.mu.begun
	p.mu.begun = true
	switch {
	case p.a.quiet || p.a.json():
	case isTerminal(p.a.stderr):
		p.draw(done, total)
	case first:
		p.mu.last = p.a.now() // a load that is over at once needs no line
	case p.a.now().Sub(p.mu.last) >= progressEvery:
		p.mu.last = p.a.now()
		if total > 0 {
			p.a.note("loading %s: %s of %s (%d %%)", p.key, p.a.size(done), p.a.size(total), 100*done/total)
		} else {
			p.a.note("loading %s: %s", p.key, p.a.size(done))
		}
	}
}

func (p *progress) draw(done, total int64) {
	if total <= 0 {
		total = -1 // the bar's word for unknown
	}
	if p.mu.bar == nil {
		p.mu.bar = progressbar.NewOptions64(total,
			progressbar.OptionSetWriter(p.a.stderr),
			progressbar.OptionSetDescription("loading "+visible(p.key)),
			progressbar.OptionShowBytes(true),
			progressbar.OptionUseIECUnits(true),
			progressbar.OptionSetWidth(24),
			progressbar.OptionThrottle(100*time.Millisecond),
			progressbar.OptionSetSpinnerChangeInterval(0), // no goroutine of its own
			progressbar.OptionClearOnFinish(),
		)
	}
	// The bar refuses to pass its end; a source that grows is the loader's to
	// report.
	if total > 0 {
		done = min(done, total)
	}
	_ = p.mu.bar.Set64(done)
}

func (p *progress) begun() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mu.begun
}

// finish wipes the bar: what follows is the result.
func (p *progress) finish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.bar != nil {
		_ = p.mu.bar.Clear()
	}
}
