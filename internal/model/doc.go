// Package model is the executable specification of the registry's protocol: an
// explicit-state model checker and the protocol written as a transition system.
// It runs every interleaving of a few processes and a kill -9 after every step,
// and shows that nothing is lost; each configuration with a rule removed must be
// caught. The library never imports it. If the protocol changes, change it here
// first, then in registry/ and docs/CRASH.md.
//
// # What is modelled
//
// generation.go is the protocol that registry/ implements: a model generation is
// a manifest (its lock and mapping are the lease) and a folder of payload files
// beside it; the slot carries a word (state and generation) and a key; a key can
// be replaced while its old generation is leased. Loads evict to make room, another
// user only reads and awaits loads, and a writer may have no compare-and-swap.
//
// segment.go is the older form of the same protocol, one file per generation with
// its metadata in the slot. It stays because it covers more kinds of fault: forked
// children that keep or drop locks, a flock that lies, named temporary files, a
// writer that evicts by truncation, a writer without compare-and-swap.
//
// micro.go holds two small models: a lock file that is removed after use, and
// several processes that create the registry at once.
//
// One step is one system call or one 64-bit atomic access. Faults are steps too:
// kill -9 of any process at any point, restarts, files or the registry removed by
// a third party, an outsider that takes LOCK_EX for ever, a full memory.
//
// # What is checked
//
// In every reachable state, the invariants that a crash must not break:
//
//	I1   leased bytes are the complete content of the key and generation looked up
//	I2a  a model in use is leased: its open file description holds the shared lock
//	I2b  our own code never unlinks a generation while it is leased
//	I3   READY means linked, complete, and of the slot's key and generation
//	I4   at most one process loads a key
//	I7   metadata that a reader accepts is never torn (segment.go)
//	I8   PROGRESS: from every state, every live process can finish without a fault
//	I9   RECOVERY: kill everybody in this state; one process alone gets its model,
//	     no lock is held, no transient state and no byte too many is left
//
// I5 (EVICTING has one owner, who holds the table lock) and I6 (a generation never
// names two contents) hold by construction.
//
// # Bounds
//
// One table slot (so that reuse by another key is forced), up to 5 processes, 2
// keys, 3 generations per registry, 2 registries over time, the numbers of kills
// and faults of each configuration. Memory is sequentially consistent, which Go's
// atomics provide. Not modelled: weak memory, hash probing, several slots, the
// bytes themselves, time-outs, and reading a directory entry by entry: the
// collector of the model sees one generation's manifest and folder in one step, so
// code that reads the folder must look for the manifest after it has seen the
// folder, never before. States are identified by a 128-bit hash.
//
// # Steps and crash points
//
// [Steps] names every step of generation.go. The names are stable: the crash
// points of registry/ carry the same meaning, and docs/CRASH.md says for each what
// lies on the tmpfs after a kill there and who repairs it. A step marked Lasting
// changes something that outlives its process; between two lasting steps a kill
// makes no difference, because the kernel takes the locks back.
//
// # Running it
//
//	go test ./internal/model                        the short configurations
//	go run ./internal/model/cmd/modelcheck          the default set, some minutes
//	go run ./internal/model/cmd/modelcheck -all     the big ones too, some GB
//	go run ./internal/model/cmd/modelcheck -only "gen mutant" -trace
//
// RESULTS.txt is the output of the default set. The tests compare the numbers of
// states and steps with it, so that no change of the model goes unnoticed.
package model
