//go:build linux

package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// chunkBytes is the unit of generating, reading and checking. It fits into the second-level cache, so that
// a full read is limited by the model's memory and not by where the bytes are copied to.
const chunkBytes = 1 << 20

// modelFile is a generated model on the local disk.
type modelFile struct {
	path string
	size int64
	// check is the sum of the first word of every chunk, which every worker reports after a full read. It
	// shows that the workers read this model, at next to no cost.
	check uint64
}

// generate writes a model of incompressible bytes that are the same on every machine.
func generate(dir string, size int64, reread bool) (modelFile, error) {
	m := modelFile{path: filepath.Join(dir, fmt.Sprintf("model-%d.bin", size)), size: size}
	f, err := os.OpenFile(m.path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return m, err
	}
	defer f.Close()
	random := rand.NewChaCha8([32]byte{'o', 'n', 'e', 'c', 'o', 'p', 'y'})
	buf := make([]byte, chunkBytes)
	for done := int64(0); done < size; {
		chunk := buf[:min(int64(len(buf)), size-done)]
		random.Read(chunk) // never fails
		m.check += firstWord(chunk)
		if _, err := f.Write(chunk); err != nil {
			return m, err
		}
		done += int64(len(chunk))
	}
	// Write-back must not run during the first trial.
	if err := f.Sync(); err != nil {
		return m, err
	}
	if reread {
		// A page cache filled by reading can have other page sizes than one filled by writing.
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			return m, os.NewSyscallError("posix_fadvise", err)
		}
	}
	return m, nil
}

// warm reads the whole source, so that every way finds it in the page cache.
func (m modelFile) warm() error {
	f, err := os.Open(m.path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, chunkBytes)
	for {
		switch _, err := f.Read(buf); err {
		case nil:
		case io.EOF:
			return nil
		default:
			return err
		}
	}
}

// cached returns the bytes of the source in the page cache, or -1 where the kernel cannot tell (before 6.5).
func (m modelFile) cached() int64 {
	f, err := os.Open(m.path)
	if err != nil {
		return -1
	}
	defer f.Close()
	var stat unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{Len: uint64(m.size)}, &stat, 0); err != nil {
		return -1
	}
	return min(int64(stat.Cache)*int64(os.Getpagesize()), m.size)
}

// scan reads every byte of data by copying it through buf and returns the check.
func scan(data, buf []byte) uint64 {
	var check uint64
	for len(data) > 0 {
		n := copy(buf, data)
		check += firstWord(buf[:n])
		data = data[n:]
	}
	return check
}

// firstWord is zero for less than a word.
func firstWord(b []byte) uint64 {
	if len(b) < 8 {
		return 0
	}
	return binary.LittleEndian.Uint64(b)
}
