package procfs

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// sample is a /proc with three processes: a worker with an awkward name, a
// thread of the kernel, and one with a hostile command line.
var sample = tree{root: filepath.FromSlash("testdata/proc")}

var (
	weights  = FileID{Dev: makeDev(0, 0x19), Inode: 4294967301}
	manifest = FileID{Dev: makeDev(0, 0x19), Inode: 6}
	memfd    = FileID{Dev: makeDev(0, 1), Inode: 2051}
)

func set(ids ...FileID) map[FileID]struct{} {
	want := make(map[FileID]struct{})
	for _, id := range ids {
		want[id] = struct{}{}
	}
	return want
}

func golden(t *testing.T, name string, got any) {
	t.Helper()
	text, err := json.MarshalIndent(got, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	text = append(text, '\n')
	path := filepath.Join("testdata", "golden", name+".json")
	if *update {
		if err := os.WriteFile(path, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(text)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

func TestLocksGolden(t *testing.T) {
	locks, err := sample.locks()
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "locks", locks)
}

// Whether smaps is read at once or after maps makes no difference.
func TestSurveyGolden(t *testing.T) {
	for _, likely := range []map[int]struct{}{nil, {714: {}, 715: {}, 1: {}}} {
		uses, hidden, err := new(Surveyor).run(sample, Query{Want: set(weights, manifest, memfd, FileID{}), Weigh: set(weights, manifest, memfd), Likely: likely})
		if err != nil || len(hidden) != 0 {
			t.Fatalf("%v hidden, %v", hidden, err)
		}
		for i := range uses {
			uses[i].Start = uses[i].Start.In(time.UTC)
		}
		golden(t, "survey", uses)
	}
}

func TestResidentGolden(t *testing.T) {
	got, err := sample.resident(714, set(weights, manifest, memfd, FileID{Inode: 1}))
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 3 {
		t.Errorf("%d files, want 3", len(got))
	}
	golden(t, "resident", []Residency{got[weights], got[manifest], got[memfd]})
}

func TestProcessGolden(t *testing.T) {
	pids, err := sample.pids()
	if err != nil {
		t.Fatal(err)
	}
	var procs []Proc
	for _, pid := range pids {
		p, err := sample.process(pid)
		if err != nil {
			t.Fatal(err)
		}
		p.Start = p.Start.In(time.UTC)
		procs = append(procs, p)
	}
	golden(t, "processes", procs)
}

func TestMachineGolden(t *testing.T) {
	info, err := sample.memInfo()
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "meminfo", info)
	id, err := sample.bootID()
	if want := "6fe3a9a4-1f2e-4c55-8a8d-0123456789ab"; id != want || err != nil {
		t.Errorf("bootID() = %q, %v, want %q", id, err, want)
	}
}
