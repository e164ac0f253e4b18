//go:build amd64 || arm64

package main

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	childMain()
	os.Exit(m.Run())
}

// needMemory skips where the trial does not fit.
func needMemory(t *testing.T, bytes uint64) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs("/dev/shm", &st); err != nil || st.Type != unix.TMPFS_MAGIC {
		t.Skipf("needs a tmpfs at /dev/shm (error: %v)", err)
	}
	if free := st.Bavail * uint64(st.Bsize); free < bytes {
		t.Skipf("needs %d bytes on /dev/shm, there are %d", bytes, free)
	}
}

func TestOvercommit(t *testing.T) {
	needMemory(t, 512<<20)
	report := filepath.Join(t.TempDir(), "reports", "overcommit")
	var out, errs bytes.Buffer
	code := run(t.Context(), []string{
		"overcommit", "-minutes", "0.15", "-traces", "zipf,scan,mixed", "-models", "60", "-largest", "4194304",
		"-think", "10ms", "-kill", "500ms", "-seed", "1", "-report", report,
	}, &out, &errs)
	t.Log(out.String())
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, errs.String())
	}
	var doc struct{ Traces []outcome }
	readJSON(t, report+".json", &doc)
	if len(doc.Traces) != 3 {
		t.Fatalf("%d traces", len(doc.Traces))
	}
	for _, o := range doc.Traces {
		if o.Hits.Loads == 0 || o.Tags == 0 || o.Kept.Pinned == 0 || o.Kept.Leases == 0 || o.BudgetKept.Samples == 0 {
			t.Errorf("%s: nothing was tried: %+v", o.Trace, o)
		}
	}
	wantReport(t, report+".md", "hit rate of an exact LRU", "-seed 1")
}

func TestRollouts(t *testing.T) {
	needMemory(t, 256<<20)
	shmctl := filepath.Join(t.TempDir(), "shmctl")
	if b, err := exec.Command("go", "build", "-o", shmctl, "github.com/onecopy/onecopy/cmd/shmctl").CombinedOutput(); err != nil {
		t.Skipf("shmctl cannot be built here: %v: %s", err, b)
	}
	report := filepath.Join(t.TempDir(), "rollouts")
	var out, errs bytes.Buffer
	code := run(t.Context(), []string{
		"rollouts", "-rollouts", "12", "-processes", "6", "-size", "8388608", "-seed", "3", "-shmctl", shmctl, "-report", report,
	}, &out, &errs)
	t.Log(out.String())
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, errs.String())
	}
	var s summary
	readJSON(t, report+".json", &s)
	fates := map[fate]int{}
	for _, r := range s.Rollouts {
		fates[r.Fate]++
	}
	if s.Requests == 0 || fates[left] == 0 || fates[killed] == 0 || fates[refused] == 0 {
		t.Errorf("%d requests, %v", s.Requests, fates)
	}
	wantReport(t, report+".md", "answers that mix generations", "-seed 3")
}

func readJSON(t *testing.T, path string, v any) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatal(err)
	}
}

func wantReport(t *testing.T, path string, texts ...string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range texts {
		if !strings.Contains(string(b), s) {
			t.Errorf("%s does not say %q:\n%s", path, s, b)
		}
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{
		{}, {"other"}, {"overcommit", "-minutes", "0"}, {"overcommit", "-models", "x"}, {"overcommit", "more"},
		{"rollouts", "-rollouts", "0"}, {"rollouts", "-size", "1"},
	} {
		if code := run(t.Context(), args, io.Discard, io.Discard); code != 2 {
			t.Errorf("%v: exit code %d, want 2", args, code)
		}
	}
	for _, args := range [][]string{
		{"overcommit", "-traces", "zipf,backwards", "-minutes", "0.001"}, {"rollouts", "-shmctl", "/no/such/program"},
	} {
		if code := run(t.Context(), args, io.Discard, io.Discard); code != 1 {
			t.Errorf("%v: exit code %d, want 1", args, code)
		}
	}
}

// A client must notice what the servers of the trial never do.
func TestClientsJudge(t *testing.T) {
	tags := func(last uint64) []uint64 {
		ts := make([]uint64, 4*len(parts))
		for i := range ts {
			ts[i] = 7
		}
		ts[len(ts)-1] = last
		return ts
	}
	c := &clients{tagOf: map[uint64]uint64{}}
	want := func(failed, mixed, stale int) {
		t.Helper()
		if c.failed != failed || c.mixed != mixed || c.stale != stale {
			t.Errorf("%d failed, %d mixed, %d stale; want %d, %d, %d", c.failed, c.mixed, c.stale, failed, mixed, stale)
		}
	}
	c.judge(answer{Generation: 5, Tags: tags(7)}, 5, time.Second)
	want(0, 0, 0)
	c.judge(answer{Generation: 5, Tags: tags(8)}, 5, time.Second)
	want(0, 1, 0)
	c.judge(answer{Generation: 5, Tags: tags(7)}, 6, time.Second)
	want(0, 1, 1)
	c.judge(answer{Generation: 6, Tags: tags(7)[:3]}, 6, time.Second)
	want(1, 1, 1)
	c.tagOf[9] = 1
	c.judge(answer{Generation: 9, Tags: tags(7)}, 6, time.Second)
	want(1, 2, 1)
}
