package shm

import (
	"testing"

	"github.com/onecopy/onecopy/internal/proctest"
)

func TestMain(m *testing.M) { proctest.Main(m) }
