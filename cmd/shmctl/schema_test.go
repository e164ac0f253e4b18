//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
)

// documents are all JSON documents that commands write. Their schemas, in
// docs/schema, are made from these types: go test ./cmd/shmctl -run TestSchemas -update
var documents = map[string]any{
	"error": errorJSON{}, "load": loadJSON{}, "ls": lsJSON{}, "ls.line": modelLineJSON{}, "stat": statJSON{}, "path": pathJSON{},
	"rm": rmJSON{}, "rm.line": rmLineJSON{}, "gc": gcJSON{}, "holders": holdersJSON{}, "holders.line": holderLineJSON{},
	"version": versionJSON{}, "keys": keysJSON{}, "trim": trimJSON{}, "config": configJSON{}, "metrics": metricsJSON{},
	"top": topJSON{}, "rollout": rolloutJSON{}, "rollout-status": rolloutStatusJSON{}, "doctor": doctorJSON{}, "doctor.line": findingLineJSON{},
	"scan": scanJSON{}, "scan.line": scanLineJSON{}, "check": checkJSON{}, "check.line": problemLineJSON{},
	"dump": dumpJSON{}, "dump.line": rawFieldLineJSON{}, "wait": modelLineJSON{},
}

// sameDocument says which commands write the document of another.
var sameDocument = map[string]string{
	"pin": "keys", "unpin": "keys", "touch": "keys", "ttl": "keys", "config get": "config", "config set": "config",
	"rollout status": "rollout-status", "rollout undo": "rollout",
}

// noDocument says which commands write no document, and what they write.
var noDocument = map[string]string{"cat": "a file", "exec": "what COMMAND writes"}

// Every command has a schema.
func TestEveryCommandHasASchema(t *testing.T) {
	for path := range commandPaths() {
		name := path
		if same, ok := sameDocument[path]; ok {
			name = same
		}
		if _, ok := documents[name]; !ok && noDocument[path] == "" {
			t.Errorf("the document of %q has no schema", path)
		}
	}
}

// Every command is tried while other processes run, by some script.
func TestEveryCommandHasAScript(t *testing.T) {
	scripts, err := filepath.Glob("testdata/script/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	background := regexp.MustCompile(`(?m)^[^#\n]*&\w+&$`)
	var texts []string
	for _, path := range scripts {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if background.Match(b) {
			texts = append(texts, string(b))
		}
	}
	for path := range commandPaths() {
		run := regexp.MustCompile(`(?m)^[^#\n]*\bshmctl ` + path + `\b`)
		if !slices.ContainsFunc(texts, run.MatchString) {
			t.Errorf("no script with processes in the background runs shmctl %s", path)
		}
	}
}

// commandPaths are the commands that people type, without those of cobra.
func commandPaths() map[string]*cobra.Command {
	paths := map[string]*cobra.Command{}
	root := newApp(nil, nil, nil, nil).command()
	var visit func(*cobra.Command)
	visit = func(cmd *cobra.Command) {
		if cmd.Name() == "help" || cmd.Name() == "completion" {
			return
		}
		if cmd != root {
			paths[strings.TrimPrefix(cmd.CommandPath(), root.Name()+" ")] = cmd
		}
		for _, sub := range cmd.Commands() {
			visit(sub)
		}
	}
	visit(root)
	return paths
}

const schemaDir = "../../docs/schema"

func TestSchemas(t *testing.T) {
	have := map[string]bool{}
	for name, v := range documents {
		path := filepath.Join(schemaDir, name+".json")
		have[name+".json"] = true
		s := schemaOf(reflect.TypeOf(v))
		s["$schema"] = "https://json-schema.org/draft/2020-12/schema"
		s["title"] = "shmctl " + strings.TrimSuffix(name, ".line") + " -o json"
		if strings.HasSuffix(name, ".line") {
			s["title"] = "a line of shmctl " + strings.TrimSuffix(name, ".line") + " -o jsonl"
		}
		want, err := json.MarshalIndent(s, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, '\n')
		if *update {
			if err := os.MkdirAll(schemaDir, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, want, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Error(err)
		}
		if d := cmp.Diff(string(want), string(got)); d != "" {
			t.Errorf("%s is stale: go test ./cmd/shmctl -run TestSchemas -update (-want +got)\n%s", path, d)
		}
	}
	files, _ := os.ReadDir(schemaDir)
	for _, f := range files {
		if !have[f.Name()] {
			t.Errorf("%s describes nothing", f.Name())
		}
	}
}

// schemaOf turns a Go type into the JSON Schema of what encoding/json makes of
// it. Further members are allowed, because they may come within a version.
func schemaOf(t reflect.Type) map[string]any {
	switch {
	case t == reflect.TypeFor[time.Time]():
		return map[string]any{"type": "string", "format": "date-time"}
	case t.Kind() == reflect.Pointer:
		s := schemaOf(t.Elem())
		s["type"] = []any{s["type"], "null"}
		return s
	}
	switch t.Kind() {
	case reflect.String:
		return map[string]any{"type": "string"}
	case reflect.Bool:
		return map[string]any{"type": "boolean"}
	case reflect.Float64:
		return map[string]any{"type": "number"}
	case reflect.Int, reflect.Int64:
		return map[string]any{"type": "integer"}
	case reflect.Uint64:
		return map[string]any{"type": "integer", "minimum": 0}
	case reflect.Slice:
		return map[string]any{"type": []any{"array", "null"}, "items": schemaOf(t.Elem())}
	case reflect.Map:
		return map[string]any{"type": []any{"object", "null"}, "additionalProperties": schemaOf(t.Elem())}
	case reflect.Struct:
		props := map[string]any{}
		addFields(t, props)
		return map[string]any{"type": "object", "properties": props, "required": slices.Sorted(maps.Keys(props))}
	}
	panic(fmt.Sprintf("no schema for %v", t))
}

func addFields(t reflect.Type, props map[string]any) {
	for f := range t.Fields() {
		if f.Anonymous {
			addFields(f.Type, props)
			continue
		}
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		props[name] = schemaOf(f.Type)
	}
}

// conforms SCHEMA checks the documents on its stdin.
func conforms() {
	err := func() error {
		b, err := os.ReadFile(os.Getenv("SCHEMAS") + "/" + os.Args[1] + ".json")
		if err != nil {
			return err
		}
		var s map[string]any
		if err := json.Unmarshal(b, &s); err != nil {
			return err
		}
		d := json.NewDecoder(os.Stdin)
		for n := 0; ; n++ {
			var v any
			if err := d.Decode(&v); err == io.EOF && n > 0 {
				return nil
			} else if err != nil {
				return err
			}
			if err := valid("", s, v); err != nil {
				return err
			}
		}
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// valid knows the words of JSON Schema that schemaOf uses.
func valid(at string, s map[string]any, v any) error {
	kind := map[bool]string{true: "null"}[v == nil]
	switch v := v.(type) {
	case string:
		kind = "string"
	case bool:
		kind = "boolean"
	case float64:
		kind = "number"
		if v == math.Trunc(v) {
			kind = "integer"
		}
	case []any:
		kind = "array"
	case map[string]any:
		kind = "object"
	}
	types, ok := s["type"].([]any)
	if !ok {
		types = []any{s["type"]}
	}
	if !slices.Contains(types, any(kind)) && !(kind == "integer" && slices.Contains(types, any("number"))) {
		return fmt.Errorf("%s is %s, want %v", at, kind, types)
	}
	switch v := v.(type) {
	case string:
		if _, err := time.Parse(time.RFC3339Nano, v); s["format"] == "date-time" && err != nil {
			return fmt.Errorf("%s: %w", at, err)
		}
	case []any:
		for i, e := range v {
			if err := valid(fmt.Sprintf("%s[%d]", at, i), s["items"].(map[string]any), e); err != nil {
				return err
			}
		}
	case map[string]any:
		props, _ := s["properties"].(map[string]any)
		required, _ := s["required"].([]any)
		for _, name := range required {
			if _, ok := v[name.(string)]; !ok {
				return fmt.Errorf("%s.%v is missing", at, name)
			}
		}
		for name, e := range v {
			sub, ok := props[name].(map[string]any)
			if !ok {
				if sub, ok = s["additionalProperties"].(map[string]any); !ok {
					continue
				}
			}
			if err := valid(at+"."+name, sub, e); err != nil {
				return err
			}
		}
	}
	return nil
}
