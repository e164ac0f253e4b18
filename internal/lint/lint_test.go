// Package lint holds the rules of this code base that a compiler does not know.
// They are ordinary tests, so that a bare Go installation can check them:
//
//	go test ./internal/lint
//
// rules_test.go has the rules, self_test.go shows that each of them can fail.
package lint

import (
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/onecopy/onecopy/internal/crashpoint"
)

const module = "github.com/onecopy/onecopy"

// root is the module's folder, seen from this package.
const root = "../.."

// libraryDeps is everything that a program gets with the library.
var libraryDeps = []string{
	"github.com/cespare/xxhash/v2",
	"github.com/edsrzf/mmap-go",
	"github.com/gofrs/flock",
	"github.com/klauspost/cpuid/v2",
	"github.com/zeebo/xxh3",
	"golang.org/x/sys/unix",
}

// portable are the packages that must compile where sharing does not work.
var portable = []string{"internal/layout", "lockfile", "shm", "registry"}

func TestRules(t *testing.T) {
	files := sources(t)
	for _, r := range rules {
		t.Run(r.name, func(t *testing.T) {
			for _, problem := range r.check(files) {
				t.Error(problem)
			}
		})
	}
}

func TestCrashPoints(t *testing.T) {
	for _, problem := range checkCrashPoints(sources(t), crashpoint.Points) {
		t.Error(problem)
	}
	doc, err := os.ReadFile(filepath.Join(root, "docs", "CRASH.md"))
	if errors.Is(err, fs.ErrNotExist) {
		t.Skip("docs/CRASH.md does not exist yet")
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, problem := range checkCrashTable(string(doc), crashpoint.Points) {
		t.Error(problem)
	}
}

func TestLibraryDependencies(t *testing.T) {
	if !hasGoFiles(t, "registry") {
		t.Skip("registry has no files yet")
	}
	out := goCommand(t, "linux/amd64", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", "./registry")
	var got []string
	for _, p := range strings.Fields(out) {
		// Packages inside a dependency count as that dependency.
		i := slices.IndexFunc(libraryDeps, func(dep string) bool { return strings.HasPrefix(p, dep+"/") })
		switch {
		case p == module || strings.HasPrefix(p, module+"/"):
		case i >= 0:
			got = append(got, libraryDeps[i])
		default:
			got = append(got, p)
		}
	}
	slices.Sort(got)
	if diff := cmp.Diff(libraryDeps, slices.Compact(got)); diff != "" {
		t.Errorf("dependencies of ./registry (-want +got):\n%s", diff)
	}
}

func TestCompilesElsewhere(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the standard library for three more systems")
	}
	var args []string
	for _, dir := range portable {
		if hasGoFiles(t, dir) {
			args = append(args, "./"+dir)
		}
	}
	for _, system := range []string{"linux/arm64", "darwin/arm64", "windows/amd64"} {
		t.Run(strings.ReplaceAll(system, "/", "-"), func(t *testing.T) {
			goCommand(t, system, append([]string{"build"}, args...)...)
		})
	}
}

// goCommand runs the go command for a system and returns its output.
func goCommand(t *testing.T, system string, args ...string) string {
	t.Helper()
	goos, goarch, _ := strings.Cut(system, "/")
	cmd := exec.Command("go", args...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "GOOS="+goos, "GOARCH="+goarch, "CGO_ENABLED=0")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("the go command is not installed")
	}
	if err != nil {
		t.Fatalf("%s: go %s: %v\n%s", system, strings.Join(args, " "), err, stderr.String())
	}
	return string(out)
}

func hasGoFiles(t *testing.T, dir string) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root, dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	return len(files) > 0
}

// file is one Go file of the module.
type file struct {
	path      string // from the module's root, with slashes
	src       []byte
	ast       *ast.File
	fset      *token.FileSet
	test      bool
	generated bool
}

func (f *file) dir() string { return path.Dir(f.path) }

// parse returns the file whose text is src.
func parse(path string, src []byte) (*file, error) {
	fset := token.NewFileSet()
	tree, err := parser.ParseFile(fset, path, src, parser.ParseComments)
	if err != nil {
		return nil, err
	}
	return &file{
		path: path, src: src, ast: tree, fset: fset,
		test:      strings.HasSuffix(path, "_test.go"),
		generated: ast.IsGenerated(tree),
	}, nil
}

// sources returns all Go files of the module, for whatever system they are.
func sources(t *testing.T) []*file {
	t.Helper()
	var files []*file
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if p != root && notOurs(p, d.Name()) {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(p, ".go") {
			return nil
		}
		src, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		f, err := parse(filepath.ToSlash(rel), src)
		if err != nil {
			return err
		}
		files = append(files, f)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// notOurs says which folders the go command skips too, or belong to another
// module.
func notOurs(p, name string) bool {
	if name == "testdata" || name == "vendor" || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") {
		return true
	}
	_, err := os.Stat(filepath.Join(p, "go.mod"))
	return err == nil
}
