package layout

// A Field is one field of the header, of a slot or of the digests file. Changing
// a row that a reader could notice changes the format: see CONTRIBUTING.md.
type Field struct {
	Struct  string // "header", "slot" or "digests"
	Offset  int    // from the struct's start; negative: from the end of the file
	Size    int    // in bytes; 8 is a number unless Meaning says otherwise
	Name    string // the same in all languages; "unused" is room for later, zero
	Writer  string // who may write it, when, under which lock
	Meaning string
}

// Writers of a field.
const (
	byCreator  = "creator" // before the file is linked, never again
	underT     = "T"
	underTFree = "T, slot FREE"
	underTKey  = "T and K"
	unlocked   = "owner, no lock" // one aligned 8-byte write() by a process of the registry's uid
)

// Fields lists every byte of the three binary structs, in order. The tables of
// docs/FORMAT.md and the constants of other languages are made from it.
var Fields = []Field{
	{"header", offMagic, 8, "magic", byCreator, "the bytes `onecopy\\n`"},
	{"header", offVersion, 8, "version", byCreator, "layout version, 1"},
	{"header", offByteOrder, 8, "byte_order", byCreator, "0x0102030405060708; compare it as a number of your machine's own byte order"},
	{"header", offEpoch, 8, "epoch", byCreator, "random, never 0: identifies this table's life in every file name of a generation"},
	{"header", offBootID, 16, "boot_id", byCreator, "16 bytes of /proc/sys/kernel/random/boot_id: clock values of another boot mean nothing"},
	{"header", offSlots, 8, "slots", byCreator, "capacity"},
	{"header", offIndex, 8, "index_entries", byCreator, "the smallest power of two that is at least 4 x slots"},
	{"header", offStripes, 8, "stripes", byCreator, "number of load locks K, 1024"},
	{"header", offSlotSize, 8, "slot_size", byCreator, "448"},
	{"header", offCreated, 8, "created", byCreator, "nanoseconds since 1970, for display"},
	{"header", offCreated + 8, offChecksum - offCreated - 8, "unused", byCreator, "zero; covered by the checksum"},
	{"header", offChecksum, 8, "checksum", byCreator, "XXH64, seed 0, of the header's bytes before this field"},
	{"header", offGeneration, 8, "generation", underT, "the last generation given out; it only grows, so no generation is ever used twice"},
	{"header", offGeneration + 8, offBudget - offGeneration - 8, "unused", "nobody", "zero"},
	{"header", offBudget, 8, "budget", underT, "bytes that all generations together may use; 0: see budget_ppm"},
	{"header", offBudgetPPM, 8, "budget_ppm", underT, "the same as a share of the tmpfs's size, in millionths; 0 or over 1,000,000 counts as 800,000"},
	{"header", offTTL, 8, "ttl", underT, "idle nanoseconds after which a model expires, for slots whose own ttl is 0; 0: never"},
	{"header", offTTL + 8, offCounters - offTTL - 8, "unused", "nobody", "zero"},
	counter(CountLoads, "count_loads", "generations published"),
	counter(CountLoadNanos, "count_load_nanos", "nanoseconds that these loads took together"),
	counter(CountLoadBytes, "count_load_bytes", "bytes of their payload"),
	counter(CountCollapsedBytes, "count_collapsed_bytes", "of these, bytes that were filled in 2 MiB pages"),
	counter(CountTakeovers, "count_takeovers", "loads that began by burying a dead loader of the same key"),
	counter(CountReplaced, "count_replaced", "publications that replaced an older generation of the key"),
	counter(CountRemoved, "count_removed", "models removed on request"),
	counter(CountEvictedSpace, "count_evicted_space", "models evicted because bytes were needed"),
	counter(CountEvictedTable, "count_evicted_table", "models evicted because a slot was needed"),
	counter(CountEvictedTTL, "count_evicted_ttl", "models evicted because their idle time was over"),
	counter(CountReclaimed, "count_reclaimed", "transient states of dead processes that were finished or undone"),
	counter(CountLeftovers, "count_leftovers", "files and folders without a slot that were removed"),
	counter(CountLoadErrors, "count_load_errors", "loads that ended in an error of their source or for want of memory"),
	counter(CountFallbacks, "count_fallbacks", "load windows that were to be 2 MiB pages and could not"),
	{"header", offCounters + 8*int(counterEnd), 8 * (numCounters - int(counterEnd)), "unused", underT, "zero; counters of later programs, to be left alone"},
	{"header", offCounters + 8*numCounters, HeaderSize - offCounters - 8*numCounters, "unused", "nobody", "zero"},

	{"slot", slotWord, 8, "word", "T, compare-and-swap", "state in the highest byte, generation in the other seven; it keeps the generation when the slot becomes FREE"},
	{"slot", slotKeyLen, 8, "key_len", underTFree, "bytes of the key, 1 to 255; 0: the slot names nothing. Cleared before the key is written, stored after it"},
	{"slot", slotKey, 256, "key", underTFree, "the key's UTF-8 text, then zeros; written in aligned 8-byte words"},
	{"slot", slotKey + 256, slotHints - slotKey - 256, "unused", "nobody", "zero"},
	hint(HintBytes, "bytes", underT, "bytes of the generation's files, copied from the manifest when it is published; the manifest decides. While LOADING: what the load may use in all, which the budget counts"),
	hint(HintTTL, "ttl", underT, "idle nanoseconds after which the model expires; 0: the header's ttl"),
	hint(HintPin, "pin", underT, "not 0: neither the budget nor a ttl removes the model"),
	hint(HintLastAttach, "last_attach", unlocked, "CLOCK_BOOTTIME nanoseconds of the last attach, or when a holder of T with a ttl to keep last found a lease; orders victims; a value in the future counts as now"),
	hint(HintLastRelease, "last_release", unlocked, "the same for the last release; killed processes and foreign readers leave none"),
	hint(HintIdleSince, "idle_since", underT, "CLOCK_BOOTTIME nanoseconds when a holder of T first found the manifest without a lease after last_attach; 0 when it found one, and after publishing. last_release counts instead if it is not before last_attach"),
	hint(HintReserved, "reserved", underTKey, "bytes that a running load still has to allocate; valid only while K is held, cleared by whoever obtains K"),
	hint(HintDeaths, "deaths", underTKey, "loads of this key in a row whose loader died: incremented by whoever holds K and buries one, cleared by a publication; from 3 on retry_after counts"),
	hint(HintRetryAfter, "retry_after", underTKey, "CLOCK_BOOTTIME nanoseconds before which nobody loads the key again; more than 5 minutes ahead it counts for nothing"),
	hint(HintAttaches, "attaches", unlocked, "attaches so far, about: increments that race are lost; for display"),
	hint(HintLoaderPID, "loader_pid", underTKey, "process that loads, 0: none; for display, no decision uses it"),
	hint(HintLoadStart, "load_start", underTKey, "CLOCK_BOOTTIME nanoseconds when the running load began, 0: none runs; whoever obtains K and finds it not 0 buries a dead load. Its value is for display"),
	hint(HintPrevious, "previous", underTKey, "the generation of the same key that this one replaced, 0: none; whether it still exists only its manifest and files can tell"),
	hint(HintPromised, "promised", underTKey, "bytes that a running load may use in all, which the budget counts while nothing of its generation has a name; 0: none. Valid and cleared like reserved"),
	{"slot", slotHints + 8*int(hintEnd), 8 * (numHints - int(hintEnd)), "unused", underTFree, "zero; hints of later programs, cleared with the others when a slot is named"},

	{"digests", offDigMagic, 8, "magic", byCreator, "the bytes `cdigests`"},
	{"digests", offDigVersion, 8, "version", byCreator, "layout version, 1"},
	{"digests", offDigEpoch, 8, "epoch", byCreator, "the manifest's epoch"},
	{"digests", offDigGeneration, 8, "generation", byCreator, "the manifest's generation"},
	{"digests", offDigChunkBytes, 8, "chunk_bytes", byCreator, "the manifest's chunk_bytes"},
	{"digests", offDigCount, 8, "count", byCreator, "number of chunk digests"},
	{"digests", offDigAlgorithm, 16, "algorithm", byCreator, "ASCII, then zeros: `xxh3-128`"},
	{"digests", offDigests, DigestSize, "chunks", byCreator, "count digests of 16 bytes each: every chunk of every file, in the manifest's order"},
	{"digests", -8, 8, "checksum", byCreator, "XXH64, seed 0, of everything before it"},
}

func counter(c Counter, name, meaning string) Field {
	return Field{"header", offCounters + 8*int(c), 8, name, underT, meaning}
}

func hint(h Hint, name, writer, meaning string) Field {
	return Field{"slot", slotHints + 8*int(h), 8, name, writer, meaning}
}

// IndexEntries is the number of index entries of a table of n slots. They start
// at HeaderSize.
func IndexEntries(slots int) int { return indexEntries(slots) }

// SlotsOffset is the offset in the file of slot 0 of a table of n slots.
func SlotsOffset(slots int) int { return slotsOffset(slots) }

// IndexDeleted is the mark of a deleted index entry.
const IndexDeleted = indexDeleted

// HashKey is XXH64, seed 0, of a key: it places the key in the index and on a
// load lock.
func HashKey(key string) uint64 { return hashKey(key) }

// A JSONField is one member of the manifest.
type JSONField struct {
	Name    string // dotted for members of members, [] for those of a list
	Type    string
	Meaning string
}

// ManifestFields lists every member of a manifest, in the order of Manifest.
var ManifestFields = []JSONField{
	{"schema", "integer", "1; another number is another format"},
	{"key", "string", "the model's key"},
	{"name", "string", "the folder's name; must be the one that the key gives"},
	{"epoch", "string", "16 lower-case hexadecimal digits; must be the table's and the file name's"},
	{"generation", "integer", "1 to 2^56-1; must be the file name's"},
	{"bytes", "integer", "sum of the files' sizes"},
	{"backing", "string", "`shm`; `file` is reserved"},
	{"chunk_bytes", "integer", "size of a chunk of the digests: a power of two from 4096 to 2^30, 4194304 today"},
	{"origin.kind", "string", "`path`: files of the local file system; `func`: made by code"},
	{"origin.path", "string, optional", "real path of the source file or folder"},
	{"origin.version", "string, optional", "what identifies the weights that code made"},
	{"origin.environment", "object of strings, optional", "stamp that is compared like version, for instance of library versions"},
	{"loaded_at", "string", "RFC 3339 time of the load, for display"},
	{"load_seconds", "number", "duration of the load, for display"},
	{"fill.collapsed", "integer", "bytes that were filled in 2 MiB pages, for display like the rest of fill"},
	{"fill.copied", "integer", "bytes that were filled in 4 KiB pages"},
	{"fill.direct", "integer", "bytes that were read past the page cache"},
	{"fill.fallbacks", "integer", "windows that were to be 2 MiB pages and could not"},
	{"files[].path", "string", "relative path below the folder, slash-separated"},
	{"files[].size", "integer", "bytes of the file"},
	{"files[].digest", "string", "root digest as `algorithm:hex`"},
	{"files[].mtime_ns", "integer, optional", "modification time of the source file, nanoseconds since 1970"},
}
