//go:build linux

package metrics_test

import (
	"bytes"
	"context"
	"os/exec"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/expfmt"

	"github.com/onecopy/onecopy/internal/proctest"
	"github.com/onecopy/onecopy/metrics"
	"github.com/onecopy/onecopy/registry"
)

func loaded(t *testing.T, keys ...string) *registry.Registry {
	t.Helper()
	r, err := registry.Open(proctest.TmpRegistry(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	for _, key := range keys {
		m, err := r.GetOrLoad(context.Background(), key, registry.Source{Version: "1", Load: func(_ context.Context, w *registry.Writer) error {
			f, err := w.Create("w", 3)
			if err == nil {
				_, err = f.Write([]byte("abc"))
			}
			return err
		}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { m.Close() })
	}
	return r
}

func TestCollect(t *testing.T) {
	r := loaded(t, "a", `b"\`+"ü")
	if err := r.Pin(context.Background(), "a"); err != nil {
		t.Fatal(err)
	}
	_, _ = r.Get("nobody")
	c := metrics.NewWith(r, metrics.Options{Process: true, Holders: true})
	want := `
# HELP onecopy_evictions_total Models removed, by reason.
# TYPE onecopy_evictions_total counter
onecopy_evictions_total{reason="removed"} 0
onecopy_evictions_total{reason="space"} 0
onecopy_evictions_total{reason="table"} 0
onecopy_evictions_total{reason="ttl"} 0
# HELP onecopy_loads_total Generations published.
# TYPE onecopy_loads_total counter
onecopy_loads_total 2
# HELP onecopy_model_bytes Bytes of a model's files.
# TYPE onecopy_model_bytes gauge
onecopy_model_bytes{key="a"} 3
onecopy_model_bytes{key="b\"\\ü"} 3
# HELP onecopy_model_holders Processes that hold the model, as far as they are visible.
# TYPE onecopy_model_holders gauge
onecopy_model_holders{key="a"} 1
onecopy_model_holders{key="b\"\\ü"} 1
# HELP onecopy_model_leased 1 if some process holds the model.
# TYPE onecopy_model_leased gauge
onecopy_model_leased{key="a"} 1
onecopy_model_leased{key="b\"\\ü"} 1
# HELP onecopy_model_pinned 1 if the model is pinned.
# TYPE onecopy_model_pinned gauge
onecopy_model_pinned{key="a"} 1
onecopy_model_pinned{key="b\"\\ü"} 0
# HELP onecopy_up 1 if the registry could be read.
# TYPE onecopy_up gauge
onecopy_up 1
`
	if err := testutil.CollectAndCompare(c, strings.NewReader(want), "onecopy_evictions_total", "onecopy_loads_total", "onecopy_model_bytes",
		"onecopy_model_holders", "onecopy_model_leased", "onecopy_model_pinned", "onecopy_up"); err != nil {
		t.Error(err)
	}
}

func TestWithoutRegistry(t *testing.T) {
	if n := testutil.CollectAndCount(metrics.New(nil)); n != 1 {
		t.Errorf("%d metrics, want onecopy_up alone", n)
	}
	r := loaded(t)
	r.Close()
	if n := testutil.CollectAndCount(metrics.New(r)); n != 1 {
		t.Errorf("%d metrics of a closed registry, want onecopy_up alone", n)
	}
}

// The rules of the Prometheus project for names and help, as far as the client
// library knows them, and all of them where promtool is installed.
func TestNamesAndHelp(t *testing.T) {
	c := metrics.NewWith(loaded(t, "a"), metrics.Options{Process: true, Holders: true})
	problems, err := testutil.CollectAndLint(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool is not installed (on Debian: apt-get install prometheus)")
	}
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(c)
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var text bytes.Buffer
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&text, f); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(promtool, "check", "metrics")
	cmd.Stdin = &text
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool: %v\n%s", err, out)
	}
}
