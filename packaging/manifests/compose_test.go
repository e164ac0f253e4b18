package manifests

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
)

// load reads a compose file as "docker compose config" does: interpolation, merge keys,
// schema and consistency.
func load(t *testing.T, file string, env ...string) (*types.Project, error) {
	t.Helper()
	o, err := cli.NewProjectOptions([]string{file}, cli.WithName("test"), cli.WithEnv(env))
	if err != nil {
		t.Fatal(err)
	}
	return o.LoadProject(context.Background())
}

func TestCompose(t *testing.T) {
	files, err := filepath.Glob("../../examples/docker/compose.*.yaml")
	if err != nil || len(files) != 2 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, f := range files {
		t.Run(filepath.Base(f), func(t *testing.T) {
			if _, err := load(t, f, "IMAGE=onecopy-example"); err == nil {
				t.Error("it does not ask for MODELS")
			}
			p, err := load(t, f, "IMAGE=onecopy-example", "MODELS=/srv/models")
			if err != nil {
				t.Fatal(err)
			}
			dirs := map[string]bool{}
			for _, name := range []string{"warm", "worker", "gc"} {
				s, err := p.GetService(name)
				if err != nil {
					t.Fatal(err)
				}
				if s.User != "10001:10001" {
					t.Errorf("%s runs as %q, not as the one user that writes the registry", name, s.User)
				}
				if s.MemLimit == 0 {
					t.Errorf("%s has no memory limit", name)
				}
				dir := s.Environment["ONECOPY_DIR"]
				if dir == nil || !mounted(s, *dir) {
					t.Errorf("%s: the registry is on no volume of the service", name)
					continue
				}
				dirs[*dir] = true
			}
			if len(dirs) != 1 {
				t.Errorf("the services have different registries: %v", dirs)
			}
			warm, worker := p.Services["warm"], p.Services["worker"]
			if worker.DependsOn["warm"].Condition != types.ServiceConditionCompletedSuccessfully {
				t.Error("the workers do not wait for the load: the weights may be charged to one of them")
			}
			if warm.MemLimit <= worker.MemLimit {
				t.Error("the loader, which pays for the weights, may use no more than a worker")
			}
		})
	}
}

func mounted(s types.ServiceConfig, dir string) bool {
	for _, v := range s.Volumes {
		if rel, err := filepath.Rel(v.Target, dir); err == nil && filepath.IsLocal(rel) && !v.ReadOnly {
			return true
		}
	}
	return false
}
