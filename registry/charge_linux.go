//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"cmp"
	"maps"
	"os"
	"reflect"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/procfs"
	"github.com/onecopy/onecopy/shm"
)

// chargeSamples is how many pages of a file are asked for.
const chargeSamples = 4096

// Charges says to which control groups the memory of a model is charged: those
// of the processes that touched its pages first, whoever uses them now. Of large
// files a sample of the pages is looked at. It holds no lease and counts as no
// use.
//
// Errors: ErrNotFound, ErrKey; fs.ErrPermission without CAP_SYS_ADMIN;
// errors.ErrUnsupported where the kernel does not tell.
func (r *Registry) Charges(key string) (charges []Charge, err error) {
	if err := layout.ValidKey(key); err != nil {
		return nil, opErr("charges", key, err)
	}
	err = r.host.each(func(p *place) error {
		charges, err = p.charges(key)
		return err
	})
	return charges, opErr("charges", key, err)
}

func (p *place) charges(key string) ([]Charge, error) {
	f, ok, err := p.find(key)
	if err != nil {
		return nil, err
	}
	if !ok || f.Word.State() != layout.Ready {
		return nil, ErrNotFound
	}
	man, err := p.manifest(f.Word.Generation())
	if err != nil {
		return nil, err
	}
	sum := map[string]int64{}
	dir := layout.GenName(uint64(man.Epoch), man.Generation) + "/" + man.Name + "/"
	for _, mf := range man.Files {
		if err := p.addCharges(sum, dir+mf.Path); err != nil {
			return nil, err
		}
	}
	var charges []Charge
	for _, group := range slices.Sorted(maps.Keys(sum)) {
		charges = append(charges, Charge{group, sum[group]})
	}
	slices.SortStableFunc(charges, func(a, b Charge) int { return cmp.Compare(b.Bytes, a.Bytes) })
	return charges, nil
}

func (p *place) addCharges(sum map[string]int64, name string) error {
	fd, st, err := p.m.OpenFD(name)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if st.Size == 0 {
		return nil
	}
	m, err := shm.Map(fd, st.Size, false)
	if err != nil {
		return err
	}
	defer m.Unmap()
	page := int64(os.Getpagesize())
	step := max(page, st.Size/chargeSamples/page*page)
	base := reflect.ValueOf(m.Bytes).Pointer()
	var addrs []uintptr
	var touched byte
	err = guarded(func() error {
		for off := int64(0); off < st.Size; off += step {
			touched += m.Bytes[off] // enters the page into our page table
			addrs = append(addrs, base+uintptr(off))
		}
		runtime.KeepAlive(touched) // or the compiler leaves the reads out
		return nil
	})
	if err != nil {
		return err
	}
	pages, err := procfs.ChargedTo(addrs)
	if err != nil {
		return err
	}
	total := int64(0)
	for _, n := range pages {
		total += n
	}
	if total == 0 { // swapped out again already
		return nil
	}
	for group, n := range pages {
		sum[group] += int64(float64(st.Blocks*512) * float64(n) / float64(total))
	}
	return nil
}
