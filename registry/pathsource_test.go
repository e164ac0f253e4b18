package registry

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/onecopy/onecopy/internal/layout"
)

// The sizes around the borders of pages, huge pages, chunks and windows.
func TestFileSizes(t *testing.T) {
	const mib = 1 << 20
	r := newRegistry(t, nil)
	for _, n := range []int{
		0, 1, 4095, 4096, 4097, 2*mib - 1, 2 * mib, 2*mib + 1, 4*mib - 1, 4 * mib, 4*mib + 1,
		6*mib + 1, 64*mib - 1, 64 * mib, 64*mib + 1, 66*mib + 3,
	} {
		if n > 10*mib && testing.Short() {
			continue
		}
		key := fmt.Sprint("k/", n)
		want := randomBytes(3, n)
		m := mustLoad(t, r, key, fileSource(t, "w.bin", want))
		wantFiles(t, m, map[string][]byte{"w.bin": want})
		m.Close()
		if err := r.Remove(ctxb, key); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFolderTree(t *testing.T) {
	r := newRegistry(t, nil)
	want := map[string][]byte{
		"config.json": []byte("{}"), "model.safetensors": randomBytes(1, 5<<20), "onnx/model.onnx": randomBytes(2, 70_000),
		"1_Pooling/config.json": []byte("[]"), "empty": {}, "deep/er/and/deeper/x": []byte("x"), "name with blanks": []byte("b"),
		"日本語.txt": []byte("utf-8"), ".hidden": []byte("h"),
	}
	m := mustLoad(t, r, "org/model", folderSource(t, want))
	wantFiles(t, m, want)
}

func TestFolderWithSubFoldersWithoutFiles(t *testing.T) {
	r := newRegistry(t, nil)
	src := folderSource(t, map[string][]byte{"a": []byte("a")})
	if err := os.MkdirAll(filepath.Join(src.Path, "nothing/in/here"), 0o755); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, mustLoad(t, r, "k", src), map[string][]byte{"a": []byte("a")})
}

// The cache of Hugging Face: a folder of links into a folder of files that are
// named by their hashes.
func TestFolderOfLinkedFiles(t *testing.T) {
	r := newRegistry(t, nil)
	cache := t.TempDir()
	want := map[string][]byte{"config.json": []byte("{}"), "model.safetensors": randomBytes(1, 100_000), "onnx/model.onnx": randomBytes(2, 3000)}
	for i, name := range sortedNames(want) {
		blob := filepath.Join(cache, "blobs", fmt.Sprintf("%064d", i))
		writeFile(t, blob, want[name])
		link := filepath.Join(cache, "snapshots", "main", filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
			t.Fatal(err)
		}
		rel, err := filepath.Rel(filepath.Dir(link), blob)
		if err != nil {
			t.Fatal(err)
		}
		symlink(t, rel, link)
	}
	snapshot := filepath.Join(cache, "snapshots", "main")
	m := mustLoad(t, r, "k", Source{Path: snapshot})
	wantFiles(t, m, want)

	// A link to the folder itself is the folder.
	ref := filepath.Join(cache, "latest")
	symlink(t, snapshot, ref)
	again := mustLoad(t, r, "k", Source{Path: ref})
	if again.Generation() != m.Generation() {
		t.Error("the same folder through a link counts as another source")
	}

	// One file alone has the name of its link.
	one := mustLoad(t, r, "k/one", Source{Path: filepath.Join(snapshot, "config.json")})
	wantFiles(t, one, map[string][]byte{"config.json": []byte("{}")})
}

func symlink(t *testing.T, to, link string) {
	t.Helper()
	if err := os.Symlink(to, link); err != nil {
		t.Skipf("needs symbolic links: %v", err)
	}
}

func TestFolderOfManyFiles(t *testing.T) {
	r := newRegistry(t, nil)
	want := map[string][]byte{}
	for i := range 300 {
		want[fmt.Sprintf("layer-%d/part-%03d", i%7, i)] = randomBytes(byte(i), 10*i)
	}
	src := folderSource(t, want)
	wantFiles(t, mustLoad(t, r, "k", src), want)
	m := mustGet(t, r, "k")
	wantBytes(t, m, "layer-5/part-299", want["layer-5/part-299"])
}

func TestRefusedSources(t *testing.T) {
	r := newRegistry(t, nil)
	dir := func(fn func(dir string)) string {
		d := t.TempDir()
		writeFile(t, filepath.Join(d, "fine"), []byte("x"))
		fn(d)
		return d
	}
	for name, c := range map[string]struct {
		path string
		says string
	}{
		"missing":        {filepath.Join(t.TempDir(), "nothing"), "no such file"},
		"empty folder":   {t.TempDir(), "without files"},
		"link to folder": {dir(func(d string) { symlink(t, t.TempDir(), filepath.Join(d, "l")) }), "link to a folder"},
		"dangling link":  {dir(func(d string) { symlink(t, "nowhere", filepath.Join(d, "l")) }), "no such file"},
		"link in circle": {dir(func(d string) { symlink(t, "l", filepath.Join(d, "l")) }), "l"},
		"socket": {dir(func(d string) {
			l, err := net.Listen("unix", filepath.Join(d, "s"))
			if err != nil {
				t.Skip(err)
			}
			t.Cleanup(func() { l.Close() })
		}), "socket"},
		"device":             {os.DevNull, "device"},
		"backslash":          {dir(func(d string) { writeFile(t, filepath.Join(d, `a\b`), nil) }), "backslash"},
		"control character":  {dir(func(d string) { writeFile(t, filepath.Join(d, "a\nb"), nil) }), "control character"},
		"not UTF-8":          {dir(func(d string) { writeFile(t, filepath.Join(d, "a\xffb"), nil) }), "UTF-8"},
		"single, not UTF-8":  {dir(func(d string) { writeFile(t, filepath.Join(d, "a\xffb"), nil) }) + "/a\xffb", "UTF-8"},
		"too long a path":    {dir(func(d string) { deepFile(t, d, 11) }), "bytes, at most 1024"},
		"a file in the path": {dir(func(string) {}) + "/fine/x", "not a directory"},
		"only empty folders": {emptyTree(t), "without files"},
	} {
		if runtime.GOOS == "windows" {
			t.Skip("the names are those of Unix")
		}
		_, err := r.GetOrLoad(ctxb, "k", Source{Path: c.path})
		if err == nil {
			t.Errorf("%s: accepted", name)
			continue
		}
		wantErr(t, err, ErrSource)
		wantText(t, err, c.says)
	}
	if _, err := r.Get("k"); err == nil {
		t.Error("a refused source left a model")
	}
}

func emptyTree(t *testing.T) string {
	d := t.TempDir()
	if err := os.MkdirAll(filepath.Join(d, "a/b"), 0o755); err != nil {
		t.Fatal(err)
	}
	return d
}

// deepFile makes a file below n folders with names of 100 bytes. No path that
// long has to be written out for that.
func deepFile(t *testing.T, dir string, n int) {
	t.Helper()
	writeFile(t, filepath.Join(dir, strings.Repeat(strings.Repeat("d", 100)+"/", n), "x"), []byte("x"))
}

func TestLongestPathThatIsAllowed(t *testing.T) {
	r := newRegistry(t, nil)
	name := strings.Repeat(strings.Repeat("d", 100)+"/", 10) // 1010 bytes
	want := map[string][]byte{name + strings.Repeat("x", layout.MaxPath-len(name)): []byte("deep")}
	wantFiles(t, mustLoad(t, r, "k", folderSource(t, want)), want)
}

func TestUnreadableSource(t *testing.T) {
	if os.Geteuid() <= 0 {
		t.Skip("root reads everything")
	}
	r := newRegistry(t, nil)
	src := fileSource(t, "w.bin", []byte("x"))
	if err := os.Chmod(src.Path, 0); err != nil {
		t.Fatal(err)
	}
	_, err := r.GetOrLoad(ctxb, "k", src)
	wantErr(t, err, ErrSource, os.ErrPermission)
}

func TestSparseSource(t *testing.T) {
	r := newRegistry(t, nil)
	want := make([]byte, 10<<20+5)
	copy(want[6<<20:], "island")
	path := filepath.Join(t.TempDir(), "sparse")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(int64(len(want))); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("island"), 6<<20); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, mustLoad(t, r, "k", Source{Path: path}), map[string][]byte{"sparse": want})
}

func TestProgressOfAFolder(t *testing.T) {
	r := newRegistry(t, nil)
	src := folderSource(t, map[string][]byte{"a": randomBytes(1, 9<<20), "b": randomBytes(2, 100), "c": {}})
	var last, total atomic.Int64
	src.Progress = func(done, all int64) {
		for old := last.Load(); done > old && !last.CompareAndSwap(old, done); old = last.Load() {
		}
		total.Store(all)
	}
	mustLoad(t, r, "k", src)
	if want := int64(9<<20 + 100); last.Load() != want || total.Load() != want {
		t.Errorf("progress ended at %d of %d, want %d", last.Load(), total.Load(), want)
	}
}

func TestRelativePathOfASource(t *testing.T) {
	r := newRegistry(t, nil)
	src := fileSource(t, "w.bin", []byte("x"))
	m := mustLoad(t, r, "k", src)
	t.Chdir(filepath.Dir(src.Path))
	again := mustLoad(t, r, "k", Source{Path: "w.bin"})
	if again.Generation() != m.Generation() {
		t.Error("the same file by a relative path counts as another source")
	}
}
