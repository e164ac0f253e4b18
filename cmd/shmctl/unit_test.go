package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/registry"
)

func TestSubstitute(t *testing.T) {
	const dir = "/dev/shm/r/v1/m/0-1/$bert"
	for arg, want := range map[string]string{
		"{}":                     dir,
		"{}/x.gguf":              dir + "/x.gguf",
		"{}/":                    dir + "/",
		"--model={}":             "--model=" + dir,
		"--model={}/x.gguf":      "--model=" + dir + "/x.gguf",
		"--set=model={}":         "--set=model=" + dir,
		"{}/a={}/b":              dir + "/a=" + dir + "/b",
		"":                       "",
		"{":                      "{",
		"a{}":                    "a{}",
		"{}b":                    "{}b",
		"./{}/x":                 "./{}/x",
		"/{}":                    "/{}",
		"x {}":                   "x {}",
		"{} {}":                  "{} {}",
		"={},":                   "={},",
		"d = {}":                 "d = {}",
		"{}\n":                   "{}\n",
		"--json={\"a\":{}}":      "--json={\"a\":{}}",
		"-I{}":                   "-I{}",
		"{}{}":                   "{}{}",
		"--model={}:{}/adapters": "--model={}:{}/adapters",
	} {
		if got := substitute(arg, dir); got != want {
			t.Errorf("substitute(%q) = %q, want %q", arg, got, want)
		}
	}
}

func TestClassify(t *testing.T) {
	wrap := func(err error) error {
		return fmt.Errorf("outer: %w", &registry.Error{Op: "load", Key: "k", Err: fmt.Errorf("because: %w", err)})
	}
	for _, tt := range []struct {
		err  error
		exit int
		code string
	}{
		{errors.New("something"), 1, "error"},
		{context.Canceled, 1, "error"}, // cancelled, but by no signal
		{errProblems, 1, "problems"},
		{usagef("", "x"), 2, "usage"},
		{registry.ErrKey, 2, "key"},
		{registry.ErrPath, 2, "path"},
		{registry.ErrNotFound, 3, "not_found"},
		{registry.ErrNoRegistry, 3, "no_registry"},
		{errNoFile, 3, "file_not_found"},
		{registry.ErrUntrusted, 4, "untrusted"},
		{registry.ErrReadOnly, 4, "read_only"},
		{fs.ErrPermission, 4, "permission"},
		{registry.ErrInUse, 5, "in_use"},
		{&registry.InUseError{}, 5, "in_use"},
		{registry.ErrBusy, 5, "busy"},
		{registry.ErrCorrupt, 6, "corrupt"},
		{registry.ErrVersion, 6, "version"},
		{registry.ErrGone, 6, "gone"},
		{registry.ErrNoSpace, 7, "no_space"},
		{&registry.NoSpaceError{}, 7, "no_space"},
		{registry.ErrTableFull, 7, "table_full"},
		{registry.ErrSource, 8, "source"},
		{registry.ErrSourceChanged, 8, "source_changed"},
		{registry.ErrLoadFailed, 8, "load_failed"},
		{registry.ErrTimeout, 9, "timeout"},
		{context.DeadlineExceeded, 9, "timeout"},
		{registry.ErrClosed, 1, "error"},
		{registry.ErrLimit, 1, "error"},
		{registry.ErrNestedLoad, 1, "error"},
		{errors.ErrUnsupported, 1, "error"},

		// What says most comes first.
		{fmt.Errorf("%w: %w", registry.ErrSource, fs.ErrPermission), 8, "source"},
		{fmt.Errorf("%w: %w", registry.ErrLoadFailed, registry.ErrNoSpace), 7, "no_space"},
		{fmt.Errorf("%w: %w", registry.ErrLoadFailed, registry.ErrTimeout), 9, "timeout"},
	} {
		a := new(app)
		if exit, code := a.classify(wrap(tt.err)); exit != tt.exit || code != tt.code {
			t.Errorf("%v: exit %d, code %q; want %d, %q", tt.err, exit, code, tt.exit, tt.code)
		}
	}

	a := new(app)
	a.signals.got.Store(true)
	if exit, code := a.classify(wrap(context.Canceled)); exit != 130 || code != "interrupted" {
		t.Errorf("interrupted: exit %d, code %q; want 130", exit, code)
	}
	if exit, _ := a.classify(wrap(registry.ErrNoSpace)); exit != 7 {
		t.Errorf("an error of its own beside a signal: exit %d, want 7", exit)
	}
}

// runText runs shmctl in this process.
func runText(t *testing.T, env []string, args ...string) (exit int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	exit = run(args, strings.NewReader(""), &out, &errs, env)
	return exit, out.String(), errs.String()
}

func TestEveryCommandHasHelpWithExample(t *testing.T) {
	var visit func(cmd *cobra.Command)
	visit = func(cmd *cobra.Command) {
		if cmd.Example == "" || cmd.Short == "" || cmd.Long == "" {
			t.Errorf("%s: needs Short, Long and Example", cmd.CommandPath())
		}
		args := append(strings.Fields(cmd.CommandPath())[1:], "--help")
		exit, out, errs := runText(t, nil, args...)
		if exit != 0 || errs != "" || !strings.Contains(out, "Examples:") {
			t.Errorf("%s --help: exit %d, stderr %q, stdout without examples:\n%s", cmd.CommandPath(), exit, errs, out)
		}
		for _, c := range cmd.Commands() {
			visit(c)
		}
	}
	visit(newApp(nil, nil, nil, nil).command())
}

func TestHelpShowsEnvironment(t *testing.T) {
	_, out, _ := runText(t, nil, "load", "--help")
	for _, v := range []string{"ONECOPY_DIR", "ONECOPY_OUTPUT", "ONECOPY_NO_HEADERS", "ONECOPY_TIMEOUT", "ONECOPY_SLOTS", "ONECOPY_MODE"} {
		if !strings.Contains(out, "$"+v) {
			t.Errorf("load --help does not mention $%s", v)
		}
	}
	for _, v := range []string{"ONECOPY_REPLACE", "ONECOPY_YES"} {
		if strings.Contains(out, v) {
			t.Errorf("%s exists: a variable must not order a replacement", v)
		}
	}
}

// No command may panic, or do anything but explain itself, without arguments.
func TestNoArguments(t *testing.T) {
	env := []string{"ONECOPY_DIR=" + t.TempDir() + "/none"}
	want := map[string]int{
		"load": 2, "stat": 2, "path": 2, "cat": 2, "rm": 2,
		"exec": 125,
		"dump": 3,
		"ls":   0, "gc": 0, "check": 0, "holders": 0, "version": 0, "help": 0, "completion": 0,
		"scan": 0, "doctor": 0,
		"pin": 2, "unpin": 2, "touch": 2, "ttl": 2, "trim": 2, "wait": 2, "rollout": 2, "top": 2, "config": 3, "metrics": 0,
	}
	got := map[string]int{}
	for _, cmd := range newApp(nil, nil, nil, nil).command().Commands() {
		got[cmd.Name()], _, _ = runText(t, env, cmd.Name())
	}
	if got["doctor"] == exitOther { // says what it found on this machine
		got["doctor"] = exitOK
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("exit codes (-want +got):\n%s", d)
	}
	if exit, out, errs := runText(t, env); exit != 2 || out != "" || !strings.Contains(errs, "no command given") {
		t.Errorf("shmctl alone: exit %d, stdout %q, stderr %q", exit, out, errs)
	}
}

func TestUsageErrors(t *testing.T) {
	env := []string{"ONECOPY_DIR=" + t.TempDir() + "/none"}
	for _, tt := range []struct {
		args string
		exit int
		want string
	}{
		{"lss", 2, "shmctl: unknown command \"lss\"\nshmctl: hint: did you mean \"ls\"?\n"},
		{"frobnicate", 2, "shmctl: unknown command \"frobnicate\"\nshmctl: hint: shmctl --help lists the commands\n"},
		{"help frobnicate", 2, "shmctl: unknown command \"frobnicate\"\nshmctl: hint: shmctl --help lists the commands\n"},
		{"help rollout statu", 2, "shmctl: unknown command \"statu\"\nshmctl: hint: did you mean \"status\"?\n"},
		{"help ls x", 2, "shmctl: unknown command \"x\"\nshmctl: hint: see shmctl ls --help\n"},
		{"completion pwershell", 2, "shmctl: unknown command \"pwershell\"\nshmctl: hint: did you mean \"powershell\"?\n"},
		{"ls --frob", 2, "shmctl: unknown flag: --frob\nshmctl: hint: shmctl ls --help lists the flags\n"},
		{"ls x", 2, "shmctl: ls takes no arguments, got 1 argument\nshmctl: hint: see shmctl ls --help\n"},
		{"ls -o xml", 2, "shmctl: output format \"xml\": want table, json, jsonl, name\n"},
		{"ls --color=red", 2, "shmctl: colour \"red\": want auto, always or never\n"},
		{"ls --timeout=-1s", 2, "shmctl: timeout -1s is negative\n"},
		{"load k", 2, "shmctl: load takes KEY PATH, got 1 argument\nshmctl: hint: see shmctl load --help\n"},
		{"load k p --mode 0777", 2, "shmctl: mode \"0777\": want 0700 or 0755\n"},
		{"load k p --on-change maybe", 2, "shmctl: --on-change \"maybe\": want error, replace or ignore\n"},
		{"load k p --slots -1", 2, "shmctl: --slots -1: want 8 to 32768\n"},
		{"load k p --slots 7", 2, "shmctl: --slots 7: want 8 to 32768\n"},
		{"load k p --threads -1", 2, "shmctl: --threads -1 is negative\n"},
		{"exec k cmd", 125, "shmctl: no -- before the command \"cmd\"\nshmctl: hint: the form is: shmctl exec KEY [--load PATH] -- COMMAND [ARG...]\n"},
		{"exec k --", 125, "shmctl: no command to run\nshmctl: hint: the form is: shmctl exec KEY [--load PATH] -- COMMAND [ARG...]\n"},
		{"exec a b -- cmd", 125, "shmctl: exec takes one KEY\nshmctl: hint: the form is: shmctl exec KEY [--load PATH] -- COMMAND [ARG...]\n"},
		{"exec -- -k -- ", 125, "shmctl: no command to run\nshmctl: hint: the form is: shmctl exec KEY [--load PATH] -- COMMAND [ARG...]\n"},
		{"exec -- -k cmd", 125, "shmctl: exec takes one KEY\nshmctl: hint: the form is: shmctl exec KEY [--load PATH] -- COMMAND [ARG...]\n"},
		{"exec --frob", 125, "shmctl: unknown flag: --frob\nshmctl: hint: shmctl exec --help lists the flags\n"},
		{"ls --frob -o json", 2, `{"error":{"code":"usage","message":"unknown flag: --frob","hint":"shmctl ls --help lists the flags"}}` + "\n"},
		{"ls -ojson x", 2, `{"error":{"code":"usage","message":"ls takes no arguments, got 1 argument","hint":"see shmctl ls --help"}}` + "\n"},
	} {
		exit, out, errs := runText(t, env, strings.Fields(tt.args)...)
		if exit != tt.exit || out != "" || errs != tt.want {
			t.Errorf("shmctl %s: exit %d, want %d; stdout %q; stderr:\n%swant:\n%s", tt.args, exit, tt.exit, out, errs, tt.want)
		}
	}
}

func TestEnvironmentSetsFlags(t *testing.T) {
	dir := "ONECOPY_DIR=" + t.TempDir() + "/none"
	for _, tt := range []struct {
		env  []string
		args string
		exit int
		want string // in stdout and stderr together
	}{
		{[]string{dir, "ONECOPY_OUTPUT=json"}, "version", 0, `"schema_version": 1`},
		{[]string{dir, "ONECOPY_OUTPUT=json"}, "version -o name", 0, "(devel)\n"},
		{[]string{dir, "ONECOPY_OUTPUT=name", "ONECOPY_OUTPUT=jsonl"}, "version", 0, `{"schema_version":1`},
		{[]string{dir, "ONECOPY_OUTPUT="}, "ls", 0, "KEY   STATE"},
		{[]string{dir, "ONECOPY_NO_HEADERS=true"}, "ls", 0, "there is no registry"},
		{[]string{dir, "ONECOPY_TIMEOUT=soon"}, "ls", 2, `ONECOPY_TIMEOUT="soon": `},
		{[]string{dir, "ONECOPY_OUTPUT=json"}, "ls --frob", 2, `{"error":{`},
		{[]string{dir, "ONECOPY_MODE=0777"}, "load k p", 2, `mode "0777"`},
	} {
		exit, out, errs := runText(t, tt.env, strings.Fields(tt.args)...)
		if exit != tt.exit || !strings.Contains(out+errs, tt.want) {
			t.Errorf("%q shmctl %s: exit %d, want %d and %q in:\n%s%s", tt.env[1:], tt.args, exit, tt.exit, tt.want, out, errs)
		}
	}
}

func TestColoured(t *testing.T) {
	for _, tt := range []struct {
		flag     string
		terminal bool
		env      string
		want     bool
	}{
		{"auto", true, "TERM=xterm", true},
		{"auto", false, "TERM=xterm", false},
		{"auto", true, "TERM=dumb", false},
		{"auto", true, "NO_COLOR=0", false},
		{"auto", true, "NO_COLOR=", true},
		{"auto", false, "CLICOLOR_FORCE=1", true},
		{"auto", false, "CLICOLOR_FORCE=0", false},
		{"auto", true, "NO_COLOR=1 CLICOLOR_FORCE=1", false},
		{"always", false, "NO_COLOR=1 TERM=dumb", true},
		{"never", true, "CLICOLOR_FORCE=1", false},
	} {
		a := newApp(nil, nil, nil, strings.Fields(tt.env))
		a.color = tt.flag
		if got := a.coloured(tt.terminal); got != tt.want {
			t.Errorf("--color=%s, terminal %v, %s: %v, want %v", tt.flag, tt.terminal, tt.env, got, tt.want)
		}
	}
}

func TestNearest(t *testing.T) {
	keys := []string{"bert-base", "bert-large", "whisper", "org/Llama-3-8B", "a", "b"}
	for word, want := range map[string][]string{
		"bert-bse":    {"bert-base"},
		"BERT-BASE":   {"bert-base", "bert-large"},
		"bert":        {"bert-base", "bert-large"},
		"llama":       {"org/Llama-3-8B"},
		"whsiper":     {"whisper"},
		"resnet50":    nil,
		"c":           nil,
		"":            nil,
		"bert-laaarg": {"bert-large"},
	} {
		if d := cmp.Diff(want, nearest(word, keys)); d != "" {
			t.Errorf("nearest(%q) (-want +got):\n%s", word, d)
		}
	}
}

func TestVisible(t *testing.T) {
	for in, want := range map[string]string{
		"plain, späť, 模型":    "plain, späť, 模型",
		"a\x1b[31mred":       `a\x1b[31mred`,
		"two\nlines":         `two\nlines`,
		"bad\xff":            `bad\ufffd`,
		"right\u202eleft":    `right\u202eleft`,
		"tab\tand nul\x00 .": `tab\tand nul\x00 .`,
	} {
		if got := visible(in); got != want {
			t.Errorf("visible(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestSizesAndAges(t *testing.T) {
	a := newApp(nil, nil, nil, nil)
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 90 << 20: "90 MiB", -2048: "-2.0 KiB"} {
		if got := a.size(n); got != want {
			t.Errorf("size(%d) = %q, want %q", n, got, want)
		}
	}
	a.rawBytes = true
	if got := a.size(90 << 20); got != "94371840" {
		t.Errorf("with --bytes: %q", got)
	}

	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	a.now = func() time.Time { return now }
	for d, want := range map[time.Duration]string{
		0: "0s", 119 * time.Second: "119s", 3 * time.Minute: "3m", 5 * time.Hour: "5h",
		72 * time.Hour: "3d", -time.Hour: "0s",
	} {
		if got := a.age(now.Add(-d)); got != want {
			t.Errorf("age(%v) = %q, want %q", d, got, want)
		}
	}
	if got := a.age(time.Time{}); got != "-" {
		t.Errorf("age of no time: %q", got)
	}
}

func TestProgressLines(t *testing.T) {
	var errs bytes.Buffer
	a := newApp(nil, nil, &errs, nil)
	now := time.Unix(0, 0)
	a.now = func() time.Time { return now }
	p := a.newProgress("bert")
	step := func(d time.Duration, done, total int64) {
		now = now.Add(d)
		p.update(done, total)
	}
	step(0, 0, 100<<20)
	step(4*time.Second, 10<<20, 100<<20)
	step(2*time.Second, 50<<20, 100<<20)
	step(time.Second, 60<<20, 100<<20)
	step(10*time.Second, 70<<20, 0)
	p.finish()
	want := "shmctl: loading bert: 50 MiB of 100 MiB (50 %)\nshmctl: loading bert: 70 MiB\n"
	if d := cmp.Diff(want, errs.String()); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}

	for _, quiet := range []*app{{quiet: true}, {output: formatJSON}, {output: formatJSONL}} {
		errs.Reset()
		quiet.stderr, quiet.now = &errs, a.now
		p := quiet.newProgress("bert")
		p.update(0, 10)
		now = now.Add(time.Hour)
		p.update(5, 10)
		p.finish()
		if errs.Len() > 0 {
			t.Errorf("quiet %v, output %q: wrote %q", quiet.quiet, quiet.output, errs.String())
		}
	}
}

func TestAsk(t *testing.T) {
	for answer, want := range map[string]bool{"y\n": true, "YES\n": true, " yes \nrest": true, "n\n": false, "\n": false, "": false, "yep\n": false} {
		var errs bytes.Buffer
		a := newApp(strings.NewReader(answer), nil, &errs, nil)
		if got := a.ask("remove bert?"); got != want {
			t.Errorf("answer %q: %v, want %v", answer, got, want)
		}
		if !strings.HasPrefix(errs.String(), "remove bert? [y/N] ") {
			t.Errorf("question: %q", errs.String())
		}
	}
}

func TestShortCommand(t *testing.T) {
	for in, want := range map[string]string{
		"":                                ".",
		"sleep 1000":                      "sleep 1000",
		"/usr/bin/python3 -m serve /a/b":  "python3 -m serve /a/b",
		"/bin/" + strings.Repeat("x", 50): strings.Repeat("x", 37) + "...",
	} {
		if got := shortCommand(in); got != want {
			t.Errorf("shortCommand(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestNameKey(t *testing.T) {
	for key, want := range map[string]string{
		"":           "shmctl rm KEY, then load KEY",
		"org/bert:1": "shmctl rm org/bert:1, then load org/bert:1",
		"a b":        "shmctl rm 'a b', then load 'a b'",
		"-k":         "shmctl rm -- -k, then load -- -k",
		"it's":       `shmctl rm 'it'\''s', then load 'it'\''s'`,
	} {
		if got := nameKey("shmctl rm KEY, then load KEY", key); got != want {
			t.Errorf("key %q: %q, want %q", key, got, want)
		}
	}
}

func TestContainer(t *testing.T) {
	const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for group, want := range map[string]string{
		"":                                      "-",
		"/":                                     "-",
		"/docker/" + id:                         "0123456789ab",
		"/system.slice/docker-" + id + ".scope": "docker-0123456789ab",
		"/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + id + ".scope": "cri-containerd-0123456789ab",
		"/system.slice/serve@1.service":                                       "serve@1",
		"/user.slice/" + id + id + id:                                         "0123456789ab0123456789ab01234...",
	} {
		if got := container(group); got != want {
			t.Errorf("%q: %q, want %q", group, got, want)
		}
	}
}
