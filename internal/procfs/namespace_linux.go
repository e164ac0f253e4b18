package procfs

import (
	"os"
	"sync"
)

// initialPIDNamespace is how the kernel names the one that every other is in.
const initialPIDNamespace = "pid:[4026531836]"

// SeesEverybody reports whether this process is in the machine's own PID
// namespace. In another, as in most containers, the processes outside are not
// in /proc, and neither are their locks in /proc/locks.
func SeesEverybody() bool { return everybody() }

// A process stays in the namespace in which it began.
var everybody = sync.OnceValue(host.seesEverybody)

func (t tree) seesEverybody() bool {
	name, err := os.Readlink(t.path("self/ns/pid"))
	return err == nil && name == initialPIDNamespace
}
