//go:build !linux

package procfs

import "errors"

// Memory looks into the memory of one process.
type Memory struct{}

func OpenMemory(int) (*Memory, error) { return nil, errors.ErrUnsupported }

func Hidden(int, error) bool { return false }

func (m *Memory) Close() {}

func (m *Memory) Regions(int64) ([]Region, error) { return nil, errors.ErrUnsupported }

func (m *Memory) Pages(uint64, []Page, []byte) (int, error) { return 0, errors.ErrUnsupported }

func (m *Memory) ReadAt([]byte, int64) (int, error) { return 0, errors.ErrUnsupported }
