package doctor

// RemountSize is the command that gives more room to the tmpfs that a path lies
// on, with SIZE to be filled in.
func RemountSize(path string) string {
	text, _ := Host{}.read("/proc/self/mountinfo")
	return "mount -o remount,size=SIZE " + quote(mountOf(parseMounts(text), path).point)
}
