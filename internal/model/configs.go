package model

// A Verdict is what exploring a configuration ends in, or must end in.
type Verdict uint8

const (
	Holds     Verdict = iota // every reachable state is sound
	Broken                   // a counter-example was found
	Truncated                // the limit of states was reached first
)

func (v Verdict) String() string { return [...]string{"HOLDS", "BROKEN", "TRUNCATED"}[v] }

// A Config is one configuration of a model: who runs, which faults happen, which
// rule is removed, and what the checker must say about it.
type Config struct {
	Group  string
	Name   string
	Expect Verdict
	Short  bool // small enough for the tests
	Big    bool // minutes or some GB; only on request

	run func(limit int) Result
}

// Run explores the configuration, up to about limit states.
func (c Config) Run(limit int) Result { return c.run(limit) }

// Configs returns all configurations in the order in which they are reported.
func Configs() []Config {
	var all []Config
	for _, g := range []struct {
		title string
		list  []Config
	}{
		{"generations: a directory with a manifest and payload, replaced while in use", generationConfigs()},
		{"the protocol: every interleaving, kill -9 at every step", protocolConfigs()},
		{"integrity without any lock: every flock lies (broken network file system, LOCK_UN in a child)", integrityConfigs()},
		{"a writer without compare-and-swap (plain aligned stores under T)", plainStoreConfigs()},
		{"mutants: drop one rule, the checker must find the hole", mutantConfigs()},
		{"rules that turn out to be redundant here (defence in depth, or speed only)", redundantConfigs()},
		{"lock file: may it be removed?", lockFileConfigs()},
		{"registry creation by 3 processes at once", creationConfigs()},
	} {
		for _, c := range g.list {
			c.Group = g.title
			all = append(all, c)
		}
	}
	return all
}

func (c genConfig) run(limit int) Result { return explore(c.system(), limit) }
func (c segConfig) run(limit int) Result { return explore(c.system(), limit) }
func (c lockFile) run(limit int) Result  { return explore(c.system(), limit) }
func (c creation) run(limit int) Result  { return explore(c.system(), limit) }

// ---- generation.go ----------------------------------------------------------

func generationConfigs() []Config {
	reads := func(key uint8) genRole { return genRole{genReader, key} }
	gets := func(key uint8) genRole { return genRole{genGetter, key} }
	replaces := func(key uint8) genRole { return genRole{genReplacer, key} }
	undoes := func(key uint8) genRole { return genRole{genUndoer, key} }
	foreign := func(key uint8) genRole { return genRole{genForeign, key} }
	evicts, collects := genRole{kind: genEvictor}, genRole{kind: genCollector}
	type roles = []genRole

	holds := []Config{
		{Name: "gen: reader+getter+replacer+evictor", run: genConfig{P: roles{reads(1), gets(1), replaces(1), evicts}, Crash: 2, Rest: 1, Fail: true}.run},
		{Name: "gen: getter+replacer+evictor+collector", Short: true, run: genConfig{P: roles{gets(1), replaces(1), evicts, collects}, Crash: 2, Rest: 1}.run},
		{Name: "gen: 2 replacers+reader+collector", Short: true, run: genConfig{P: roles{replaces(1), replaces(1), reads(1), collects}, Crash: 2, Rest: 1}.run},
		{Name: "gen: two keys, replacer, collector", Short: true, run: genConfig{P: roles{gets(1), replaces(2), evicts, collects}, Crash: 2, Rest: 1}.run},
		{Name: "gen: registry removed", Short: true, run: genConfig{P: roles{reads(1), replaces(1), gets(1), collects}, Crash: 1, RmReg: 1}.run},
		{Name: "gen: files removed by a third party", Short: true, run: genConfig{P: roles{reads(1), replaces(1), evicts, collects}, Crash: 1, Rm: 1}.run},
		{Name: "gen: outsider LOCK_EX for ever", Short: true, run: genConfig{P: roles{reads(1), replaces(1), gets(1), evicts}, Crash: 1, Host: 1}.run},
		{Name: "gen: failing loaders, collector", Short: true, run: genConfig{P: roles{gets(1), replaces(1), collects}, Crash: 2, Rest: 1, Fail: true}.run},
		{Name: "gen: plain stores, replacer, evictor", Short: true, run: genConfig{P: roles{gets(1), replaces(1), evicts, collects}, Crash: 2, Plain: true}.run},
		{Name: "gen: rollout undo", Short: true, run: genConfig{P: roles{gets(1), replaces(1), undoes(1)}, Crash: 2, Rest: 1}.run},
		{Name: "gen: rollout undo + evictor", Short: true, run: genConfig{P: roles{gets(1), replaces(1), undoes(1), evicts}, Crash: 2}.run},

		{Name: "gen: foreign user, replacer, outsider", Short: true, run: genConfig{P: roles{foreign(1), gets(1), replaces(1), evicts}, Crash: 2, Host: 1}.run},
		{Name: "gen: foreign user, registry removed", Short: true, run: genConfig{P: roles{foreign(1), gets(1), replaces(1), collects}, Crash: 1, RmReg: 1}.run},
		{Name: "gen: loads that evict, reader", Short: true, run: genConfig{P: roles{reads(1), gets(1), gets(2)}, Crash: 2, Rest: 1, Evict: true}.run},
		{Name: "gen: loads that evict, replacer, collector", Short: true, run: genConfig{P: roles{replaces(1), gets(2), foreign(1), collects}, Crash: 2, Rest: 1, Evict: true}.run},
		{Name: "gen: loads that evict, plain stores", Short: true, run: genConfig{P: roles{replaces(1), gets(2), reads(1), collects}, Crash: 2, Evict: true, Plain: true}.run},

		{Name: "gen: rollout undo + evictor + collector", Big: true, run: genConfig{P: roles{gets(1), replaces(1), undoes(1), evicts, collects}, Crash: 1}.run},
		{Name: "gen: 5 processes, all kinds", Big: true, run: genConfig{P: roles{reads(1), gets(1), replaces(1), evicts, collects}, Crash: 2, Rest: 1, Fail: true}.run},
		{Name: "gen: 2 readers+getter+replacer+evictor, plain", Big: true, run: genConfig{P: roles{reads(1), reads(1), gets(1), replaces(1), evicts}, Crash: 2, Rest: 1, Plain: true}.run},
		{Name: "gen: everything at once", Big: true, run: genConfig{P: roles{reads(1), replaces(1), gets(2), collects}, Crash: 1, Rest: 1, Rm: 1, RmReg: 1, Host: 1, Fail: true}.run},
	}
	mutant := func(name string, r genRules, p ...genRole) Config {
		if p == nil {
			p = roles{reads(1), replaces(1), evicts, collects}
		}
		return Config{Name: "gen mutant: " + name, Expect: Broken, Short: true, run: genConfig{P: p, Crash: 2, Rest: 1, genRules: r}.run}
	}
	return append(holds,
		mutant("payload linked before the manifest", genRules{LinkPayFirst: true}, gets(1), replaces(1), collects),
		mutant("payload unlinked before the manifest", genRules{UnlinkPayFirst: true}, reads(1), gets(1), evicts, collects),
		mutant("lease after linking", genRules{LeaseLate: true}),
		mutant("READY before the payload", genRules{ReadyEarly: true}),
		mutant("old generation removed without LOCK_EX", genRules{RetireBlind: true}),
		mutant("collector removes without LOCK_EX", genRules{CollectBlind: true}),
		mutant("retire without T, undo", genRules{RetireLate: true}, gets(1), replaces(1), undoes(1)),
		Config{Name: "gen mutant: a load evicts without LOCK_EX", Expect: Broken, Short: true, run: genConfig{P: roles{reads(1), gets(1), gets(2)}, Crash: 2, Evict: true, genRules: genRules{EvictBlind: true}}.run},
		mutant("undo trusts a linked manifest", genRules{UndoTrusts: true}, gets(1), replaces(1), undoes(1)),

		Config{Name: "gen: redundant here: no word re-check after LOCK_SH", Short: true, run: genConfig{P: roles{reads(1), replaces(1), evicts, collects}, Crash: 2, Rest: 1, genRules: genRules{NoRecheck: true}}.run},
		Config{Name: "gen: replacer marks LOADING (old unreachable meanwhile)", Short: true, run: genConfig{P: roles{reads(1), replaces(1), evicts, collects}, Crash: 2, genRules: genRules{MarkLoading: true}}.run},
	)
}

// ---- segment.go -------------------------------------------------------------

type segRoles = []segRole

func segReads(key uint8) segRole { return segRole{segReader, key} }
func segGets(key uint8) segRole  { return segRole{segGetter, key} }

var (
	segEvicts   = segRole{kind: segEvictor}
	segCollects = segRole{kind: segCollector}
)

func protocolConfigs() []Config {
	r, g, e, c := segReads, segGets, segEvicts, segCollects
	return []Config{
		{Name: "2 readers+loader+evictor, 4 kills", run: segConfig{P: segRoles{r(1), r(1), g(1), e}, Crash: 4, Rest: 2, Enospc: true}.run},
		{Name: "2 getters+reader+evictor", run: segConfig{P: segRoles{g(1), g(1), r(1), e}, Crash: 3, Rest: 2, Enospc: true}.run},
		{Name: "2 getters+evictor+GC", run: segConfig{P: segRoles{g(1), g(1), e, c}, Crash: 3, Rest: 2}.run},
		{Name: "two keys, one slot", run: segConfig{P: segRoles{g(1), g(2), r(1), e}, Crash: 2, Rest: 1}.run},
		{Name: "segments removed by a third party", run: segConfig{P: segRoles{r(1), g(1), e, c}, Crash: 2, Rest: 1, Rm: 2, Enospc: true}.run},
		{Name: "registry removed", run: segConfig{P: segRoles{r(1), g(1), g(1), e}, Crash: 2, RmReg: 1}.run},
		{Name: "registry removed, other key, GC", run: segConfig{P: segRoles{r(1), g(1), g(2), c}, Crash: 1, RmReg: 1}.run},
		{Name: "registry and lock files removed", run: segConfig{P: segRoles{r(1), g(1), g(2), e}, Crash: 1, RmReg: 1, RmLocksToo: true}.run},
		{Name: "outsider LOCK_EX for ever", Short: true, run: segConfig{P: segRoles{r(1), g(1), g(1), e}, Crash: 2, Host: 1}.run},
		{Name: "... and the loader heals", Short: true, run: segConfig{P: segRoles{r(1), g(1), g(1), e}, Crash: 2, Host: 1, Heal: true}.run},
		{Name: "child keeps the lease for ever", Short: true, run: segConfig{P: segRoles{r(1), g(1), g(1), e}, Crash: 2, KidKeepsLease: true, KidNeverExits: true}.run},
		{Name: "child keeps all fds, exits later", Short: true, run: segConfig{P: segRoles{g(1), g(1), e}, Crash: 2, KidKeepsAll: true}.run},
		{Name: "named tmp file, reclaimed", Short: true, run: segConfig{P: segRoles{r(1), g(1), g(1), e}, Crash: 2, TmpName: true, Enospc: true}.run},

		{Name: "3 getters+evictor", Big: true, run: segConfig{P: segRoles{g(1), g(1), g(1), e}, Crash: 3, Rest: 2, Enospc: true}.run},
		{Name: "2 readers+getter+2 evictors", Big: true, run: segConfig{P: segRoles{r(1), r(1), g(1), e, e}, Crash: 3, Rest: 2}.run},
		{Name: "reader+2 getters+evictor+GC", Big: true, run: segConfig{P: segRoles{r(1), g(1), g(1), e, c}, Crash: 2, Rest: 1}.run},
		{Name: "two keys+evictor+GC, rm", Big: true, run: segConfig{P: segRoles{g(1), g(2), e, c}, Crash: 2, Rest: 1, Rm: 1}.run},
		{Name: "registry removed, evictor, GC", Big: true, run: segConfig{P: segRoles{g(1), r(1), e, c}, Crash: 2, Rest: 1, RmReg: 1}.run},
		{Name: "everything at once", Big: true, run: segConfig{P: segRoles{r(1), g(1), g(2), e}, Crash: 1, Rest: 1, Rm: 1, RmReg: 1, Host: 1, Enospc: true}.run},
	}
}

// Checked here: no reader ever sees wrong, torn, partial or another generation's
// bytes, whatever the locks do.
func integrityConfigs() []Config {
	r, g, e, c := segReads, segGets, segEvicts, segCollects
	lies := func(rules segRules, p ...segRole) func(int) Result {
		return segConfig{P: p, Crash: 1, FlockLies: true, IntegrityOnly: true, segRules: rules}.run
	}
	unlocks := func(rules segRules) func(int) Result {
		return segConfig{P: segRoles{r(1), g(1), g(1), e}, Crash: 2, KidUnlocks: true, IntegrityOnly: true, segRules: rules}.run
	}
	return []Config{
		{Name: "flock lies: 2 getters+reader+evictor", run: lies(segRules{}, g(1), g(1), r(1), e)},
		{Name: "flock lies: two keys, GC", run: lies(segRules{}, g(1), g(2), r(1), c)},
		{Name: "child LOCK_UN: integrity", run: unlocks(segRules{})},
		{Name: "flock lies, checksum but no header", run: lies(segRules{NoHdrCheck: true}, g(1), g(2), r(1), e)},
		{Name: "flock lies, header but no checksum", Expect: Broken, Short: true, run: lies(segRules{NoMetaSum: true}, g(1), g(2), r(1), e)},
		{Name: "flock lies, neither of them", Expect: Broken, Short: true, run: lies(segRules{NoMetaSum: true, NoHdrCheck: true}, g(1), g(2), r(1), e)},
		{Name: "flock lies, evict by truncation", Expect: Broken, Short: true, run: lies(segRules{InPlace: true, NameByKey: true}, g(1), g(1), r(1), e)},
		{Name: "child LOCK_UN, evict by truncation", Expect: Broken, Short: true, run: unlocks(segRules{InPlace: true, NameByKey: true})},
	}
}

func plainStoreConfigs() []Config {
	r, g, e, c := segReads, segGets, segEvicts, segCollects
	lies := func(p ...segRole) func(int) Result {
		return segConfig{P: p, Crash: 1, FlockLies: true, IntegrityOnly: true, PlainStore: true}.run
	}
	return []Config{
		{Name: "plain: 2 readers+loader+evictor", Big: true, run: segConfig{P: segRoles{r(1), r(1), g(1), e}, Crash: 4, Rest: 2, Enospc: true, PlainStore: true}.run},
		{Name: "plain: 2 getters+reader+evictor", Big: true, run: segConfig{P: segRoles{g(1), g(1), r(1), e}, Crash: 3, Rest: 2, Enospc: true, PlainStore: true}.run},

		{Name: "plain: two keys, one slot", run: segConfig{P: segRoles{g(1), g(2), r(1), e}, Crash: 2, Rest: 1, PlainStore: true}.run},
		{Name: "plain: segments removed", run: segConfig{P: segRoles{r(1), g(1), e, c}, Crash: 2, Rest: 1, Rm: 2, Enospc: true, PlainStore: true}.run},
		{Name: "plain: registry removed", run: segConfig{P: segRoles{r(1), g(1), g(1), e}, Crash: 2, RmReg: 1, PlainStore: true}.run},
		{Name: "plain: registry and lock files removed", run: segConfig{P: segRoles{r(1), g(1), g(2), e}, Crash: 1, RmReg: 1, RmLocksToo: true, PlainStore: true}.run},
		{Name: "plain: outsider, heal", run: segConfig{P: segRoles{r(1), g(1), g(1), e}, Crash: 2, Host: 1, Heal: true, PlainStore: true}.run},
		{Name: "plain: flock lies: 2 getters+reader+evictor", run: lies(g(1), g(1), r(1), e)},
		{Name: "plain: flock lies: two keys, GC", run: lies(g(1), g(2), r(1), c)},
		{Name: "plain: flock lies: 2 evictors", run: lies(g(1), g(1), e, e)},
	}
}

func mutantConfigs() []Config {
	r, g, e, c := segReads, segGets, segEvicts, segCollects
	// Two getters, so that one finds what the other's death has left.
	mutant := func(name string, m segConfig) Config {
		if m.P == nil {
			m.P = segRoles{r(1), g(1), g(1), e}
		}
		m.Crash = 2
		return Config{Name: name, Expect: Broken, Short: true, run: m.run}
	}
	return []Config{
		mutant("no check after LOCK_SH (word, nlink)", segConfig{segRules: segRules{NoWordRecheck: true, NoNlinkCheck: true}}),
		mutant("no checks at all, two keys", segConfig{P: segRoles{r(1), g(1), g(2), e}, segRules: segRules{NoWordRecheck: true, NoSeqCheck: true, NoNlinkCheck: true, NoHdrCheck: true, NameByKey: true, RenameOver: true}}),
		mutant("no word re-check, nlink check kept", segConfig{segRules: segRules{NoWordRecheck: true, BlindReclaim: true}}),
		mutant("retire, reclaim ignores leases", segConfig{Heal: true, Host: 1, segRules: segRules{BlindReclaim: true}}),
		mutant("name=key, no checks after LOCK_SH", segConfig{segRules: segRules{NameByKey: true, RenameOver: true, NoWordRecheck: true, NoHdrCheck: true}}),
		mutant("registry removed: name w/o epoch", segConfig{P: segRoles{r(1), g(1), g(2)}, RmReg: 1, segRules: segRules{NameByGen: true, RenameOver: true, NoHdrCheck: true}}),
		mutant("registry removed: no nlink check, GC", segConfig{P: segRoles{r(1), g(1), g(2), c}, RmReg: 1, segRules: segRules{NoNlinkCheck: true}}),
		mutant("registry removed, nobody notices", segConfig{P: segRoles{r(1), g(1), g(1), c}, RmReg: 1, segRules: segRules{NoRegCheck: true}}),
		mutant("evictor takes no LOCK_EX", segConfig{segRules: segRules{EvictNoEX: true}}),
		mutant("unlink before any store", segConfig{segRules: segRules{EvictSkipsMark: true}}),
		mutant("FREE then unlink, no orphan scan", segConfig{segRules: segRules{FreeThenUnlink: true, NoOrphanScan: true}}),
		mutant("READY before link", segConfig{segRules: segRules{ReadyBeforeLink: true}}),
		mutant("publish before verify", segConfig{segRules: segRules{EarlyPublish: true}}),
		mutant("no second look under K", segConfig{segRules: segRules{NoCheckUnderK: true}}),
		mutant("no single-flight lock", segConfig{segRules: segRules{NoK: true}}),
		mutant("LOADING freed without K", segConfig{P: segRoles{g(1), g(2), r(1), e}, segRules: segRules{StealLoading: true}}),
		mutant("no table lock", segConfig{P: segRoles{g(1), g(2), r(1), e}, segRules: segRules{NoT: true}}),
		mutant("named tmp, never reclaimed", segConfig{TmpName: true, segRules: segRules{TmpNoReclaim: true}}),
		mutant("evictor upgrades its own LOCK_SH", segConfig{P: segRoles{r(1), g(1), e, e}, segRules: segRules{UpgradeEX: true}}),
		mutant("child keeps K for ever", segConfig{KidKeepsAll: true, KidNeverExits: true}),
		mutant("child calls LOCK_UN", segConfig{KidUnlocks: true}),
		mutant("outsider EX, reader retries for ever", segConfig{P: segRoles{r(1), g(1), e}, Host: 1, segRules: segRules{NoBusyBound: true}}),
	}
}

func redundantConfigs() []Config {
	r, g, e := segReads, segGets, segEvicts
	one := segRoles{r(1), g(1), g(1), e}
	return []Config{
		{Name: "no seq check before open", Short: true, run: segConfig{P: segRoles{r(1), g(1), g(2), e}, Crash: 2, segRules: segRules{NoSeqCheck: true}}.run},
		{Name: "no fstat nlink (no third party)", Short: true, run: segConfig{P: one, Crash: 2, segRules: segRules{NoNlinkCheck: true}}.run},
		{Name: "evictor: no word re-check under T", Short: true, run: segConfig{P: segRoles{g(1), g(1), e}, Crash: 2, Rm: 1, segRules: segRules{EvictNoRecheck: true}}.run},
		{Name: "no EVICTING state, orphan scan kept", Short: true, run: segConfig{P: one, Crash: 2, segRules: segRules{FreeThenUnlink: true}}.run},
		{Name: "no word re-check, reclaim tries S", Short: true, run: segConfig{P: one, Crash: 2, segRules: segRules{NoWordRecheck: true}}.run},
		{Name: "reclaim ignores leases, no retire", Short: true, run: segConfig{P: one, Crash: 2, segRules: segRules{BlindReclaim: true}}.run},
		{Name: "loader leases after publishing", Short: true, run: segConfig{P: segRoles{g(1), g(1), e}, Crash: 2, segRules: segRules{LeaseLate: true}}.run},
		{Name: "file name = key, all checks kept", Short: true, run: segConfig{P: one, Crash: 2, segRules: segRules{NameByKey: true, RenameOver: true}}.run},
	}
}

// ---- micro.go ---------------------------------------------------------------

func lockFileConfigs() []Config {
	return []Config{
		{Name: "never removed", Short: true, run: lockFile{}.run},
		{Name: "removed after use, no re-check", Expect: Broken, Short: true, run: lockFile{Unlink: true}.run},
		{Name: "removed after use, inode re-check", Short: true, run: lockFile{Unlink: true, Recheck: true}.run},
	}
}

func creationConfigs() []Config {
	return []Config{
		{Name: "O_TMPFILE + init + linkat", Short: true, run: creation{}.run},
		{Name: "same, third party removes it", Short: true, run: creation{MaxRm: 2}.run},
		{Name: "O_CREAT|O_EXCL then init", Expect: Broken, Short: true, run: creation{InPlace: true}.run},
		{Name: "build aside, rename() over", Expect: Broken, Short: true, run: creation{Rename: true}.run},
	}
}
