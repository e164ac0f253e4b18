package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/spf13/cobra"

	"github.com/onecopy/onecopy/metrics"
	"github.com/onecopy/onecopy/registry"
)

type metricsFlags struct {
	textfile, listen string
	holders          bool
}

func (a *app) metricsCommand() *cobra.Command {
	var m metricsFlags
	cmd := &cobra.Command{
		Use:   "metrics",
		Short: "Print the registry's metrics for Prometheus",
		Long: `Metrics prints what the registry counts, in the text format of Prometheus. Gauges
are computed anew, counters are those that all processes keep in the registry.
Hits and misses are not among them: a hit writes nothing to shared memory, so
each process has its own, see package metrics.

--textfile writes a file instead, for node_exporter's textfile collector: readers
see the old one or the new one, never a half. --listen serves /metrics over HTTP
until it is interrupted. Without a registry there is only onecopy_up 0.`,
		Example: `  shmctl metrics
  shmctl metrics --textfile /var/lib/prometheus/node-exporter/onecopy.prom
  shmctl metrics --listen 127.0.0.1:9417`,
		Args: takes(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error { return a.metrics(cmd, m) },
	}
	f := cmd.Flags()
	f.StringVar(&m.textfile, "textfile", "", "write to this `path` instead of stdout, atomically")
	f.StringVar(&m.listen, "listen", "", "serve /metrics at this `address`, such as 127.0.0.1:9417")
	f.BoolVar(&m.holders, "holders", false, "count holders too: reads /proc at each scrape")
	return cmd
}

type metricsJSON struct {
	schema
	Metrics []metricJSON `json:"metrics"`
}

type metricJSON struct {
	Name   string            `json:"name"`
	Type   string            `json:"type"` // gauge or counter
	Labels map[string]string `json:"labels"`
	Value  float64           `json:"value"`
}

func (a *app) metrics(cmd *cobra.Command, m metricsFlags) error {
	for _, name := range []string{"textfile", "listen"} {
		if f := cmd.Flags().Lookup(name); f.Changed && f.Value.String() == "" {
			return usagef("", "--%s is empty", name)
		}
	}
	switch {
	case m.listen != "" && m.textfile != "":
		return usagef("", "--textfile and --listen exclude each other")
	case m.listen != "":
		return a.serveMetrics(cmd, m)
	}
	e := a.exporter(m.holders)
	defer e.w.close()
	families, err := e.gather()
	if m.textfile != "" { // with onecopy_up 0 too, or the file would go on saying 1
		return errors.Join(err, writeTextfile(m.textfile, families))
	}
	if err != nil {
		return err
	}
	switch {
	case a.json():
		doc := metricsJSON{newSchema(), []metricJSON{}}
		for _, f := range families {
			for _, v := range f.Metric {
				j := metricJSON{Name: f.GetName(), Type: "gauge", Labels: map[string]string{}, Value: v.GetGauge().GetValue()}
				if v.Counter != nil {
					j.Type, j.Value = "counter", v.GetCounter().GetValue()
				}
				for _, l := range v.Label {
					j.Labels[l.GetName()] = l.GetValue()
				}
				doc.Metrics = append(doc.Metrics, j)
			}
		}
		return a.writeJSON(doc)
	case a.output == formatName:
		for _, f := range families {
			if err := a.writeLines(f.GetName()); err != nil {
				return err
			}
		}
		return nil
	}
	text, err := metricsText(families)
	if err == nil {
		_, err = a.stdout.Write(text)
	}
	return err
}

// writeTextfile puts metrics into a file, all at once: a new file takes the place of
// the old one. So a link is followed first, and nothing but a file replaced.
func writeTextfile(path string, families []*dto.MetricFamily) error {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	if fi, err := os.Lstat(path); err == nil && !fi.Mode().IsRegular() {
		return usagef("without --textfile the metrics go to stdout", "--textfile %s: not a regular file", path)
	}
	err := prometheus.WriteToTextfile(path, prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) { return families, nil }))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		err = fmt.Errorf("%w: the folder of %s", errNoFile, path)
	}
	return err
}

// exporter gathers metrics, again and again for a server.
type exporter struct {
	holders bool

	mu       sync.Mutex
	w        watcher
	watched  *registry.Watch // by the collector
	gatherer *prometheus.Registry
}

func (a *app) exporter(holders bool) *exporter {
	return &exporter{holders: holders, w: watcher{a: a}}
}

// gather returns the metrics; with an error, that onecopy_up is 0.
func (e *exporter) gather() (families []*dto.MetricFamily, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	err = e.w.look(func(w *registry.Watch) (err error) {
		if e.watched != w {
			r := prometheus.NewRegistry()
			if err := r.Register(metrics.NewWith(e.w.r, metrics.Options{Holders: e.holders})); err != nil {
				return err
			}
			e.watched, e.gatherer = w, r
		}
		if families, err = e.gatherer.Gather(); err == nil && !isUp(families) {
			_, err = w.Overview() // why it is not
		}
		return err
	})
	if err == nil {
		return families, nil
	}
	if errors.Is(err, registry.ErrNoRegistry) {
		e.w.a.noteNoRegistry()
		err = nil
	}
	r := prometheus.NewRegistry()
	if err := r.Register(metrics.New(nil)); err != nil {
		return nil, err
	}
	families, e2 := r.Gather()
	return families, errors.Join(err, e2)
}

// isUp reports whether the registry could be read.
func isUp(families []*dto.MetricFamily) bool {
	for _, f := range families {
		if f.GetName() == "onecopy_up" {
			return f.Metric[0].GetGauge().GetValue() != 0
		}
	}
	return false
}

func metricsText(families []*dto.MetricFamily) ([]byte, error) {
	var b bytes.Buffer
	e := expfmt.NewEncoder(&b, expfmt.NewFormat(expfmt.TypeTextPlain).WithEscapingScheme(model.UnderscoreEscaping))
	for _, f := range families {
		if err := e.Encode(f); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), nil
}

func (a *app) serveMetrics(cmd *cobra.Command, m metricsFlags) error {
	ctx, stop := a.context(cmd)
	defer stop()
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", m.listen)
	if errors.Is(err, syscall.EADDRINUSE) {
		return withHint(fmt.Errorf("%w: %w", registry.ErrInUse, err), "another program listens there: choose another --listen address")
	}
	var bad *net.AddrError
	var name *net.DNSError
	if errors.As(err, &bad) || errors.As(err, &name) {
		return usagef("an address is HOST:PORT, such as 127.0.0.1:9417", "--listen %q: %v", m.listen, err)
	}
	if err != nil {
		return err
	}
	e := a.exporter(m.holders)
	defer e.w.close()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		families, err := e.gather()
		if err != nil {
			a.note("%v", err)
		}
		text, err := metricsText(families)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		_, _ = w.Write(text)
	})
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "shmctl: see /metrics") })
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute}
	a.note("serving http://%s/metrics", l.Addr())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		<-ctx.Done()
		quick, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = s.Shutdown(quick)
	}()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	<-ended
	return ctx.Err()
}
