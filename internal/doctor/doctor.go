// Package doctor explains a machine: what of its kernel, mounts, limits and
// services helps or hinders sharing models in memory, and which command changes
// that.
//
// A finding is ok; or info, when it works and could be better; or warn, when
// something will fail or cost memory one day; or fail, when models cannot be
// shared at all. Most is read from /proc, /sys and /etc; what the kernel can do
// is tried, on an anonymous file that is gone afterwards. Nothing is changed,
// and no registry has to exist.
package doctor

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Severity of a finding.
type Severity int

// The severities, the best first.
const (
	OK Severity = iota
	Info
	Warn
	Fail
)

func (s Severity) String() string { return [...]string{"ok", "info", "warn", "fail"}[s] }

// Finding is one thing about the machine.
type Finding struct {
	Check    string // what was looked at, one word
	Severity Severity
	Text     string // what is
	Reason   string // why it matters; "" when all is well
	Fix      string // the command that changes it, "" when there is none
}

// Registry is what the caller knows about the registry.
type Registry struct {
	Models   int
	Files    int
	Used     int64 // bytes
	Reserved int64
	Budget   int64
	Largest  int64 // model
	Problems int   // found by check
}

// Space of a file system.
type Space struct {
	Size, Free         int64
	Inodes, FreeInodes int64 // 0, 0: not limited
}

// Owner and permissions of a name.
type Owner struct {
	UID  int
	Mode os.FileMode
}

// Probe is what happened when things were tried in a directory; nil is success.
type Probe struct {
	Dir     string
	Skipped error // nothing could be tried
	TmpFile error // an anonymous file (O_TMPFILE)
	Lock    error // flock excludes, and a mapping keeps it
	Lease   error // F_SETLEASE, the proof that no writer is left
	Huge    error // a 2 MiB page on demand (MADV_COLLAPSE)
}

// Host is the machine to look at. Machine returns this one; tests have others.
type Host struct {
	Root     string // before every path
	UID      int
	Statfs   func(path string) (Space, error)
	Lstat    func(path string) (Owner, error)
	Headroom func() (bytes int64, group string, limited bool)
	Probe    func(dir string) Probe
}

// Examine looks at everything that concerns a registry in dir. r is nil when
// there is none, or when it cannot be opened.
func (h Host) Examine(dir string, r *Registry) []Finding {
	if r == nil {
		r = &Registry{}
	}
	x := &examination{Host: h, dir: h.resolve(dir), registry: *r}
	if x.probe = h.Probe(x.dir); errors.Is(x.probe.Skipped, errors.ErrUnsupported) {
		x.add(Fail, "system", "models cannot be shared on this system", "It takes Linux on amd64 or arm64. Elsewhere every process has models of its own.", "")
		return x.findings
	}
	if text, ok := x.read("/proc/self/mountinfo"); ok {
		x.mounts = parseMounts(text)
	}
	x.mount = mountOf(x.mounts, x.dir)
	x.memory = parseMemInfo(x.text("/proc/meminfo"))

	x.fileSystem()
	x.directory()
	x.probes()
	x.hugePages()
	x.pathReaders()
	x.space()
	x.group()
	x.overcommit()
	x.swap()
	x.limits()
	x.removeIPC()
	x.ageing()
	x.hidden()
	x.contents()
	x.duplicates()
	return x.findings
}

// Worst severity of all.
func Worst(fs []Finding) Severity {
	worst := OK
	for _, f := range fs {
		worst = max(worst, f.Severity)
	}
	return worst
}

// examination is one Examine.
type examination struct {
	Host
	dir      string
	registry Registry
	mounts   []mount
	mount    mount // of dir
	memory   map[string]int64
	probe    Probe
	findings []Finding
}

func (x *examination) add(s Severity, check, text, reason, fix string) {
	x.findings = append(x.findings, Finding{check, s, text, reason, fix})
}

func (x *examination) ok(check, format string, args ...any) {
	x.add(OK, check, fmt.Sprintf(format, args...), "", "")
}

// read returns the text of a file of the machine.
func (h Host) read(path string) (string, bool) {
	b, err := os.ReadFile(h.Root + path)
	return string(b), err == nil
}

// text is the file without the white space around it, "" when there is none.
func (h Host) text(path string) string {
	s, _ := h.read(path)
	return strings.TrimSpace(s)
}

func (h Host) exists(path string) bool {
	_, err := os.Stat(h.Root + path)
	return err == nil
}

// names lists a directory, sorted.
func (h Host) names(dir string) ([]string, error) {
	es, err := os.ReadDir(h.Root + dir)
	names := make([]string, len(es))
	for i, e := range es {
		names[i] = e.Name()
	}
	return names, err
}

// resolve makes a path absolute and follows the links in its parents: /dev/shm
// is one on some machines.
func (h Host) resolve(dir string) string {
	if h.Root != "" {
		return path.Clean(dir)
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return dir
	}
	for rest, at := "", dir; ; {
		if real, err := filepath.EvalSymlinks(filepath.Dir(at)); err == nil {
			return filepath.Join(real, filepath.Base(at), rest)
		}
		if at == filepath.Dir(at) {
			return dir
		}
		rest, at = filepath.Join(filepath.Base(at), rest), filepath.Dir(at)
	}
}

// layered returns the files of configuration folders such as tmpfiles.d, in the
// order in which they count: by name, one in /etc before its namesakes.
func (h Host) layered(folder string) []string {
	where := map[string]string{}
	for _, dir := range []string{"/etc/", "/run/", "/usr/local/lib/", "/usr/lib/", "/lib/"} {
		names, _ := h.names(dir + folder)
		for _, n := range names {
			if strings.HasSuffix(n, ".conf") && where[n] == "" {
				where[n] = dir + folder + "/" + n
			}
		}
	}
	var files []string
	for _, path := range where {
		files = append(files, path)
	}
	slices.SortFunc(files, func(a, b string) int { return strings.Compare(path.Base(a), path.Base(b)) })
	return files
}

// quote makes a word safe for a shell.
func quote(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_./:@%+=,", r)
	}
	if s != "" && strings.IndexFunc(s, func(r rune) bool { return !plain(r) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// size of bytes for people.
func size(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	f, u := float64(n), 0
	for f >= 1024 && u < len(units)-1 {
		f /= 1024
		u++
	}
	if u == 0 || f >= 10 {
		return fmt.Sprintf("%.0f %s", f, units[u])
	}
	return fmt.Sprintf("%.1f %s", f, units[u])
}

// plural counts things: "1 file", "2 files".
func plural(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return strconv.Itoa(n) + " " + thing + "s"
}

// within reports whether a path is dir or lies below it.
func within(p, dir string) bool {
	return p == dir || strings.HasPrefix(p, strings.TrimSuffix(dir, "/")+"/")
}
