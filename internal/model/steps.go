package model

// A Step is one step of the protocol in generation.go. Names are stable: docs and
// crash points refer to them.
type Step struct {
	Name string // "load.claim"
	Does string // the system call or the atomic access
	// Lasting: it changes the table or the names on the tmpfs, which outlive the
	// process. A kill right after it leaves a picture of its own to repair.
	Lasting bool
	// ModelOnly: registry/ has no such step. It belongs to a removed rule, to a
	// writer without compare-and-swap, or marks a state for the checker.
	ModelOnly bool
}

// Steps lists the steps of generation.go in the order of the protocol.
var Steps = steps[:stepDone]

// A step is the place of a process in the protocol, and an index of Steps.
type step uint8

const (
	openRegistry step = iota

	acqWord
	acqKey
	acqOpen
	acqLease
	acqRecheck
	acqMap
	acqAwait
	useOpen
	useRelease

	loadLockKey
	loadLockTable
	loadLook
	loadGeneration
	loadKey
	loadClaim
	loadUnlockTable
	loadFill // from here to pubUnlockKey the process is the loader of its key (I4)
	loadLinkManifest
	loadLinkManifestLate
	loadMkdir
	loadLinkPayload
	loadLeased
	pubLockTable
	pubReady
	pubStore
	pubClaimEvicted
	pubUnlockTable
	pubUnlockKey

	abortDropFiles
	abortLockTable
	abortFree
	abortUnlinkManifest
	abortUnlinkPayload
	abortRmdir

	retireLockTable
	retireLockManifest
	retireUnlinkManifest
	retireUnlinkPayload
	retireRmdir

	reclaimLockManifest
	reclaimTryShared
	reclaimUndo
	reclaimUnlinkManifest
	reclaimUnlinkManifestLate
	reclaimUnlinkDeadLoad
	reclaimUnlinkPayload
	reclaimFree

	evictWord
	evictLockTable
	evictOpen
	evictLockManifest
	evictMark
	evictUnlinkManifest
	evictUnlinkManifestLate
	evictFree
	evictUnlockTable
	evictUnlinkPayload
	evictRmdir
	evictClose

	undoLockKey
	undoLockTable
	undoLease
	undoReady
	undoUnlock

	collectLockTable
	collectSlot
	collectNext
	collectLockManifest
	collectUnlinkManifest
	collectUnlinkPayload
	collectRmdir
	collectUnlockTable

	stepDone
	stepDead
)

func (s step) String() string { return steps[s].Name }

var steps = [...]Step{
	openRegistry: {Name: "open.registry", Does: "open the table, or create it in an O_TMPFILE and linkat it", Lasting: true},

	acqWord:    {Name: "acquire.word", Does: "load the slot word, want READY"},
	acqKey:     {Name: "acquire.key", Does: "compare the slot's key text"},
	acqOpen:    {Name: "acquire.open-manifest", Does: "open the manifest read-only"},
	acqLease:   {Name: "acquire.lease", Does: "LOCK_SH|LOCK_NB on the manifest"},
	acqRecheck: {Name: "acquire.recheck", Does: "load the slot word again under the lease"},
	acqMap:     {Name: "acquire.map", Does: "fstat and validate the manifest, mmap it, close the descriptor"},
	acqAwait:   {Name: "acquire.await", Does: "who can only read loads the word again until the load is over"},
	useOpen:    {Name: "use.open-payload", Does: "open and map the payload files"},
	useRelease: {Name: "use.release", Does: "munmap everything, which drops the lease"},

	loadLockKey:          {Name: "load.lock-key", Does: "LOCK_EX on K"},
	loadLockTable:        {Name: "load.lock-table", Does: "LOCK_EX on T"},
	loadLook:             {Name: "load.look", Does: "registry still ours; look again, free a READY slot without manifest", Lasting: true},
	loadGeneration:       {Name: "load.generation", Does: "add one to the generation counter", Lasting: true},
	loadKey:              {Name: "load.key", Does: "store the key text in the free slot", Lasting: true},
	loadClaim:            {Name: "load.claim", Does: "CAS FREE -> LOADING|g", Lasting: true},
	loadUnlockTable:      {Name: "load.unlock-table", Does: "release T"},
	loadFill:             {Name: "load.fill", Does: "fill, digest and seal the O_TMPFILEs; write the manifest, LOCK_SH and map it"},
	loadLinkManifest:     {Name: "load.link-manifest", Does: "linkat the manifest", Lasting: true},
	loadLinkManifestLate: {Name: "load.link-manifest-late", Does: "linkat the manifest after the payload (a removed rule)", Lasting: true, ModelOnly: true},
	loadMkdir:            {Name: "load.mkdir", Does: "mkdir of the generation", Lasting: true},
	loadLinkPayload:      {Name: "load.link-payload", Does: "linkat the payload files", Lasting: true},
	loadLeased:           {Name: "load.leased", Does: "nothing: the lease is held since load.fill (a removed rule takes it here)", ModelOnly: true},
	pubLockTable:         {Name: "publish.lock-table", Does: "LOCK_EX on T"},
	pubReady:             {Name: "publish.ready", Does: "registry still ours; CAS LOADING|g -> READY|g, or READY|g -> READY|g'", Lasting: true},
	pubStore:             {Name: "publish.store", Does: "plain store of READY (a writer without compare-and-swap)", Lasting: true, ModelOnly: true},
	pubClaimEvicted:      {Name: "publish.claim-evicted", Does: "evicted meanwhile: store the key, CAS FREE -> READY|g'", Lasting: true},
	pubUnlockTable:       {Name: "publish.unlock-table", Does: "release T"},
	pubUnlockKey:         {Name: "publish.unlock-key", Does: "release K"},

	abortDropFiles:      {Name: "abort.drop-files", Does: "close the O_TMPFILEs, nothing is linked yet"},
	abortLockTable:      {Name: "abort.lock-table", Does: "LOCK_EX on T"},
	abortFree:           {Name: "abort.free", Does: "CAS LOADING|g -> FREE, release T and K", Lasting: true},
	abortUnlinkManifest: {Name: "abort.unlink-manifest", Does: "unlink the own manifest", Lasting: true},
	abortUnlinkPayload:  {Name: "abort.unlink-payload", Does: "unlink the own payload", Lasting: true},
	abortRmdir:          {Name: "abort.rmdir", Does: "rmdir; CAS LOADING|g -> FREE where T is held; release T and K", Lasting: true},

	retireLockTable:      {Name: "retire.lock-table", Does: "LOCK_EX on T"},
	retireLockManifest:   {Name: "retire.lock-manifest", Does: "no slot names it; LOCK_EX|LOCK_NB on the old manifest"},
	retireUnlinkManifest: {Name: "retire.unlink-manifest", Does: "unlink the old manifest, release T", Lasting: true},
	retireUnlinkPayload:  {Name: "retire.unlink-payload", Does: "unlink the old payload", Lasting: true},
	retireRmdir:          {Name: "retire.rmdir", Does: "rmdir of the old generation, close its manifest", Lasting: true},

	reclaimLockManifest:       {Name: "reclaim.lock-manifest", Does: "open the dead owner's manifest, LOCK_EX|LOCK_NB"},
	reclaimTryShared:          {Name: "reclaim.try-shared", Does: "refused: LOCK_SH|LOCK_NB tells leases from a stranger's LOCK_EX"},
	reclaimUndo:               {Name: "reclaim.undo", Does: "leases exist: close, CAS EVICTING -> READY", Lasting: true},
	reclaimUnlinkManifest:     {Name: "reclaim.unlink-manifest", Does: "unlink the manifest", Lasting: true},
	reclaimUnlinkManifestLate: {Name: "reclaim.unlink-manifest-late", Does: "unlink the manifest after the payload (a removed rule)", Lasting: true, ModelOnly: true},
	reclaimUnlinkDeadLoad:     {Name: "reclaim.unlink-dead-load", Does: "unlink what a dead loader has linked: nobody can lease it", Lasting: true},
	reclaimUnlinkPayload:      {Name: "reclaim.unlink-payload", Does: "unlink the payload", Lasting: true},
	reclaimFree:               {Name: "reclaim.free", Does: "rmdir, close, CAS -> FREE", Lasting: true},

	evictWord:               {Name: "evict.word", Does: "load the victim's slot word, want READY"},
	evictLockTable:          {Name: "evict.lock-table", Does: "LOCK_EX on T"},
	evictOpen:               {Name: "evict.open-manifest", Does: "word unchanged; open the manifest"},
	evictLockManifest:       {Name: "evict.lock-manifest", Does: "LOCK_EX|LOCK_NB on the manifest"},
	evictMark:               {Name: "evict.mark", Does: "CAS READY -> EVICTING", Lasting: true},
	evictUnlinkManifest:     {Name: "evict.unlink-manifest", Does: "unlink the manifest", Lasting: true},
	evictUnlinkManifestLate: {Name: "evict.unlink-manifest-late", Does: "unlink the manifest after the payload (a removed rule)", Lasting: true, ModelOnly: true},
	evictFree:               {Name: "evict.free", Does: "CAS EVICTING -> FREE", Lasting: true},
	evictUnlockTable:        {Name: "evict.unlock-table", Does: "release T before the payload: freeing pages takes long"},
	evictUnlinkPayload:      {Name: "evict.unlink-payload", Does: "unlink the payload", Lasting: true},
	evictRmdir:              {Name: "evict.rmdir", Does: "rmdir of the generation", Lasting: true},
	evictClose:              {Name: "evict.close", Does: "close the manifest"},

	undoLockKey:   {Name: "undo.lock-key", Does: "LOCK_EX on K"},
	undoLockTable: {Name: "undo.lock-table", Does: "LOCK_EX on T"},
	undoLease:     {Name: "undo.lease", Does: "LOCK_SH|LOCK_NB on the previous generation's manifest"},
	undoReady:     {Name: "undo.ready", Does: "every listed file is there; CAS READY|g+1 -> READY|g", Lasting: true},
	undoUnlock:    {Name: "undo.unlock", Does: "release T, K and the lease"},

	collectLockTable:      {Name: "collect.lock-table", Does: "LOCK_EX on T"},
	collectSlot:           {Name: "collect.slot", Does: "judge the slot; free a READY slot without manifest", Lasting: true},
	collectNext:           {Name: "collect.next", Does: "find a generation that no slot names"},
	collectLockManifest:   {Name: "collect.lock-manifest", Does: "LOCK_EX|LOCK_NB on its manifest"},
	collectUnlinkManifest: {Name: "collect.unlink-manifest", Does: "unlink its manifest", Lasting: true},
	collectUnlinkPayload:  {Name: "collect.unlink-payload", Does: "unlink its payload", Lasting: true},
	collectRmdir:          {Name: "collect.rmdir", Does: "rmdir of the generation, close", Lasting: true},
	collectUnlockTable:    {Name: "collect.unlock-table", Does: "release T"},

	stepDone: {Name: "done"},
	stepDead: {Name: "dead"},
}
