//go:build !linux || !(amd64 || arm64) || onecopy_private

package registry

import (
	"context"
	"time"
)

// Models that are private to a process need no policy: they go with it.

// Pin is for shared models.
func (r *Registry) Pin(ctx context.Context, key string) error { return opErr("pin", key, errPrivate) }

// Unpin is for shared models.
func (r *Registry) Unpin(ctx context.Context, key string) error {
	return opErr("unpin", key, errPrivate)
}

// SetTTL is for shared models.
func (r *Registry) SetTTL(ctx context.Context, key string, ttl time.Duration) error {
	return opErr("ttl", key, errPrivate)
}

// Touch is for shared models.
func (r *Registry) Touch(ctx context.Context, key string) error {
	return opErr("touch", key, errPrivate)
}

// Config is for shared models.
func (r *Registry) Config() (Config, error) { return Config{}, opErr("config", "", errPrivate) }

// SetConfig is for shared models.
func (r *Registry) SetConfig(ctx context.Context, c Config) error {
	return opErr("config", "", errPrivate)
}

// Trim is for shared models.
func (r *Registry) Trim(ctx context.Context, to int64) (TrimReport, error) {
	return TrimReport{}, opErr("trim", "", errPrivate)
}

// PlanTrim is for shared models.
func (r *Registry) PlanTrim(ctx context.Context, to int64) (TrimReport, error) {
	return TrimReport{}, opErr("trim", "", errPrivate)
}

// PlanConfig is for shared models.
func (r *Registry) PlanConfig(ctx context.Context, c Config) error {
	return opErr("config", "", errPrivate)
}

// PlanRemove is for shared models.
func (r *Registry) PlanRemove(ctx context.Context, key string) error {
	return opErr("remove", key, errPrivate)
}

// PlanGC is for shared models.
func (r *Registry) PlanGC(ctx context.Context) (GCReport, error) {
	return GCReport{}, opErr("gc", "", errPrivate)
}

// Rollout is for shared models.
func (r *Registry) Rollout(ctx context.Context, key string, src Source, prove func(context.Context, *Model) error) (*Model, error) {
	return nil, opErr("load", key, errPrivate)
}

// Undo is for shared models.
func (r *Registry) Undo(ctx context.Context, key string) (published, replaced uint64, err error) {
	return 0, 0, opErr("undo", key, errPrivate)
}

// Generations is for shared models.
func (r *Registry) Generations(key string) ([]GenerationInfo, error) {
	return nil, opErr("generations", key, errPrivate)
}

// Counters is for shared models.
func (r *Registry) Counters() (Counters, error) {
	return Counters{}, opErr("counters", "", errPrivate)
}

// HugePages is for shared models.
func (r *Registry) HugePages(key string) (PageReport, error) {
	return PageReport{}, opErr("pages", key, errPrivate)
}

// Charges is for shared models.
func (r *Registry) Charges(key string) ([]Charge, error) {
	return nil, opErr("charges", key, errPrivate)
}
