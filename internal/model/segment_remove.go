package model

import "fmt"

// The steps of segment.go that remove a file.

// reclaim removes what a dead owner may have left, then frees the slot.
func (m *segMove) reclaim() {
	s, n, np, q := m.was, &m.now, m.me, m.q
	ts, tn := &s.Tab[q.Tb], &n.Tab[q.Tb]
	switch q.PC {
	case segReclaim: // remove what the dead owner may have left, then one CAS
		if q.W.St == evicting && !m.c.BlindReclaim {
			// an eviction was begun: finish it only if nobody holds a lease
			i := s.Name[m.c.name(q.Tb, ts.MK, q.W.Gen)]
			if i == 0 {
				m.goTo(segReclaimFree, "file already gone")
				return
			}
			np.Fd = i
			f := &n.Ino[i]
			f.Open |= m.bit
			if f.SH|f.EX == 0 || m.c.FlockLies {
				f.EX |= m.bit
				m.goTo(segReclaimUnlink, "LOCK_EX|NB granted")
			} else {
				m.goTo(segReclaimShared, "LOCK_EX|NB refused")
			}
			return
		}
		if m.c.TmpName && !m.c.TmpNoReclaim {
			n.unlinkTmp(q.Tb, q.W.Gen)
		}
		n.unlink(m.c.name(q.Tb, ts.MK, q.W.Gen))
		m.goTo(segReclaimFree, "unlink the dead owner's file")
	case segReclaimShared: // leased, or EX-locked by somebody who does not hold T?
		f := &n.Ino[q.Fd]
		if f.EX != 0 {
			m.goTo(segReclaimUnlink, "LOCK_SH|NB refused: EX held, so no lease exists")
			return
		}
		f.SH |= m.bit
		m.goTo(segReclaimUndo, "LOCK_SH|NB granted: leases exist")
	case segReclaimUnlink:
		n.unlink(m.c.name(q.Tb, ts.MK, q.W.Gen))
		m.goTo(segReclaimClose, "unlink")
	case segReclaimUndo: // undo the eviction
		n.close(m.p)
		if m.c.PlainStore && ts.W == q.W {
			m.goTo(segStoreUndo, "close, load word: EVICTING")
			return
		}
		if ts.W == q.W {
			tn.W = word{ready, q.W.Gen}
		}
		m.afterReclaim("close, CAS EVICTING->READY")
	case segReclaimClose:
		n.close(m.p)
		m.goTo(segReclaimFree, "close")
	case segStoreUndo:
		tn.W = word{ready, q.W.Gen}
		m.afterReclaim("store READY")
	case segStoreReclaimed:
		tn.W = word{free, q.W.Gen}
		m.afterReclaim("store FREE")
	case segReclaimFree:
		if m.c.PlainStore && ts.W == q.W {
			m.goTo(segStoreReclaimed, "load word: unchanged")
			return
		}
		if ts.W == q.W {
			tn.W = word{free, q.W.Gen}
		}
		m.afterReclaim("CAS FREE")
	}
}

// evict removes the file that the slot names, unless it is leased.
func (m *segMove) evict() {
	s, n, np, q := m.was, &m.now, m.me, m.q
	ts, tn := &s.Tab[q.Tb], &n.Tab[q.Tb]
	switch q.PC {
	case segStoreEvicting:
		tn.W = word{evicting, q.W.Gen}
		m.goTo(segEvictUnlink, "store EVICTING")
	case segStoreEvicted:
		tn.W = word{free, q.W.Gen}
		m.goTo(segEvictUnlock, "store FREE")
	case segEvict:
		if ts.W.St != ready {
			m.finish(gotNothing, "nothing to evict")
			return
		}
		np.W = ts.W
		np.MK = ts.MK
		m.goTo(segEvictOpen, "load word READY (victim)")
	case segEvictOpen:
		i := s.Name[m.c.name(q.Tb, q.MK, q.W.Gen)]
		if i == 0 {
			m.finish(gotNothing, "open ENOENT")
			return
		}
		np.Fd = i
		n.Ino[i].Open |= m.bit
		if m.c.UpgradeEX {
			if s.Ino[i].EX != 0 {
				m.finish(gotNothing, "LOCK_SH refused")
				return
			}
			n.Ino[i].SH |= m.bit
		}
		m.goTo(segEvictLease, "open victim")
	case segEvictLease:
		f := &n.Ino[q.Fd]
		if m.c.EvictNoEX {
			m.goTo(segEvictLock, "no LOCK_EX taken")
			return
		}
		f.SH &^= m.bit // flock conversion drops the old lock before it tries the new
		if (f.SH != 0 || f.EX != 0) && !m.c.FlockLies {
			if m.c.UpgradeEX {
				// believes that it still has its LOCK_SH and goes on reading
				np.PC = segInUse
				np.Key, np.M1, np.M2 = f.Key, q.W.Gen, q.W.Gen
				m.emit("upgrade refused, keeps using the segment")
				return
			}
			m.finish(gotNothing, "LOCK_EX|NB: EWOULDBLOCK, leased")
			return
		}
		f.EX |= m.bit
		m.goTo(segEvictLock, "LOCK_EX|NB granted")
	case segEvictLock:
		m.lockTable(segEvictMark, "LOCK_EX T")
	case segEvictMark:
		if !m.c.EvictNoRecheck && ts.W != q.W {
			m.goTo(segEvictUnlock, "word moved: give up")
			return
		}
		if m.c.EvictSkipsMark {
			n.unlink(m.c.name(q.Tb, q.MK, q.W.Gen))
			m.goTo(segEvictFree, "unlink before any store")
			return
		}
		if m.c.FreeThenUnlink {
			tn.W = word{free, q.W.Gen}
			m.goTo(segEvictUnlinkLate, "CAS FREE before unlink")
			return
		}
		if m.c.PlainStore {
			m.goTo(segStoreEvicting, "load word: READY, unchanged")
			return
		}
		tn.W = word{evicting, q.W.Gen}
		m.goTo(segEvictUnlink, "CAS EVICTING")
	case segEvictUnlink:
		if m.c.InPlace {
			f := &n.Ino[q.Fd]
			f.Damaged, f.Fill = true, 0
			m.goTo(segEvictFree, "ftruncate(0)")
			return
		}
		n.unlink(m.c.name(q.Tb, q.MK, q.W.Gen))
		m.goTo(segEvictFree, "unlink")
	case segEvictUnlinkLate:
		n.unlink(m.c.name(q.Tb, q.MK, q.W.Gen))
		m.goTo(segEvictUnlock, "unlink")
	case segEvictFree:
		if m.c.PlainStore && ts.W == (word{evicting, q.W.Gen}) {
			m.goTo(segStoreEvicted, "load word: EVICTING, ours")
			return
		}
		if ts.W == (word{evicting, q.W.Gen}) || m.c.EvictSkipsMark {
			tn.W = word{free, q.W.Gen}
		}
		m.goTo(segEvictUnlock, "CAS FREE")
	case segEvictUnlock:
		m.unlockTable()
		m.finish(gotModel, "release T, close")
	}
}

// collect looks after the slot and removes every file that no slot names.
func (m *segMove) collect() {
	s, n, np, q := m.was, &m.now, m.me, m.q
	ts, tn := &s.Tab[q.Tb], &n.Tab[q.Tb]
	switch q.PC {
	case segCollect:
		m.lockTable(segCollectSlot, "LOCK_EX T")
	case segCollectSlot:
		if m.gone && !m.c.NoRegCheck {
			m.goTo(segCollectUnlock, "registry gone")
			return
		}
		switch {
		case ts.W.St == evicting:
			np.W = ts.W
			m.goTo(segReclaim, "EVICTING under T: owner dead")
		case ts.W.St == loading && (s.K[m.le][ts.MK] == 0 || m.c.StealLoading):
			if !m.c.StealLoading {
				n.K[m.le][ts.MK] = m.id
				np.MK = ts.MK
			}
			np.W = ts.W
			m.goTo(segReclaim, "LOADING, K|NB granted: owner dead")
		case ts.W.St == ready && s.Name[m.c.name(q.Tb, ts.MK, ts.W.Gen)] == 0:
			tn.W = word{free, ts.W.Gen}
			m.goTo(segCollectNext, "READY without file: store FREE")
		default:
			m.goTo(segCollectNext, "slot fine")
		}
	case segCollectNext: // orphans: a name that no live slot word refers to
		if q.MK != 0 && n.K[m.le][q.MK] == m.id {
			n.K[m.le][q.MK] = 0
		}
		np.MK = 0
		if !m.c.NoOrphanScan {
			for nm := uint8(1); nm < segMaxNames; nm++ {
				i := s.Name[nm]
				if i == 0 || ts.W.St != free && m.c.name(q.Tb, ts.MK, ts.W.Gen) == nm {
					continue
				}
				if s.Ino[i].SH|s.Ino[i].EX != 0 {
					continue // LOCK_EX|NB will be refused
				}
				np.Fd = i
				np.Gen = nm
				n.Ino[i].Open |= m.bit
				m.goTo(segCollectLease, fmt.Sprintf("open orphan %d", nm))
				return
			}
		}
		if m.c.TmpName && !m.c.TmpNoReclaim {
			for i := range s.Ino {
				f := s.Ino[i]
				if f.Born && f.Tmp && !(f.Tb == q.Tb && ts.W == (word{loading, f.Gen})) {
					n.unlinkTmp(f.Tb, f.Gen)
					m.emit("unlink stale tmp")
					return
				}
			}
		}
		m.goTo(segCollectUnlock, "no orphans")
	case segCollectLease:
		f := &n.Ino[q.Fd]
		if f.SH|f.EX != 0 && !m.c.FlockLies {
			m.goTo(segCollectUnlock, "orphan is leased: leave it")
			return
		}
		f.EX |= m.bit
		m.goTo(segCollectUnlink, "LOCK_EX|NB on orphan")
	case segCollectUnlink:
		if s.Name[q.Gen] == q.Fd {
			n.unlink(q.Gen)
		}
		m.goTo(segCollectClose, "unlink orphan")
	case segCollectClose:
		n.close(m.p)
		np.Gen = 0
		m.goTo(segCollectNext, "close orphan")
	case segCollectUnlock:
		m.unlockTable()
		m.finish(gotModel, "release T")
	}
}
