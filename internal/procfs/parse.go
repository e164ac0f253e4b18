package procfs

import (
	"bytes"
	"errors"
	"io"
	"math"
	"strings"
	"unicode"
	"unicode/utf8"
)

// bufferSize holds the longest line that the kernel prints: a path of
// PATH_MAX bytes in maps, each escaped as four.
const bufferSize = 64 << 10

var errLineTooLong = errors.New("line too long")

// eachLine calls fn for each line of r, without its newline. The line lies in
// buf and is valid during the call only.
func eachLine(r io.Reader, buf []byte, fn func(line []byte)) error {
	n := 0
	for {
		m, err := r.Read(buf[n:])
		n += m
		for start := 0; ; {
			i := bytes.IndexByte(buf[start:n], '\n')
			if i < 0 {
				n = copy(buf, buf[start:n])
				break
			}
			fn(buf[start : start+i])
			start += i + 1
		}
		switch {
		case err == io.EOF:
			if n > 0 {
				fn(buf[:n])
			}
			return nil
		case err != nil:
			return err
		case n == len(buf):
			return errLineTooLong
		}
	}
}

// cutField returns the first run of non-blanks and what follows it.
func cutField(b []byte) (field, rest []byte) {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t') {
		b = b[1:]
	}
	for i, c := range b {
		if c == ' ' || c == '\t' {
			return b[:i], b[i:]
		}
	}
	return b, nil
}

// parseUint is strconv.ParseUint for bytes, strict: digits of the base only,
// lower-case as the kernel prints them.
func parseUint(b []byte, base uint64) (n uint64, ok bool) {
	if len(b) == 0 {
		return 0, false
	}
	for _, c := range b {
		var d uint64
		switch {
		case '0' <= c && c <= '9':
			d = uint64(c - '0')
		case 'a' <= c && c <= 'f':
			d = uint64(c-'a') + 10
		default:
			return 0, false
		}
		if d >= base || n > (math.MaxUint64-d)/base {
			return 0, false
		}
		n = n*base + d
	}
	return n, true
}

func parseUint32(b []byte, base uint64) (uint32, bool) {
	n, ok := parseUint(b, base)
	return uint32(n), ok && n <= math.MaxUint32
}

// parsePID takes what the kernel prints for a pid_t, which is negative for
// "nobody in particular".
func parsePID(b []byte) (int, bool) {
	digits, negative := bytes.CutPrefix(b, []byte("-"))
	n, ok := parseUint(digits, 10)
	if !ok || n > math.MaxInt32 {
		return 0, false
	}
	if negative {
		return -int(n), true
	}
	return int(n), true
}

// parseDev takes "fe:00", hexadecimal.
func parseDev(b []byte) (major, minor uint32, ok bool) {
	ma, mi, _ := bytes.Cut(b, []byte(":"))
	major, ok1 := parseUint32(ma, 16)
	minor, ok2 := parseUint32(mi, 16)
	return major, minor, ok1 && ok2
}

// parseLock takes a line of /proc/locks:
//
//	1: FLOCK  ADVISORY  WRITE 714 00:19:5 0 EOF
//	1: -> FLOCK  ADVISORY  WRITE 715 00:19:5 0 EOF
func parseLock(line []byte) (l Lock, ok bool) {
	id, rest := cutField(line)
	if !bytes.HasSuffix(id, []byte(":")) {
		return Lock{}, false
	}
	kind, rest := cutField(rest)
	if string(kind) == "->" {
		l.Waiting = true
		kind, rest = cutField(rest)
	}
	_, rest = cutField(rest) // ADVISORY, ACTIVE, BREAKING, ...
	access, rest := cutField(rest)
	pid, rest := cutField(rest)
	file, _ := cutField(rest)

	colon := bytes.LastIndexByte(file, ':')
	if len(kind) == 0 || colon < 0 {
		return Lock{}, false
	}
	var okPID, okDev, okInode bool
	l.PID, okPID = parsePID(pid)
	l.Major, l.Minor, okDev = parseDev(file[:colon])
	l.Inode, okInode = parseUint(file[colon+1:], 10)
	if !okPID || !okDev || !okInode {
		return Lock{}, false
	}
	l.Type = string(kind)
	l.Exclusive = string(access) == "WRITE" || string(access) == "RW"
	return l, true
}

// vma is a line of maps. perms lies in the line.
type vma struct {
	start, end uint64
	perms      []byte
	file       FileID
}

// parseVMA takes a line of /proc/PID/maps, or the first of an entry in smaps:
//
//	7f0e5c000000-7f0e5c200000 r--s 00000000 00:19 5    /dev/shm/x
func parseVMA(line []byte) (v vma, ok bool) {
	span, rest := cutField(line)
	perms, rest := cutField(rest)
	_, rest = cutField(rest) // offset
	dev, rest := cutField(rest)
	inode, _ := cutField(rest)

	start, end, _ := bytes.Cut(span, []byte("-"))
	var ok1, ok2, ok3, ok4 bool
	v.start, ok1 = parseUint(start, 16)
	v.end, ok2 = parseUint(end, 16)
	major, minor, ok3 := parseDev(dev)
	v.file.Inode, ok4 = parseUint(inode, 10)
	v.file.Dev = makeDev(major, minor)
	v.perms = perms
	return v, ok1 && ok2 && ok3 && ok4 && len(perms) == 4
}

// residencies adds up smaps per wanted file.
type residencies struct {
	want map[FileID]struct{}
	sum  map[FileID]*Residency
	cur  *Residency // nil while in an entry nobody asked for
}

func (r *residencies) line(line []byte) {
	if r.cur == nil && len(line) > 0 && 'A' <= line[0] && line[0] <= 'Z' {
		return // a field of an entry nobody asked for: most of the file
	}
	name, rest := cutField(line)
	field, isField := bytes.CutSuffix(name, []byte(":"))
	if !isField {
		// The head of the next entry. Should it not parse, its fields must
		// not be counted for the entry before it.
		r.cur = nil
		if v, ok := parseVMA(line); ok {
			r.enter(v.file)
		}
		return
	}
	if r.cur == nil {
		return
	}
	var to *int64
	switch string(field) {
	case "Size":
		to = &r.cur.Size
	case "Rss":
		to = &r.cur.RSS
	case "Pss":
		to = &r.cur.PSS
	case "Shared_Clean":
		to = &r.cur.SharedClean
	case "Shared_Dirty":
		to = &r.cur.SharedDirty
	case "Private_Clean":
		to = &r.cur.PrivateClean
	case "Private_Dirty":
		to = &r.cur.PrivateDirty
	case "Swap":
		to = &r.cur.Swap
	case "Locked":
		to = &r.cur.Locked
	case "ShmemPmdMapped":
		to = &r.cur.ShmemPMDMapped
	default:
		return
	}
	if n, ok := parseSize(rest); ok && *to <= math.MaxInt64-n {
		*to += n
	}
}

// enter begins an entry.
func (r *residencies) enter(id FileID) {
	r.cur = nil
	if _, wanted := r.want[id]; !wanted {
		return
	}
	if r.cur = r.sum[id]; r.cur == nil {
		r.cur = new(Residency)
		r.sum[id] = r.cur
	}
}

func (r *residencies) result() map[FileID]Residency {
	out := make(map[FileID]Residency, len(r.sum))
	for id, sum := range r.sum {
		out[id] = *sum
	}
	return out
}

// parseSize takes "  12 kB" and returns bytes; without a unit, the number.
func parseSize(b []byte) (int64, bool) {
	number, rest := cutField(b)
	unit, _ := cutField(rest)
	n, ok := parseUint(number, 10)
	if !ok || n > math.MaxInt64/1024 {
		return 0, false
	}
	switch string(unit) {
	case "kB":
		return int64(n) * 1024, true
	case "":
		return int64(n), true
	}
	return 0, false
}

// parseMemInfo adds a line of /proc/meminfo.
func parseMemInfo(into map[string]int64, line []byte) {
	name, rest := cutField(line)
	field, isField := bytes.CutSuffix(name, []byte(":"))
	if n, ok := parseSize(rest); ok && isField && len(field) > 0 {
		into[string(field)] = n
	}
}

// parseStatus fills what p takes from a line of /proc/PID/status.
func parseStatus(p *Proc, line []byte) {
	name, rest := cutField(line)
	var to *int64
	switch string(name) {
	case "Uid:": // real, effective, saved, file system
		_, rest = cutField(rest)
		effective, _ := cutField(rest)
		if uid, ok := parseUint32(effective, 10); ok {
			p.UID = int(uid)
		}
		return
	case "VmRSS:":
		to = &p.VmRSS
	case "VmPTE:":
		to = &p.VmPTE
	case "RssShmem:":
		to = &p.RssShmem
	default:
		return
	}
	if n, ok := parseSize(rest); ok {
		*to = n
	}
}

// procStat is what we use of /proc/PID/stat.
type procStat struct {
	comm  []byte
	state byte
	flags uint64
	start uint64 // clock ticks after boot
}

const (
	ticksPerSecond = 100         // USER_HZ of every architecture that we build for
	maxTicks       = 1 << 39     // 174 years after boot; more does not fit a time.Duration
	flagKThread    = 0x0020_0000 // PF_KTHREAD
)

// parseStat takes the whole of /proc/PID/stat. The name may hold blanks,
// newlines and parentheses; nothing after it does.
func parseStat(data []byte) (s procStat, ok bool) {
	first, last := bytes.IndexByte(data, '('), bytes.LastIndexByte(data, ')')
	if first < 0 || last < first {
		return procStat{}, false
	}
	s.comm = data[first+1 : last]
	rest := bytes.TrimSuffix(data[last+1:], []byte("\n"))
	var okFlags, okStart bool
	for n := 3; n <= 22; n++ { // numbered as in proc(5)
		var field []byte
		field, rest = cutField(rest)
		switch n {
		case 3:
			if len(field) != 1 {
				return procStat{}, false
			}
			s.state = field[0]
		case 9:
			s.flags, okFlags = parseUint(field, 10)
		case 22:
			s.start, okStart = parseUint(field, 10)
		}
	}
	return s, okFlags && okStart && s.start <= maxTicks
}

// parseStatm takes /proc/PID/statm: the pages that are mapped, those in memory,
// and those of them that are of files or shared memory.
func parseStatm(data []byte) (size, shared uint64, ok bool) {
	first, rest := cutField(data)
	_, rest = cutField(rest)
	third, _ := cutField(rest)
	size, ok1 := parseUint(first, 10)
	shared, ok2 := parseUint(third, 10)
	return size, shared, ok1 && ok2
}

// withoutMemory reports a process that has neither mappings nor descriptors: a
// thread of the kernel, or one that is dead and not yet waited for.
func (s procStat) withoutMemory() bool {
	return s.flags&flagKThread != 0 || s.state == 'Z' || s.state == 'X'
}

// parseBootTime takes a line of /proc/stat: "btime 1795412611".
func parseBootTime(line []byte) (seconds int64, ok bool) {
	name, rest := cutField(line)
	if string(name) != "btime" {
		return 0, false
	}
	value, _ := cutField(rest)
	n, ok := parseUint(value, 10)
	return int64(n), ok && n < 1<<40
}

// parseCgroup takes a line of /proc/PID/cgroup, "4:memory:/path" or
// "0::/path", and tells whether it is of the memory controller or of v2.
func parseCgroup(line []byte) (path string, memory, unified bool) {
	id, rest, _ := bytes.Cut(line, []byte(":"))
	controllers, name, ok := bytes.Cut(rest, []byte(":"))
	if !ok {
		return "", false, false
	}
	for c := range bytes.SplitSeq(controllers, []byte(",")) {
		memory = memory || string(c) == "memory"
	}
	unified = string(id) == "0" && len(controllers) == 0
	return printable(name), memory, unified
}

// maxCommand limits Proc.Command: a command line may have megabytes.
const maxCommand = 4 << 10

// commandText makes a command line, arguments separated by NUL, fit for a
// terminal; without one it is the name in brackets, as ps shows it.
func commandText(cmdline, comm []byte) string {
	if text := strings.TrimRight(printable(cmdline), " "); text != "" {
		return text
	}
	return "[" + printable(comm) + "]"
}

// printable replaces what a terminal could obey or what could mislead a
// reader, such as an escape sequence or a change of writing direction.
func printable(b []byte) string {
	b = b[:min(len(b), maxCommand)]
	out := make([]byte, 0, len(b))
	for len(b) > 0 {
		r, size := utf8.DecodeRune(b)
		switch {
		case r == 0, r == '\t', r == '\n', r == '\r':
			out = append(out, ' ')
		case r == utf8.RuneError && size == 1, !unicode.IsPrint(r):
			out = append(out, '?')
		default:
			out = append(out, b[:size]...)
		}
		b = b[size:]
	}
	return string(out)
}

// validBootID reports the form of a UUID as the kernel prints it.
func validBootID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i, c := range []byte(s) {
		dash := i == 8 || i == 13 || i == 18 || i == 23
		hex := '0' <= c && c <= '9' || 'a' <= c && c <= 'f'
		if dash != (c == '-') || !dash && !hex {
			return false
		}
	}
	return true
}
