package layout

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestValidKey(t *testing.T) {
	for _, key := range []string{
		"a", " ", ".", "..", "../../etc/passwd", "/", "//", "a b", "a\\b", `"`, "%00", "\u2028", "\ufffd",
		"meta-llama/Llama-3.1-8B@main", "模型/🤗", strings.Repeat("k", 255), strings.Repeat("é", 127),
	} {
		if err := ValidKey(key); err != nil {
			t.Errorf("%q: %v", key, err)
		}
	}
	for _, key := range []string{
		"", "\x00", "a\x00b", "a\n", "\ta", "\x1b[2J", "\x7f", "a\u0085", "\u009b31m",
		"\xff", "a\xc3", "\xed\xa0\x80", "\xc0\x80", strings.Repeat("k", 256), strings.Repeat("é", 128), strings.Repeat("k", 1_000_000),
	} {
		err := ValidKey(key)
		if !errors.Is(err, ErrKey) {
			t.Errorf("%q: %v, want ErrKey", clip(key), err)
		} else if len(err.Error()) > 200 || strings.ContainsAny(err.Error(), "\x00\n\x1b\xff") {
			t.Errorf("%q: the error repeats what is wrong with it: %q", clip(key), err)
		}
	}
}

func TestValidPath(t *testing.T) {
	for _, p := range []string{
		"a", "model.safetensors", "onnx/model.onnx", "1_Pooling/config.json", ".gitattributes", "...", "..a", "a..", "a/.b/..c",
		" ", "a b", "-rf", "~", "*", "a:b", "C:", "模型.bin", strings.Repeat("a", 255),
		strings.Repeat(strings.Repeat("a", 255)+"/", 3) + strings.Repeat("a", 256-1),
		strings.Repeat("a/", 511) + "aa",
	} {
		if err := ValidPath(p); err != nil {
			t.Errorf("%q: %v", clip(p), err)
		}
	}
	for _, p := range []string{
		"", ".", "..", "/", "//", "/etc/passwd", "//host/share", "../a", "a/..", "a/../b", "./a", "a/.", "a/./b", "a//b", "a/", "a/b/",
		`a\b`, `..\a`, `C:\a`, "a\x00", "a\x00/../b", "a\nb", "\x1b[2J", "a\u0085", "\xff", "a/\xc0\xae\xc0\xae/b",
		strings.Repeat("a", 256), "b/" + strings.Repeat("a", 256) + "/c", strings.Repeat("a/", 512) + "a", strings.Repeat("../", 1000),
		strings.Repeat("x", 1_000_000),
	} {
		err := ValidPath(p)
		if !errors.Is(err, ErrPath) {
			t.Errorf("%q: %v, want ErrPath", clip(p), err)
		} else if len(err.Error()) > 600 || strings.ContainsAny(err.Error(), "\x00\n\x1b\xff") {
			t.Errorf("%q: the error repeats what is wrong with it: %q", clip(p), err)
		}
	}
}

func TestValidPaths(t *testing.T) {
	for _, c := range []struct {
		ok    bool
		paths []string
	}{
		{true, []string{"a"}},
		{true, []string{"a", "b"}},
		{true, []string{"a/b", "a/c", "a/d/e", "a/d/f", "b"}},
		{true, []string{"a", "ab", "a.b", "a-b/c", "A"}},
		{true, []string{"a/b/c", "a/b2", "a/b/d"}},
		{false, []string{".."}},
		{false, []string{"a", "../b"}},
		{false, []string{"a", "a"}},
		{false, []string{"a/b", "c", "a/b"}},
		{false, []string{"a", "a/b"}},
		{false, []string{"a/b", "a"}},
		{false, []string{"a/b/c/d", "a/b"}},
		{false, []string{"a/b", "a/b/c/d"}},
		{false, []string{"a/b/c", "a/x", "a"}},
		{false, []string{"a/x", "a/b/c", "a/b/c/d/e"}},
	} {
		var files []ManifestFile
		for _, p := range c.paths {
			files = append(files, ManifestFile{Path: p})
		}
		if err := ValidPaths(files); (err == nil) != c.ok || err != nil && !errors.Is(err, ErrPath) {
			t.Errorf("%q: %v, want ok %v", c.paths, err, c.ok)
		}
	}
}

func TestSafeName(t *testing.T) {
	for key, want := range map[string]string{
		"a":                              "a",
		"org/model":                      "model",
		"org/model/":                     "model",
		"org//model//":                   "model",
		"model@v1.2_3-x":                 "model-v1.2_3-x",
		"/":                              "-",
		"///":                            "-",
		".":                              "_",
		"..":                             "_.",
		"a/..":                           "_.",
		"../../etc/passwd":               "passwd",
		".hidden":                        "_hidden",
		"a/.hidden":                      "_hidden",
		`C:\models\x`:                    "C--models-x",
		"a b\x00c\nd":                    "a-b-c-d",
		"é":                              "--",
		"\xff":                           "-",
		strings.Repeat("x", 255):         strings.Repeat("x", 100),
		strings.Repeat("x", 99) + "é":    strings.Repeat("x", 99) + "-",
		"":                               "_",
		"org/" + strings.Repeat("é", 60): strings.Repeat("-", 100),
	} {
		got := SafeName(key)
		if got != want {
			t.Errorf("SafeName(%q) = %q, want %q", key, got, want)
		}
		if err := ValidPath(got); err != nil || strings.Contains(got, "/") {
			t.Errorf("SafeName(%q) = %q is no file name: %v", key, got, err)
		}
	}
}

func TestGenNames(t *testing.T) {
	for _, c := range []struct {
		name       string
		epoch, gen uint64
		ext        string
	}{
		{"0000000000000001-1", 1, 1, ""},
		{"0123456789abcdef-42.manifest", 0x0123456789abcdef, 42, ManifestExt},
		{"ffffffffffffffff-72057594037927935.digests", 1<<64 - 1, MaxGen, DigestsExt},
	} {
		if got := GenName(c.epoch, c.gen) + c.ext; got != c.name {
			t.Errorf("GenName = %q, want %q", got, c.name)
		}
		epoch, gen, ext, ok := ParseGenName(c.name)
		if !ok || epoch != c.epoch || gen != c.gen || ext != c.ext {
			t.Errorf("ParseGenName(%q) = %x, %d, %q, %v", c.name, epoch, gen, ext, ok)
		}
	}
	for _, name := range []string{
		"", "-", "-1", "0123456789abcdef", "0123456789abcdef-", "0123456789abcdef-.manifest", "0123456789abcde-1", "0123456789abcdef0-1",
		"0123456789ABCDEF-1", "0123456789abcdeg-1", "0x23456789abcdef-1", "+123456789abcdef-1",
		"0123456789abcdef-01", "0123456789abcdef-+1", "0123456789abcdef--1", "0123456789abcdef-1_0", "0123456789abcdef-1 ", " 0123456789abcdef-1",
		"0123456789abcdef-72057594037927936", "0123456789abcdef-99999999999999999999", "0123456789abcdef-1.manifests", "0123456789abcdef-1.manifest.digests",
		"0123456789abcdef-1.digests.manifest", "0123456789abcdef-1.MANIFEST", "0123456789abcdef-1/x", "0123456789abcdef-1\n", "0123456789abcdef-١",
		"registry", ".manifest", "..", strings.Repeat("0", 1_000_000) + "-1",
	} {
		if epoch, gen, ext, ok := ParseGenName(name); ok || epoch != 0 || gen != 0 || ext != "" {
			t.Errorf("ParseGenName(%q) = %x, %d, %q, %v", clip(name), epoch, gen, ext, ok)
		}
	}
}

// TestManyPaths: the longest list of the deepest paths is checked in one pass.
func TestManyPaths(t *testing.T) {
	var files []ManifestFile
	for i := range MaxFiles {
		files = append(files, ManifestFile{Path: fmt.Sprintf("%s%05d", strings.Repeat("d/", 500), i)})
	}
	if err := ValidPaths(files); err != nil {
		t.Error(err)
	}
	files[MaxFiles-1].Path = strings.Repeat("d/", 249) + "d"
	if err := ValidPaths(files); !errors.Is(err, ErrPath) {
		t.Errorf("%v, want ErrPath: a file where a folder is", err)
	}
}
