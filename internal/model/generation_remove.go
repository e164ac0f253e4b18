package model

import "fmt"

// The steps of generation.go that remove a generation, or take a replacement back.

// retire is the replacer's courtesy: it removes the old generation if nobody
// leases it; otherwise the collector does, later.
func (m *genMove) retire() {
	s, n, np, q := m.was, &m.now, m.me, m.q
	ts := &s.Tab[q.Tb]
	switch q.PC {
	case retireLockTable:
		if m.c.RetireLate {
			m.goTo(retireLockManifest, "(mutation: without T)")
			return
		}
		m.lockTable(retireLockManifest, "LOCK_EX T (retire)")
	case retireLockManifest:
		i := s.D[genName(q.Tb, q.Busy)].Man
		if i == 0 || m.gone || !m.c.RetireLate && ts.W.St != free && ts.W.Gen == q.Busy {
			m.unlockTable()
			np.Busy = 0
			m.goTo(useOpen, "old manifest gone, or named again; in use")
			return
		}
		f := &n.Ino[i]
		if f.SH|f.EX != 0 && !m.c.RetireBlind {
			m.unlockTable()
			np.Busy = 0
			m.goTo(useOpen, "old generation leased: leave it; in use")
			return
		}
		f.EX |= m.bit
		f.Open |= m.bit
		m.goTo(retireUnlinkManifest, "LOCK_EX|NB on the old manifest")
	case retireUnlinkManifest:
		n.unlinkManifest(genName(q.Tb, q.Busy))
		m.unlockTable()
		m.goTo(retireUnlinkPayload, "unlink old manifest, release T")
	case retireUnlinkPayload:
		n.D[genName(q.Tb, q.Busy)].Pay = false
		m.goTo(retireRmdir, "unlink old payload")
	case retireRmdir:
		n.rmdir(genName(q.Tb, q.Busy))
		for i := range n.Ino { // close the old manifest, keep our own
			if f := &n.Ino[i]; f.Born && f.Gen == q.Busy && f.Tb == q.Tb {
				f.EX &^= m.bit
				f.Open &^= m.bit
				n.reap(uint8(i))
			}
		}
		np.Busy = 0
		m.goTo(useOpen, "rmdir old; in use")
	}
}

// reclaim finishes what a dead owner began. T is held, so that the owner of an
// EVICTING slot is dead; the owner of a LOADING one is, when its K is ours.
func (m *genMove) reclaim() {
	s, n, np, q := m.was, &m.now, m.me, m.q
	ts, tn := &s.Tab[q.Tb], &n.Tab[q.Tb]
	switch q.PC {
	case reclaimLockManifest:
		nm := genName(q.Tb, q.W.Gen)
		i := s.D[nm].Man
		np.Nm = nm
		if i == 0 {
			m.goTo(reclaimUnlinkPayload, "manifest already gone")
			return
		}
		np.Fd = i
		n.Ino[i].Open |= m.bit
		if n.Ino[i].SH|n.Ino[i].EX == 0 {
			n.Ino[i].EX |= m.bit
			m.goTo(reclaimUnlinkManifest, "LOCK_EX|NB granted")
		} else {
			m.goTo(reclaimTryShared, "LOCK_EX|NB refused")
		}
	case reclaimTryShared:
		if s.Ino[q.Fd].EX != 0 {
			m.goTo(reclaimUnlinkManifest, "LOCK_SH|NB refused: EX held, so no lease exists")
			return
		}
		n.Ino[q.Fd].SH |= m.bit
		m.goTo(reclaimUndo, "LOCK_SH|NB granted: leases exist")
	case reclaimUndo:
		n.close(m.p)
		if ts.W == q.W {
			tn.W.St = ready
		}
		m.afterReclaim("close, CAS EVICTING -> READY")
	case reclaimUnlinkManifest:
		if m.c.UnlinkPayFirst {
			n.D[q.Nm].Pay = false
			m.goTo(reclaimUnlinkManifestLate, "unlink payload")
			return
		}
		n.unlinkManifest(q.Nm)
		m.goTo(reclaimUnlinkPayload, "unlink manifest")
	case reclaimUnlinkManifestLate:
		n.unlinkManifest(q.Nm)
		m.goTo(reclaimFree, "unlink manifest")
	case reclaimUnlinkPayload:
		n.D[q.Nm].Pay = false
		m.goTo(reclaimFree, "unlink payload")
	case reclaimFree:
		n.rmdir(q.Nm)
		n.close(m.p)
		if ts.W == q.W {
			tn.W.St = free
		}
		m.afterReclaim("rmdir, close, CAS FREE")
	case reclaimUnlinkDeadLoad: // a dead loader's: nobody can lease it
		np.Nm = genName(q.Tb, q.W.Gen)
		n.unlinkManifest(np.Nm)
		m.goTo(reclaimUnlinkPayload, "unlink the dead loader's manifest")
	}
}

func (m *genMove) afterReclaim(label string) {
	if m.q.Kind == genCollector {
		m.goTo(collectNext, label)
	} else {
		m.goTo(loadLook, label)
	}
}

// evict removes the generation that the slot names, unless it is leased. An evictor
// comes for nothing else; a load makes room and then looks again.
func (m *genMove) evict() {
	s, n, np, q := m.was, &m.now, m.me, m.q
	ts, tn := &s.Tab[q.Tb], &n.Tab[q.Tb]
	load := q.Kind != genEvictor
	giveUp := func(got outcome, label string) {
		m.unlockTable()
		m.unlockKey()
		m.finish(got, label)
	}
	switch q.PC {
	case evictWord:
		if ts.W.St != ready {
			m.finish(gotNothing, "nothing to evict")
			return
		}
		np.W, np.Nm = ts.W, genName(q.Tb, ts.W.Gen)
		m.goTo(evictLockTable, "load word READY (victim)")
	case evictLockTable: // T first; EX only tried, and only under T
		m.lockTable(evictOpen, "LOCK_EX T")
	case evictOpen:
		i := s.D[q.Nm].Man
		switch {
		case load && (i == 0 || m.gone): // by a third party since it looked
			m.goTo(loadLook, "manifest or registry gone: look again")
			return
		case ts.W != q.W || m.gone:
			giveUp(gotNothing, "word moved: give up")
			return
		case i == 0:
			giveUp(gotNothing, "open ENOENT")
			return
		}
		np.Fd = i
		n.Ino[i].Open |= m.bit
		m.goTo(evictLockManifest, "open victim's manifest")
	case evictLockManifest:
		f := &n.Ino[q.Fd]
		switch {
		case f.SH|f.EX == 0 || m.c.EvictBlind:
		case load:
			giveUp(gotError, "LOCK_EX|NB refused: no room, typed error")
			return
		default:
			giveUp(gotNothing, "LOCK_EX|NB refused: leased")
			return
		}
		f.EX |= m.bit
		m.goTo(evictMark, "LOCK_EX|NB granted")
	case evictMark:
		tn.W = word{evicting, q.W.Gen}
		m.goTo(evictUnlinkManifest, "EVICTING")
	case evictUnlinkManifest:
		if m.c.UnlinkPayFirst {
			n.D[q.Nm].Pay = false
			m.goTo(evictUnlinkManifestLate, "unlink payload")
			return
		}
		n.unlinkManifest(q.Nm)
		m.goTo(evictFree, "unlink manifest")
	case evictUnlinkManifestLate:
		n.unlinkManifest(q.Nm)
		m.goTo(evictFree, "unlink manifest")
	case evictFree:
		tn.W.St = free
		m.goTo(evictUnlockTable, "FREE")
	case evictUnlockTable:
		m.unlockTable()
		m.goTo(evictUnlinkPayload, "release T before the payload: freeing pages takes long")
	case evictUnlinkPayload:
		n.D[q.Nm].Pay = false
		m.goTo(evictRmdir, "unlink payload")
	case evictRmdir:
		n.rmdir(q.Nm)
		m.goTo(evictClose, "rmdir")
	case evictClose:
		if load {
			m.clean()
			m.goTo(loadLockTable, "close; there is room now")
			return
		}
		m.finish(gotModel, "close")
	}
}

// undo takes a replacement back: the previous generation is still resident.
func (m *genMove) undo() {
	s, n, np, q := m.was, &m.now, m.me, m.q
	ts, tn := &s.Tab[q.Tb], &n.Tab[q.Tb]
	switch q.PC {
	case undoLockKey:
		m.lockKey(undoLockTable, "LOCK_EX K")
	case undoLockTable:
		m.lockTable(undoLease, "LOCK_EX T")
	case undoLease:
		giveUp := func(l string) { m.unlockTable(); m.unlockKey(); m.finish(gotNothing, l) }
		if m.gone || ts.W.St != ready || ts.Key != q.Key || ts.W.Gen < 2 {
			giveUp("nothing to undo")
			return
		}
		g := ts.W.Gen - 1
		i := s.D[genName(q.Tb, g)].Man
		if i == 0 || s.Ino[i].Key != q.Key || s.Ino[i].EX != 0 {
			giveUp("previous generation not resident, or being removed")
			return
		}
		n.Ino[i].Open |= m.bit
		n.Ino[i].SH |= m.bit
		np.Fd, np.Gen, np.Nm = i, g, genName(q.Tb, g)
		m.goTo(undoReady, "LOCK_SH|NB on the previous manifest")
	case undoReady:
		if !s.Ino[q.Fd].Linked || !s.D[q.Nm].Pay && !m.c.UndoTrusts {
			m.unlockTable()
			m.unlockKey()
			m.finish(gotNothing, "unlinked meanwhile, or incomplete (a killed loader's)")
			return
		}
		tn.W = word{ready, q.Gen}
		m.goTo(undoUnlock, "CAS READY|g+1 -> READY|g")
	case undoUnlock:
		m.unlockTable()
		m.unlockKey()
		m.finish(gotModel, "release T, K, lease")
	}
}

// collect looks after the slot and removes every generation that no slot names.
func (m *genMove) collect() {
	s, n, np, q := m.was, &m.now, m.me, m.q
	ts, tn := &s.Tab[q.Tb], &n.Tab[q.Tb]
	switch q.PC {
	case collectLockTable:
		m.lockTable(collectSlot, "LOCK_EX T")
	case collectSlot:
		if m.gone {
			m.unlockTable()
			m.finish(gotNothing, "registry gone")
			return
		}
		switch {
		case ts.W.St == evicting:
			np.W = ts.W
			m.goTo(reclaimLockManifest, "EVICTING under T: owner dead")
		case ts.W.St == loading && s.K[ts.Key] == 0:
			n.K[ts.Key] = m.id
			np.Key = ts.Key
			np.W = ts.W
			m.goTo(reclaimUnlinkDeadLoad, "LOADING, K|NB granted: owner dead")
		case ts.W.St == ready && s.D[genName(q.Tb, ts.W.Gen)].Man == 0:
			tn.W.St = free
			m.goTo(collectNext, "READY without manifest: FREE")
		default:
			m.goTo(collectNext, "slot fine")
		}
	case collectNext:
		for k := range n.K {
			if n.K[k] == m.id {
				n.K[k] = 0
			}
		}
		for nm := uint8(1); nm < 9; nm++ {
			d := s.D[nm]
			if !d.Dir && !d.Pay && d.Man == 0 {
				continue
			}
			if ts.W.St != free && genName(q.Tb, ts.W.Gen) == nm {
				continue // named by the slot
			}
			if i := d.Man; i != 0 {
				if s.Ino[i].SH|s.Ino[i].EX != 0 && !m.c.CollectBlind {
					continue // leased, or in the making
				}
				np.Fd, np.Nm = i, nm
				n.Ino[i].Open |= m.bit
				m.goTo(collectLockManifest, fmt.Sprintf("open unnamed generation %d", nm))
				return
			}
			np.Nm = nm
			if d.Pay {
				m.goTo(collectUnlinkPayload, fmt.Sprintf("leftover %d without manifest", nm))
				return
			}
			m.goTo(collectRmdir, fmt.Sprintf("empty directory %d without manifest", nm))
			return
		}
		m.unlockTable()
		m.finish(gotModel, "nothing unnamed: release T")
	case collectLockManifest:
		f := &n.Ino[q.Fd]
		if f.SH|f.EX != 0 && !m.c.CollectBlind {
			n.close(m.p)
			m.goTo(collectUnlockTable, "LOCK_EX|NB refused: leave it")
			return
		}
		f.EX |= m.bit
		m.goTo(collectUnlinkManifest, "LOCK_EX|NB granted")
	case collectUnlinkManifest:
		if s.D[q.Nm].Man == q.Fd {
			n.unlinkManifest(q.Nm)
		}
		m.goTo(collectUnlinkPayload, "unlink manifest")
	case collectUnlinkPayload:
		n.D[q.Nm].Pay = false
		m.goTo(collectRmdir, "unlink payload")
	case collectRmdir:
		n.rmdir(q.Nm)
		n.close(m.p)
		m.goTo(collectNext, "rmdir")
	case collectUnlockTable:
		m.unlockTable()
		m.finish(gotModel, "release T")
	}
}
