//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/procfs"
)

// generation is what there is of one generation below m/, at the moment of a
// look.
type generation struct {
	gen  uint64
	name string
	id   procfs.FileID    // of the manifest
	stat unix.Stat_t      // likewise
	man  *layout.Manifest // nil: it cannot be read, and nothing below is known

	// If it was measured:
	at    time.Time
	bytes int64           // memory of manifest, digests and files
	files []procfs.FileID // those of the manifest's files that are there
}

func fileOf(st *unix.Stat_t) procfs.FileID {
	return procfs.FileID{Dev: uint64(st.Dev), Inode: st.Ino}
}

// parallel calls fn for each number below n, with several threads if there are
// many. fn must not read the table: only the calling goroutine is guarded.
func parallel(n int, fn func(i int)) {
	const few = 32 // not worth a thread
	var next atomic.Int64
	work := func() {
		for {
			i := int(next.Add(1) - 1)
			if i >= n {
				return
			}
			fn(i)
		}
	}
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0)-1, 3, n/few) {
		wg.Go(work)
	}
	work()
	wg.Wait()
}

// lookAt looks at generations. One without a manifest is not among the results.
// From known, which may be nil, it takes the manifests that are still the same.
func (p *place) lookAt(gens []uint64, known map[uint64]*generation, measure bool) map[uint64]*generation {
	found := make([]*generation, len(gens))
	parallel(len(gens), func(i int) { found[i] = p.look(gens[i], known[gens[i]], measure) })
	all := make(map[uint64]*generation, len(gens))
	for _, g := range found {
		if g != nil {
			all[g.gen] = g
		}
	}
	return all
}

func (p *place) look(gen uint64, known *generation, measure bool) *generation {
	g := &generation{gen: gen, name: layout.GenName(p.table.Identity().Epoch, gen)}
	path := g.name + layout.ManifestExt
	if known != nil && known.man != nil {
		if st, err := p.m.Stat(path); err == nil && sameFile(&st, &known.stat) {
			g.man, g.stat = known.man, st
			g.at, g.bytes, g.files = known.at, known.bytes, known.files
		}
	}
	if g.man == nil {
		fd, st, err := p.m.OpenFD(path)
		if err == nil {
			g.man, err = decodeManifestFD(fd, path, st.Size)
			unix.Close(fd)
		} else {
			st, err = p.m.Stat(path) // it may be leased all the same
		}
		if err != nil && st.Ino == 0 {
			return nil
		}
		g.stat = st
	}
	g.id = fileOf(&g.stat)
	if g.man != nil && (g.man.Generation != gen || uint64(g.man.Epoch) != p.table.Identity().Epoch) {
		g.man = nil
	}
	// Not all at the same time again.
	if g.man != nil && measure && time.Since(g.at) > believeFiles-believeFiles/16*time.Duration(gen%8) {
		p.measure(g)
	}
	return g
}

// sameFile reports whether nobody has touched a file since its stat was was.
func sameFile(st, was *unix.Stat_t) bool {
	return st.Ino == was.Ino && st.Dev == was.Dev && st.Ctim == was.Ctim && st.Mtim == was.Mtim &&
		st.Size == was.Size && st.Mode == was.Mode && st.Uid == was.Uid && st.Nlink == was.Nlink
}

// A tmpfs counts so many bytes for each name in a directory, "." and ".."
// included.
const nameSize = 20

// holdsOnly reports whether a generation's two directories have, by their sizes, as
// many names as the manifest lists files. It says no if there are folders within.
func holdsOnly(outer, inner *unix.Stat_t, man *layout.Manifest) bool {
	return outer.Size == nameSize*3 && inner.Size == int64(nameSize*(2+len(man.Files))) &&
		!slices.ContainsFunc(man.Files, func(f layout.ManifestFile) bool { return strings.Contains(f.Path, "/") })
}

// measure finds the generation's files and adds up their memory. It asks for
// those that the manifest lists, and lists no directory: the sizes of the
// directories tell whether there is anything else, or something is missing. If
// so, or if there are folders within the folder, it walks the tree.
func (p *place) measure(g *generation) {
	sum := g.stat.Blocks * 512
	whole := true
	g.at, g.files = time.Now(), nil
	add := func(path string, kind uint32) (st unix.Stat_t, ok bool) {
		st, err := p.m.Stat(path)
		if ok = err == nil && st.Mode&unix.S_IFMT == kind; !ok {
			whole = false
		}
		return st, ok
	}
	if st, ok := add(g.name+layout.DigestsExt, unix.S_IFREG); ok {
		sum += st.Blocks * 512
	}
	folder := g.name + "/" + g.man.Name
	outer, _ := add(g.name, unix.S_IFDIR)
	inner, _ := add(folder, unix.S_IFDIR)
	whole = whole && holdsOnly(&outer, &inner, g.man)
	for i := range g.man.Files {
		path := g.man.Files[i].Path
		if st, ok := add(folder+"/"+path, unix.S_IFREG); ok {
			sum += st.Blocks * 512
			g.files = append(g.files, fileOf(&st))
		}
	}
	if !whole {
		sum = generationUsage(g.name, p.m.TreeUsage)
	}
	g.bytes = sum
}
