package model

import "fmt"

// The protocol that registry/ implements. A generation is a manifest
// m/<epoch>-<generation>.manifest, whose lock and mapping are the lease, and a
// folder m/<epoch>-<generation>/ of payload files. The slot carries only the
// word and the key; everything else is in the manifest. A key can be replaced
// while its old generation is leased.
//
// Rules under test, besides those of segment.go:
//   - link the manifest first, unlink the manifest first: a folder without a
//     manifest is a leftover, and a half-removed generation can never be
//     resurrected by undoing an eviction;
//   - LOCK_SH on the manifest before it is linked: the collector, which removes
//     generations that no slot names, must leave a generation in the making alone;
//   - replacing is one compare-and-swap READY|g -> READY|g'.

// A genKind is what a process does.
type genKind uint8

const (
	genNobody    genKind = iota
	genReader            // hit or miss
	genGetter            // hit, or load
	genReplacer          // always loads a new generation
	genEvictor           // removes the slot's generation unless it is leased
	genCollector         // finishes what the dead began, removes unnamed generations
	genUndoer            // republishes the previous generation while it is resident
	genForeign           // another user, who can only read: hit, or awaits a load that runs
)

func (k genKind) start() step {
	switch k {
	case genReplacer:
		return loadLockKey
	case genEvictor:
		return evictWord
	case genCollector:
		return collectLockTable
	case genUndoer:
		return undoLockKey
	}
	return acqWord
}

// A genTable is one registry's table: one slot and the generation counter.
type genTable struct {
	Born bool
	W    word
	Key  uint8
	Ctr  uint8
}

// A genFiles is what one generation has on the tmpfs.
type genFiles struct {
	Dir bool
	Man uint8 // linked manifest (inode), 0 none
	Pay bool  // payload linked
}

// A genInode is a manifest's inode.
type genInode struct {
	Born, Linked bool
	Tb, Key, Gen uint8
	Open, SH, EX uint8 // bit p: process p has it open or mapped, holds LOCK_SH, LOCK_EX
}

type genProc struct {
	Kind genKind
	Key  uint8
	PC   step
	Tb   uint8 // registry that it has mapped, 0 none yet
	W    word  // captured slot word
	Fd   uint8 // open manifest (inode)
	Gen  uint8 // generation that this process makes
	Got  outcome
	Busy uint8 // refusals seen; the old generation while retiring
	Nm   uint8 // generation's name that it works on
}

// at is the step that the process takes next.
func (q genProc) at() step {
	if q.Tb == 0 {
		return openRegistry
	}
	return q.PC
}

func (q genProc) alive() bool { return q.Kind != genNobody && q.PC != stepDone && q.PC != stepDead }

type genState struct {
	Tab    [3]genTable // 1 and 2; the first may be removed under running processes
	Cur    uint8       // registry that the path names, 0 none
	T      uint8       // holder + 1
	K      [3]uint8    // by key: holder + 1
	D      [9]genFiles // by genName
	Ino    [10]genInode
	P      [5]genProc
	Faults faults
}

// genName is the file name of a generation: it carries the registry's epoch.
func genName(tb, gen uint8) uint8 { return (tb-1)*4 + gen }

// A genRole is one process of a configuration.
type genRole struct {
	kind genKind
	key  uint8
}

// A genConfig is a set of processes, the faults to try, and the rules to remove.
type genConfig struct {
	P        []genRole
	Crash    uint8 // kill -9 budget
	Rest     uint8 // how many killed processes are started again
	Rm       uint8 // files removed by a third party
	RmReg    uint8 // registries removed by a third party
	Host     uint8 // outsiders that take LOCK_EX for ever
	Fail     bool  // ENOSPC, a failing loader
	Plain    bool  // writers without compare-and-swap
	Evict    bool  // a load makes room: it evicts the idle model of another key
	maxGen   uint8 // generations per registry
	genRules       // removed rules
}

type genRules struct {
	LinkPayFirst   bool // payload linked before the manifest
	UnlinkPayFirst bool // payload unlinked before the manifest
	LeaseLate      bool // LOCK_SH only after the manifest is linked
	NoRecheck      bool // reader does not re-read the word after LOCK_SH
	ReadyEarly     bool // READY before the payload is linked
	MarkLoading    bool // replacer marks the slot LOADING (old generation unreachable meanwhile)
	RetireBlind    bool // replacer removes the old generation without LOCK_EX
	CollectBlind   bool // collector removes unnamed generations without LOCK_EX
	RetireLate     bool // replacer retires the old generation without T and without looking at the slot
	UndoTrusts     bool // undo takes a linked manifest for a complete generation
	EvictBlind     bool // a generation is evicted without LOCK_EX
}

const genMaxGen = 3

func (c genConfig) system() system[genState] {
	s := genState{Cur: 1}
	s.Tab[1].Born = true // a registry exists at the start
	for i, r := range c.P {
		s.P[i] = genProc{Kind: r.kind, Key: r.key, PC: r.kind.start()}
	}
	c.maxGen = genMaxGen
	return system[genState]{
		init:     s,
		next:     c.next,
		check:    genCheck,
		finished: genFinished,
		describe: genDescribe,
		step:     func(s genState, p int8) string { return s.P[p].at().String() },
		recover:  c.recovery(),
	}
}

// ---- what the kernel does ---------------------------------------------------

// close closes whatever process p has open: its locks on manifests go with it.
func (s *genState) close(p int) {
	bit := uint8(1) << p
	for i := range s.Ino {
		if f := &s.Ino[i]; f.Born {
			f.Open &^= bit
			f.SH &^= bit
			f.EX &^= bit
			s.reap(uint8(i))
		}
	}
	s.P[p].Fd = 0
}

func (s *genState) reap(i uint8) {
	if f := &s.Ino[i]; f.Born && !f.Linked && f.Open == 0 {
		*f = genInode{}
	}
}

func (s *genState) unlinkManifest(nm uint8) {
	if i := s.D[nm].Man; i != 0 {
		s.D[nm].Man = 0
		s.Ino[i].Linked = false
		s.reap(i)
	}
}

func (s *genState) rmdir(nm uint8) {
	if !s.D[nm].Pay { // the manifest lies beside the folder
		s.D[nm].Dir = false
	}
}

// dropLocks releases T and every K of process p.
func (s *genState) dropLocks(p int) {
	id := uint8(p) + 1
	if s.T == id {
		s.T = 0
	}
	for k := range s.K {
		if s.K[k] == id {
			s.K[k] = 0
		}
	}
}

// ---- transitions ------------------------------------------------------------

func (c *genConfig) next(s genState) []transition[genState] {
	var out []transition[genState]
	fault := func(p int, label string, to genState) {
		out = append(out, transition[genState]{proc: int8(p), fault: true, label: label, to: to})
	}
	for p := range s.P {
		q := s.P[p]
		if q.alive() {
			out = append(out, c.step(&s, p)...)
			if s.Faults.Crash < c.Crash {
				n := s
				n.Faults.Crash++
				n.dropLocks(p)
				n.close(p)
				n.P[p] = genProc{Kind: q.Kind, Key: q.Key, PC: stepDead}
				fault(p, "KILL", n)
			}
		}
		if q.PC == stepDead && s.Faults.Restart < c.Rest {
			n := s
			n.Faults.Restart++
			n.P[p] = genProc{Kind: q.Kind, Key: q.Key, PC: q.Kind.start()}
			fault(p, "restarted", n)
		}
	}
	if s.Faults.Rm < c.Rm {
		for nm := uint8(1); nm < 9; nm++ {
			if s.D[nm].Man != 0 {
				n := s
				n.Faults.Rm++
				n.unlinkManifest(nm)
				fault(outsider, fmt.Sprintf("third party rm manifest %d", nm), n)
			}
			if s.D[nm].Pay {
				n := s
				n.Faults.Rm++
				n.D[nm].Pay = false
				fault(outsider, fmt.Sprintf("third party rm payload %d", nm), n)
			}
		}
	}
	if s.Faults.RmReg < c.RmReg && s.Cur != 0 {
		n := s
		n.Faults.RmReg++
		n.Cur = 0
		fault(outsider, "third party rm registry table", n)
	}
	if s.Faults.Host < c.Host {
		for i := range s.Ino {
			if f := s.Ino[i]; f.Born && f.Linked && f.SH == 0 && f.EX == 0 {
				n := s
				n.Faults.Host++
				n.Ino[i].EX |= outsideBit
				n.Ino[i].Open |= outsideBit
				fault(outsider, fmt.Sprintf("outsider LOCK_EX on manifest inode %d", i), n)
			}
		}
	}
	return out
}

// step is what process p can do next; nothing when it is blocked.
func (c *genConfig) step(s *genState, p int) []transition[genState] {
	m := newGenMove(c, s, p)
	switch at := m.q.at(); {
	case at == openRegistry:
		m.openRegistry()
	case at <= useRelease:
		m.acquire()
	case at <= loadLeased:
		m.load()
	case at <= pubUnlockKey:
		m.publish()
	case at <= abortRmdir:
		m.abort()
	case at <= retireRmdir:
		m.retire()
	case at <= reclaimFree:
		m.reclaim()
	case at <= evictClose:
		m.evict()
	case at <= undoUnlock:
		m.undo()
	case at <= collectUnlockTable:
		m.collect()
	}
	return m.out
}

// ---- invariants -------------------------------------------------------------

func genCheck(s genState) string {
	var loaders [3]int
	for p, q := range s.P {
		if q.PC == useOpen || q.PC == useRelease {
			f := s.Ino[q.Fd]
			nm := genName(q.Tb, q.W.Gen)
			if !f.Born || f.Key != q.Key || f.Gen != q.W.Gen || f.Tb != q.Tb {
				return fmt.Sprintf("I1 p%d uses another key or generation than it looked up", p)
			}
			if f.SH&(1<<p) == 0 {
				return fmt.Sprintf("I2a p%d uses a generation without its lease", p)
			}
			if s.Faults.Rm == 0 && (!f.Linked || !s.D[nm].Pay) {
				return fmt.Sprintf("I2b our own code removed files of a generation that p%d leases", p)
			}
		}
		if q.Kind != genNobody && q.PC >= loadFill && q.PC <= pubUnlockKey {
			loaders[q.Key]++
		}
	}
	for k, v := range loaders {
		if v > 1 {
			return fmt.Sprintf("I4 %d processes load key %d", v, k)
		}
	}
	for tb := uint8(1); tb <= 2; tb++ {
		t := s.Tab[tb]
		if !t.Born || t.W.St != ready || s.Cur != tb || s.Faults.Rm > 0 {
			continue
		}
		d := s.D[genName(tb, t.W.Gen)]
		if d.Man == 0 || !d.Pay {
			return "I3 READY but manifest or payload is missing"
		}
		if f := s.Ino[d.Man]; f.Key != t.Key || f.Gen != t.W.Gen {
			return "I3 READY but the manifest is another key's or generation's"
		}
	}
	return ""
}

func genFinished(s genState) bool {
	for _, q := range s.P {
		if q.alive() {
			return false
		}
	}
	return true
}

func genDescribe(s genState) string {
	o := ""
	for tb := 1; tb <= 2; tb++ {
		if t := s.Tab[tb]; t.Born {
			o += fmt.Sprintf("reg%d(%v):%s|%d key%d ", tb, int(s.Cur) == tb, t.W.St, t.W.Gen, t.Key)
		}
	}
	o += fmt.Sprintf("T=%d K=%v", s.T, s.K)
	for nm, d := range s.D {
		if d.Dir || d.Pay || d.Man != 0 {
			o += fmt.Sprintf(" dir%d{man=%d pay=%v SH=%b EX=%b}", nm, d.Man, d.Pay, s.Ino[d.Man].SH, s.Ino[d.Man].EX)
		}
	}
	return o
}

// ---- recovery ---------------------------------------------------------------

// recovery returns the test of I9. States that differ only in their processes
// recover alike, so that the answer is remembered by what survives the kill.
func (c *genConfig) recovery() func(genState) string {
	known := map[stateKey]string{}
	return func(s genState) string {
		n := s
		for p := range n.P {
			n.dropLocks(p)
			n.close(p)
			n.P[p] = genProc{}
		}
		for i := range n.Ino {
			n.Ino[i].EX &^= outsideBit
			n.Ino[i].Open &^= outsideBit
			n.reap(uint8(i))
		}
		n.Faults = faults{}
		if s.Faults.Rm > 0 { // what may be missing is not part of n
			return c.recoverAlone(n, true)
		}
		key := keyOf(n)
		v, ok := known[key]
		if !ok {
			v = c.recoverAlone(n, false)
			known[key] = v
		}
		return v
	}
}

func (c *genConfig) recoverAlone(n genState, filesRemoved bool) string {
	alone := *c
	alone.Crash, alone.Rm, alone.RmReg, alone.Host, alone.Fail = 0, 0, 0, 0, false
	alone.maxGen++
	run := func(kind genKind, key uint8) (outcome, bool) {
		n.P[0] = genProc{Kind: kind, Key: key, PC: kind.start()}
		for range 300 {
			t := alone.step(&n, 0)
			if len(t) == 0 {
				return 0, false
			}
			n = t[0].to
			if n.P[0].PC == stepDone {
				return n.P[0].Got, true
			}
		}
		return 0, false
	}
	if n.Cur == 0 && n.Tab[2].Born {
		return "" // model bound: no third registry
	}
	if _, ok := run(genCollector, 0); !ok && n.Cur != 0 {
		return "the collector gets stuck"
	}
	want := uint8(1)
	if n.Cur != 0 && n.Tab[n.Cur].W.St == ready {
		want = n.Tab[n.Cur].Key
	}
	got, ok := run(genGetter, want)
	if !ok {
		return "a restarted getter gets stuck"
	}
	if got != gotModel && !filesRemoved {
		return fmt.Sprintf("a restarted getter alone does not get its model (result %d)", got)
	}
	if _, ok := run(genCollector, 0); !ok {
		return "the collector gets stuck"
	}
	n.P[0] = genProc{}
	if n.T != 0 || n.K != [3]uint8{} {
		return "a lock is still held after recovery"
	}
	gens := 0
	for _, d := range n.D {
		if d.Dir || d.Pay || d.Man != 0 {
			gens++
		}
	}
	if t := n.Tab[n.Cur]; t.W.St != ready || gens != 1 {
		return fmt.Sprintf("after recovery: word %s, %d generations in memory (leak)", t.W.St, gens)
	}
	return ""
}
