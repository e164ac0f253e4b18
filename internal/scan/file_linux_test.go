package scan

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestParseTmpfs(t *testing.T) {
	got := parseTmpfs("35 31 0:32 / /dev/shm rw shared:9 - tmpfs tmpfs rw,size=1k\n36 31 0:33 / / rw - ext4 tmpfs rw\nbroken - tmpfs x\n1 2 x:y / /z rw - tmpfs t rw\n")
	if d := cmp.Diff(map[uint64]bool{unix.Mkdev(0, 32): true}, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}
