//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"errors"
	"io/fs"
	"testing"
)

func TestCharges(t *testing.T) {
	r := newRegistry(t, nil)
	_, err := r.Charges("k")
	wantErr(t, err, ErrNotFound)
	m := mustLoad(t, r, "k", fileSource(t, "w", make([]byte, 300_000)))
	m.Close()
	before, err := r.Entry("k")
	must(t, err)
	charges, err := r.Charges("k")
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	must(t, err)
	var sum int64
	for _, c := range charges {
		sum += c.Bytes
	}
	if want := int64(74 * 4096); sum < want-int64(len(charges)) || sum > want {
		t.Errorf("%d bytes charged, want %d: %+v", sum, want, charges)
	}
	if after, _ := r.Entry("k"); after.Attaches != before.Attaches || after.Leased {
		t.Errorf("looking counts as a use: %+v", after)
	}
}
