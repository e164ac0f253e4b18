//go:build linux

package main

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/registry"
)

// taskLoad loads a source into an empty registry as a program would, and reads it all again for the digests.
func taskLoad(t terminal, args []string) error {
	if err := need(args, "SOURCE REGISTRY THREADS HUGE"); err != nil {
		return err
	}
	threads, err1 := strconv.Atoi(args[2])
	huge, err2 := strconv.ParseBool(args[3])
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if !huge {
		if err := unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0); err != nil {
			return os.NewSyscallError("prctl", err)
		}
	}
	var reg *registry.Registry
	var m *registry.Model
	v, err := metered(func() (err error) {
		if reg, err = registry.Open(args[1], &registry.Options{Threads: threads}); err != nil {
			return err
		}
		m, err = reg.GetOrLoad(context.Background(), modelKey, registry.Source{Path: args[0]})
		return err
	})
	if err != nil {
		return err
	}
	info := m.Info()
	if info.Bytes > 0 {
		v["huge_percent"] = 100 * float64(info.Fill.Collapsed) / float64(info.Bytes)
	}
	v["direct_bytes"], v["fallbacks"] = float64(info.Fill.Direct), float64(info.Fill.Fallbacks)
	again, err := metered(func() error { return m.Verify(context.Background()) })
	if err != nil {
		return err
	}
	v["verify_ms"] = again["wall_ms"]
	if err := errors.Join(m.Close(), reg.Close()); err != nil {
		return err
	}
	return t.answer(v)
}

// taskReadWrite is what most programs do.
func taskReadWrite(t terminal, args []string) error {
	if err := need(args, "SOURCE COPY"); err != nil {
		return err
	}
	v, err := metered(func() error {
		src, err := os.Open(args[0])
		if err != nil {
			return err
		}
		defer src.Close()
		dst, err := os.Create(args[1])
		if err != nil {
			return err
		}
		defer dst.Close()
		buf := make([]byte, chunkBytes)
		for {
			n, err := src.Read(buf)
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			if _, err := dst.Write(buf[:n]); err != nil {
				return err
			}
		}
	})
	if err != nil {
		return err
	}
	return t.answer(v)
}

// taskDirect reads a file past the page cache and forgets it: what the disk can give. Requests go into 2 MiB
// pages, because they are cut into small ones otherwise.
func taskDirect(t terminal, args []string) error {
	if err := need(args, "SOURCE"); err != nil {
		return err
	}
	const readers, request = 4, 4 << 20
	f, err := os.OpenFile(args[0], os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	mem, err := unix.Mmap(-1, 0, readers*request, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return os.NewSyscallError("mmap", err)
	}
	_ = unix.Madvise(mem, unix.MADV_HUGEPAGE) // a wish
	clear(mem)
	v, err := metered(func() error {
		var next atomic.Int64
		var wg sync.WaitGroup
		errs := make([]error, readers)
		for i := range readers {
			buf := mem[i*request : (i+1)*request]
			wg.Go(func() {
				for {
					at := request * (next.Add(1) - 1)
					if at >= info.Size() || errs[i] != nil {
						return
					}
					_, errs[i] = unix.Pread(int(f.Fd()), buf, at)
				}
			})
		}
		wg.Wait()
		return errors.Join(errs...)
	})
	if err != nil {
		return &fs.PathError{Op: "read", Path: args[0], Err: err}
	}
	return t.answer(v)
}
