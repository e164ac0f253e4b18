//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"os"
	"reflect"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/procfs"
	"github.com/onecopy/onecopy/shm"
)

// HugePages measures how much of a model lies in 2 MiB pages, whoever loaded it
// and whatever became of it since: it maps the files, as a reader would, touches
// one byte of every 2 MiB block, and asks the kernel which blocks it entered
// whole. It holds no lease and counts as no use.
//
// Errors: ErrNotFound, ErrKey; errors.ErrUnsupported where models are private.
func (r *Registry) HugePages(key string) (rep PageReport, err error) {
	if err := layout.ValidKey(key); err != nil {
		return rep, opErr("pages", key, err)
	}
	err = r.host.each(func(p *place) error {
		rep, err = p.hugePages(key)
		return err
	})
	return rep, opErr("pages", key, err)
}

func (p *place) hugePages(key string) (rep PageReport, err error) {
	f, ok, err := p.find(key)
	if err != nil {
		return rep, err
	}
	if !ok || f.Word.State() != layout.Ready {
		return rep, ErrNotFound
	}
	man, err := p.manifest(f.Word.Generation())
	if err != nil {
		return rep, err
	}
	rep.Bytes = man.Bytes
	dir := layout.GenName(uint64(man.Epoch), man.Generation) + "/" + man.Name + "/"
	var large layout.ManifestFile // of the files that lie in 2 MiB pages
	for _, mf := range man.Files {
		if mf.Size < shm.HugePage {
			continue // no block of it can be entered whole
		}
		huge, err := p.hugeBytes(dir+mf.Path, alignedMapping)
		if err != nil {
			return rep, err
		}
		rep.Huge += huge
		if huge > 0 && mf.Size > large.Size {
			large = mf
		}
	}
	if large.Size == 0 {
		return rep, nil
	}
	// One address may be a multiple of 2 MiB by chance. The kernel chooses from the
	// top of a hole, so that a second mapping, longer by a page, is one only if the
	// kernel sees to it.
	gets := true
	for pages := range 2 {
		huge, err := p.hugeBytes(dir+large.Path, plainMapping(pages))
		if err != nil {
			return rep, err
		}
		gets = gets && huge > 0
	}
	rep.PathReaders = &gets
	return rep, nil
}

// mapping maps a file; unmap ends it.
type mapping func(fd int, size int64) (b []byte, unmap func() error, err error)

func alignedMapping(fd int, size int64) ([]byte, func() error, error) {
	m, err := shm.Map(fd, size, false)
	return m.Bytes, m.Unmap, err
}

// plainMapping is what a program does that knows nothing of us, with some pages
// more than the file has.
func plainMapping(pages int) mapping {
	return func(fd int, size int64) ([]byte, func() error, error) {
		b, err := unix.Mmap(fd, 0, int(size)+pages*os.Getpagesize(), unix.PROT_READ, unix.MAP_SHARED)
		return b, func() error { return unix.Munmap(b) }, err
	}
}

// hugeBytes is how much of a file the kernel enters into the page table in
// blocks of 2 MiB.
func (p *place) hugeBytes(name string, maps mapping) (huge int64, err error) {
	fd, st, err := p.m.OpenFD(name)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if st.Size < shm.HugePage {
		return 0, nil
	}
	b, unmap, err := maps(fd, st.Size)
	if err != nil {
		return 0, err
	}
	defer func() {
		if e := unmap(); err == nil {
			err = e
		}
	}()
	var touched byte
	start := uint64(reflect.ValueOf(b).Pointer())
	// From the first boundary, which is not the start of a plain mapping.
	first := (shm.HugePage - int64(start%shm.HugePage)) % shm.HugePage
	err = guarded(func() error {
		for off := first; off < st.Size; off += shm.HugePage {
			touched += b[off]
		}
		runtime.KeepAlive(touched) // or the compiler leaves the reads out
		return nil
	})
	if err != nil {
		return 0, err
	}
	self, err := procfs.OpenMemory(os.Getpid())
	if err != nil {
		return 0, err
	}
	defer self.Close()
	regions, err := self.Regions(0)
	if err != nil {
		return 0, err
	}
	for _, r := range regions {
		if r.Start >= start && r.End <= start+uint64(len(b)+os.Getpagesize()) {
			huge += r.Huge
		}
	}
	return huge, nil
}
