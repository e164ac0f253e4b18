package registry

import "time"

// Config are a registry's limits, the same for all processes.
type Config struct {
	Budget      int64         // bytes that all generations together may use; 0: BudgetShare counts
	BudgetShare float64       // of the tmpfs, 0 to 1; 0 (with Budget 0) is the default, 0.8
	TTL         time.Duration // idle time after which a model without a TTL of its own expires; 0: never
}

// TrimReport says what Trim did.
type TrimReport struct {
	Removed []string // keys
	Freed   int64    // bytes
	Used    int64    // bytes that the registry still uses
	Held    int64    // Used, if that is more than was asked for: all of it is in use or pinned
}

// GenerationInfo is one generation of a key that is still in memory.
type GenerationInfo struct {
	Generation uint64
	Published  bool // new users get this one
	Bytes      int64
	LoadedAt   time.Time
	Origin     Origin
	Holders    []Holder
}
