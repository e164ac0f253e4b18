package doctor

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// removeIPC: systemd-logind removes what ordinary users have in /dev/shm when
// their last session ends.
func (x *examination) removeIPC() {
	const check = "remove-ipc"
	uid := x.owner()
	switch {
	case !within(x.dir, "/dev/shm"):
		x.ok(check, "logind cleans /dev/shm only")
		return
	case !x.exists("/run/systemd/system"):
		x.ok(check, "systemd does not run here")
		return
	case uid <= x.lastSystemUID():
		x.ok(check, "uid %d is root or a system user, whose memory logind leaves alone", uid)
		return
	}
	setting, where := "yes", "the default"
	for _, path := range []string{"/etc/systemd/logind.conf", "/run/systemd/logind.conf", "/usr/local/lib/systemd/logind.conf", "/usr/lib/systemd/logind.conf"} {
		if text, ok := x.read(path); ok {
			if v, ok := parseSetting(text, "Login", "RemoveIPC"); ok {
				setting, where = v, path
			}
			break
		}
	}
	for _, path := range x.layered("systemd/logind.conf.d") {
		text, _ := x.read(path)
		if v, ok := parseSetting(text, "Login", "RemoveIPC"); ok {
			setting, where = v, path
		}
	}
	if !yes(setting) {
		x.ok(check, "RemoveIPC=%s (%s)", setting, where)
		return
	}
	user := x.userName(uid)
	if user != "" && x.exists("/var/lib/systemd/linger/"+user) {
		x.ok(check, "RemoveIPC=%s, but %s lingers, so the last logout never comes", setting, user)
		return
	}
	fix := fmt.Sprintf("loginctl enable-linger %d", uid)
	if user != "" {
		fix = "loginctl enable-linger " + quote(user)
	}
	x.add(Warn, check, fmt.Sprintf("RemoveIPC=%s (%s), and the registry belongs to uid %d, an ordinary user", setting, where, uid),
		"When this user's last session ends, logind deletes everything of theirs in /dev/shm: the registry and all models. "+
			"Processes that have them keep them; the next one loads again. A system user, or RemoveIPC=no, is as good.", fix)
}

// owner of the registry: of its directory, or who would make it.
func (x *examination) owner() int {
	if o, err := x.Lstat(x.dir); err == nil {
		return o.UID
	}
	return x.UID
}

// lastSystemUID is the largest uid that is not an ordinary user's.
func (x *examination) lastSystemUID() int {
	for line := range strings.Lines(x.text("/etc/login.defs")) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == "SYS_UID_MAX" {
			if n, err := strconv.Atoi(f[1]); err == nil {
				return n
			}
		}
	}
	return 999
}

func (x *examination) userName(uid int) string {
	for line := range strings.Lines(x.text("/etc/passwd")) {
		if f := strings.Split(line, ":"); len(f) > 2 && f[2] == strconv.Itoa(uid) {
			return f[0]
		}
	}
	return ""
}

// ageing: systemd-tmpfiles removes files that were not used for long.
func (x *examination) ageing() {
	const check = "tmpfiles"
	var aged *ageRule
	var excluded []string
	for _, file := range x.layered("tmpfiles.d") {
		text, _ := x.read(file)
		for _, r := range parseTmpfiles(file, text) {
			switch {
			case !covers(r.path, x.dir):
			case r.exclude:
				excluded = append(excluded, r.path)
			case aged == nil || len(r.path) > len(aged.path):
				aged = &r
			}
		}
	}
	switch {
	case aged == nil:
		x.ok(check, "no rule of tmpfiles.d ages %s", x.dir)
	case len(excluded) > 0:
		x.ok(check, "%s ages %s, and %s is excluded", aged.file, aged.path, excluded[0])
	default:
		x.add(Warn, check, fmt.Sprintf("%s removes what is older than %s below %s", aged.file, aged.age, aged.path),
			"While a process has the registry open its lock keeps systemd-tmpfiles out; at other times idle models are deleted one file at a time.",
			"echo "+quote("x "+x.dir)+" > /etc/tmpfiles.d/onecopy.conf")
	}
}

// initialPIDNamespace is how the kernel names the machine's own.
const initialPIDNamespace = "pid:[4026531836]"

// hidden: a /proc that hides other users' processes.
func (x *examination) hidden() {
	const check = "hidepid"
	if name, err := os.Readlink(x.Root + "/proc/self/ns/pid"); err == nil && name != initialPIDNamespace {
		x.add(Info, check, "this is a PID namespace of its own, as in a container: processes outside are not visible",
			"holders, top and scan show those of the same container only, and say so. Nothing else depends on it: locks decide what is in use.",
			"docker run --pid=host ... (Kubernetes: hostPID: true)")
		return
	}
	if len(x.mounts) == 0 {
		x.add(Warn, check, "/proc is not mounted", "Models can be read; nothing can be loaded or removed, and no process is visible.", "mount -t proc proc /proc")
		return
	}
	v, ok := mountOf(x.mounts, "/proc").options["hidepid"]
	if !ok || v == "0" || v == "off" {
		x.ok(check, "all processes are visible in /proc")
		return
	}
	x.add(Info, check, "/proc is mounted with hidepid="+v,
		"holders and scan show this user's processes only. Nothing else depends on it: locks decide what is in use.",
		"mount -o remount,hidepid=0 /proc")
}
