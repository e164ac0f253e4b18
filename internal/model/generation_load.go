package model

// The steps of generation.go, one case per step: first the way to a model, then
// (generation_remove.go) the ways in which one goes.

// A genMove is one process that takes its next step: what was, what is now.
type genMove struct {
	c   *genConfig
	p   int
	id  uint8 // as holder of T or K
	bit uint8 // as holder of a manifest's lock

	was  *genState // never written
	now  genState
	q    genProc  // the process as it was
	me   *genProc // the process as it is now
	gone bool     // the path names another registry than q's, or none

	out []transition[genState]
}

func newGenMove(c *genConfig, s *genState, p int) *genMove {
	m := &genMove{c: c, p: p, id: uint8(p) + 1, bit: 1 << p, was: s, now: *s, q: s.P[p]}
	m.me = &m.now.P[p]
	m.gone = s.Cur != m.q.Tb
	return m
}

// emit adds the state as it is now to the possible successors.
func (m *genMove) emit(label string) { m.emitState(label, m.now) }

func (m *genMove) emitState(label string, to genState) {
	m.out = append(m.out, transition[genState]{proc: int8(m.p), label: label, to: to})
}

func (m *genMove) goTo(next step, label string) {
	m.me.PC = next
	m.emit(label)
}

func (m *genMove) clean() {
	m.now.close(m.p)
	m.me.W, m.me.Gen, m.me.Nm = word{}, 0, 0
}

func (m *genMove) finish(got outcome, label string) {
	m.clean()
	*m.me = genProc{Kind: m.q.Kind, Key: m.q.Key, PC: stepDone, Got: got}
	m.emit(label)
}

func (m *genMove) retry(label string) {
	m.clean()
	m.goTo(m.q.Kind.start(), label)
}

func (m *genMove) reopen(label string) {
	m.me.Tb = 0
	m.retry(label)
}

func (m *genMove) miss(label string) {
	if m.q.Kind == genReader {
		m.finish(gotNothing, label+" -> miss")
		return
	}
	m.clean()
	if m.q.Kind == genForeign {
		m.goTo(acqAwait, label+" -> miss, and nothing to load with")
		return
	}
	m.goTo(loadLockKey, label+" -> load path")
}

func (m *genMove) lockTable(next step, label string) {
	if m.was.T == 0 { // else blocked: no transition
		m.now.T = m.id
		m.goTo(next, label)
	}
}

func (m *genMove) lockKey(next step, label string) {
	if m.was.K[m.q.Key] == 0 {
		m.now.K[m.q.Key] = m.id
		m.goTo(next, label)
	}
}

func (m *genMove) unlockTable() {
	if m.now.T == m.id {
		m.now.T = 0
	}
}

func (m *genMove) unlockKey() {
	if m.now.K[m.q.Key] == m.id {
		m.now.K[m.q.Key] = 0
	}
}

// openRegistry is atomic here; creating it by several processes is a micro-model.
func (m *genMove) openRegistry() {
	if m.was.Cur != 0 {
		m.me.Tb = m.was.Cur
		m.emit("open registry")
		return
	}
	switch m.q.Kind {
	case genReader, genForeign, genEvictor, genCollector:
		m.finish(gotNothing, "no registry")
		return
	}
	for i := uint8(1); i <= 2; i++ {
		if !m.was.Tab[i].Born {
			m.now.Tab[i].Born, m.now.Cur, m.me.Tb = true, i, i
			m.emit("create registry")
			return
		}
	}
	m.finish(gotError, "model bound: no more registries")
}

// acquire is the look-up: no lock on the table, no write permission.
func (m *genMove) acquire() {
	s, n, np, q := m.was, &m.now, m.me, m.q
	ts := &s.Tab[q.Tb]
	switch q.PC {
	case acqWord:
		if ts.W.St != ready {
			m.miss("word " + ts.W.St.String())
			return
		}
		np.W = ts.W
		m.goTo(acqKey, "load word READY")
	case acqKey:
		if ts.Key != q.Key {
			m.miss("slot holds another key")
			return
		}
		m.goTo(acqOpen, "key matches")
	case acqOpen:
		i := s.D[genName(q.Tb, q.W.Gen)].Man
		if i == 0 {
			switch {
			case ts.W != q.W:
				m.retry("open ENOENT, word moved")
			case m.gone:
				m.reopen("open ENOENT, registry gone")
			default:
				m.miss("open ENOENT, word unchanged")
			}
			return
		}
		np.Fd = i
		n.Ino[i].Open |= m.bit
		m.goTo(acqLease, "open manifest")
	case acqLease:
		f := &n.Ino[q.Fd]
		if f.EX != 0 {
			if ts.W != q.W {
				m.retry("LOCK_SH refused, word moved")
			} else if q.Busy < 2 {
				np.Busy++
				m.retry("LOCK_SH refused, word unchanged")
			} else if q.Kind == genGetter {
				m.clean()
				np.Kind = genReplacer
				m.goTo(loadLockKey, "still EX-locked: replace it")
			} else {
				m.finish(gotError, "still EX-locked: clean busy result")
			}
			return
		}
		f.SH |= m.bit
		pc := acqRecheck
		if m.c.NoRecheck {
			pc = acqMap
		}
		m.goTo(pc, "LOCK_SH granted")
	case acqRecheck:
		if ts.W != q.W {
			m.retry("word moved after LOCK_SH")
			return
		}
		m.goTo(acqMap, "word unchanged under lease")
	case acqMap:
		f := s.Ino[q.Fd]
		if !f.Linked || f.Key != q.Key || f.Gen != q.W.Gen || f.Tb != q.Tb {
			switch {
			case ts.W != q.W:
				m.retry("manifest mismatch, word moved")
			case m.gone:
				m.reopen("manifest mismatch, registry gone")
			default:
				m.miss("manifest mismatch, word unchanged")
			}
			return
		}
		np.Busy, np.Nm = 0, genName(q.Tb, q.W.Gen)
		m.goTo(useOpen, "manifest ok, mmap: leased")
	case acqAwait: // its own deadline may end it at any time
		switch {
		case m.gone:
			m.reopen("registry gone")
			return
		case ts.Key != q.Key || ts.W.St != loading && ts.W.St != ready:
			m.finish(gotError, "nobody loads it: typed error")
			return
		case ts.W.St == ready:
			m.retry("READY: look up again")
		}
		m.finish(gotError, "deadline: typed error")
	case useOpen: // the invariants are checked here, before and after payload is opened
		if !s.D[q.Nm].Pay {
			m.finish(gotError, "payload removed by a third party: typed error")
			return
		}
		m.goTo(useRelease, "open + mmap payload")
	case useRelease:
		m.finish(gotModel, "munmap, close: lease dropped")
	}
}

// load makes a new generation, up to the point where all of it is linked.
func (m *genMove) load() {
	s, n, np, q := m.was, &m.now, m.me, m.q
	ts, tn := &s.Tab[q.Tb], &n.Tab[q.Tb]
	switch q.PC {
	case loadLockKey:
		m.lockKey(loadLockTable, "LOCK_EX K")
	case loadLockTable:
		m.lockTable(loadLook, "LOCK_EX T")
	case loadLook:
		if m.gone {
			m.unlockTable()
			m.unlockKey()
			m.reopen("registry gone: drop locks, reopen")
			return
		}
		switch ts.W.St {
		case ready:
			if i := s.D[genName(q.Tb, ts.W.Gen)].Man; i == 0 || s.Ino[i].Key != ts.Key || s.Ino[i].Tb != q.Tb {
				tn.W.St = free
				m.emit("READY without its manifest: FREE")
				return
			}
			if ts.Key != q.Key && m.c.Evict {
				np.W, np.Nm = ts.W, genName(q.Tb, ts.W.Gen)
				m.goTo(evictOpen, "no room: evict another key's model")
				return
			}
			if ts.Key != q.Key {
				m.unlockTable()
				m.unlockKey()
				m.finish(gotError, "slot taken by another key (in reality: another slot)")
				return
			}
			if q.Kind == genReplacer {
				m.goTo(loadGeneration, "READY, to be replaced")
				return
			}
			m.unlockTable()
			m.unlockKey()
			m.retry("someone loaded it: look up again")
		case evicting:
			np.W = ts.W
			m.goTo(reclaimLockManifest, "EVICTING under T: owner dead")
		case loading:
			if ts.Key == q.Key || s.K[ts.Key] == 0 {
				np.W = ts.W
				m.goTo(reclaimUnlinkDeadLoad, "LOADING and its K is ours or free: owner dead")
				return
			}
			m.unlockTable()
			m.unlockKey()
			m.finish(gotError, "slot is being loaded for another key")
		case free:
			m.goTo(loadGeneration, "slot FREE")
		}
	case loadGeneration:
		if ts.Ctr >= m.c.maxGen {
			m.unlockTable()
			m.unlockKey()
			m.finish(gotError, "model bound: generations")
			return
		}
		tn.Ctr++
		np.Gen, np.W = tn.Ctr, ts.W
		np.Nm = genName(q.Tb, tn.Ctr)
		if ts.W.St == ready && !m.c.MarkLoading {
			m.goTo(loadUnlockTable, "gen++ (replace: the word stays READY)")
		} else {
			m.goTo(loadKey, "gen++")
		}
	case loadKey:
		tn.Key = q.Key
		m.goTo(loadClaim, "store key")
	case loadClaim:
		tn.W = word{loading, q.Gen}
		np.W = tn.W
		m.goTo(loadUnlockTable, "CAS LOADING")
	case loadUnlockTable:
		m.unlockTable()
		m.goTo(loadFill, "release T")
	case loadFill:
		if m.c.Fail {
			failed := *n
			failed.P[m.p].PC = abortDropFiles
			m.emitState("loader fails (ENOSPC, error)", failed)
		}
		i := uint8(1)
		for ; int(i) < len(s.Ino) && s.Ino[i].Born; i++ {
		}
		if int(i) == len(s.Ino) {
			m.goTo(abortDropFiles, "model bound: inodes")
			return
		}
		n.Ino[i] = genInode{Born: true, Tb: q.Tb, Key: q.Key, Gen: q.Gen, Open: m.bit}
		if !m.c.LeaseLate {
			n.Ino[i].SH = m.bit
		}
		np.Fd = i
		m.goTo(loadLinkManifest, "O_TMPFILEs filled, verified, 0444; LOCK_SH on the manifest")
	case loadLinkManifest:
		if m.c.LinkPayFirst {
			n.D[q.Nm].Dir, n.D[q.Nm].Pay = true, true
			m.goTo(loadLinkManifestLate, "mkdir, linkat payload")
			return
		}
		n.D[q.Nm].Man = q.Fd
		n.Ino[q.Fd].Linked = true
		pc := loadMkdir
		if m.c.ReadyEarly {
			pc = loadLeased
		}
		m.goTo(pc, "linkat manifest")
	case loadLinkManifestLate:
		n.D[q.Nm].Man = q.Fd
		n.Ino[q.Fd].Linked = true
		m.goTo(loadLeased, "linkat manifest")
	case loadMkdir:
		n.D[q.Nm].Dir = true
		m.goTo(loadLinkPayload, "mkdir generation")
	case loadLinkPayload:
		if !s.D[q.Nm].Dir {
			m.goTo(abortUnlinkManifest, "linkat payload ENOENT (third party): undo")
			return
		}
		n.D[q.Nm].Pay = true
		pc := loadLeased
		if m.c.ReadyEarly {
			pc = pubUnlockKey
		}
		m.goTo(pc, "linkat payload")
	case loadLeased:
		if m.c.LeaseLate {
			if s.Ino[q.Fd].EX != 0 {
				m.goTo(abortUnlinkManifest, "lease refused: undo")
				return
			}
			n.Ino[q.Fd].SH |= m.bit
		}
		m.goTo(pubLockTable, "(lease held)")
	}
}

// publish makes the generation visible: one compare-and-swap under T.
func (m *genMove) publish() {
	s, n, np, q := m.was, &m.now, m.me, m.q
	ts, tn := &s.Tab[q.Tb], &n.Tab[q.Tb]
	switch q.PC {
	case pubLockTable:
		m.lockTable(pubReady, "LOCK_EX T (publish)")
	case pubReady:
		if m.gone {
			m.goTo(abortUnlinkManifest, "registry gone: do not publish")
			return
		}
		if ts.W == q.W {
			if m.c.Plain {
				m.goTo(pubStore, "load word: as expected")
				return
			}
			tn.W = word{ready, q.Gen}
			m.goTo(pubUnlockTable, "CAS -> READY")
			return
		}
		if ts.W.St == free && q.W.St == ready { // evicted meanwhile
			m.goTo(pubClaimEvicted, "evicted meanwhile, slot FREE")
			return
		}
		m.goTo(abortUnlinkManifest, "word moved: undo")
	case pubStore:
		tn.W = word{ready, q.Gen}
		m.goTo(pubUnlockTable, "plain store READY")
	case pubClaimEvicted: // under T nobody else claims the FREE slot
		if ts.Key != q.Key {
			tn.Key = q.Key
			m.emit("store key")
			return
		}
		tn.W = word{ready, q.Gen}
		m.goTo(pubUnlockTable, "CAS FREE -> READY")
	case pubUnlockTable:
		m.unlockTable()
		if m.c.ReadyEarly {
			m.goTo(loadMkdir, "release T, payload follows")
			return
		}
		m.goTo(pubUnlockKey, "release T")
	case pubUnlockKey:
		m.unlockKey()
		old := q.W
		np.W = word{ready, q.Gen}
		if old.St == ready && old.Gen != q.Gen {
			np.Busy = old.Gen
			m.goTo(retireLockTable, "release K; retire the old generation")
			return
		}
		m.goTo(useOpen, "release K; in use")
	}
}

// abort undoes a load that failed.
func (m *genMove) abort() {
	s, n, q := m.was, &m.now, m.q
	ts, tn := &s.Tab[q.Tb], &n.Tab[q.Tb]
	switch q.PC {
	case abortDropFiles: // failed before anything was linked
		n.close(m.p)
		m.goTo(abortLockTable, "drop the anonymous files")
	case abortLockTable:
		m.lockTable(abortFree, "LOCK_EX T (undo)")
	case abortFree:
		if ts.W == (word{loading, q.Gen}) {
			tn.W.St = free
		}
		n.rmdir(q.Nm)
		m.unlockTable()
		m.unlockKey()
		m.finish(gotError, "CAS FREE, rmdir, release: typed error")
	case abortUnlinkManifest: // undo after linking: manifest first
		if s.D[q.Nm].Man == q.Fd {
			n.unlinkManifest(q.Nm)
		}
		m.goTo(abortUnlinkPayload, "unlink own manifest")
	case abortUnlinkPayload:
		n.D[q.Nm].Pay = false
		m.goTo(abortRmdir, "unlink own payload")
	case abortRmdir:
		n.rmdir(q.Nm)
		if ts.W == (word{loading, q.Gen}) && n.T == m.id {
			tn.W.St = free
		}
		m.unlockTable()
		m.unlockKey()
		m.finish(gotError, "rmdir, release: typed error")
	}
}
