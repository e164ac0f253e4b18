//go:build !(linux && (amd64 || arm64))

package shm

// CgroupHeadroom returns ok == false: control groups exist on Linux only.
func CgroupHeadroom() (headroom int64, path string, ok bool) { return 0, "", false }
