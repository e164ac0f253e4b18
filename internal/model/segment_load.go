package model

// The steps of segment.go.

// A segMove is one process that takes its next step: what was, what is now.
type segMove struct {
	c   *segConfig
	p   int
	id  uint8 // as holder of T or K
	bit uint8 // as holder of a file's lock
	le  uint8 // the lock files that it uses

	was  *segState // never written
	now  segState
	q    segProc  // the process as it was
	me   *segProc // the process as it is now
	gone bool     // fstat(registry).nlink == 0, or another inode at the path

	out []transition[segState]
}

func newSegMove(c *segConfig, s *segState, p int) *segMove {
	m := &segMove{c: c, p: p, id: uint8(p) + 1, bit: 1 << p, was: s, now: *s, q: s.P[p]}
	m.me = &m.now.P[p]
	m.le = c.lockEpoch(m.q.Tb)
	m.gone = s.Cur != m.q.Tb
	return m
}

// emit adds the state as it is now to the possible successors.
func (m *segMove) emit(label string) { m.emitState(label, m.now) }

func (m *segMove) emitState(label string, to segState) {
	m.out = append(m.out, transition[segState]{proc: int8(m.p), label: label, to: to})
}

func (m *segMove) goTo(next segStep, label string) {
	m.me.PC = next
	m.emit(label)
}

func (m *segMove) clean() {
	m.now.close(m.p)
	m.me.W, m.me.MK, m.me.M1, m.me.M2 = word{}, 0, 0, 0
}

func (m *segMove) finish(got outcome, label string) {
	m.clean()
	*m.me = segProc{Kind: m.q.Kind, Key: m.q.Key, PC: segDone, Got: got}
	m.emit(label)
}

func (m *segMove) retry(label string) {
	m.clean()
	m.goTo(segWord, label)
}

func (m *segMove) reopen(label string) {
	m.me.Tb = 0
	m.retry(label)
}

func (m *segMove) miss(label string) {
	if m.q.Kind == segReader {
		m.finish(gotNothing, label+" -> miss")
		return
	}
	m.clean()
	m.goTo(segLockKey, label+" -> load path")
}

func (m *segMove) lockTable(next segStep, label string) {
	if !m.c.NoT && !m.c.FlockLies {
		if m.was.T[m.le] != 0 {
			return // blocked
		}
		m.now.T[m.le] = m.id
	}
	m.goTo(next, label)
}

func (m *segMove) unlockTable() {
	if m.now.T[m.le] == m.id {
		m.now.T[m.le] = 0
	}
}

func (m *segMove) unlockKey() {
	if m.now.K[m.le][m.q.Key] == m.id {
		m.now.K[m.le][m.q.Key] = 0
	}
}

func (m *segMove) afterReclaim(label string) {
	if m.q.Kind == segCollector {
		m.goTo(segCollectNext, label)
	} else {
		m.goTo(segLook, label)
	}
}

// openRegistry is atomic here; creating it by several processes is a micro-model.
func (m *segMove) openRegistry() {
	if m.was.Cur != 0 {
		m.me.Tb = m.was.Cur
		m.emit("open registry")
		return
	}
	if m.q.Kind != segGetter {
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

// acquire is the lock-free look-up and then the lease.
func (m *segMove) acquire() {
	s, n, np, q := m.was, &m.now, m.me, m.q
	ts := &s.Tab[q.Tb]
	switch q.PC {
	case segWord: // one atomic load of the slot word
		if ts.W.St != ready {
			m.miss("word " + ts.W.St.String())
			return
		}
		np.W = ts.W
		m.goTo(segMeta1, "load word READY")
	case segMeta1:
		np.MK, np.M1 = ts.MK, ts.M1
		m.goTo(segMeta2, "load meta.key, meta.1")
	case segMeta2:
		np.M2 = ts.M2
		if m.c.NoSeqCheck {
			if q.MK != q.Key {
				m.miss("other key")
				return
			}
			m.goTo(segOpen, "load meta.2")
			return
		}
		m.goTo(segValidate, "load meta.2")
	case segValidate:
		if ts.W != q.W {
			m.retry("word moved while reading metadata")
			return
		}
		if !m.c.NoMetaSum && (q.M1 != q.M2 || q.M1 != q.W.Gen) {
			m.miss("metadata checksum wrong")
			return
		}
		if q.MK != q.Key {
			m.miss("slot holds another key")
			return
		}
		m.goTo(segOpen, "metadata validated")
	case segOpen:
		i := s.Name[m.c.name(q.Tb, q.Key, q.W.Gen)]
		if i == 0 {
			switch {
			case ts.W != q.W:
				m.retry("open ENOENT, word moved")
			case m.gone:
				m.reopen("open ENOENT, registry gone: reopen")
			default:
				m.miss("open ENOENT, word unchanged")
			}
			return
		}
		np.Fd = i
		n.Ino[i].Open |= m.bit
		m.goTo(segLease, "open segment")
	case segLease:
		f := &n.Ino[q.Fd]
		if f.EX&^m.bit != 0 && !m.c.FlockLies {
			if ts.W != q.W {
				m.retry("LOCK_SH|NB: EWOULDBLOCK, word moved")
			} else if q.Busy < 2 {
				if !m.c.NoBusyBound {
					np.Busy++
				}
				m.retry("LOCK_SH|NB: EWOULDBLOCK, word unchanged")
			} else if m.c.Heal && q.Kind == segGetter {
				m.clean()
				m.goTo(segLockKey, "still EX-locked -> load path to retire it")
			} else {
				m.finish(gotError, "still EX-locked: clean 'busy' result")
			}
			return
		}
		f.SH |= m.bit
		pc := segRecheck
		if m.c.NoWordRecheck {
			pc = segMap
		}
		m.goTo(pc, "LOCK_SH granted")
	case segRecheck:
		if ts.W != q.W {
			m.retry("word moved after LOCK_SH: drop lease")
			return
		}
		m.goTo(segMap, "word unchanged under lease")
	case segMap: // fstat + the segment's own header
		f := s.Ino[q.Fd]
		bad := !m.c.NoNlinkCheck && !f.Linked ||
			!m.c.NoHdrCheck && (f.Key != q.Key || f.Gen != q.W.Gen || f.Tb != q.Tb || f.Fill != 2)
		if bad {
			switch {
			case ts.W != q.W:
				m.retry("fstat/header mismatch, word moved")
			case m.gone:
				m.reopen("fstat/header mismatch, registry gone: reopen")
			default:
				m.miss("fstat/header mismatch, word unchanged")
			}
			return
		}
		np.Busy = 0
		m.goTo(segInUse, "fstat and header ok, mmap")
	case segInUse: // invariants are checked on this state
		m.finish(gotModel, "munmap+close")
	}
}

// load claims the slot and makes the file.
func (m *segMove) load() {
	s, n, np, q := m.was, &m.now, m.me, m.q
	ts, tn := &s.Tab[q.Tb], &n.Tab[q.Tb]
	switch q.PC {
	case segLockKey: // K
		if !m.c.NoK && !m.c.FlockLies {
			if s.K[m.le][q.Key] != 0 {
				return // blocked
			}
			n.K[m.le][q.Key] = m.id
		}
		m.goTo(segLockTable, "LOCK_EX K")
	case segLockTable:
		m.lockTable(segLook, "LOCK_EX T")
	case segLook: // look again, under K and T
		if m.gone && !m.c.NoRegCheck {
			m.goTo(segGoneUnlock, "registry gone: reopen")
			return
		}
		nm := m.c.name(q.Tb, ts.MK, ts.W.Gen)
		switch ts.W.St {
		case ready:
			mine := ts.MK == q.Key
			f := s.Ino[s.Name[nm]]
			if s.Name[nm] == 0 || !m.c.NoHdrCheck && (f.Key != ts.MK || f.Gen != ts.W.Gen || f.Tb != q.Tb) {
				tn.W = word{free, ts.W.Gen}
				m.emit("READY without its file: store FREE")
				return
			}
			if mine && m.c.NoCheckUnderK {
				m.goTo(segGeneration, "does not look again")
				return
			}
			if mine && m.c.Heal && q.Busy >= 2 {
				np.Busy = 0
				np.PC = segReclaim
				np.W = word{evicting, ts.W.Gen}
				tn.W = np.W
				m.emit("CAS EVICTING (retire)")
				return
			}
			if mine {
				m.goTo(segLostUnlock, "already READY: someone loaded it")
				return
			}
			m.goTo(segFailUnlock, "slot taken by another key")
		case evicting: // we hold T, so its owner is dead
			np.W = ts.W
			m.goTo(segReclaim, "EVICTING seen under T: owner dead")
		case loading:
			if m.c.StealLoading || ts.MK == q.Key || s.K[m.le][ts.MK] == 0 {
				np.W = ts.W // we hold K, or K|NB would be granted: owner dead
				m.goTo(segReclaim, "LOADING, its K is ours or free: owner dead")
				return
			}
			m.goTo(segFailUnlock, "slot is being loaded for another key")
		case free:
			m.goTo(segGeneration, "slot FREE")
		}
	case segStoreLoading:
		tn.W = word{loading, q.Gen}
		m.goTo(segUnlockTable, "store LOADING")
	case segStoreCounter:
		tn.Ctr = q.Gen
		np.W = ts.W
		m.goTo(segStoreMeta1, "store counter")
	case segGeneration:
		if ts.Ctr >= m.c.maxGen {
			m.goTo(segFailUnlock, "model bound: no generations left")
			return
		}
		if m.c.PlainStore {
			np.Gen = ts.Ctr + 1
			m.goTo(segStoreCounter, "load counter")
			return
		}
		tn.Ctr++
		np.Gen = tn.Ctr
		np.W = ts.W
		m.goTo(segStoreMeta1, "gen++")
	case segStoreMeta1:
		tn.MK, tn.M1 = q.Key, q.Gen
		m.goTo(segStoreMeta2, "store meta.key, meta.1")
	case segStoreMeta2:
		tn.M2 = q.Gen
		m.goTo(segClaim, "store meta.2")
	case segClaim:
		if ts.W != q.W && !m.c.NoCheckUnderK {
			m.goTo(segFailUnlock, "CAS LOADING failed")
			return
		}
		if m.c.PlainStore {
			m.goTo(segStoreLoading, "load word: unchanged")
			return
		}
		tn.W = word{loading, q.Gen}
		m.goTo(segUnlockTable, "CAS LOADING")
	case segUnlockTable:
		m.unlockTable()
		m.goTo(segCreate, "release T")
	case segCreate:
		if m.c.InPlace {
			if i := s.Name[m.c.name(q.Tb, q.Key, q.Gen)]; i != 0 {
				f := &n.Ino[i]
				f.Damaged, f.Fill, f.RO, f.Gen, f.Key, f.Tb = true, 0, false, q.Gen, q.Key, q.Tb
				f.Open |= m.bit
				np.Fd = i
				m.goTo(segAllocate, "open existing file O_TRUNC")
				return
			}
		}
		i := uint8(1)
		for ; i < segMaxInodes && s.Ino[i].Born; i++ {
		}
		if i == segMaxInodes {
			m.goTo(segAbort, "model bound: no inodes")
			return
		}
		n.Ino[i] = segInode{Born: true, Tmp: m.c.TmpName, Tb: q.Tb, Key: q.Key, Gen: q.Gen, Open: m.bit}
		np.Fd = i
		pc := segAllocate
		if m.c.EarlyPublish {
			pc = segSeal
		}
		m.goTo(pc, "create file (O_TMPFILE)")
	case segAllocate:
		if m.c.Enospc {
			failed := *n
			failed.P[m.p].PC = segAbort
			m.emitState("fallocate ENOSPC", failed)
		}
		n.Ino[q.Fd].Fill = 1
		m.goTo(segFill, "fallocate")
	case segFill:
		n.Ino[q.Fd].Fill = 2
		n.Ino[q.Fd].Damaged = false
		pc := segSeal
		if m.c.EarlyPublish {
			pc = segInUse
		}
		m.goTo(pc, "write + verify")
	case segSeal:
		n.Ino[q.Fd].RO = true
		if !m.c.LeaseLate {
			n.Ino[q.Fd].SH |= m.bit
		}
		pc := segLink
		if m.c.ReadyBeforeLink {
			pc = segPublishLock
		}
		m.goTo(pc, "0444, read-only OFD, LOCK_SH")
	case segLink: // linkat fails if the name exists; it never replaces
		nm := m.c.name(q.Tb, q.Key, q.Gen)
		if i := s.Name[nm]; i != 0 && i != q.Fd {
			if !m.c.RenameOver {
				m.goTo(segAbort, "linkat EEXIST")
				return
			}
			n.unlink(nm)
		}
		n.Name[nm] = q.Fd
		n.Ino[q.Fd].Linked = true
		n.Ino[q.Fd].Tmp = false
		pc := segPublishLock
		if m.c.ReadyBeforeLink {
			pc = segUnlockKey
		}
		m.goTo(pc, "linkat final name")
	}
}

// publish makes the file visible.
func (m *segMove) publish() {
	s, n, np, q := m.was, &m.now, m.me, m.q
	ts, tn := &s.Tab[q.Tb], &n.Tab[q.Tb]
	switch q.PC {
	case segStoreReady:
		tn.W = word{ready, q.Gen}
		m.goTo(segPublishUnlock, "store READY")
	case segPublishLock:
		m.lockTable(segPublish, "LOCK_EX T (publish)")
	case segPublish:
		if ts.W != (word{loading, q.Gen}) {
			m.goTo(segAbortUnlink, "CAS READY failed: slot no longer ours")
			return
		}
		if m.gone && !m.c.NoRegCheck {
			m.goTo(segAbortUnlink, "registry gone: do not publish")
			return
		}
		if m.c.PlainStore {
			m.goTo(segStoreReady, "load word: LOADING, ours")
			return
		}
		tn.W = word{ready, q.Gen}
		m.goTo(segPublishUnlock, "CAS READY")
	case segPublishUnlock:
		m.unlockTable()
		pc := segUnlockKey
		if m.c.ReadyBeforeLink {
			pc = segLink
		}
		m.goTo(pc, "release T")
	case segUnlockKey:
		m.unlockKey()
		np.W, np.M1, np.M2 = word{ready, q.Gen}, q.Gen, q.Gen
		pc := segInUse
		if m.c.EarlyPublish {
			pc = segAllocate
		}
		if m.c.LeaseLate {
			m.clean()
			pc = segWord
		}
		m.goTo(pc, "release K")
	}
}

// giveUp undoes a failed load, or leaves a load that is not needed any more.
func (m *segMove) giveUp() {
	s, n, q := m.was, &m.now, m.q
	ts, tn := &s.Tab[q.Tb], &n.Tab[q.Tb]
	switch q.PC {
	case segStoreAborted:
		tn.W = word{free, q.Gen}
		m.goTo(segFailUnlock, "store FREE")
	case segAbort: // ENOSPC and the like: undo
		n.close(m.p)
		n.unlinkTmp(q.Tb, q.Gen)
		m.goTo(segAbortLock, "drop the anonymous file")
	case segAbortLock:
		m.lockTable(segAbortFree, "LOCK_EX T (undo)")
	case segAbortFree:
		if m.c.PlainStore && ts.W == (word{loading, q.Gen}) {
			m.goTo(segStoreAborted, "load word: LOADING, ours")
			return
		}
		if ts.W == (word{loading, q.Gen}) {
			tn.W = word{free, q.Gen}
		}
		m.goTo(segFailUnlock, "CAS FREE")
	case segAbortUnlink:
		if s.Name[m.c.name(q.Tb, q.Key, q.Gen)] == q.Fd {
			n.unlink(m.c.name(q.Tb, q.Key, q.Gen))
		}
		n.close(m.p)
		m.goTo(segFailUnlock, "unlink own orphan")

	case segLostUnlock: // someone else loaded it
		m.unlockTable()
		m.goTo(segLostRetry, "release T")
	case segLostRetry:
		m.unlockKey()
		m.retry("release K, look up again")
	case segFailUnlock: // clean failure
		m.unlockTable()
		m.goTo(segFail, "release T")
	case segFail:
		m.unlockKey()
		m.finish(gotError, "release K, clean error")
	case segGoneUnlock:
		m.unlockTable()
		m.goTo(segGoneReopen, "release T")
	case segGoneReopen:
		m.unlockKey()
		m.reopen("release K, reopen registry")
	}
}
