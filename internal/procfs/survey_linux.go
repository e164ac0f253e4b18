package procfs

import (
	"bytes"
	"errors"
	"maps"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Run looks at every process once and returns those that have something of what
// q asks for, by number, and the numbers of those that could have and may not be
// looked into. A process that ends meanwhile is left out.
func (s *Surveyor) Run(q Query) (uses []Use, hidden []int, err error) { return s.run(host, q) }

func (s *Surveyor) run(t tree, q Query) (uses []Use, hidden []int, err error) {
	pids, err := t.pids()
	if err != nil || len(q.Want) == 0 && q.Deleted == "" {
		return nil, nil, err
	}
	boot := sync.OnceValues(func() (time.Time, bool) { return t.bootTime(make([]byte, bufferSize)) })
	sameWant := s.Believe > 0 && maps.Equal(s.want, q.Want)
	lookers := make([]*looker, min(runtime.GOMAXPROCS(0), 4, len(pids)))
	var next atomic.Int64
	var wg sync.WaitGroup
	for i := range lookers {
		l := &looker{t: t, q: &q, s: s, sameWant: sameWant, now: time.Now(), boot: boot, buf: make([]byte, bufferSize), found: map[int]*seen{}}
		if q.Deleted != "" {
			l.prefix = []byte(" " + strings.TrimSuffix(q.Deleted, "/") + "/")
		}
		lookers[i] = l
		wg.Go(func() {
			for {
				n := next.Add(1) - 1
				if n >= int64(len(pids)) {
					return
				}
				l.look(pids[n])
			}
		})
	}
	wg.Wait()
	known := map[int]*seen{}
	for _, l := range lookers {
		uses, hidden = append(uses, l.uses...), append(hidden, l.hidden...)
		maps.Copy(known, l.found)
	}
	if s.Believe > 0 {
		s.known, s.want = known, q.Want
	}
	slices.SortFunc(uses, func(a, b Use) int { return a.PID - b.PID })
	slices.Sort(hidden)
	return uses, hidden, nil
}

// looker is one thread of a survey.
type looker struct {
	t        tree
	q        *Query
	s        *Surveyor // read only
	sameWant bool      // as in the survey before
	now      time.Time
	boot     func() (time.Time, bool)
	prefix   []byte
	buf      []byte

	use    Use // of the process that is looked at
	weigh  residencies
	uses   []Use
	hidden []int
	found  map[int]*seen
}

func (l *looker) look(pid int) {
	// Relative to this descriptor all is of one process, never of a later one with
	// the same number.
	dir, err := openDirectory(l.t.path(strconv.Itoa(pid)))
	if err != nil {
		return // it has ended
	}
	defer dir.close()
	size, old := memorySize{}, (*seen)(nil)
	if l.s.Believe > 0 {
		if size, err = memorySizeOf(dir); err == nil {
			if old = l.s.known[pid]; old != nil && (old.size != size || !l.now.Before(old.until)) {
				old = nil
			}
		}
	}
	if old != nil && l.sameWant {
		l.keep(old)
		return
	}
	l.use = Use{Proc: Proc{PID: pid}}
	_, likely := l.q.Likely[pid]
	// smaps has all of maps, and takes the kernel ten times as long.
	name, weighed := "maps", likely && old == nil
	if weighed {
		name = "smaps"
	}
	l.weigh = residencies{want: l.q.Weigh, sum: map[FileID]*Residency{}}
	if err := linesAt(dir, name, l.buf, l.line); err != nil {
		if l.t.hidden(pid, err) {
			l.hidden = append(l.hidden, pid)
		}
		return
	}
	if len(l.q.Want) > 0 {
		l.descriptors(dir)
	}
	holds := len(l.use.Mapped)+len(l.use.Open) > 0
	switch {
	case old != nil && slices.Equal(old.use.Mapped, l.use.Mapped):
		l.use.Weights = old.use.Weights
	case holds:
		if !weighed && len(l.q.Weigh) > 0 {
			l.weigh.cur = nil
			if linesAt(dir, "smaps", l.buf, l.weigh.line) != nil {
				l.weigh.sum = nil // it has ended; what is known of it is shown
			}
		}
		l.weights()
	}
	if holds || len(l.use.Unlinked) > 0 {
		if l.t.describe(dir, &l.use.Proc, l.buf, l.boot) != nil {
			return
		}
	}
	// Not all at the same time again.
	until := l.now.Add(l.s.Believe - l.s.Believe/16*time.Duration(pid%8))
	if old != nil {
		until = old.until
	}
	l.keep(&seen{size, until, l.use})
}

// keep notes what is known of a process.
func (l *looker) keep(p *seen) {
	if p.size != (memorySize{}) {
		l.found[p.use.PID] = p
	}
	if u := &p.use; len(u.Mapped)+len(u.Open)+len(u.Unlinked) > 0 {
		l.uses = append(l.uses, *u)
	}
}

func memorySizeOf(dir *file) (m memorySize, err error) {
	stat, err := openAt(dir, "stat")
	if err != nil {
		return m, err
	}
	s, err := stat.stat()
	stat.close()
	if err != nil {
		return m, err
	}
	statm, err := openAt(dir, "statm")
	if err != nil {
		return m, err
	}
	defer statm.close()
	data, err := statm.head(make([]byte, 128))
	if err != nil {
		return m, err
	}
	m.start = s.start
	var ok bool
	if m.size, m.shared, ok = parseStatm(data); !ok {
		err = errMalformed
	}
	return m, err
}

// weights takes over what was added up.
func (l *looker) weights() {
	u := &l.use
	for id, r := range l.weigh.sum {
		u.Weights = append(u.Weights, Weight{id, r.RSS, r.PSS})
	}
	slices.SortFunc(u.Weights, func(a, b Weight) int { return a.File.compare(b.File) })
}

// line takes a line of maps or smaps.
func (l *looker) line(line []byte) {
	if len(line) > 0 && 'A' <= line[0] && line[0] <= 'Z' { // a field of smaps
		l.weigh.line(line)
		return
	}
	v, ok := parseVMA(line)
	if !ok || v.file.Inode == 0 {
		l.weigh.cur = nil
		return
	}
	if _, wanted := l.q.Want[v.file]; wanted && !slices.Contains(l.use.Mapped, v.file) {
		l.use.Mapped = append(l.use.Mapped, v.file)
	}
	l.weigh.enter(v.file)
	if l.prefix != nil && bytes.HasSuffix(line, deleted) && bytes.Contains(line, l.prefix) {
		l.unlinked(line)
	}
}

var deleted = []byte(" (deleted)")

func (l *looker) unlinked(line []byte) {
	r, ok := parseRegion(line)
	if !ok {
		return
	}
	n := int64(r.End - r.Start)
	u := &l.use
	if last := len(u.Unlinked) - 1; last >= 0 && u.Unlinked[last].File == r.File {
		u.Unlinked[last].Bytes += n
		return
	}
	u.Unlinked = append(u.Unlinked, Unlinked{File: r.File, Path: strings.TrimSuffix(r.Path, string(deleted)), Bytes: n})
}

// descriptors finds the wanted files that the process has open.
func (l *looker) descriptors(dir *file) {
	fds, err := openAt(dir, "fd")
	if err != nil {
		return
	}
	defer fds.close()
	for {
		n, err := syscall.ReadDirent(fds.fd, l.buf)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || n <= 0 {
			return
		}
		_, _, names := syscall.ParseDirent(l.buf[:n], -1, nil)
		for _, name := range names {
			id, ok := behind(fds.fd, name)
			if _, wanted := l.q.Want[id]; ok && wanted && !slices.Contains(l.use.Open, id) {
				l.use.Open = append(l.use.Open, id)
			}
		}
	}
}

// behind returns which file a link of /proc/PID/fd leads to, as far as the kernel
// knows without asking a file system: one that is out of reach, such as a dead
// NFS server, would not answer.
func behind(fd int, name string) (FileID, bool) {
	if pid, ok := parsePID([]byte(name)); !ok || pid < 0 {
		return FileID{}, false
	}
	var stx unix.Statx_t
	err := unix.Statx(fd, name, unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &stx)
	if err == nil {
		return FileID{Dev: makeDev(stx.Dev_major, stx.Dev_minor), Inode: stx.Ino}, true
	}
	if !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EPERM) {
		return FileID{}, false
	}
	// An old kernel, or a container that forbids the call.
	var st unix.Stat_t
	if unix.Fstatat(fd, name, &st, 0) != nil {
		return FileID{}, false
	}
	return FileID{Dev: uint64(st.Dev), Inode: st.Ino}, true
}
