//go:build !linux

package procfs

import "errors"

func Locks() ([]Lock, error) { return nil, errors.ErrUnsupported }

func (*Surveyor) Run(Query) (uses []Use, hidden []int, err error) {
	return nil, nil, errors.ErrUnsupported
}

func Resident(int, map[FileID]struct{}) (map[FileID]Residency, error) {
	return nil, errors.ErrUnsupported
}

func Process(int) (Proc, error) { return Proc{}, errors.ErrUnsupported }

func UID(int) (int, error) { return -1, errors.ErrUnsupported }

func PIDs() ([]int, error) { return nil, errors.ErrUnsupported }

func BootID() (string, error) { return "", errors.ErrUnsupported }

func SeesEverybody() bool { return false }

func MemInfo() (map[string]int64, error) { return nil, errors.ErrUnsupported }
