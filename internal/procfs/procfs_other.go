//go:build !linux

package procfs

import "errors"

func Locks() ([]Lock, error) { return nil, errors.ErrUnsupported }

func FindMappings(map[FileID]struct{}) (found []Mapping, unreadable int, err error) {
	return nil, 0, errors.ErrUnsupported
}

func FindDescriptors(map[FileID]struct{}) (found []Descriptor, unreadable int, err error) {
	return nil, 0, errors.ErrUnsupported
}

func Resident(int, map[FileID]struct{}) (map[FileID]Residency, error) {
	return nil, errors.ErrUnsupported
}

func Process(int) (Proc, error) { return Proc{}, errors.ErrUnsupported }

func PIDs() ([]int, error) { return nil, errors.ErrUnsupported }

func BootID() (string, error) { return "", errors.ErrUnsupported }

func MemInfo() (map[string]int64, error) { return nil, errors.ErrUnsupported }
