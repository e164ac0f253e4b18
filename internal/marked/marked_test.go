package marked

import (
	"os"
	"path/filepath"
	"testing"
)

func TestReplace(t *testing.T) {
	page := filepath.Join(t.TempDir(), "page.md")
	const p = Part("x")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(page, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, bad := range []string{"", p.Begin(), p.End(), p.End() + p.Begin()} {
		write(bad)
		if err := p.Replace(page, "new"); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
	write("above\n" + p.Begin() + "\nold\n" + p.End() + "\nbelow\n")
	for _, text := range []string{"", "new\n", "newer\n"} {
		if err := p.Replace(page, text); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(page)
	if want := "above\n" + p.Begin() + "\nnewer\n" + p.End() + "\nbelow\n"; err != nil || string(b) != want {
		t.Errorf("%q, %v; want %q", b, err, want)
	}
}
