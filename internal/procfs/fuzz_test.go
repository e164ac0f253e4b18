package procfs

import (
	"bytes"
	"math"
	"os"
	"path/filepath"
	"testing"
	"time"
	"unicode/utf8"
)

// Each target feeds a parser with any bytes: it must not panic, and what it
// accepts must keep the promises that callers rely on.

func addSamples(f *testing.F, pattern string) {
	f.Helper()
	paths, err := filepath.Glob(filepath.Join("testdata", "proc", filepath.FromSlash(pattern)))
	if err != nil || len(paths) == 0 {
		f.Fatalf("no sample %s: %v", pattern, err)
	}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
}

func feed(data []byte, fn func(line []byte)) {
	_ = eachLine(bytes.NewReader(data), make([]byte, 4096), fn)
}

func FuzzLocks(f *testing.F) {
	addSamples(f, "locks")
	f.Fuzz(func(t *testing.T, data []byte) {
		feed(data, func(line []byte) {
			l, ok := parseLock(line)
			if !ok && l != (Lock{}) {
				t.Errorf("%q: refused, but %+v", line, l)
			}
			if ok && (l.Type == "" || l.PID < -math.MaxInt32 || l.PID > math.MaxInt32) {
				t.Errorf("%q: %+v", line, l)
			}
		})
	})
}

func FuzzStat(f *testing.F) {
	addSamples(f, "*/stat")
	f.Add([]byte("1 () S 1 1 1 0 -1 4194560 1 1 1 1 1 1 1 1 20 0 1 0 0"))
	f.Add([]byte(") 1 ("))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, ok := parseStat(data)
		if ok && time.Duration(s.start)*(time.Second/ticksPerSecond) < 0 {
			t.Errorf("start %d overflows", s.start)
		}
		s.withoutMemory()
	})
}

func FuzzStatus(f *testing.F) {
	addSamples(f, "*/status")
	f.Fuzz(func(t *testing.T, data []byte) {
		p := Proc{UID: -1}
		feed(data, func(line []byte) { parseStatus(&p, line) })
		if p.UID < -1 || p.VmRSS < 0 || p.VmPTE < 0 || p.RssShmem < 0 {
			t.Errorf("%+v", p)
		}
	})
}

// FuzzFields covers the parsers of single "name value" lines.
func FuzzFields(f *testing.F) {
	addSamples(f, "meminfo")
	addSamples(f, "stat")
	f.Fuzz(func(t *testing.T, data []byte) {
		info := make(map[string]int64)
		feed(data, func(line []byte) {
			parseMemInfo(info, line)
			if seconds, ok := parseBootTime(line); ok && seconds < 0 {
				t.Errorf("%q: boot time %d", line, seconds)
			}
		})
		for name, n := range info {
			if name == "" || n < 0 {
				t.Errorf("%q = %d", name, n)
			}
		}
		if validBootID(string(data)) && len(data) != 36 {
			t.Errorf("%q", data)
		}
	})
}

func FuzzCgroup(f *testing.F) {
	addSamples(f, "*/cgroup")
	f.Fuzz(func(t *testing.T, data []byte) {
		feed(data, func(line []byte) {
			path, memory, unified := parseCgroup(line)
			if memory && unified {
				t.Errorf("%q: both v1 and v2", line)
			}
			if !showable(path) {
				t.Errorf("%q: %q", line, path)
			}
		})
	})
}

func FuzzCommand(f *testing.F) {
	f.Add([]byte("python3\x00worker.py\x00"), []byte("python3"))
	f.Add([]byte("x\x1b[31m\x00\u202e\xff"), []byte(") ("))
	f.Fuzz(func(t *testing.T, cmdline, comm []byte) {
		text := commandText(cmdline, comm)
		if text == "" || len(text) > maxCommand+len("[]") || !showable(text) {
			t.Errorf("commandText(%q, %q) = %q", cmdline, comm, text)
		}
	})
}

func showable(s string) bool {
	for _, r := range s {
		if r < ' ' || 0x7f <= r && r < 0xa0 {
			return false
		}
	}
	return utf8.ValidString(s)
}
