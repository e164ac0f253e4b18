package doctor

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"syscall"
)

const (
	mib = 1 << 20
	gib = 1 << 30

	containerDefault = 64 * mib // what container runtimes give /dev/shm
	thp              = "/sys/kernel/mm/transparent_hugepage"
	fewInodes        = 1000
)

// fileSystem says whether the registry lies in memory at all.
func (x *examination) fileSystem() {
	switch m := x.mount; {
	case m.point == "":
		x.add(Warn, "tmpfs", "the mount of "+x.dir+" cannot be found", "/proc/self/mountinfo cannot be read, so nothing is known about the file system.", "mount -t proc proc /proc")
	case m.kind != "tmpfs":
		x.add(Fail, "tmpfs", x.dir+" lies on "+m.point+" ("+m.kind+"), which is not a tmpfs",
			"A registry is memory that processes map; on a disk it would be neither fast nor locked the same way, and is refused.",
			"export ONECOPY_DIR=/dev/shm/onecopy-"+strconv.Itoa(x.UID))
	default:
		if _, ro := m.options["ro"]; ro {
			x.add(Fail, "tmpfs", m.point+" is mounted read-only", "Models can be attached and not loaded.", "mount -o remount,rw "+quote(m.point))
			return
		}
		x.ok("tmpfs", "%s is a tmpfs", m.point)
	}
}

// probes reports what the kernel and the file system were seen to do.
func (x *examination) probes() {
	p := x.probe
	if p.Skipped != nil {
		x.add(Info, "kernel", "nothing was tried: "+p.Skipped.Error(),
			"Whether locks, leases and 2 MiB pages work can only be tried by a user who may write there.", "")
		return
	}
	for _, t := range []struct {
		err           error
		what, without string
	}{
		{p.TmpFile, "anonymous files (O_TMPFILE)", "A load is built in a file without a name, so that a killed one leaves nothing; here nothing can be loaded."},
		{p.Lock, "locks that a mapping keeps (flock)", "A lease is a lock that the kernel drops with the process; without it nothing can tell which models are in use."},
		{p.Lease, "file leases (F_SETLEASE)", "A loaded model is published only with the kernel's proof that nobody can write it any more; here nothing can be loaded."},
	} {
		if t.err != nil {
			x.add(Fail, "kernel", t.what+" do not work in "+p.Dir+": "+t.err.Error(), t.without, "")
			return
		}
	}
	x.ok("kernel", "anonymous files, locks and leases work in %s (tried)", p.Dir)
}

// hugePages says whether a load gets 2 MiB pages.
func (x *examination) hugePages() {
	p := x.probe
	if p.Skipped != nil || p.TmpFile != nil {
		return
	}
	if p.Huge == nil {
		x.ok("huge-pages", "2 MiB pages on demand work (tried)")
		return
	}
	// What it takes to try. A size of 0 is no limit.
	const tried = 4 << 20
	if s, err := x.Statfs(x.dir); err == nil && s.Size > 0 && s.Free < tried {
		x.add(Info, "huge-pages", "2 MiB pages on demand were not tried: "+x.mount.point+" has "+size(s.Free)+" free", "It takes "+size(tried)+".", "")
		return
	}
	release := x.text("/proc/sys/kernel/osrelease")
	major, minor, known := parseKernel(release)
	slow := "Models are loaded into 4 KiB pages: loading is about half as fast, and every later read is slower than from the page cache."
	text, fix := "2 MiB pages on demand do not work: "+p.Huge.Error(), ""
	switch thpOff := x.status("THP_enabled") == "0"; {
	case known && (major < 6 || major == 6 && minor < 1):
		text += fmt.Sprintf(" (kernel %s; MADV_COLLAPSE came with 6.1)", release)
		slow += " A kernel of 6.1 or later changes that."
	case !x.exists(thp):
		text += " (the kernel was built without transparent huge pages)"
	case chosen(x.text(thp+"/shmem_enabled")) == "deny":
		text += " (shmem_enabled is deny)"
		fix = "echo advise > " + thp + "/shmem_enabled"
	case thpOff:
		text += " (switched off for this process by prctl)"
		slow += " Whatever started this process, a container runtime perhaps, set PR_SET_THP_DISABLE."
	case errors.Is(p.Huge, syscall.EBUSY) || errors.Is(p.Huge, syscall.ENOMEM) || errors.Is(p.Huge, syscall.EAGAIN):
		text += " (memory is fragmented, or a limit is reached)"
		fix = "echo 1 > /proc/sys/vm/compact_memory"
	}
	x.add(Warn, "huge-pages", text, slow, fix)
}

// status returns a field of /proc/self/status.
func (x *examination) status(name string) string {
	for line := range strings.Lines(x.text("/proc/self/status")) {
		if k, v, ok := strings.Cut(line, ":"); ok && k == name {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// pathReaders says whether programs that map the path themselves get 2 MiB pages.
func (x *examination) pathReaders() {
	if x.mount.kind != "tmpfs" {
		return
	}
	switch huge := x.mount.options["huge"]; huge {
	case "always", "within_size", "advise":
		x.ok("path-readers", "%s is mounted with huge=%s: programs that map a model by its path get 2 MiB pages", x.mount.point, huge)
	default:
		x.add(Info, "path-readers", x.mount.point+" is mounted without huge=",
			"Programs that map a model by its path (llama.cpp, safetensors, numpy) get addresses that 2 MiB pages do not fit: "+
				"measured with 10 workers on 1.5 GiB, 32 MiB of page tables instead of 1.6 and a first read that takes twice as long. "+
				"The library's own mappings are aligned and not concerned. Nobody else notices the option.",
			remountHuge(x.mount))
	}
}

// space compares the tmpfs with memory, budget and models.
func (x *examination) space() {
	if x.mount.kind != "tmpfs" {
		return
	}
	point, r := x.mount.point, x.registry
	s, err := x.Statfs(point)
	if err != nil {
		x.add(Warn, "size", "the size of "+point+" is not known: "+err.Error(), "", "")
		return
	}
	resize := func(to int64) string {
		return fmt.Sprintf("mount -o remount,size=%dM %s", (to+mib-1)/mib, quote(point))
	}
	budget := r.Budget
	if budget == 0 {
		budget = s.Size / 5 * 4
	}
	memory := x.memory["MemTotal"]
	before := len(x.findings)
	switch {
	case s.Size == 0:
		x.add(Warn, "size", point+" has no limit of size", "A tmpfs without a limit can take all memory, and the machine dies of it before anybody gets an error.", resize(memory/2))
	case s.Size <= containerDefault:
		x.add(Warn, "size", fmt.Sprintf("%s is %s: what container runtimes give by default", point, size(s.Size)),
			"No model of use fits. A container needs its own size, the host's /dev/shm, or a volume in memory.",
			"docker run --shm-size 8g ... (compose: shm_size: 8g; Kubernetes: an emptyDir with medium: Memory at /dev/shm)")
	case budget > s.Size:
		x.add(Warn, "size", fmt.Sprintf("the budget (%s) is more than %s holds (%s)", size(budget), point, size(s.Size)),
			"Loads fail before the budget is reached, and nothing idle is removed for them in time.", resize(budget/4*5))
	case memory > 0 && budget > memory/10*9:
		x.add(Warn, "size", fmt.Sprintf("models may take %s of the machine's %s", size(budget), size(memory)),
			"What lies on a tmpfs cannot be given back under pressure: processes are killed before a load is refused.", resize(memory/2))
	}
	if r.Budget > 0 && r.Used+r.Reserved > r.Budget/10*9 {
		x.add(Info, "size", fmt.Sprintf("%s of the budget of %s are used", size(r.Used+r.Reserved), size(r.Budget)),
			"The next load has to remove idle models first, or fails.", "shmctl ls")
	}
	if others := budget - r.Used - s.Free; s.Size > containerDefault && budget <= s.Size && others > budget/10 {
		x.add(Info, "size", fmt.Sprintf("only %s are free on %s, %s less than the budget has left", size(s.Free), point, size(others)),
			"Others use the same tmpfs, and loads fail when they fill it.", "du -xsh "+quote(point)+"/* | sort -h")
	}
	if s.Inodes > 0 && s.FreeInodes < fewInodes {
		x.add(Warn, "size", fmt.Sprintf("%d of %d inodes are free on %s", s.FreeInodes, s.Inodes, point),
			"Every file of a model takes one.", "mount -o remount,nr_inodes="+strconv.FormatInt(max(s.Inodes*4, 1<<20), 10)+" "+quote(point))
	}
	if len(x.findings) == before {
		x.ok("size", "%s has %s, %s free; the budget is %s", point, size(s.Size), size(s.Free), size(budget))
	}
}

// group looks at the memory limit around this process.
func (x *examination) group() {
	room, path, limited := x.Headroom()
	if !limited {
		x.ok("cgroup", "no memory limit of a control group is below the machine's memory")
		return
	}
	s, err := x.Statfs(x.mount.point)
	budget := x.registry.Budget
	if budget == 0 && err == nil {
		budget = s.Size / 5 * 4
	}
	left := max(0, budget-x.registry.Used)
	name, unlimited := "memory.max", "max"
	if x.exists(path + "/memory.limit_in_bytes") {
		name, unlimited = "memory.limit_in_bytes", "-1"
	}
	fix := "echo " + unlimited + " > " + quote(path+"/"+name) + " (systemd: MemoryMax=; docker: --memory; Kubernetes: resources.limits.memory)"
	reason := "A model's memory is charged to the process that loads it. A load that does not fit is refused; " +
		"load from a process with a larger limit, such as a unit of its own, and let the workers attach."
	switch {
	case room < left:
		x.add(Warn, "cgroup", fmt.Sprintf("this process can load %s before the limit of %s, less than the %s that the budget has left", size(room), path, size(left)), reason, fix)
	default:
		x.ok("cgroup", "this process can load %s before the limit of %s", size(room), path)
	}
}

func (x *examination) overcommit() {
	if x.text("/proc/sys/vm/overcommit_memory") != "2" {
		x.ok("overcommit", "memory is not strictly accounted")
		return
	}
	left := x.memory["CommitLimit"] - x.memory["Committed_AS"]
	x.add(Warn, "overcommit", fmt.Sprintf("vm.overcommit_memory is 2, and %s can still be promised", size(max(0, left))),
		"Every page of a tmpfs counts as promised memory: loads end with \"cannot allocate memory\" although there is free memory.",
		"sysctl -w vm.overcommit_memory=0")
}

func (x *examination) swap() {
	total := x.memory["SwapTotal"]
	_, never := x.mount.options["noswap"]
	switch {
	case total == 0:
		x.ok("swap", "there is no swap")
	case never:
		x.ok("swap", "%s is mounted with noswap", x.mount.point)
	default:
		x.add(Info, "swap", fmt.Sprintf("models can be swapped out: there are %s of swap", size(total)),
			"Pages of a tmpfs go to swap when memory is short, and 2 MiB pages come back as small ones. "+
				"A mount of its own can exclude that (kernel 6.4 and later; a remount cannot).",
			"mkdir -p /run/onecopy && mount -t tmpfs -o noswap,huge=advise,mode=1777,size=50% tmpfs /run/onecopy && export ONECOPY_DIR=/run/onecopy/"+strconv.Itoa(x.UID))
	}
}

// limits compares the limits of this process with what the models need.
func (x *examination) limits() {
	text := x.text("/proc/self/limits")
	before := len(x.findings)
	// While it attaches, a process has a descriptor for each model, and some for
	// the registry itself.
	need := int64(max(256, 2*x.registry.Models+64))
	if n, ok := parseLimit(text, "Max open files"); ok && n < need {
		x.add(Warn, "limits", fmt.Sprintf("a process may open %d files, and %d may be needed", n, need),
			"Loading and attaching need descriptors for a moment; then they fail with \"too many open files\".", fmt.Sprintf("ulimit -n %d", max(need, 1024)))
	}
	if n, err := strconv.ParseInt(x.text("/proc/sys/vm/max_map_count"), 10, 64); err == nil {
		need := int64(2*(x.registry.Models+x.registry.Files) + 4096)
		if n < need {
			x.add(Warn, "limits", fmt.Sprintf("a process may have %d mappings, and %d may be needed", n, need),
				"Every file of an attached model that is used is one mapping.", fmt.Sprintf("sysctl -w vm.max_map_count=%d", max(need, 262144)))
		}
	}
	if n, ok := parseLimit(text, "Max address space"); ok && n < x.registry.Used+gib {
		x.add(Warn, "limits", "the address space of a process is limited to "+size(n),
			"A model takes as much address space as it has bytes, in every process that attaches it.", "ulimit -v unlimited")
	}
	if n, ok := parseLimit(text, "Max file size"); ok && n < max(x.registry.Largest, 64*gib) {
		x.add(Warn, "limits", "files may have at most "+size(n), "A model with a larger file cannot be loaded.", "ulimit -f unlimited")
	}
	if n, ok := parseLimit(text, "Max locked memory"); ok && n < x.registry.Largest {
		x.add(Info, "limits", fmt.Sprintf("a process may lock %s, less than the largest model (%s)", size(n), size(x.registry.Largest)),
			"Nothing here locks memory; a runtime that wants to (llama.cpp --mlock) cannot.", "ulimit -l unlimited")
	}
	if len(x.findings) == before {
		x.ok("limits", "files, mappings and address space are enough")
	}
}
