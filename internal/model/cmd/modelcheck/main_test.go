package main

import (
	"regexp"
	"strings"
	"testing"
)

func TestCheck(t *testing.T) {
	for _, c := range []struct {
		name string
		o    options
		want []string // regular expressions that the report matches
		err  string
	}{
		{
			name: "holds",
			o:    options{only: "never removed", limit: 1000},
			want: []string{`(?m)^== lock file`, `(?m)^never removed +HOLDS +165 states +531 steps \(282 faults\) .*s$`, `1 configurations hold \(165 states`},
		},
		{
			name: "broken as it must be",
			o:    options{only: "no re-check", short: true, trace: true, limit: 1000},
			want: []string{`BROKEN`, `SAFETY: two processes .* \(after 9 steps\)`, `(?m)^ +p\d unlink lock file   path=`, `1 are broken as they must be`},
		},
		{
			name: "trace with step names",
			o:    options{only: "READY before the payload", trace: true, limit: 10_000},
			want: []string{`p\d load.claim: CAS LOADING   reg1`},
		},
		{
			name: "limit reached",
			o:    options{only: "never removed", limit: 10},
			want: []string{`TRUNCATED .* \*\*\* UNEXPECTED \*\*\*`},
			err:  "1 unexpected",
		},
		{name: "no such name", o: options{only: "no such configuration"}, err: "no configuration"},
		{name: "big ones only on request", o: options{only: "3 getters+evictor"}, err: "no configuration"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out strings.Builder
			err := check(&out, c.o)
			if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
				t.Errorf("error %v, want %q", err, c.err)
			}
			for _, want := range c.want {
				if !regexp.MustCompile(want).MatchString(out.String()) {
					t.Errorf("the report lacks %q:\n%s", want, out.String())
				}
			}
		})
	}
}
