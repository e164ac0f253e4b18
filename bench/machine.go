//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// machine is where the figures come from.
type machine struct {
	CPU     string            `json:"cpu"`
	Cores   int               `json:"cores"`
	Memory  int64             `json:"memory_bytes"`
	Swap    int64             `json:"swap_bytes"`
	Kernel  string            `json:"kernel"`
	Arch    string            `json:"arch"`
	Go      string            `json:"go"`
	Python  string            `json:"python"` // "" when none was found
	THP     map[string]string `json:"transparent_hugepage"`
	Shm     mount             `json:"shm"`
	Source  mount             `json:"source"`
	Load    string            `json:"load_average_at_start"` // other work on the machine shows here
	Started time.Time         `json:"started"`
	Args    []string          `json:"args"` // flags that change what is measured
}

// mount is the file system of a folder.
type mount struct {
	Type    string `json:"type"`
	Options string `json:"options"`
	Size    int64  `json:"size_bytes"`
}

func facts(python, shm, work string, args []string) machine {
	m := machine{
		CPU:     processor(),
		Cores:   runtime.NumCPU(),
		Kernel:  firstLine("/proc/sys/kernel/osrelease"),
		Arch:    runtime.GOARCH,
		Go:      runtime.Version(),
		Python:  python,
		THP:     map[string]string{},
		Shm:     mountOf(shm),
		Source:  mountOf(work),
		Load:    firstLine("/proc/loadavg"),
		Started: time.Now().UTC().Truncate(time.Second),
		Args:    args,
	}
	if meminfo, err := os.ReadFile("/proc/meminfo"); err == nil {
		m.Memory, _ = kilobytes(meminfo, "MemTotal")
		m.Swap, _ = kilobytes(meminfo, "SwapTotal")
	}
	for _, knob := range []string{"enabled", "defrag", "shmem_enabled"} {
		m.THP[knob] = chosen(firstLine("/sys/kernel/mm/transparent_hugepage/" + knob))
	}
	return m
}

func firstLine(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return "unknown"
	}
	line, _, _ := strings.Cut(string(text), "\n")
	return strings.TrimSpace(line)
}

// chosen returns the word in brackets of "always [madvise] never".
func chosen(line string) string {
	_, rest, ok := strings.Cut(line, "[")
	if !ok {
		return line
	}
	word, _, _ := strings.Cut(rest, "]")
	return word
}

func processor() string {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	field := map[string]string{}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		field[strings.TrimSpace(name)] = strings.TrimSpace(value)
	}
	if name := field["model name"]; name != "" {
		return fmt.Sprintf("%s (family %s, model %s)", name, field["cpu family"], field["model"])
	}
	// arm64 has numbers only.
	return fmt.Sprintf("implementer %s, part %s", field["CPU implementer"], field["CPU part"])
}

// mountOf finds the mount of a folder by its device, which every mount has one of.
func mountOf(dir string) mount {
	var m mount
	var fs unix.Statfs_t
	if unix.Statfs(dir, &fs) == nil {
		m.Size = int64(fs.Blocks) * fs.Bsize
	}
	id, err := identify(dir)
	if err != nil {
		return m
	}
	major, minor, _ := strings.Cut(id.dev, ":")
	a, _ := strconv.ParseUint(major, 16, 32)
	b, _ := strconv.ParseUint(minor, 16, 32)
	text, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(text)) {
		// "36 35 98:0 /root /mount/point rw,noatime shared:1 - ext4 /dev/root rw,errors=continue"
		before, after, ok := strings.Cut(strings.TrimSpace(line), " - ")
		fields, tail := strings.Fields(before), strings.Fields(after)
		if ok && len(fields) > 5 && len(tail) > 2 && fields[2] == fmt.Sprintf("%d:%d", a, b) {
			m.Type, m.Options = tail[0], tail[2]
		}
	}
	return m
}

// findPython returns the path of an interpreter that is new enough, and its version. A name on the PATH may
// be a script that looks for the real one at each start (pyenv does that): the real one is what is measured.
func findPython(ctx context.Context, name string) (path, version string, err error) {
	const ask = `import sys
print(sys.executable)
print(".".join(map(str, sys.version_info[:3])))
print(sys.version_info >= (3, 9))`
	out, err := exec.CommandContext(ctx, name, "-c", ask).Output()
	if err != nil {
		return "", "", fmt.Errorf("%s: %w", name, err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(lines) != 3 || lines[2] != "True" {
		return "", "", fmt.Errorf("%s is not Python 3.9 or later", name)
	}
	return lines[0], lines[1], nil
}
