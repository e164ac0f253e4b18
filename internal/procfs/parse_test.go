package procfs

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
)

func TestEachLine(t *testing.T) {
	const text = "one\n\nthree is longer\nno newline"
	want := []string{"one", "", "three is longer", "no newline"}
	for name, r := range map[string]io.Reader{
		"at once":       strings.NewReader(text),
		"byte by byte":  iotest.OneByteReader(strings.NewReader(text)),
		"end with data": iotest.DataErrReader(strings.NewReader(text)),
	} {
		var got []string
		err := eachLine(r, make([]byte, 16), func(line []byte) { got = append(got, string(line)) })
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%s: %v (-want +got):\n%s", name, err, diff)
		}
	}
}

func TestEachLineErrors(t *testing.T) {
	broken := errors.New("broken")
	for name, c := range map[string]struct {
		r    io.Reader
		want error
	}{
		"long line":  {strings.NewReader("short\n" + strings.Repeat("x", 40) + "\n"), errLineTooLong},
		"read error": {io.MultiReader(strings.NewReader("short\npart"), iotest.ErrReader(broken)), broken},
	} {
		var got []string
		err := eachLine(c.r, make([]byte, 16), func(line []byte) { got = append(got, string(line)) })
		if err != c.want || len(got) != 1 || got[0] != "short" {
			t.Errorf("%s: %q, %v, want the first line and %v", name, got, err, c.want)
		}
	}
}

func TestParseUint(t *testing.T) {
	for _, c := range []struct {
		in   string
		base uint64
		want uint64
		ok   bool
	}{
		{"0", 10, 0, true},
		{"18446744073709551615", 10, 1<<64 - 1, true},
		{"18446744073709551616", 10, 0, false},
		{"ffffffffffffffff", 16, 1<<64 - 1, true},
		{"10000000000000000", 16, 0, false},
		{"", 10, 0, false},
		{"12a", 10, 0, false},
		{"+1", 10, 0, false},
		{"-1", 10, 0, false},
		{"FF", 16, 0, false},
	} {
		got, ok := parseUint([]byte(c.in), c.base)
		if ok != c.ok || ok && got != c.want {
			t.Errorf("parseUint(%q, %d) = %d, %t, want %d, %t", c.in, c.base, got, ok, c.want, c.ok)
		}
	}
}

func TestParseStatm(t *testing.T) {
	for text, want := range map[string]struct {
		size, shared uint64
		ok           bool
	}{
		"5120 300 210 11 0 400 0\n": {5120, 210, true},
		"1 2 3":                     {1, 3, true},
		"5120 300":                  {5120, 0, false},
		"x 300 210 11":              {0, 210, false},
		"-1 300 210 11":             {0, 210, false},
		"":                          {},
	} {
		if size, shared, ok := parseStatm([]byte(text)); size != want.size || shared != want.shared || ok != want.ok {
			t.Errorf("%q: %d, %d, %v, want %+v", text, size, shared, ok, want)
		}
	}
}

func TestCommandText(t *testing.T) {
	for _, c := range []struct{ cmdline, comm, want string }{
		{"sleep\x0060\x00", "sleep", "sleep 60"},
		{"", "kthreadd", "[kthreadd]"},
		{"\x00\x00\x00", "a) (b", "[a) (b]"},
		{"  \x00", "padded", "[padded]"},
		{"sshd: user [priv]\x00\x00\x00", "sshd", "sshd: user [priv]"},
		{"x\x1b[31m\x00\u009b2J\x00\u202eoff", "x", "x?[31m ?2J ?off"},
		{"caf\u00e9 \u6a21\u578b\xff", "x", "caf\u00e9 \u6a21\u578b?"},
		{"", "new\nline\x1b", "[new line?]"},
	} {
		if got := commandText([]byte(c.cmdline), []byte(c.comm)); got != c.want {
			t.Errorf("commandText(%q, %q) = %q, want %q", c.cmdline, c.comm, got, c.want)
		}
	}
	long := commandText(bytes.Repeat([]byte("\u6a21"), 4096), nil)
	if len(long) > maxCommand {
		t.Errorf("a long command line keeps %d bytes, want at most %d", len(long), maxCommand)
	}
}

func TestValidBootID(t *testing.T) {
	for id, want := range map[string]bool{
		"6fe3a9a4-1f2e-4c55-8a8d-0123456789ab":  true,
		"6FE3A9A4-1F2E-4C55-8A8D-0123456789AB":  false,
		"6fe3a9a4-1f2e-4c55-8a8d-0123456789ab0": false,
		"6fe3a9a41f2e-4c55-8a8d-0123456789abcd": false,
		"":                                      false,
	} {
		if got := validBootID(id); got != want {
			t.Errorf("validBootID(%q) = %t, want %t", id, got, want)
		}
	}
}

// A line that cannot be understood must not lend its numbers to another file.
func TestResidencyOfAnUnparsableEntry(t *testing.T) {
	file := FileID{Dev: makeDev(0, 0x19), Inode: 5}
	r := residencies{want: map[FileID]struct{}{file: {}}, sum: make(map[FileID]*Residency)}
	for _, line := range []string{
		"Rss: 1 kB", // before any entry
		"7f0000000000-7f0000001000 r--s 00000000 00:19 5 /dev/shm/x",
		"Rss: 4 kB",
		"Rss: 9223372036854775807 kB",
		"Rss: -4 kB",
		"7f0000002000-7f0000003000 r--s 00000000 00:19 what",
		"Rss: 400 kB",
	} {
		r.line([]byte(line))
	}
	want := map[FileID]Residency{file: {RSS: 4096}}
	if diff := cmp.Diff(want, r.result()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
