package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/onecopy/onecopy/internal/doctor"
	"github.com/onecopy/onecopy/internal/scan"
)

// outputOf runs fn with an output format and returns stdout and stderr.
func outputOf(t *testing.T, format string, fn func(*app) error) string {
	t.Helper()
	var out, errs bytes.Buffer
	a := newApp(nil, &out, &errs, nil)
	a.output, a.dir, a.color = format, "/dev/shm/r", "never"
	a.setColours()
	if err := fn(a); err != nil {
		t.Fatal(err)
	}
	return out.String() + errs.String()
}

func TestScanOutput(t *testing.T) {
	models := []scan.Model{{Name: "bert", Registered: true}, {Name: "./gpt\x1b"}, {Name: "quiet", Registered: true}}
	r := &scan.Report{
		Processes: []scan.Process{
			{PID: 4711, Command: "/usr/bin/python app.py", UID: 33, Uses: []scan.Use{
				{Model: 0, Private: 3 << 29, Samples: 2048, Matched: 2007},
				{Model: 1, PageCache: 1 << 30},
			}},
			{PID: 4712, Command: "worker", UID: 33, Uses: []scan.Use{
				{Model: 0, Private: 3 << 29, Samples: 2048, Matched: 2048, Attached: true, Resident: 1 << 20},
			}},
			{PID: 9, Command: "plasma", UID: 0, Uses: []scan.Use{{Model: 1, OtherShm: 1 << 30}}},
		},
		Models: []scan.Total{
			{Bytes: 3 << 29, Copies: 2, Private: 3 << 30, Attached: 1, Both: 1, Reclaimable: 3 << 30},
			{Bytes: 1 << 30, PageCache: 1, OtherShm: 1 << 30},
			{Bytes: 5},
		},
		Examined: 80, NotVisible: 2, SameUser: 1, SkippedFor: 1, Elapsed: 1500 * time.Millisecond,
	}
	write := func(a *app) error { return a.writeScan(models, r) }
	for format, want := range map[string]string{
		formatTable: `PID    COMMAND         UID   MODEL       PRIVATE   MATCH   SHARED
4711   python app.py   33    bert        1.5 GiB   98 %    -
4711   python app.py   33    ./gpt\x1b   -         -       page cache
4712   worker          33    bert        1.5 GiB   100 %   attached, yet copied
9      plasma          0     ./gpt\x1b   -         -       shm

bert (1.5 GiB): 2 processes hold 3.0 GiB of private copies, 3.0 GiB reclaimable; 1 attached, of which 1 copied it all the same
./gpt\x1b (1.0 GiB): 1.0 GiB in other shared memory, 0 B reclaimable; 1 share it through the page cache
quiet (5 B): no private copies
shmctl: 2 processes could not be read: CAP_SYS_PTRACE: run it as root
shmctl: the time was over before 1 process was looked at: --max-time
`,
		formatName: "4711\n4712\n",
		formatJSONL: `{"schema_version":1,"pid":4711,"command":"/usr/bin/python app.py","uid":33,"name":"bert","private_bytes":1610612736,"match":0.97998046875,"samples":2048,"page_cache_bytes":0,"other_shm_bytes":0,"attached":false,"attached_resident_bytes":0}
{"schema_version":1,"pid":4711,"command":"/usr/bin/python app.py","uid":33,"name":"./gpt\u001b","private_bytes":0,"match":null,"samples":0,"page_cache_bytes":1073741824,"other_shm_bytes":0,"attached":false,"attached_resident_bytes":0}
{"schema_version":1,"pid":4712,"command":"worker","uid":33,"name":"bert","private_bytes":1610612736,"match":1,"samples":2048,"page_cache_bytes":0,"other_shm_bytes":0,"attached":true,"attached_resident_bytes":1048576}
{"schema_version":1,"pid":9,"command":"plasma","uid":0,"name":"./gpt\u001b","private_bytes":0,"match":null,"samples":0,"page_cache_bytes":0,"other_shm_bytes":1073741824,"attached":false,"attached_resident_bytes":0}
`,
	} {
		if d := cmp.Diff(want, outputOf(t, format, write)); d != "" {
			t.Errorf("%s (-want +got):\n%s", format, d)
		}
	}

	// The document, cut to one of each.
	models, r.Models, r.Processes = models[:1], r.Models[:1], r.Processes[1:2]
	want := `{
  "schema_version": 1,
  "dir": "/dev/shm/r",
  "models": [
    {
      "name": "bert",
      "registered": true,
      "bytes": 1610612736,
      "copies": 2,
      "private_bytes": 3221225472,
      "other_shm_bytes": 0,
      "page_cache_processes": 0,
      "attached_processes": 1,
      "attached_and_copied_processes": 1,
      "reclaimable_bytes": 3221225472
    }
  ],
  "processes": [
    {
      "pid": 4712,
      "command": "worker",
      "uid": 33,
      "name": "bert",
      "private_bytes": 1610612736,
      "match": 1,
      "samples": 2048,
      "page_cache_bytes": 0,
      "other_shm_bytes": 0,
      "attached": true,
      "attached_resident_bytes": 1048576
    }
  ],
  "examined_processes": 80,
  "not_visible_processes": 2,
  "not_visible_same_user": 1,
  "needs": "CAP_SYS_PTRACE: run it as root",
  "outside_not_visible": false,
  "complete": false,
  "skipped_processes": 1,
  "seconds": 1.5
}
`
	if d := cmp.Diff(want, outputOf(t, formatJSON, write)); d != "" {
		t.Errorf("json (-want +got):\n%s", d)
	}
}

func TestDoctorOutput(t *testing.T) {
	fs := []doctor.Finding{
		{Check: "tmpfs", Text: "/dev/shm is a tmpfs"},
		{Check: "path-readers", Severity: doctor.Info, Text: "x", Reason: strings.Repeat("twelve chars ", 8), Fix: "mount " + strings.Repeat("long ", 30) + "/dev/shm"},
		{Check: "size", Severity: doctor.Warn, Text: "one"},
		{Check: "size", Severity: doctor.Fail, Text: "two\x1b"},
	}
	write := func(a *app) error { return a.writeFindings(fs) }
	for format, want := range map[string]string{
		formatTable: `ok   tmpfs          /dev/shm is a tmpfs
info path-readers   x
                    twelve chars twelve chars twelve chars twelve chars twelve chars twelve chars
                    twelve chars twelve chars
                    fix: mount ` + strings.Repeat("long ", 30) + `/dev/shm
warn size           one
fail size           two\x1b
`,
		formatName: "path-readers\nsize\n",
		formatJSONL: `{"schema_version":1,"check":"tmpfs","severity":"ok","text":"/dev/shm is a tmpfs","reason":null,"fix":null}
{"schema_version":1,"check":"path-readers","severity":"info","text":"x","reason":"` + strings.Repeat("twelve chars ", 8) + `","fix":"mount ` + strings.Repeat("long ", 30) + `/dev/shm"}
{"schema_version":1,"check":"size","severity":"warn","text":"one","reason":null,"fix":null}
{"schema_version":1,"check":"size","severity":"fail","text":"two\u001b","reason":null,"fix":null}
`,
	} {
		if d := cmp.Diff(want, outputOf(t, format, write)); d != "" {
			t.Errorf("%s (-want +got):\n%s", format, d)
		}
	}
	fs = fs[:1]
	want := `{
  "schema_version": 1,
  "dir": "/dev/shm/r",
  "worst": "ok",
  "findings": [
    {
      "check": "tmpfs",
      "severity": "ok",
      "text": "/dev/shm is a tmpfs",
      "reason": null,
      "fix": null
    }
  ]
}
`
	if d := cmp.Diff(want, outputOf(t, formatJSON, write)); d != "" {
		t.Errorf("json (-want +got):\n%s", d)
	}
}
