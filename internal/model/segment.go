package model

import "fmt"

// The older form of the protocol: one file per generation, its metadata in the
// slot. It differs from generation.go in what a generation is and in that nothing
// is replaced in use; it knows more kinds of fault and more removed rules.

const (
	segMaxProcs  = 5
	segMaxInodes = 8
	segMaxNames  = 9
	segMaxGen    = 3
)

// A segKind is what a process does.
type segKind uint8

const (
	segNobody    segKind = iota
	segReader            // no write permission: hit or miss, never loads
	segGetter            // hit, or load (single flight)
	segEvictor           // removes the slot's file unless it is leased
	segCollector         // finishes what the dead began, removes unnamed files
)

func (k segKind) start() segStep {
	switch k {
	case segEvictor:
		return segEvict
	case segCollector:
		return segCollect
	}
	return segWord
}

// A segStep is the place of a process in the protocol.
type segStep uint8

const (
	segWord segStep = iota // acquire
	segMeta1
	segMeta2
	segValidate
	segOpen
	segLease
	segRecheck
	segMap
	segInUse

	segLockKey // load
	segLockTable
	segLook
	segGeneration
	segStoreCounter
	segStoreMeta1
	segStoreMeta2
	segClaim
	segStoreLoading
	segUnlockTable
	segCreate // from here to segUnlockKey the process is the loader of its key (I4)
	segAllocate
	segFill
	segSeal
	segLink
	segPublishLock // publish
	segPublish
	segStoreReady
	segPublishUnlock
	segUnlockKey

	segAbort // giveUp
	segAbortLock
	segAbortFree
	segStoreAborted
	segAbortUnlink
	segLostUnlock
	segLostRetry
	segFailUnlock
	segFail
	segGoneUnlock
	segGoneReopen

	segReclaim // reclaim
	segReclaimShared
	segReclaimUnlink
	segReclaimUndo
	segReclaimClose
	segReclaimFree
	segStoreUndo
	segStoreReclaimed

	segEvict // evict
	segEvictOpen
	segEvictLease
	segEvictLock
	segEvictMark
	segStoreEvicting
	segEvictUnlink
	segEvictUnlinkLate
	segEvictFree
	segStoreEvicted
	segEvictUnlock

	segCollect // collect
	segCollectSlot
	segCollectNext
	segCollectLease
	segCollectUnlink
	segCollectClose
	segCollectUnlock

	segDone
	segDead
)

// A segTable is one registry's table: one slot with its metadata, and the counter.
type segTable struct {
	Born       bool
	W          word
	MK, M1, M2 uint8 // metadata: key and two words that must agree
	Ctr        uint8 // generation counter
}

type segInode struct {
	Born    bool
	Linked  bool // reachable by its published name
	Tmp     bool // reachable by a temporary name (variant without O_TMPFILE)
	Tb      uint8
	Key     uint8 // whose weights the bytes are
	Gen     uint8
	Fill    uint8 // 0 empty, 1 fallocated/partial, 2 complete and verified
	RO      bool
	Damaged bool  // truncated or overwritten after publication
	Open    uint8 // bit p: process p has a description or a mapping
	SH, EX  uint8 // bit p: process p holds LOCK_SH / LOCK_EX
}

type segProc struct {
	Kind       segKind
	Key        uint8
	PC         segStep
	Tb         uint8 // registry mapped (1, 2), 0 = none yet
	W          word  // captured slot word
	MK, M1, M2 uint8
	Fd         uint8 // open inode
	Gen        uint8 // generation this process allocated
	Got        outcome
	Busy       uint8 // EWOULDBLOCK seen with the word unchanged
}

func (q segProc) alive() bool { return q.Kind != segNobody && q.PC != segDone && q.PC != segDead }

type segState struct {
	Tab    [3]segTable
	Cur    uint8       // registry the path names, 0 = none
	T      [3]uint8    // by lock epoch: holder + 1
	K      [3][3]uint8 // by lock epoch and key: holder + 1
	Ino    [segMaxInodes]segInode
	Name   [segMaxNames]uint8 // published name -> inode
	P      [segMaxProcs]segProc
	Faults faults
	Kid    uint8 // bit p: p is dead but a forked child still holds its descriptions
}

// A segRole is one process of a configuration.
type segRole struct {
	kind segKind
	key  uint8
}

// A segConfig is a set of processes, the faults to try, and the rules to remove.
type segConfig struct {
	P      []segRole
	Crash  uint8 // kill -9 budget
	Rest   uint8 // how many killed processes are started again
	Rm     uint8 // segments removed by a third party (tmpfiles, RemoveIPC, rm)
	RmReg  uint8 // registry removed by a third party
	Host   uint8 // outsider with read permission takes LOCK_EX for ever
	Enospc bool  // memory is full

	RmLocksToo bool // removing the registry also removes the lock files

	// forked children: when a process dies its child may keep OFDs
	KidKeepsLease, KidKeepsAll, KidNeverExits, KidUnlocks bool

	FlockLies     bool // every flock succeeds (broken network filesystem)
	IntegrityOnly bool // check only what readers see, not memory accounting

	// variants of the protocol
	Heal       bool // getter retires a READY segment that stays EX-locked
	PlainStore bool // a writer without compare-and-swap: load, check, later a plain store (counter too)
	TmpName    bool // named temporary file instead of O_TMPFILE

	maxGen uint8 // generations per registry

	segRules // removed rules
}

type segRules struct {
	NoWordRecheck   bool // reader does not re-read the word after LOCK_SH
	NoSeqCheck      bool // reader does not re-read the word after the metadata
	NoMetaSum       bool // metadata carries no checksum
	NoNlinkCheck    bool // reader does not fstat after LOCK_SH
	NoHdrCheck      bool // reader does not compare the segment's own header
	NoBusyBound     bool // reader retries EWOULDBLOCK for ever
	NameByKey       bool // file name = key
	NameByGen       bool // file name = generation, no epoch
	RenameOver      bool // rename() instead of linkat()
	EvictNoEX       bool // evictor does not lock the segment
	EvictNoRecheck  bool // evictor does not compare the word under T
	EvictSkipsMark  bool // unlink first, one FREE store afterwards
	FreeThenUnlink  bool // store FREE, then unlink (no EVICTING state)
	NoOrphanScan    bool // collector looks at the slot only
	ReadyBeforeLink bool // READY, then linkat
	EarlyPublish    bool // publish before the bytes are complete
	NoCheckUnderK   bool // no second look once K and T are held
	NoK             bool // no lock per key
	StealLoading    bool // anyone holding T frees LOADING without K
	TmpNoReclaim    bool // nobody removes a dead loader's temporary file
	InPlace         bool // evict = truncate + reuse the file
	LeaseLate       bool // loader takes its lease only after publication
	UpgradeEX       bool // evictor upgrades a LOCK_SH it already has
	NoT             bool // no table lock
	NoRegCheck      bool // writers never notice that the registry is gone
	BlindReclaim    bool // EVICTING left by a dead owner is finished without trying S
}

func (c segConfig) system() system[segState] {
	s := segState{Cur: 1}
	s.Tab[1].Born = true // a registry exists at the start
	for i, r := range c.P {
		s.P[i] = segProc{Kind: r.kind, Key: r.key, PC: r.kind.start()}
	}
	c.maxGen = segMaxGen
	sys := system[segState]{
		init:     s,
		next:     c.next,
		check:    c.check,
		finished: segFinished,
		describe: segDescribe,
	}
	if !c.IntegrityOnly {
		sys.recover = c.recovery()
	}
	return sys
}

// name is the file name under which a generation is published.
func (c *segConfig) name(tb, key, gen uint8) uint8 {
	switch {
	case c.NameByKey:
		return key
	case c.NameByGen:
		return gen
	}
	return (tb-1)*4 + gen
}

// lockEpoch says which lock files go with a registry.
func (c *segConfig) lockEpoch(tb uint8) uint8 {
	if c.RmLocksToo {
		return tb
	}
	return 0
}

// ---- what the kernel does ---------------------------------------------------

// close closes descriptor and mapping of process p: its locks on files go too.
func (s *segState) close(p int) {
	b := uint8(1) << p
	for i := range s.Ino {
		n := &s.Ino[i]
		if n.Born {
			n.Open &^= b
			n.SH &^= b
			n.EX &^= b
			s.reap(uint8(i))
		}
	}
	s.P[p].Fd = 0
}

func (s *segState) reap(i uint8) {
	n := &s.Ino[i]
	if n.Born && !n.Linked && !n.Tmp && n.Open == 0 {
		*n = segInode{}
	}
}

func (s *segState) unlink(name uint8) {
	i := s.Name[name]
	if i != 0 {
		s.Name[name] = 0
		s.Ino[i].Linked = false
		s.reap(i)
	}
}

func (s *segState) unlinkTmp(tb, gen uint8) {
	for i := range s.Ino {
		if f := &s.Ino[i]; f.Born && f.Tmp && f.Tb == tb && f.Gen == gen {
			f.Tmp = false
			s.reap(uint8(i))
		}
	}
}

// dropLocks releases T and every K of process p.
func (s *segState) dropLocks(p int) {
	me := uint8(p) + 1
	for e := range s.T {
		if s.T[e] == me {
			s.T[e] = 0
		}
		for k := range s.K[e] {
			if s.K[e][k] == me {
				s.K[e][k] = 0
			}
		}
	}
}

// ---- transitions ------------------------------------------------------------

func (c *segConfig) next(s segState) []transition[segState] {
	var out []transition[segState]
	fault := func(p int, label string, to segState) {
		out = append(out, transition[segState]{proc: int8(p), fault: true, label: label, to: to})
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
				n.P[p] = segProc{Kind: q.Kind, Key: q.Key, PC: segDead}
				fault(p, "KILL", n)
				if c.KidKeepsLease || c.KidKeepsAll {
					n := s
					n.Faults.Crash++
					if c.KidKeepsLease { // the child closed everything but leases
						n.dropLocks(p)
						for i := range n.Ino {
							n.Ino[i].EX &^= 1 << p
						}
					}
					n.P[p] = segProc{Kind: q.Kind, Key: q.Key, PC: segDead, Fd: q.Fd}
					n.Kid |= 1 << p
					fault(p, "KILL (child keeps fds)", n)
				}
				if c.KidUnlocks {
					n := s
					n.Faults.Crash++
					n.dropLocks(p)
					for i := range n.Ino {
						n.Ino[i].SH &^= 1 << p
						n.Ino[i].EX &^= 1 << p
					}
					fault(p, "its child LOCK_UN", n)
				}
			}
		}
		if q.PC == segDead && s.Kid&(1<<p) == 0 && s.Faults.Restart < c.Rest {
			n := s
			n.Faults.Restart++
			n.P[p] = segProc{Kind: q.Kind, Key: q.Key, PC: q.Kind.start()}
			fault(p, "restarted", n)
		}
		if s.Kid&(1<<p) != 0 && !c.KidNeverExits {
			n := s
			n.Kid &^= 1 << p
			n.dropLocks(p)
			n.close(p)
			out = append(out, transition[segState]{proc: int8(p), label: "its child exits", to: n})
		}
	}
	if s.Faults.Rm < c.Rm {
		for nm := range s.Name {
			if s.Name[nm] != 0 {
				n := s
				n.Faults.Rm++
				n.unlink(uint8(nm))
				fault(outsider, fmt.Sprintf("third party rm name%d", nm), n)
			}
		}
	}
	if s.Faults.RmReg < c.RmReg && s.Cur != 0 {
		n := s
		n.Faults.RmReg++
		n.Cur = 0
		fault(outsider, "third party rm registry", n)
	}
	if s.Faults.Host < c.Host {
		for i := range s.Ino {
			if f := s.Ino[i]; f.Born && f.Linked && f.SH == 0 && f.EX == 0 {
				n := s
				n.Faults.Host++
				n.Ino[i].EX |= outsideBit
				n.Ino[i].Open |= outsideBit
				fault(outsider, fmt.Sprintf("outsider LOCK_EX on inode %d", i), n)
			}
		}
	}
	return out
}

// step is what process p can do next; nothing when it is blocked.
func (c *segConfig) step(s *segState, p int) []transition[segState] {
	m := newSegMove(c, s, p)
	switch at := m.q.PC; {
	case m.q.Tb == 0:
		m.openRegistry()
	case at <= segInUse:
		m.acquire()
	case at <= segLink:
		m.load()
	case at <= segUnlockKey:
		m.publish()
	case at <= segGoneReopen:
		m.giveUp()
	case at <= segStoreReclaimed:
		m.reclaim()
	case at <= segEvictUnlock:
		m.evict()
	case at <= segCollectUnlock:
		m.collect()
	}
	return m.out
}
