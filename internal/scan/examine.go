package scan

import (
	"cmp"
	"context"
	"math/rand/v2"
	"os"
	"slices"
	"strings"

	"github.com/onecopy/onecopy/internal/procfs"
)

const (
	pagemapBatch = 64 << 10 // pages
	// A region that is mostly not there, such as the address space that a
	// runtime keeps for later, is looked at up to this size: the kernel lists
	// every page of it.
	sparseLimit = 64 << 30
	sparseShare = 64 // of larger ones so much must be there, one part in ...

	leastProbes  = 64   // pages looked up before a region is given up
	pagesAProbe  = 512  // ... more for larger ones: one in so many pages
	lookUpTries  = 16   // places compared for one page
	maxPlaces    = 8192 // places of the models that a region has copies of
	nearPlaces   = 4    // of which so many are tried for a page: those found next to it
	cancelStride = 64   // pages between two looks at the clock
)

// examiner looks at one process at a time.
type examiner struct {
	s        *scanner
	pageSize uint64
	entries  []procfs.Page
	raw      []byte
	want     []byte // of a model
	pages    []byte // of a process, one after the other
	random   *rand.Rand
}

func newExaminer(s *scanner) *examiner {
	return &examiner{
		s: s, pageSize: uint64(os.Getpagesize()),
		entries: make([]procfs.Page, pagemapBatch), raw: make([]byte, 8*pagemapBatch),
		want: make([]byte, pageBytes), random: rand.New(rand.NewPCG(1, 2)),
	}
}

// process returns what a process has of each model. With an error it has what
// was found until then.
func (e *examiner) process(ctx context.Context, pid int) (uses []Use, err error) {
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	m, err := procfs.OpenMemory(pid)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	all, err := m.Regions(0)
	if err != nil {
		return nil, err
	}
	found := map[int]*Use{}
	use := func(model int) *Use {
		if found[model] == nil {
			found[model] = &Use{Model: model}
		}
		return found[model]
	}
	slices.SortFunc(all, func(a, b procfs.Region) int { return cmp.Compare(b.RSS, a.RSS) })
	for _, r := range all {
		if model, ok := e.s.index.attach[r.File]; ok {
			u := use(model)
			u.Attached = true
			u.Resident += r.RSS
		}
		if ctx.Err() == nil && r.RSS >= e.s.opts.MinRegion && e.worth(r) {
			e.region(ctx, m, r, use)
		}
	}
	for _, u := range found {
		// A page here and there is not what anybody looks for.
		least := e.s.opts.MinRegion / 2
		if u.Private < least {
			u.Private, u.Samples, u.Matched = 0, 0, 0
		}
		if u.PageCache < least {
			u.PageCache = 0
		}
		if u.OtherShm < least {
			u.OtherShm = 0
		}
		if u.Private+u.PageCache+u.OtherShm > 0 || u.Attached {
			uses = append(uses, *u)
		}
	}
	slices.SortFunc(uses, func(a, b Use) int {
		return cmp.Or(cmp.Compare(b.Private, a.Private), cmp.Compare(a.Model, b.Model))
	})
	return uses, nil
}

// worth leaves out what holds no weights: code, devices, the kernel's own pages,
// and regions of which next to nothing is there.
func (e *examiner) worth(r procfs.Region) bool {
	size := int64(r.End - r.Start)
	switch {
	case r.Perms[0] != 'r' || r.Perms[2] == 'x':
		return false
	case strings.HasPrefix(r.Path, "/dev/") && !strings.HasPrefix(r.Path, "/dev/shm/") && !strings.HasPrefix(r.Path, "/dev/zero"):
		return false
	case strings.HasPrefix(r.Path, "[v"): // [vvar], [vdso], [vsyscall]
		return false
	}
	return size <= sparseLimit || r.RSS >= size/sparseShare
}

// run is a number of pages one after the other.
type run struct {
	addr  uint64
	pages int
}

// class is the pages of a region that are present and of one kind.
type class struct {
	runs  []run
	pages int
}

func (c *class) add(addr, pageSize uint64) {
	c.pages++
	if n := len(c.runs); n > 0 {
		if last := &c.runs[n-1]; last.addr+uint64(last.pages)*pageSize == addr {
			last.pages++
			return
		}
	}
	c.runs = append(c.runs, run{addr, 1})
}

// region adds what a region of the process has of the models.
func (e *examiner) region(ctx context.Context, m *procfs.Memory, r procfs.Region, use func(model int) *Use) {
	private, shared := e.classes(ctx, m, r)
	least := int(e.s.opts.MinRegion / int64(e.pageSize) / 2)
	if private.pages > least {
		// Memory that fork shares is divided by those who share it. The kernel
		// says by how many for a region as a whole.
		part := 1.0
		if r.Anonymous == r.RSS && r.PSS < r.RSS {
			part = float64(r.PSS) / float64(r.RSS)
		}
		for model, f := range e.compare(ctx, m, private) {
			u := use(model)
			u.Private += int64(part * f.share * float64(private.pages) * float64(e.pageSize))
			u.Samples += f.samples
			u.Matched += f.matched
		}
	}
	if _, attached := e.s.index.attach[r.File]; attached || shared.pages <= least {
		return
	}
	what := piece{r.File, r.Offset, r.End - r.Start}
	if e.s.isEmpty(what) {
		return
	}
	matches := e.compare(ctx, m, shared)
	if len(matches) == 0 && ctx.Err() == nil {
		e.s.setEmpty(what)
	}
	_, own := e.s.index.own[r.File]
	for model, f := range matches {
		n := int64(f.share * float64(shared.pages) * float64(e.pageSize))
		if u := use(model); own || !e.s.isShm(r) {
			u.PageCache += n
		} else {
			u.OtherShm += n
			e.s.addShm(shmCopy{r.File, r.Offset, model}, n)
		}
	}
}

// classes lists the pages of a region that are there: those of the process alone
// and those of a file.
func (e *examiner) classes(ctx context.Context, m *procfs.Memory, r procfs.Region) (private, shared class) {
	for addr := r.Start; addr < r.End && ctx.Err() == nil; {
		left := (r.End - addr) / e.pageSize
		n, err := m.Pages(addr, e.entries[:min(left, pagemapBatch)], e.raw)
		if err != nil || n == 0 {
			break
		}
		for _, p := range e.entries[:n] {
			switch {
			case !p.Present():
			case p.Shared():
				shared.add(addr, e.pageSize)
			default:
				private.add(addr, e.pageSize)
			}
			addr += e.pageSize
		}
	}
	return private, shared
}

// match is how much of a class is a model's.
type match struct {
	share            float64 // of the bytes
	samples, matched int     // pages
}

// place says that the byte of the process at address a is that of the file at
// a - base. seen is the address of the last page for which that was true.
type place struct {
	file int
	base int64
	seen uint64
}

// sampled is a page of a process.
type sampled struct {
	addr  uint64
	data  []byte // nil: gone
	equal int    // bytes that are a model's
	place int    // which
}

// compare samples the pages of a class and returns what they match, by model.
func (e *examiner) compare(ctx context.Context, m *procfs.Memory, c class) map[int]match {
	pages := e.sample(c)
	probes := max(leastProbes*int(min(e.s.index.stride, 32)), c.pages/pagesAProbe)
	var places []place
	samples := 0
	// Neighbours are alike: the first probes are spread over the region.
	for i, at := range spread(len(pages)) {
		if i == probes && len(places) == 0 || i%cancelStride == 0 && ctx.Err() != nil {
			return nil
		}
		p := &pages[at]
		if n, _ := m.ReadAt(p.data, int64(p.addr)); n < pageBytes {
			p.data = nil
			continue
		}
		samples++
		if blank(p.data) {
			continue
		}
		for _, w := range near(places, p.addr) {
			e.try(places, w, p)
			if p.equal == pageBytes {
				break
			}
		}
		if p.equal < pageBytes && len(places) < maxPlaces {
			places = e.lookUp(places, p)
		}
	}
	if len(places) == 0 {
		return nil
	}
	// With an index that has not every block, the first pages were looked up in
	// vain; where they must come from is known only now.
	for i := range pages {
		if p := &pages[i]; p.equal == 0 && p.data != nil {
			for _, w := range near(places, p.addr) {
				e.try(places, w, p)
			}
		}
	}
	e.settle(places, pages)
	found := map[int]match{}
	for _, p := range pages {
		if p.equal > 0 {
			model := e.model(places[p.place])
			f := found[model]
			f.share += float64(p.equal) / float64(samples*pageBytes)
			f.matched++
			f.samples = samples
			found[model] = f
		}
	}
	return found
}

func (e *examiner) model(p place) int { return e.s.index.files[p.file].model }

// try compares a page with what must be there if it belongs to the copy at a
// place.
func (e *examiner) try(places []place, w int, p *sampled) {
	n := e.s.index.compare(places[w].file, int64(p.addr)-places[w].base, p.data, e.want)
	if n > p.equal {
		p.equal, p.place = n, w
		places[w].seen = p.addr
	}
}

// lookUp finds further places that the page is a copy of.
func (e *examiner) lookUp(places []place, p *sampled) []place {
	tries := lookUpTries
	e.s.index.lookUp(p.data, func(file int, off int64) bool {
		tries--
		base := int64(p.addr) - off
		w := slices.IndexFunc(places, func(q place) bool { return q.file == file && q.base == base })
		if w >= 0 {
			e.try(places, w, p)
		} else if n := e.s.index.compare(file, off, p.data, e.want); n > 0 {
			places = append(places, place{file, base, p.addr})
			if n > p.equal {
				p.equal, p.place = n, len(places)-1
			}
		}
		return tries > 0 && p.equal < pageBytes && len(places) < maxPlaces
	})
	return places
}

// near returns the places that were last found nearest to an address.
func near(places []place, addr uint64) []int {
	distance := func(w int) uint64 { return max(places[w].seen, addr) - min(places[w].seen, addr) }
	var buf [nearPlaces + 1]int
	found := buf[:0]
	for w := range places {
		i := len(found)
		for i > 0 && distance(w) < distance(found[i-1]) {
			i--
		}
		if i < nearPlaces {
			found = slices.Insert(found, i, w)[:min(len(found)+1, nearPlaces)]
		}
	}
	return found
}

// settle decides between models that have some contents in common: a page that
// several match belongs to the one of which there is most in the region.
func (e *examiner) settle(places []place, pages []sampled) {
	if !slices.ContainsFunc(places, func(p place) bool { return e.model(p) != e.model(places[0]) }) {
		return
	}
	total := map[int]int{} // bytes, by model
	alike := make([][]int, len(pages))
	for i, p := range pages {
		if p.equal == 0 {
			continue
		}
		counted := map[int]bool{}
		for _, w := range near(places, p.addr) {
			n := e.s.index.compare(places[w].file, int64(p.addr)-places[w].base, p.data, e.want)
			if n < p.equal {
				continue
			}
			alike[i] = append(alike[i], w)
			if model := e.model(places[w]); !counted[model] {
				counted[model] = true
				total[model] += n
			}
		}
	}
	for i := range pages {
		for _, w := range alike[i] {
			if total[e.model(places[w])] > total[e.model(places[pages[i].place])] {
				pages[i].place = w
			}
		}
	}
}

// sample chooses up to Options.Samples pages, one from each of as many parts of
// equal size, ascending.
func (e *examiner) sample(c class) []sampled {
	n := min(c.pages, e.s.opts.Samples)
	if need := n * pageBytes; len(e.pages) < need {
		e.pages = make([]byte, need)
	}
	pages := make([]sampled, n)
	run, before := 0, 0 // pages in the runs before run
	for i := range pages {
		first, end := i*c.pages/n, (i+1)*c.pages/n
		at := first + e.random.IntN(end-first)
		for at-before >= c.runs[run].pages {
			before += c.runs[run].pages
			run++
		}
		pages[i].addr = c.runs[run].addr + uint64(at-before)*e.pageSize
		pages[i].data = e.pages[i*pageBytes:][:pageBytes]
	}
	return pages
}

// spread counts from 0 to n-1 in an order of which every beginning is spread
// over the whole.
func spread(n int) func(yield func(i, at int) bool) {
	step := max(1, int(float64(n)*0.6180339887))
	for gcd(step, n) > 1 {
		step++
	}
	return func(yield func(i, at int) bool) {
		at := 0
		for i := range n {
			if !yield(i, at) {
				return
			}
			at = (at + step) % n
		}
	}
}

func gcd(a, b int) int {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// isShm reports that the pages of a region's file are memory and nothing else.
func (s *scanner) isShm(r procfs.Region) bool {
	return s.shm[r.File.Dev] || strings.HasPrefix(r.Path, "/memfd:") || strings.HasPrefix(r.Path, "/dev/zero") ||
		strings.HasPrefix(r.Path, "/dev/shm/") || strings.HasPrefix(r.Path, "/SYSV")
}

// isEmpty reports that nothing was found in the same piece of a file that
// another process maps.
func (s *scanner) isEmpty(p piece) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.empty[p]
}

func (s *scanner) setEmpty(p piece) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.empty[p] = true
}

// addShm counts a file of shared memory once, as much of it as any process maps.
func (s *scanner) addShm(c shmCopy, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.shm[c] = max(s.mu.shm[c], n)
}
