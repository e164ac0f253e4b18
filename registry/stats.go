package registry

import "time"

func (r *Registry) localStats() Stats {
	s := &r.stats
	return Stats{
		Hits: r.hits(), Misses: s.misses.Load(), Attaches: s.attaches.Load(), Loads: s.loads.Load(),
		Waits: s.waits.Load(), Takeovers: s.takeovers.Load(), Replaced: s.replaced.Load(),
		Fallbacks: s.fallbacks.Load(), Retries: s.retries.Load(),
		Reclaimed: s.reclaimed.Load(), Leftovers: s.leftovers.Load(),
		LoadTime: time.Duration(s.loadNanos.Load()), BytesLoaded: s.bytesLoaded.Load(), BytesSaved: s.bytesSaved.Load(),
	}
}
