package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/onecopy/onecopy/internal/doctor"
	"github.com/onecopy/onecopy/registry"
)

// schemaVersion is at the top of every JSON document. Within a version fields
// are only added; names are snake_case, sizes are integer bytes, durations are
// seconds, times are RFC 3339 in UTC, and a value that is not known is null
// instead of absent.
const schemaVersion = 1

type schema struct {
	SchemaVersion int `json:"schema_version"`
}

func newSchema() schema { return schema{schemaVersion} }

type errorJSON struct {
	Error struct {
		Code    string  `json:"code"`
		Message string  `json:"message"`
		Hint    *string `json:"hint"`
	} `json:"error"`
}

type originJSON struct {
	Kind        string            `json:"kind"`
	Path        *string           `json:"path"`
	Version     *string           `json:"version"`
	Environment map[string]string `json:"environment"`
}

type fillJSON struct {
	CollapsedBytes int64 `json:"collapsed_bytes"`
	CopiedBytes    int64 `json:"copied_bytes"`
	DirectBytes    int64 `json:"direct_bytes"`
	Fallbacks      int   `json:"fallbacks"`
}

// pagesJSON is in which pages a model lies now.
type pagesJSON struct {
	Bytes       int64   `json:"bytes"` // of the model
	HugeBytes   int64   `json:"huge_bytes"`
	Share       float64 `json:"huge_share"`
	PathReaders *bool   `json:"path_readers"` // whether programs that map a path get them; null when there are none
	Fix         *string `json:"fix"`          // the command that would let them
}

// generationJSON is what a manifest says about one published generation.
type generationJSON struct {
	Name        string      `json:"name"`
	Epoch       string      `json:"epoch"` // 16 hexadecimal digits, as in file names
	Backing     string      `json:"backing"`
	Path        string      `json:"path"`
	FileCount   int         `json:"file_count"`
	Origin      *originJSON `json:"origin"`
	LoadedAt    *time.Time  `json:"loaded_at"`
	LoadSeconds float64     `json:"load_seconds"`
	Fill        fillJSON    `json:"fill"`
}

// modelJSON is one entry of the registry.
type modelJSON struct {
	Key          string     `json:"key"`
	State        string     `json:"state"`
	Generation   *uint64    `json:"generation"`
	Bytes        int64      `json:"bytes"`
	Leased       bool       `json:"leased"`
	Pinned       bool       `json:"pinned"`
	TTLSeconds   *float64   `json:"ttl_seconds"` // its own; null: the registry's default counts
	NeverExpires bool       `json:"never_expires"`
	LastAttach   *time.Time `json:"last_attach"`
	LastRelease  *time.Time `json:"last_release"`
	IdleSince    *time.Time `json:"idle_since"`
	RetryAfter   *time.Time `json:"retry_after"`
	Reserved     int64      `json:"reserved_bytes"`
	Deaths       int        `json:"deaths"`
	Attaches     uint64     `json:"attaches"`   // about
	LoaderPID    *int       `json:"loader_pid"` // for display, while a load runs

	Published *generationJSON `json:"published"` // null while nothing readable is
}

type fileJSON struct {
	Path    string     `json:"path"`
	Bytes   int64      `json:"bytes"`
	Digest  string     `json:"digest"`
	ModTime *time.Time `json:"mod_time"`
}

type holderJSON struct {
	Key               string     `json:"key"`
	Generation        uint64     `json:"generation"`
	PID               *int       `json:"pid"`
	Command           *string    `json:"command"`
	UID               *int       `json:"uid"`
	Since             *time.Time `json:"since"`
	ResidentBytes     *int64     `json:"resident_bytes"`
	ProportionalBytes *int64     `json:"proportional_bytes"`
	Via               string     `json:"via"`
	Visible           bool       `json:"visible"`
	Cgroup            *string    `json:"cgroup"` // control group; names the container
}

type statsJSON struct {
	Models          int    `json:"models"`
	Slots           int    `json:"slots"`
	UsedBytes       int64  `json:"used_bytes"`
	ReservedBytes   int64  `json:"reserved_bytes"`
	BudgetBytes     int64  `json:"budget_bytes"`
	FreeBytes       int64  `json:"free_bytes"`
	SizeBytes       int64  `json:"size_bytes"`
	Superseded      int    `json:"superseded"`
	SupersededBytes int64  `json:"superseded_bytes"`
	ModelBytes      int64  `json:"model_bytes"`    // used_bytes are these and superseded_bytes
	OverheadBytes   int64  `json:"overhead_bytes"` // of the table: besides used_bytes
	Epoch           string `json:"epoch"`
	LayoutVersion   int    `json:"layout_version"`
}

func toOriginJSON(o registry.Origin) *originJSON {
	env := o.Environment
	if len(env) == 0 {
		env = nil
	}
	return &originJSON{o.Kind, orNull(o.Path), orNull(o.Version), env}
}

func toModelJSON(e registry.Entry) modelJSON {
	m := modelJSON{
		Key: e.Key, State: e.State, Generation: orNull(e.Generation), Bytes: e.Bytes,
		Leased: e.Leased, Pinned: e.Pinned,
		LastAttach: utc(e.LastAttach), LastRelease: utc(e.LastRelease),
		IdleSince: utc(e.IdleSince), RetryAfter: utc(e.RetryAfter),
		Reserved: e.Reserved, Deaths: e.Deaths, LoaderPID: orNull(e.LoaderPID), Attaches: e.Attaches,
	}
	if e.TTL > 0 {
		s := e.TTL.Seconds()
		m.TTLSeconds = &s
	}
	m.NeverExpires = e.TTL < 0
	if e.Info != nil {
		m.Published = toGenerationJSON(*e.Info)
	}
	return m
}

func toGenerationJSON(i registry.Info) *generationJSON {
	return &generationJSON{
		Name: i.Name, Epoch: hex64(i.Epoch), Backing: i.Backing, Path: i.Path,
		FileCount: len(i.Files), Origin: toOriginJSON(i.Origin),
		LoadedAt: utc(i.LoadedAt), LoadSeconds: i.LoadTime.Seconds(),
		Fill: fillJSON{i.Fill.Collapsed, i.Fill.Copied, i.Fill.Direct, i.Fill.Fallbacks},
	}
}

func (a *app) toPagesJSON(p *registry.PageReport) *pagesJSON {
	if p == nil {
		return nil
	}
	j := &pagesJSON{Bytes: p.Bytes, HugeBytes: p.Huge, PathReaders: p.PathReaders}
	if p.Bytes > 0 {
		j.Share = float64(p.Huge) / float64(p.Bytes)
	}
	if p.PathReaders != nil && !*p.PathReaders {
		j.Fix = orNull(doctor.RemountHuge(a.registryDir()))
	}
	return j
}

// pagesText says in which pages a model lies, and who gets them.
func (a *app) pagesText(p registry.PageReport) string {
	j := a.toPagesJSON(&p)
	s := fmt.Sprintf("%.0f %% (%s of %s) in 2 MiB pages", 100*j.Share, a.size(j.HugeBytes), a.size(j.Bytes))
	switch {
	case j.PathReaders == nil:
	case *j.PathReaders:
		s += "; programs that map the path get them too"
	default:
		s += "; programs that map the path do not get them without " + *j.Fix
	}
	return s
}

func toFilesJSON(files []registry.File) []fileJSON {
	out := make([]fileJSON, len(files))
	for i, f := range files {
		out[i] = fileJSON{f.Path, f.Size, f.Digest, utc(f.ModTime)}
	}
	return out
}

func toHoldersJSON(hs []registry.Holder) []holderJSON {
	out := make([]holderJSON, len(hs))
	for i, h := range hs {
		j := holderJSON{
			Key: h.Key, Generation: h.Generation, PID: orNull(h.PID), Command: orNull(h.Command),
			Since: utc(h.Since), Via: h.Via, Visible: h.Visible, Cgroup: orNull(h.Cgroup),
		}
		if h.Visible {
			j.UID, j.ResidentBytes, j.ProportionalBytes = &h.UID, &h.Resident, &h.Proportional
		}
		out[i] = j
	}
	return out
}

func toStatsJSON(s registry.Stats) statsJSON {
	return statsJSON{
		s.Models, s.Slots, s.Used, s.Reserved, s.Budget, s.Free, s.Size,
		s.Superseded, s.SupersededBytes, s.ModelBytes, s.Overhead, hex64(s.Epoch), s.LayoutVersion,
	}
}

func hex64(v uint64) string { return fmt.Sprintf("%016x", v) }

func orNull[T comparable](v T) *T {
	var zero T
	if v == zero {
		return nil
	}
	return &v
}

func utc(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

// byKey sorts entries as every list shows them.
func byKey(es []registry.Entry) {
	slices.SortFunc(es, func(x, y registry.Entry) int { return strings.Compare(x.Key, y.Key) })
}
