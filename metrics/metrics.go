// Package metrics shows a onecopy registry to Prometheus. It is outside package
// registry so that only programs that want it carry the client library.
//
//	prometheus.MustRegister(metrics.New(reg))
//
// Everything is read when it is asked for, nothing is stored: gauges are
// recomputed; counters are those that the registry's table keeps for all
// processes. What a process counts for itself, hits above all, is reported with
// [Options.Process] only: nothing is written to shared memory on a hit.
package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/onecopy/onecopy/registry"
)

// Options of NewWith.
type Options struct {
	Process bool // report what this process did, too
	Holders bool // report holders: reads /proc, which costs more than all the rest
}

// New returns a collector for the registry, without what this process did.
func New(r *registry.Registry) prometheus.Collector { return NewWith(r, Options{}) }

// NewWith returns a collector for the registry. It may be collected by several
// goroutines; the registry must stay open. Without one (nil) it says that there
// is none: onecopy_up is 0.
func NewWith(r *registry.Registry, o Options) prometheus.Collector {
	c := &collector{o: o}
	if r != nil {
		c.w = r.Watch()
	}
	return c
}

type collector struct {
	w *registry.Watch
	o Options
}

var all []*prometheus.Desc

func desc(name, help string, labels ...string) *prometheus.Desc {
	d := prometheus.NewDesc("onecopy_"+name, help, labels, nil)
	all = append(all, d)
	return d
}

var (
	up          = desc("up", "1 if the registry could be read.")
	models      = desc("models", "Models that are loaded.")
	slots       = desc("slots", "Models that the registry can hold.")
	used        = desc("used_bytes", "Memory of all generations, replaced ones included.")
	reserved    = desc("reserved_bytes", "Memory that running loads have still to allocate.")
	budget      = desc("budget_bytes", "Memory that all generations together may use.")
	tmpfsFree   = desc("tmpfs_free_bytes", "Free space on the tmpfs.")
	tmpfsSize   = desc("tmpfs_size_bytes", "Size of the tmpfs.")
	superseded  = desc("superseded_generations", "Replaced generations that are still in use, or not collected yet.")
	supersededB = desc("superseded_bytes", "Memory of replaced generations.")

	modelBytes    = desc("model_bytes", "Bytes of a model's files.", "key")
	modelLeased   = desc("model_leased", "1 if some process holds the model.", "key")
	modelPinned   = desc("model_pinned", "1 if the model is pinned.", "key")
	modelAttaches = desc("model_attaches_total", "Times that processes attached the model, about.", "key")
	modelLoadedAt = desc("model_loaded_timestamp_seconds", "When the published generation was loaded.", "key")
	modelLoadTime = desc("model_load_seconds", "How long the load of the published generation took.", "key")
	modelHolders  = desc("model_holders", "Processes that hold the model, as far as they are visible.", "key")
	hidden        = desc("hidden_processes", "Processes that could not be looked into.")

	loads       = desc("loads_total", "Generations published.")
	loadSeconds = desc("load_seconds_total", "Time that these loads took.")
	loadBytes   = desc("load_bytes_total", "Bytes loaded.")
	collapsed   = desc("load_collapsed_bytes_total", "Bytes loaded into 2 MiB pages.")
	loadErrors  = desc("load_errors_total", "Loads that failed.")
	takeovers   = desc("takeovers_total", "Loads begun after another loader of the key died.")
	replaced    = desc("replaced_total", "Publications that replaced an older generation.")
	evictions   = desc("evictions_total", "Models removed, by reason.", "reason")
	reclaimed   = desc("reclaimed_total", "Unfinished work of dead processes that was finished or undone.")
	leftovers   = desc("leftovers_total", "Files without a model that were removed.")
	fallbacks   = desc("fallbacks_total", "Load windows for which the kernel gave no 2 MiB pages.")

	procLookups     = desc("process_lookups_total", "Look-ups of this process, by result.", "result")
	procAttaches    = desc("process_attaches_total", "Models that this process attached.")
	procWaits       = desc("process_waits_total", "Waits of this process for somebody else's load.")
	procRetries     = desc("process_retries_total", "Look-ups of this process begun again because the entry moved.")
	procBytesSaved  = desc("process_saved_bytes_total", "Bytes of models that this process attached instead of loading them.")
	procBytesLoaded = desc("process_loaded_bytes_total", "Bytes that this process loaded.")
)

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range all {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	count := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
	}
	if c.w == nil {
		gauge(up, 0)
		return
	}
	var all registry.Overview
	var rep registry.HolderReport
	var err error
	if c.o.Holders {
		all, rep, err = c.w.OverviewAndHolders()
	} else {
		all, err = c.w.Overview()
	}
	if err != nil {
		gauge(up, 0)
		return
	}
	s, n, es := all.Stats, all.Counters, all.Entries
	gauge(up, 1)
	gauge(models, float64(s.Models))
	gauge(slots, float64(s.Slots))
	gauge(used, float64(s.Used))
	gauge(reserved, float64(s.Reserved))
	gauge(budget, float64(s.Budget))
	gauge(tmpfsFree, float64(s.Free))
	gauge(tmpfsSize, float64(s.Size))
	gauge(superseded, float64(s.Superseded))
	gauge(supersededB, float64(s.SupersededBytes))

	count(loads, float64(n.Loads))
	count(loadSeconds, n.LoadTime.Seconds())
	count(loadBytes, float64(n.LoadBytes))
	count(collapsed, float64(n.CollapsedBytes))
	count(loadErrors, float64(n.LoadErrors))
	count(takeovers, float64(n.Takeovers))
	count(replaced, float64(n.Replaced))
	count(evictions, float64(n.EvictedSpace), "space")
	count(evictions, float64(n.EvictedTable), "table")
	count(evictions, float64(n.EvictedTTL), "ttl")
	count(evictions, float64(n.Removed), "removed")
	count(reclaimed, float64(n.Reclaimed))
	count(leftovers, float64(n.Leftovers))
	count(fallbacks, float64(n.Fallbacks))

	for _, e := range es {
		gauge(modelBytes, float64(e.Bytes), e.Key)
		gauge(modelLeased, oneIf(e.Leased), e.Key)
		gauge(modelPinned, oneIf(e.Pinned), e.Key)
		count(modelAttaches, float64(e.Attaches), e.Key)
		if e.Info != nil {
			gauge(modelLoadedAt, float64(e.Info.LoadedAt.UnixMilli())/1e3, e.Key)
			gauge(modelLoadTime, e.Info.LoadTime.Seconds(), e.Key)
		}
	}
	if c.o.Holders {
		held := map[string]map[int]bool{}
		for _, h := range rep.Holders {
			if held[h.Key] == nil {
				held[h.Key] = map[int]bool{}
			}
			held[h.Key][h.PID] = true
		}
		for _, e := range es {
			gauge(modelHolders, float64(len(held[e.Key])), e.Key)
		}
		gauge(hidden, float64(rep.Hidden))
	}
	if c.o.Process {
		count(procLookups, float64(s.Hits), "hit")
		count(procLookups, float64(s.Misses), "miss")
		count(procAttaches, float64(s.Attaches))
		count(procWaits, float64(s.Waits))
		count(procRetries, float64(s.Retries))
		count(procBytesSaved, float64(s.BytesSaved))
		count(procBytesLoaded, float64(s.BytesLoaded))
	}
}

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
