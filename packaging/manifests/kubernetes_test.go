package manifests

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
	strict "sigs.k8s.io/yaml"
)

// pods decodes a file strictly and returns the pod templates in it by object.
func pods(t *testing.T, file string) map[string]corev1.PodTemplateSpec {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]corev1.PodTemplateSpec{}
	for r := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(b))); ; {
		doc, err := r.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		name, template, err := decode(doc)
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		found[name] = template
	}
	return found
}

func decode(doc []byte) (name string, p corev1.PodTemplateSpec, err error) {
	var kind struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
	}
	if err := strict.Unmarshal(doc, &kind); err != nil {
		return "", p, err
	}
	switch kind.APIVersion + " " + kind.Kind {
	case "v1 Pod":
		var o corev1.Pod
		err = strict.UnmarshalStrict(doc, &o)
		return o.Kind + " " + o.Name, corev1.PodTemplateSpec{ObjectMeta: o.ObjectMeta, Spec: o.Spec}, err
	case "apps/v1 Deployment":
		var o appsv1.Deployment
		err = strict.UnmarshalStrict(doc, &o)
		if err == nil && !selects(o.Spec.Selector.MatchLabels, o.Spec.Template.Labels) {
			err = errors.New("the selector does not match the template's labels")
		}
		return o.Kind + " " + o.Name, o.Spec.Template, err
	case "apps/v1 DaemonSet":
		var o appsv1.DaemonSet
		err = strict.UnmarshalStrict(doc, &o)
		if err == nil && !selects(o.Spec.Selector.MatchLabels, o.Spec.Template.Labels) {
			err = errors.New("the selector does not match the template's labels")
		}
		return o.Kind + " " + o.Name, o.Spec.Template, err
	}
	return "", p, errors.New("no type for " + kind.APIVersion + " " + kind.Kind)
}

func selects(want, have map[string]string) bool {
	for k, v := range want {
		if have[k] != v {
			return false
		}
	}
	return len(want) > 0
}

// TestKubernetes reads every manifest strictly and holds it to what the README says:
// who maps models runs as one user, mounts exist, and memory has a limit.
func TestKubernetes(t *testing.T) {
	files, err := filepath.Glob("../../examples/kubernetes/*.yaml")
	if err != nil || len(files) < 3 {
		t.Fatalf("%d manifests, %v", len(files), err)
	}
	objects := map[string]corev1.PodTemplateSpec{}
	for _, f := range files {
		for name, p := range pods(t, f) {
			if _, twice := objects[name]; twice {
				t.Errorf("%s: %s is defined twice", f, name)
			}
			objects[name] = p
			t.Run(name, func(t *testing.T) { checkPod(t, p.Spec) })
		}
	}
	for _, want := range []string{"DaemonSet onecopy-models", "Deployment worker", "Pod workers-in-one-pod"} {
		if _, ok := objects[want]; !ok {
			t.Errorf("there is no %s", want)
		}
	}

	t.Run("the owner pays", func(t *testing.T) {
		// The weights are charged to who loads them: that pod's request must be larger
		// than the budget it sets, and no worker may load.
		owner := container(t, objects["DaemonSet onecopy-models"].Spec, "models")
		script := strings.Join(owner.Command, " ")
		requests := owner.Resources.Requests
		if !strings.Contains(script, "budget=12GiB") || requests.Memory().Value() <= 12<<30 {
			t.Errorf("the loader requests %v for %q", requests.Memory(), script)
		}
		for _, c := range objects["Deployment worker"].Spec.Containers {
			if slices.Contains(c.Command, "--load") || slices.Contains(c.Command, "load") {
				t.Errorf("the worker %s may load: %v", c.Name, c.Command)
			}
		}
	})

	t.Run("the volume fits", func(t *testing.T) {
		spec := objects["Pod workers-in-one-pod"].Spec
		for _, v := range spec.Volumes {
			if v.EmptyDir == nil {
				continue
			}
			if v.EmptyDir.Medium != corev1.StorageMediumMemory || v.EmptyDir.SizeLimit == nil {
				t.Fatalf("%s: %+v", v.Name, v.EmptyDir)
			}
			for _, name := range []string{"serve-a", "serve-b"} {
				if limits := container(t, spec, name).Resources.Limits; limits.Memory().Cmp(*v.EmptyDir.SizeLimit) <= 0 {
					t.Errorf("%s may use %v, and the volume alone %v", name, limits.Memory(), v.EmptyDir.SizeLimit)
				}
			}
			return
		}
		t.Error("no emptyDir")
	})
}

func checkPod(t *testing.T, spec corev1.PodSpec) {
	if spec.SecurityContext == nil || spec.SecurityContext.RunAsUser == nil || *spec.SecurityContext.RunAsUser != 10001 {
		t.Error("it does not run as 10001, the one user that writes the registry")
	}
	volumes := map[string]bool{}
	for _, v := range spec.Volumes {
		volumes[v.Name] = true
	}
	for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
		if limits := c.Resources.Limits; limits.Memory().IsZero() {
			t.Errorf("%s has no memory limit", c.Name)
		}
		if len(c.VolumeMounts) == 0 {
			t.Errorf("%s mounts nothing", c.Name)
		}
		for _, m := range c.VolumeMounts {
			if !volumes[m.Name] {
				t.Errorf("%s mounts %s, which is no volume", c.Name, m.Name)
			}
		}
	}
}

func container(t *testing.T, spec corev1.PodSpec, name string) corev1.Container {
	t.Helper()
	i := slices.IndexFunc(spec.Containers, func(c corev1.Container) bool { return c.Name == name })
	if i < 0 {
		t.Fatalf("no container %s", name)
	}
	return spec.Containers[i]
}

// TestStrict: a misspelt field must not pass, or TestKubernetes would prove little.
func TestStrict(t *testing.T) {
	for _, doc := range []string{
		"apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec:\n  containers: [{name: a, comand: [b]}]\n",
		"apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec:\n  volumes: [{name: a, emptyDir: {sizelimit: 1Gi, size: 3}}]\n",
		"apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec:\n  containers: [{name: a, resources: {limits: {memory: 64Mega}}}]\n",
		"apiVersion: v1\nkind: Pod\nmetadata: {name: a, name: b}\n",
		"apiVersion: apps/v1\nkind: DaemonSet\nmetadata: {name: a}\nspec:\n  selector: {matchLabels: {a: b}}\n  template: {metadata: {labels: {a: c}}}\n",
		"apiVersion: apps/v2\nkind: DaemonSet\n",
	} {
		if _, _, err := decode([]byte(doc)); err == nil {
			t.Errorf("this is accepted:\n%s", doc)
		}
	}
}
