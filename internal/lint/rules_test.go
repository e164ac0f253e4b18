package lint

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/format"
	"go/token"
	"path"
	"slices"
	"strconv"
	"strings"
)

// rule is a rule that each file keeps or breaks by itself.
type rule struct {
	name  string
	check func([]*file) []string
}

var rules = []rule{
	{"imports", checkImports},
	{"unsafe", checkUnsafe},
	{"calls", checkCalls},
	{"names", checkNames},
	{"length", checkLength},
	{"format", checkFormat},
}

// problem starts with the place, as compilers write it.
func problem(f *file, pos token.Pos, text string, args ...any) string {
	return fmt.Sprintf("%s:%d: %s", f.path, f.fset.Position(pos).Line, fmt.Sprintf(text, args...))
}

// under says whether dir is one of the folders or lies below one.
func under(dir string, folders ...string) bool {
	return slices.ContainsFunc(folders, func(f string) bool { return dir == f || strings.HasPrefix(dir, f+"/") })
}

// A package may import the standard library and what its layer lists. Layers
// below a folder are found by the longest name.
//
//	cmd/shmctl, bench, demo -> registry -> shm -> lockfile
//	                           registry, shm, cmd/shmctl -> internal/layout
type layer struct {
	folder   string
	own      []string // packages of this module
	others   []string // packages of other modules; nil = any, which is for programs
	standard []string // packages of the standard library that are forbidden
}

const (
	xsys   = "golang.org/x/sys/unix"
	xxhash = "github.com/cespare/xxhash/v2"
	xxh3   = "github.com/zeebo/xxh3"
	mmap   = "github.com/edsrzf/mmap-go"
	gofrs  = "github.com/gofrs/flock"
)

var helpers = []string{"internal/crashpoint", "internal/digest", "internal/invariants", "internal/procfs"}

var layers = []layer{
	{folder: "lockfile", others: []string{gofrs, xsys}},
	{folder: "shm", own: append([]string{"lockfile", "internal/layout"}, helpers...), others: []string{mmap, xsys}},
	{folder: "registry", own: append([]string{"shm", "lockfile", "internal/layout"}, helpers...),
		others: []string{mmap, xsys, xxhash}},
	// The layout is bytes: no I/O and no system call (and no clock: checkCalls).
	{folder: "internal/layout", others: []string{xxhash}, standard: []string{"os", "syscall", "net", "io/ioutil", "path/filepath"}},
	{folder: "internal/layout/gen", own: []string{"internal/layout"}, others: []string{}},
	{folder: "internal/digest", others: []string{xxh3}},
	{folder: "internal/model/cmd", own: []string{"internal/model"}, others: []string{}},
	// Whatever else is internal helps, and knows nothing of the product.
	{folder: "internal", others: []string{xsys}},
	{folder: "internal/doctor", own: []string{"shm", "internal/layout"}, others: []string{xsys}},
	// Programs that try the whole, with an eye of their own on the bytes.
	{folder: "internal/torture", own: []string{"registry", "internal/audit", "internal/layout", "internal/crashpoint", "internal/marked"}, others: []string{xsys}},
	{folder: "internal/campaign", own: []string{"registry", "internal/layout"}, others: []string{xsys}},
	// An auditor shares the layout with what it audits, and no code that recovers.
	{folder: "internal/audit", own: []string{"internal/layout", "internal/procfs"}, others: []string{xsys}},
	{folder: "internal/scan", own: []string{"internal/procfs"}, others: []string{xsys}},
	{folder: "metrics", own: []string{"registry"}},
	{folder: "cmd", own: []string{"registry", "metrics", "internal/layout", "internal/doctor", "internal/scan"}},
	{folder: "bench", own: []string{"registry", "internal/marked", "internal/proctest"}},
	{folder: "demo", own: []string{"registry"}},
	{folder: "examples", own: []string{"registry"}},
}

func layerOf(dir string) *layer {
	var found *layer
	for i, l := range layers {
		if under(dir, l.folder) && (found == nil || len(l.folder) > len(found.folder)) {
			found = &layers[i]
		}
	}
	return found
}

// checkImports holds the import direction. Tests may import what they like, but
// only they and bench may import the test helper.
func checkImports(files []*file) (problems []string) {
	for _, f := range files {
		if f.test {
			continue
		}
		l := layerOf(f.dir())
		if l == nil {
			problems = append(problems, problem(f, f.ast.Package, "no layer is defined for this folder"))
			continue
		}
		for _, spec := range f.ast.Imports {
			p, _ := strconv.Unquote(spec.Path.Value)
			if !l.allows(f.dir(), p) {
				problems = append(problems, problem(f, spec.Pos(), "%s may not import %s", l.folder, p))
			}
		}
	}
	return problems
}

func (l *layer) allows(dir, p string) bool {
	first, _, _ := strings.Cut(p, "/")
	switch own, ok := strings.CutPrefix(p, module+"/"); {
	case p == "C" || p == module:
		return false
	case ok:
		return slices.Contains(l.own, own) || (under(own, l.folder) && under(own, dir)) // its own sub-packages
	case strings.Contains(first, "."):
		return l.others == nil || slices.Contains(l.others, p)
	default:
		return !under(p, l.standard...)
	}
}

// unsafeFiles are the only places that turn bytes into words and addresses.
var unsafeFiles = []string{"internal/layout/view.go", "shm/map_linux.go"}

func checkUnsafe(files []*file) (problems []string) {
	for _, f := range files {
		if slices.Contains(unsafeFiles, f.path) || under(f.dir(), "internal/model", "internal/torture") {
			continue
		}
		for _, spec := range f.ast.Imports {
			if spec.Path.Value == `"unsafe"` || spec.Path.Value == `"C"` {
				problems = append(problems, problem(f, spec.Pos(), "import %s is allowed in %v only", spec.Path.Value, unsafeFiles))
			}
		}
	}
	return problems
}

// banned are names that must not be used in some folders.
type banned struct {
	why    string
	where  func(f *file) bool
	names  map[string][]string // by import path; "*" is the import itself
	prefix bool                // names are prefixes
}

// program says whether a folder holds programs or what only tests run. Those may
// print, exit and read the environment; the library may not.
func program(dir string) bool {
	return path.Base(dir) == "gen" ||
		under(dir, "cmd", "bench", "demo", "examples", "internal/campaign", "internal/torture", "internal/proctest", "internal/faultinject", "internal/crashpoint", "internal/model", "internal/uncovered")
}

func library(f *file) bool { return !f.test && !program(f.dir()) }

var bans = []banned{
	{
		why:   "the library prints nothing, never exits and handles no signals",
		where: library,
		names: map[string][]string{
			"log":       {"*"},
			"os/signal": {"*"},
			"os/exec":   {"*"},
			"testing":   {"*"},
			"fmt":       {"Print", "Printf", "Println"},
			"os":        {"Exit", "Stdin", "Stdout", "Stderr"},
			"syscall":   {"Exit", "Stdin", "Stdout", "Stderr"},
			xsys:        {"Exit", "Stdin", "Stdout", "Stderr"},
			"log/slog": {"Default", "SetDefault", "Log", "Debug", "Info", "Warn", "Error",
				"DebugContext", "InfoContext", "WarnContext", "ErrorContext"},
			"builtin": {"print", "println"},
		},
	},
	{
		why:   "the library reads no environment; registry/dir.go does when it is called",
		where: func(f *file) bool { return library(f) && f.path != "registry/dir.go" },
		names: map[string][]string{
			"os": {"Getenv", "LookupEnv", "Environ", "ExpandEnv", "Setenv", "Unsetenv", "Clearenv",
				"TempDir", "UserHomeDir", "UserCacheDir", "UserConfigDir"},
			"syscall": {"Getenv", "Setenv", "Environ"},
			xsys:      {"Getenv", "Setenv", "Environ"},
		},
	},
	{
		why:   "the layout reads no clock",
		where: func(f *file) bool { return !f.test && f.dir() == "internal/layout" },
		names: map[string][]string{"time": {"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker"}},
	},
	{
		why:   "lock files are never removed or replaced",
		where: func(f *file) bool { return !f.test && f.dir() == "lockfile" },
		names: map[string][]string{
			"os":      {"Remove", "RemoveAll", "Rename", "Truncate"},
			"syscall": {"Unlink", "Rename"},
			xsys:      {"Unlink", "Unlinkat", "Rename", "Renameat", "Renameat2"},
		},
	},
	{
		why:    "POSIX record locks end when any descriptor of the file is closed; a lease is released by munmap, not LOCK_UN",
		where:  library,
		names:  map[string][]string{xsys: {"F_SETLK", "F_OFD_SETLK", "LOCK_UN"}, "syscall": {"F_SETLK", "LOCK_UN"}},
		prefix: true,
	},
}

func checkCalls(files []*file) (problems []string) {
	for _, f := range files {
		for _, b := range bans {
			if b.where(f) {
				problems = append(problems, b.check(f)...)
			}
		}
	}
	return problems
}

func (b *banned) check(f *file) (problems []string) {
	local := map[string]string{} // name in this file -> import path
	for _, spec := range f.ast.Imports {
		p, _ := strconv.Unquote(spec.Path.Value)
		if slices.Contains(b.names[p], "*") {
			problems = append(problems, problem(f, spec.Pos(), "import of %s: %s", p, b.why))
		}
		name := path.Base(p)
		if spec.Name != nil {
			name = spec.Name.Name
		}
		local[name] = p
	}
	ast.Inspect(f.ast, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.CallExpr:
			id, ok := n.Fun.(*ast.Ident)
			if ok && id.Obj == nil && b.has("builtin", id.Name) {
				problems = append(problems, problem(f, n.Pos(), "%s: %s", id.Name, b.why))
			}
		case *ast.SelectorExpr:
			// An identifier that the file does not declare is an import.
			id, ok := n.X.(*ast.Ident)
			if ok && id.Obj == nil && b.has(local[id.Name], n.Sel.Name) {
				problems = append(problems, problem(f, n.Pos(), "%s.%s: %s", id.Name, n.Sel.Name, b.why))
			}
		}
		return true
	})
	return problems
}

func (b *banned) has(importPath, name string) bool {
	return slices.ContainsFunc(b.names[importPath], func(s string) bool {
		return s == name || b.prefix && strings.HasPrefix(name, s)
	})
}

// emptyNames say nothing about a package and attract everything.
var emptyNames = []string{"common", "helper", "helpers", "misc", "shared", "types", "util", "utils"}

func checkNames(files []*file) (problems []string) {
	for _, f := range files {
		for _, name := range []string{strings.TrimSuffix(f.ast.Name.Name, "_test"), path.Base(f.dir())} {
			if slices.Contains(emptyNames, name) {
				problems = append(problems, problem(f, f.ast.Package, "a package may not be called %s", name))
				break
			}
		}
	}
	return problems
}

// maxLines is more than any file here should need.
const maxLines = 900

func checkLength(files []*file) (problems []string) {
	for _, f := range files {
		if n := bytes.Count(f.src, []byte("\n")); n > maxLines && !f.test && !f.generated {
			problems = append(problems, fmt.Sprintf("%s: %d lines; more than %d are too many for one file", f.path, n, maxLines))
		}
	}
	return problems
}

func checkFormat(files []*file) (problems []string) {
	for _, f := range files {
		if out, err := format.Source(f.src); err != nil || !bytes.Equal(out, f.src) {
			problems = append(problems, f.path+": not formatted by gofmt")
		}
	}
	return problems
}

// checkCrashPoints compares the names in the code with the list.
//
// A name may be computed, as in Hit(step + ".rmdir") or Hit(step). Then a listed
// name counts as used if the same package has it, or its first part, as a string
// literal. Whether a computed name is listed is checked by Hit itself in builds
// with the tag.
func checkCrashPoints(files []*file, points []string) (problems []string) {
	used := map[string]bool{}
	suffixes := map[string][]string{}        // by folder: ends of computed names, "" = all of it
	literals := map[string]map[string]bool{} // by folder
	for _, f := range files {
		if f.test || f.dir() == "internal/crashpoint" {
			continue
		}
		dir := f.dir()
		if literals[dir] == nil {
			literals[dir] = map[string]bool{}
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			if s, ok := stringLiteral(n); ok {
				literals[dir][s] = true
			}
			call, ok := n.(*ast.CallExpr)
			if !ok || !isHit(call) {
				return true
			}
			arg := call.Args[0]
			name, isLiteral := stringLiteral(arg)
			switch sum, isSum := arg.(*ast.BinaryExpr); {
			case isLiteral && slices.Contains(points, name):
				used[name] = true
			case isLiteral:
				problems = append(problems, problem(f, call.Pos(), "crash point %q is missing in crashpoint.Points", name))
			case isSum:
				end, ok := stringLiteral(sum.Y)
				if !ok {
					problems = append(problems, problem(f, call.Pos(), "the end of a computed crash point must be a literal"))
				}
				suffixes[dir] = append(suffixes[dir], end)
			default:
				suffixes[dir] = append(suffixes[dir], "")
			}
			return true
		})
	}
	computed := func(point string) bool {
		for dir, ends := range suffixes {
			for _, end := range ends {
				if start, ok := strings.CutSuffix(point, end); ok && literals[dir][start] {
					return true
				}
			}
		}
		return false
	}
	for i, p := range points {
		if !used[p] && !computed(p) {
			problems = append(problems, fmt.Sprintf("crashpoint.Points: %q is nowhere in the code", p))
		}
		if slices.Contains(points[:i], p) {
			problems = append(problems, fmt.Sprintf("crashpoint.Points: %q is there twice", p))
		}
	}
	return problems
}

// checkCrashTable wants a row | `name` | ... for each crash point, and no row for
// a name of the same family that is none.
func checkCrashTable(doc string, points []string) (problems []string) {
	rows := map[string]bool{}
	for line := range strings.Lines(doc) {
		cells := strings.Split(line, "|")
		if len(cells) < 3 || strings.TrimSpace(cells[0]) != "" {
			continue
		}
		for i, quoted := range strings.Split(cells[1], "`") { // several names may share a row
			if i%2 == 1 {
				rows[quoted] = true
			}
		}
	}
	families := map[string]bool{}
	for _, p := range points {
		family, _, _ := strings.Cut(p, ".")
		families[family] = true
		if !rows[p] {
			problems = append(problems, fmt.Sprintf("docs/CRASH.md: no row for `%s`", p))
		}
		delete(rows, p)
	}
	for name := range rows {
		if family, _, ok := strings.Cut(name, "."); ok && families[family] {
			problems = append(problems, fmt.Sprintf("docs/CRASH.md: `%s` is no crash point", name))
		}
	}
	slices.Sort(problems)
	return problems
}

func isHit(call *ast.CallExpr) bool {
	sel, ok := call.Fun.(*ast.SelectorExpr)
	if !ok || sel.Sel.Name != "Hit" || len(call.Args) != 1 {
		return false
	}
	id, ok := sel.X.(*ast.Ident)
	return ok && id.Name == "crashpoint" && id.Obj == nil
}

func stringLiteral(n ast.Node) (string, bool) {
	lit, ok := n.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return "", false
	}
	s, err := strconv.Unquote(lit.Value)
	return s, err == nil
}
