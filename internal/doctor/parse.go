package doctor

import (
	"path"
	"strconv"
	"strings"
)

// mount is a line of mountinfo.
type mount struct {
	point, kind string
	options     map[string]string // of the mount and of the file system
}

// parseMounts takes /proc/self/mountinfo, in its order:
//
//	35 31 0:32 / /dev/shm rw,nosuid,nodev shared:9 - tmpfs tmpfs rw,size=24684092k,huge=advise
func parseMounts(text string) []mount {
	var mounts []mount
	for line := range strings.Lines(text) {
		left, right, _ := strings.Cut(line, " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if len(l) < 6 || len(r) < 3 {
			continue
		}
		m := mount{point: unescape(l[4]), kind: r[0], options: map[string]string{}}
		for o := range strings.SplitSeq(l[5]+","+r[2], ",") {
			k, v, _ := strings.Cut(o, "=")
			m.options[k] = v
		}
		mounts = append(mounts, m)
	}
	return mounts
}

// mountOf returns the mount that a path lies on: the deepest, and of those at one
// point the last.
func mountOf(mounts []mount, path string) (found mount) {
	for _, m := range mounts {
		if within(path, m.point) && len(m.point) >= len(found.point) {
			found = m
		}
	}
	return found
}

// RemountHuge is the command that gives 2 MiB pages to programs that map a model
// by its path, for the mount that a path lies on.
func RemountHuge(path string) string { return remountHuge(mountHere(path)) }

// RemountSize is the command that gives more room to the tmpfs that a path lies
// on, with SIZE to be filled in.
func RemountSize(path string) string {
	return "mount -o remount,size=SIZE " + quote(mountHere(path).point)
}

// mountHere is the mount of this machine that a path lies on.
func mountHere(path string) mount {
	text, _ := Host{}.read("/proc/self/mountinfo")
	return mountOf(parseMounts(text), path)
}

func remountHuge(m mount) string { return "mount -o remount,huge=advise " + quote(m.point) }

// unescape undoes the kernel's \040 for a blank.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// parseMemInfo returns the sizes of /proc/meminfo in bytes.
func parseMemInfo(text string) map[string]int64 {
	info := map[string]int64{}
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(line, ":")
		f := strings.Fields(value)
		if len(f) == 2 && f[1] == "kB" {
			if n, err := strconv.ParseUint(f[0], 10, 53); err == nil {
				info[name] = int64(n) << 10
			}
		}
	}
	return info
}

// parseLimit finds the soft limit of a line of /proc/self/limits; no limit is
// ok == false.
func parseLimit(text, name string) (n int64, ok bool) {
	for line := range strings.Lines(text) {
		if rest, found := strings.CutPrefix(line, name+"  "); found {
			if f := strings.Fields(rest); len(f) > 0 {
				n, err := strconv.ParseInt(f[0], 10, 64)
				return n, err == nil
			}
		}
	}
	return 0, false
}

// parseKernel returns the version in a release such as "6.1.0-13-amd64".
func parseKernel(release string) (major, minor int, ok bool) {
	first, rest, _ := strings.Cut(release, ".")
	end := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
	if end < 0 {
		end = len(rest)
	}
	major, err1 := strconv.Atoi(first)
	minor, err2 := strconv.Atoi(rest[:end])
	return major, minor, err1 == nil && err2 == nil
}

// chosen returns the word in brackets: "always [madvise] never".
func chosen(text string) string {
	_, rest, _ := strings.Cut(text, "[")
	word, _, _ := strings.Cut(rest, "]")
	return word
}

// parseSetting returns the last value of a key of a section of a systemd
// configuration file.
func parseSetting(text, section, key string) (value string, ok bool) {
	in := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if s, found := strings.CutPrefix(line, "["); found {
			in = strings.TrimSuffix(s, "]")
			continue
		}
		if k, v, found := strings.Cut(line, "="); found && in == section && strings.TrimSpace(k) == key {
			value, ok = strings.TrimSpace(v), true
		}
	}
	return value, ok
}

// yes reads a systemd boolean.
func yes(s string) bool {
	switch strings.ToLower(s) {
	case "1", "yes", "y", "true", "t", "on":
		return true
	}
	return false
}

// ageRule is a line of a tmpfiles.d file that ages a directory, or protects one.
type ageRule struct {
	file, path, age string
	exclude         bool
}

// parseTmpfiles picks the lines that matter:
//
//	q /dev/shm 1777 root root 10d
//	x /dev/shm/onecopy-*
func parseTmpfiles(file, text string) []ageRule {
	var rules []ageRule
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 2 || strings.HasPrefix(f[0], "#") {
			continue
		}
		r := ageRule{file: file, path: path.Clean(strings.Trim(f[1], `"'`))}
		switch kind := f[0][0]; {
		case kind == 'x':
			r.exclude = true
		case strings.ContainsRune("dDevqQC", rune(kind)) && len(f) > 5 && f[5] != "-":
			r.age = strings.TrimLeft(f[5], "~")
		default:
			continue
		}
		rules = append(rules, r)
	}
	return rules
}

// covers reports whether a pattern names a path or something that it lies below.
func covers(pattern, p string) bool {
	for ; p != "/" && p != "."; p = path.Dir(p) {
		if ok, _ := path.Match(pattern, p); ok {
			return true
		}
	}
	return pattern == "/"
}
