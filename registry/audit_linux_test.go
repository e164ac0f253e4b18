//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"testing"

	"github.com/onecopy/onecopy/internal/audit"
)

// auditor fails a test instead of returning what is wrong.
type auditor struct{ *audit.Auditor }

func newAuditor(dir string) auditor { return auditor{audit.New(dir)} }

// look fails the test unless the registry is at rest, apart from the leases of the
// generations in leased.
func (a auditor) look(t *testing.T, leased map[uint64]bool) audit.Picture {
	t.Helper()
	pic, problems := a.Look(leased)
	for _, p := range problems {
		t.Errorf("audit: %s", p)
	}
	return pic
}
