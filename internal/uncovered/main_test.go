package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const source = `package p

import "errors"

type box[T any] struct{}

func (b *box[T]) open(ok bool) error {
	if !ok {
		return errors.New("shut")
	}
	return nil
}

func twice(ok bool) (n int, err error) {
	each := func() error {
		return errors.New("each")
	}
	if !ok {
		return
	}
	return 0, each()
}

func number() int { return 1 }
`

// The profile of two builds: what one of them did not run, the other did.
const profile = `mode: atomic
example.org/m/p/p.go:7.38,8.9 1 3
example.org/m/p/p.go:8.9,10.3 1 0
example.org/m/p/p.go:11.2,11.12 1 3
example.org/m/p/p.go:14.40,15.23 1 1
example.org/m/p/p.go:15.23,17.3 1 0
example.org/m/p/p.go:18.2,18.9 1 1
example.org/m/p/p.go:18.9,20.3 1 0
example.org/m/p/p.go:21.2,21.18 1 1
example.org/m/p/p.go:24.19,24.29 1 0
example.org/m/p/p.go:15.23,17.3 1 2
`

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestRun(t *testing.T) {
	all := "# why\np/p.go:box.open:1: no lock\np/p.go:twice:1: luck\n"
	for name, c := range map[string]struct {
		profile, reasons string
		min              float64
		want             []string // of the output
		err              string
	}{
		"all justified":   {profile, all, 60, []string{"p                   66.67% of 9 statements\n"}, ""},
		"too little":      {profile, all, 70, []string{"66.67% of 9 statements  below 70%"}, "1 problems"},
		"none justified":  {profile, "", 0, []string{"p/p.go:box.open: 1 error returns are not reached, 0 justified:\n\tp/p.go:9: return errors.New(\"shut\")\n", "p/p.go:19: return\n"}, "2 problems"},
		"reached by now":  {strings.Replace(profile, "8.9,10.3 1 0", "8.9,10.3 1 1", 1), all, 0, []string{"note: p/p.go:box.open: 1 error returns are justified, 0 are not reached"}, ""},
		"no such thing":   {profile, all + "p/p.go:gone:1: gone\n", 0, []string{"p/p.go:gone: justified, but there is no such function"}, "1 problems"},
		"no reason":       {profile, "p/p.go:twice:1: \n", 0, nil, "want FILE"},
		"no number":       {profile, "p/p.go:twice: luck\n", 0, nil, "want FILE"},
		"twice":           {profile, all + all, 0, nil, "twice"},
		"not a profile":   {"hello\n", "", 0, nil, "no line of a profile"},
		"another module":  {"example.com/p.go:1.1,2.2 1 1\n", "", 0, nil, "is not of module"},
		"nothing in it":   {"mode: atomic\n", "", 0, nil, "nothing was measured"},
		"a missing file":  {"example.org/m/p/q.go:1.1,2.2 1 1\n", "", 0, nil, "q.go"},
		"cut in a number": {"example.org/m/p/p.go:1.1,2.2 1\n", "", 0, nil, "no line of a profile"},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			o := options{min: c.min, root: root, profile: filepath.Join(root, "profile"), justified: filepath.Join(root, "justified"), list: filepath.Join(root, "list")}
			write(t, filepath.Join(root, "go.mod"), "module example.org/m\n")
			write(t, filepath.Join(root, "p", "p.go"), source)
			write(t, o.profile, c.profile)
			write(t, o.justified, c.reasons)
			var out strings.Builder
			err := run(&out, o)
			if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
				t.Errorf("error %v, want %q", err, c.err)
			}
			for _, want := range c.want {
				if !strings.Contains(out.String(), want) {
					t.Errorf("the output lacks %q:\n%s", want, out.String())
				}
			}
			if c.err != "" {
				return
			}
			list, err := os.ReadFile(o.list)
			if err != nil || !strings.Contains(string(list), "p/p.go:24-24: func number() int { return 1 }\n") {
				t.Errorf("list: %s, %v", list, err)
			}
		})
	}
}
