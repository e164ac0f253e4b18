package main

import (
	"bufio"
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// place is a line and a column, both from 1.
type place struct{ line, col int }

func (p place) before(q place) bool { return p.line < q.line || p.line == q.line && p.col < q.col }

// block is a run of statements that are executed together or not at all.
type block struct {
	start, end place // end is exclusive
	statements int
	ran        bool
}

func (b *block) size() (lines, cols int) { return b.end.line - b.start.line, b.end.col - b.start.col }

// sourceFile is what the profile says of one file.
type sourceFile struct {
	path      string // from the module's root, with slashes
	blocks    []*block
	functions []function // all that return errors; filled by unreached
}

// function is a function that returns an error, with the error returns that no
// test reached. What a function literal returns counts for the function around it.
type function struct {
	name    string
	returns []string
}

// readProfile reads the text form of a profile. Builds with other tags have lines
// of their own for the same block: it ran if it ran in one of them.
func readProfile(name, root string) ([]*sourceFile, error) {
	module, err := moduleOf(root)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	files := map[string]*sourceFile{}
	blocks := map[string]*block{}
	in := bufio.NewScanner(f)
	for n := 1; in.Scan(); n++ {
		line := in.Text()
		if strings.HasPrefix(line, "mode:") {
			continue
		}
		// github.com/onecopy/onecopy/shm/map_linux.go:30.44,33.2 2 17
		where, numbers, _ := strings.Cut(line, " ")
		file, span, ok := strings.Cut(where, ":")
		var b block
		var count int
		if ok {
			_, err = fmt.Sscanf(span+" "+numbers, "%d.%d,%d.%d %d %d",
				&b.start.line, &b.start.col, &b.end.line, &b.end.col, &b.statements, &count)
		}
		if !ok || err != nil {
			return nil, fmt.Errorf("%s:%d: no line of a profile: %s", name, n, line)
		}
		rel, ok := strings.CutPrefix(file, module+"/")
		if !ok {
			return nil, fmt.Errorf("%s:%d: %s is not of module %s", name, n, file, module)
		}
		if blocks[where] == nil {
			blocks[where] = &b
			if files[rel] == nil {
				files[rel] = &sourceFile{path: rel}
			}
			files[rel].blocks = append(files[rel].blocks, &b)
		}
		blocks[where].ran = blocks[where].ran || count > 0
	}
	if err := in.Err(); err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("%s: nothing was measured", name)
	}
	return slices.SortedFunc(maps.Values(files), func(a, b *sourceFile) int { return strings.Compare(a.path, b.path) }), nil
}

func moduleOf(root string) (string, error) {
	b, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutPrefix(line, "module "); ok {
			return strings.TrimSpace(name), nil
		}
	}
	return "", fmt.Errorf("%s/go.mod names no module", root)
}

type pkg struct {
	name     string
	all, ran int // statements
}

func (p *pkg) percent() float64 { return 100 * float64(p.ran) / float64(max(p.all, 1)) }

func packagesOf(files []*sourceFile) (ps []*pkg) {
	byName := map[string]*pkg{}
	for _, f := range files {
		name := path.Dir(f.path)
		p := byName[name]
		if p == nil {
			p = &pkg{name: name}
			byName[name] = p
			ps = append(ps, p)
		}
		for _, b := range f.blocks {
			p.all += b.statements
			if b.ran {
				p.ran += b.statements
			}
		}
	}
	slices.SortFunc(ps, func(a, b *pkg) int { return strings.Compare(a.name, b.name) })
	return ps
}

// unreached lists what did not run, one line for each block, and fills functions.
func (f *sourceFile) unreached(root string) (lines []string, err error) {
	src, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(f.path)))
	if err != nil {
		return nil, err
	}
	text := strings.Split(string(src), "\n")
	fset := token.NewFileSet()
	tree, err := parser.ParseFile(fset, f.path, src, 0)
	if err != nil {
		return nil, err
	}
	at := func(line int) string {
		if line > len(text) {
			return ""
		}
		return strings.TrimSpace(text[line-1])
	}
	slices.SortFunc(f.blocks, func(a, b *block) int {
		return cmp.Or(cmp.Compare(a.start.line, b.start.line), cmp.Compare(a.start.col, b.start.col))
	})
	for _, b := range f.blocks {
		if !b.ran && b.statements > 0 {
			lines = append(lines, fmt.Sprintf("%s:%d-%d: %s", f.path, b.start.line, b.end.line, at(b.start.line)))
		}
	}
	for _, d := range tree.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok || fn.Body == nil {
			continue
		}
		found := function{name: nameOf(fn)}
		errorReturns(fn.Type, fn.Body, func(r *ast.ReturnStmt) {
			pos := fset.Position(r.Pos())
			if b := f.blockAt(place{pos.Line, pos.Column}); b != nil && !b.ran {
				found.returns = append(found.returns, fmt.Sprintf("%s:%d: %s", f.path, pos.Line, at(pos.Line)))
			}
		})
		f.functions = append(f.functions, found)
	}
	return lines, nil
}

// blockAt is the innermost block around a place.
func (f *sourceFile) blockAt(p place) (found *block) {
	for _, b := range f.blocks {
		if p.before(b.start) || !p.before(b.end) {
			continue
		}
		if found != nil {
			l1, c1 := found.size()
			if l2, c2 := b.size(); l2 > l1 || l2 == l1 && c2 >= c1 {
				continue
			}
		}
		found = b
	}
	return found
}

// nameOf is "function" or "type.method".
func nameOf(fn *ast.FuncDecl) string {
	if fn.Recv == nil || len(fn.Recv.List) == 0 {
		return fn.Name.Name
	}
	typ := fn.Recv.List[0].Type
	for {
		switch t := typ.(type) {
		case *ast.StarExpr:
			typ = t.X
		case *ast.IndexExpr:
			typ = t.X
		case *ast.Ident:
			return t.Name + "." + fn.Name.Name
		default:
			return fn.Name.Name
		}
	}
}

// errorReturns calls fn for every return, in a function and the literals within
// it, of something else than nil as an error.
func errorReturns(typ *ast.FuncType, body *ast.BlockStmt, fn func(*ast.ReturnStmt)) {
	last, named := lastResult(typ)
	ast.Inspect(body, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncLit:
			errorReturns(n.Type, n.Body, fn)
			return false
		case *ast.ReturnStmt:
			if last != "error" {
				return true
			}
			if len(n.Results) == 0 && named {
				fn(n)
			} else if len(n.Results) > 0 && !isNil(n.Results[len(n.Results)-1]) {
				fn(n)
			}
		}
		return true
	})
}

func lastResult(typ *ast.FuncType) (name string, named bool) {
	if typ.Results == nil || len(typ.Results.List) == 0 {
		return "", false
	}
	last := typ.Results.List[len(typ.Results.List)-1]
	id, ok := last.Type.(*ast.Ident)
	if !ok {
		return "", false
	}
	return id.Name, len(last.Names) > 0
}

func isNil(e ast.Expr) bool {
	id, ok := e.(*ast.Ident)
	return ok && id.Name == "nil"
}

// reason says why error returns of a function are not reached.
type reason struct {
	returns int
	seen    bool
}

func readReasons(name string) (map[string]*reason, error) {
	reasons := map[string]*reason{}
	if name == "" {
		return reasons, nil
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	n := 0
	for line := range strings.Lines(string(b)) {
		n++
		if line = strings.TrimSpace(line); line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		parts := strings.SplitN(line, ":", 4)
		count := 0
		if len(parts) == 4 {
			count, err = strconv.Atoi(parts[2])
		}
		if count < 1 || err != nil || strings.TrimSpace(parts[3]) == "" {
			return nil, fmt.Errorf("%s:%d: want FILE:FUNCTION:RETURNS: REASON", name, n)
		}
		key := parts[0] + ":" + parts[1]
		if reasons[key] != nil {
			return nil, fmt.Errorf("%s:%d: %s is there twice", name, n, key)
		}
		reasons[key] = &reason{returns: count}
	}
	return reasons, nil
}
