package registry

import (
	"context"
	"io/fs"
	"log/slog"
	"time"
)

// Options of Open; nil and zero values are the defaults.
type Options struct {
	MustExist   bool          // never create a registry: ErrNoRegistry when there is none
	Slots       int           // capacity when the registry is created; 0: 1024
	Mode        fs.FileMode   // of its directory when it is created: 0700 (default), or 0755 to let other users read
	TrustOwner  uint32        // a uid, besides this process's own and root, whose registry may be read
	Budget      int64         // bytes, stored when the registry is created; 0: 80 % of the tmpfs
	LoadTimeout time.Duration // longest wait for another process's load; 0: 10 minutes
	Threads     int           // that fill a segment at once; 0: 2, or 1 on one processor
	Populate    bool          // enter all pages of a model into the page table when attaching
	Logger      *slog.Logger  // nil: silent
}

// OnChange says what to do with a loaded model whose source has changed.
type OnChange int

// A source that changed is an error by default: two deployments that share a
// key by mistake must not replace each other's model in turn.
const (
	ChangeError   OnChange = iota // ErrSourceChanged
	ChangeReplace                 // load a new generation; old leases stay valid
	ChangeIgnore                  // use what is loaded
)

// Source says where a model comes from: exactly one of Path and Load is set.
type Source struct {
	// Path of a file or a folder. Symbolic links in it are followed to regular
	// files; anything else that is not a folder is refused. What is compared once
	// per process is its text: a relative path must go on meaning the same.
	Path string

	// Load writes the model's files. It runs in the calling goroutine, once per
	// machine, and must not load another model (ErrNestedLoad). What it made is
	// identified by Version and Environment, which must be UTF-8.
	Load        func(ctx context.Context, w *Writer) error
	Version     string
	Environment map[string]string
	Size        int64 // bytes that Load will write; 0: not known

	OnChange OnChange
	Replace  bool // load a new generation in any case

	// Progress is called now and then during a load with bytes done and in
	// all (0: not known), from any of the loading threads.
	Progress func(done, total int64)

	// prove is called before a new generation is published, see Rollout.
	prove func(context.Context, *Model) error

	replaced uint64 // set by a load: see Info
}

// File is one file of a model.
type File struct {
	Path    string // relative to the model's folder, with slashes
	Size    int64  // bytes
	Digest  string // "xxh3-128:..." over size and chunk digests: docs/FORMAT.md
	ModTime time.Time
}

// Origin says where a generation came from.
type Origin struct {
	Kind        string // "path" or "func"
	Path        string // real path of the source, with U+FFFD for what is not UTF-8
	Version     string
	Environment map[string]string
}

// FillStats counts the bytes of a load by the way they took.
type FillStats struct {
	Collapsed int64 // into 2 MiB pages
	Copied    int64 // into 4 KiB pages
	Direct    int64 // past the page cache
	Fallbacks int   // windows for which the kernel granted no 2 MiB pages
}

// Info describes one published generation.
type Info struct {
	Key        string
	Name       string // of its folder
	Generation uint64
	Epoch      uint64
	Bytes      int64
	Backing    string
	Origin     Origin
	LoadedAt   time.Time
	LoadTime   time.Duration
	Fill       FillStats
	Files      []File
	Path       string // of its folder

	// AlreadyPresent: the call that returned this model did not load it.
	AlreadyPresent bool

	// Replaced is the generation in whose place that call published this one; 0:
	// there was none, or the call did not load.
	Replaced uint64
}

// Entry is what a slot of the header table describes.
type Entry struct {
	Key         string
	State       string // loading, ready, evicting
	Generation  uint64
	Bytes       int64
	Leased      bool // for display: from /proc/locks
	Pinned      bool
	TTL         time.Duration // its own: 0 is the registry's default, negative is never
	LastAttach  time.Time
	LastRelease time.Time
	IdleSince   time.Time
	Reserved    int64
	Deaths      int
	RetryAfter  time.Time
	LoaderPID   int    // while loading; for display
	Attaches    uint64 // about
	Info        *Info  // of a READY entry; nil when its manifest cannot be read
}

// Holder is a process that holds a lease. It is for display only: the kernel's
// locks decide, and processes of other users and PID namespaces may be missing.
type Holder struct {
	Key          string
	Generation   uint64
	PID          int
	Command      string
	UID          int
	Since        time.Time // start of the process
	Resident     int64     // bytes of the model in its page table
	Proportional int64     // its share of them
	Via          string    // "mapping", "descriptor", "lock" (of a process that cannot be looked into), or "unlinked"
	Visible      bool
	Cgroup       string // control group of the process, as far as it is visible
}

// HolderReport is what can be seen of who holds what. It is for display only.
type HolderReport struct {
	// Holders by key, generation and process. One that maps files whose names
	// are gone has Via "unlinked": its key may be unknown, Resident is what it
	// maps of them, at most.
	Holders []Holder

	Hidden   int   // processes that this user may not look into: they may hold something too
	Unseen   int   // generations that are leased, by nobody among Holders
	Outside  bool  // this is not the machine's PID namespace: those outside are not visible, nor counted
	Unlinked int64 // bytes of files without a name that somebody still maps
}

// PageReport says in which pages a model lies, as measured when it was asked for.
type PageReport struct {
	Bytes int64 // of the model
	Huge  int64 // of these, in 2 MiB pages that the library's own mappings use whole

	// PathReaders says whether a program that maps a file by its path gets the
	// 2 MiB pages too; nil when there are none to get.
	PathReaders *bool
}

// Charge is memory that counts for a control group.
type Charge struct {
	Cgroup string // below the cgroup file system; "" for none, "?" for one that is gone or not visible
	Bytes  int64
}

// Counters count what all processes did since the registry was made. A process
// that is killed at the wrong moment may leave something uncounted.
type Counters struct {
	Loads          uint64
	LoadTime       time.Duration // of all loads together
	LoadBytes      int64
	CollapsedBytes int64 // of these, in 2 MiB pages
	LoadErrors     uint64
	Takeovers      uint64 // loads that began by burying a dead loader of the key
	Replaced       uint64
	Removed        uint64 // on request
	EvictedSpace   uint64 // because bytes were needed
	EvictedTable   uint64 // because a slot was needed
	EvictedTTL     uint64
	Reclaimed      uint64 // unfinished work of dead processes
	Leftovers      uint64
	Fallbacks      uint64 // windows without 2 MiB pages
}

// Problem is a broken invariant.
type Problem struct {
	Kind   string // table, manifest, payload, digest, leftover, loading, evicting, lock, version
	Key    string
	Path   string
	Text   string
	Repair string // what repairs it
	Note   bool   // worth knowing, but nothing is broken
}

// CheckOptions of Check.
type CheckOptions struct {
	Key  string // only this one; "" is all
	Data bool   // digest the payload again: each model is used by that
}

// GCReport says what GC removed.
type GCReport struct {
	Reclaimed int      // slots whose owner died
	Expired   int      // idle models past their TTL
	Orphans   int      // generations that no slot names and nobody leases
	Leftovers int      // files without a manifest
	Freed     int64    // bytes
	Removed   []string // names below m/
	Keys      []string // of the models that expired
}

// Stats of this process and of the registry.
type Stats struct {
	// This process, since Open.
	Hits        uint64 // answered from this process's own map
	Misses      uint64
	Attaches    uint64 // models mapped
	Loads       uint64 // models loaded by this process
	Waits       uint64 // for a load of another process or goroutine
	Takeovers   uint64 // loads begun after another loader died
	Replaced    uint64
	Fallbacks   uint64 // windows without 2 MiB pages
	Retries     uint64 // look-ups begun again because the entry moved or was locked for a moment
	Reclaimed   uint64 // unfinished work of dead processes that this one ended
	Leftovers   uint64 // files and folders without a slot that it removed
	LoadTime    time.Duration
	BytesLoaded int64
	BytesSaved  int64 // bytes of models attached instead of loaded, and of further users of the same mapping

	// The registry, recomputed at each call.
	Models          int
	Slots           int
	Used            int64 // memory of all generations: ModelBytes and SupersededBytes
	ModelBytes      int64 // memory of the generations that the table names
	Overhead        int64 // memory of the table itself, which no budget counts
	Reserved        int64 // still to be allocated by running loads
	Budget          int64
	Free            int64 // on the tmpfs
	Size            int64 // of the tmpfs
	Superseded      int   // generations that no slot names any more
	SupersededBytes int64
	Epoch           uint64
	LayoutVersion   int
}
