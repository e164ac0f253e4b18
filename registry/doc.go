// Package registry is the host-wide table of loaded models: find a model, load
// it once per machine, hold it while it is used, remove it when nobody needs it.
//
//	reg, err := registry.Open(registry.DefaultDir(), nil)
//	m, err := reg.GetOrLoad(ctx, "all-MiniLM-L6-v2", registry.Source{Path: "/models/minilm"})
//	defer m.Close()
//	weights, err := m.Bytes("model.safetensors") // the same physical pages in every process
//	run(m.Path())                                // or: a runtime that opens files
//
// There is no daemon. The kernel's locks and mappings keep all that has to be
// kept: who loads, who uses, who died.
//
// # Life of an entry
//
//	FREE ──claim──> LOADING ──publish──> READY ──mark──> EVICTING ──unlink──> FREE
//	                                     READY|g ──publish──> READY|g' (replace)
//
// A model generation is a manifest m/<epoch>-<gen>.manifest and a folder beside
// it. The manifest's mapping, with the shared lock of its file description, is
// the lease: the kernel drops it at munmap, exec or death. Removing needs the
// exclusive lock. A slot of the header table names the published generation of
// a key in one word, whose every change is one compare-and-swap.
//
// # Locks
//
//	K  w/k-NNNN   one per stripe of keys; held during a load
//	T  w/table    held for a few stores and unlinks, never while bytes move
//	S  a manifest's lock: shared = lease, exclusive = removing
//
// Order: K, then T. S is only ever tried. Nobody waits for K while holding T
// (the K of another key is tried). In this process: a key's flight, then K, then
// T; Registry.mu is never held across a wait or a system call.
//
// Each transient state has one owner lock; whoever holds that lock and sees the
// state knows that its owner is dead: LOADING under K, EVICTING under T.
//
// # Crashes
//
// A process may die anywhere. What is left at each step, and who repairs it, is
// the table in docs/CRASH.md; internal/model checks the same protocol
// exhaustively, under the same step names. In short:
//
//	while filling             anonymous files: the kernel drops them; the slot is
//	                          LOADING, the next holder of K frees it
//	manifest or payload linked, not READY
//	                          LOADING: the next holder of K removes them;
//	                          replacing: the collector, once the lock is gone
//	READY                     the model stays
//	EVICTING                  the next holder of T finishes, or undoes it if a
//	                          lease exists
//	manifest unlinked         the rest is a leftover: the collector removes it
//
// # Caveats
//
// Bytes of a Model are valid until Close. A path (Model.Path) is valid only while
// a lease is held. A child of fork shares the lease of its parent's mappings. The
// registry may be deleted by others (systemd-logind's RemoveIPC does so with
// ordinary users' files in /dev/shm): models in use go on, new calls make a new
// registry. Nobody evicts while nobody calls: idle models go at the next load
// that needs the room, or at GC.
package registry
