package model

import "fmt"

// What must hold of segment.go.

// ---- invariants -------------------------------------------------------------

func (c *segConfig) check(s segState) string {
	var loaders [3][3]int
	for p, q := range s.P {
		if q.Kind == segNobody {
			continue
		}
		if q.PC == segInUse {
			f := s.Ino[q.Fd]
			if !f.Born || f.Key != q.Key {
				return fmt.Sprintf("I1 p%d uses bytes of another key", p)
			}
			if f.Fill != 2 || f.Damaged {
				return fmt.Sprintf("I1 p%d uses incomplete or altered bytes", p)
			}
			if f.Gen != q.W.Gen || f.Tb != q.Tb {
				return fmt.Sprintf("I1 p%d uses another generation than it looked up", p)
			}
			if q.M1 != q.M2 || q.M1 != q.W.Gen {
				return fmt.Sprintf("I7 p%d accepted torn metadata", p)
			}
			if !c.IntegrityOnly {
				if f.SH&(1<<p) == 0 {
					return fmt.Sprintf("I2a p%d uses a segment without holding its lease", p)
				}
				if !f.Linked && s.Faults.Rm == 0 {
					return fmt.Sprintf("I2b our own code unlinked a segment that p%d leases", p)
				}
			}
		}
		if q.Tb != 0 && q.PC >= segCreate && q.PC <= segUnlockKey {
			loaders[c.lockEpoch(q.Tb)][q.Key]++
		}
	}
	if !c.IntegrityOnly {
		for e := range loaders {
			for k, n := range loaders[e] {
				if n > 1 {
					return fmt.Sprintf("I4 %d processes load key %d at once", n, k)
				}
			}
		}
		for tb := uint8(1); tb <= 2; tb++ {
			t := s.Tab[tb]
			if !t.Born || t.W.St != ready {
				continue
			}
			i := s.Name[c.name(tb, t.MK, t.W.Gen)]
			if i == 0 {
				if s.Faults.Rm == 0 && s.Cur == tb {
					return "I3 READY without a file"
				}
				continue
			}
			f := s.Ino[i]
			if s.Cur == tb && (f.Fill != 2 || f.Damaged || !f.RO || f.Key != t.MK) {
				return "I3 READY but the file is incomplete, altered, writable or another key's"
			}
			if t.M1 != t.W.Gen || t.M2 != t.W.Gen {
				return "I7 READY with metadata of another generation"
			}
		}
		for i, f := range s.Ino {
			if f.EX != 0 && f.SH != 0 {
				return fmt.Sprintf("kernel model broken: SH and EX on %d", i)
			}
		}
	}
	return ""
}

func segFinished(s segState) bool {
	for _, q := range s.P {
		if q.alive() {
			return false
		}
	}
	return true
}

func segDescribe(s segState) string {
	o := ""
	for tb := 1; tb <= 2; tb++ {
		if t := s.Tab[tb]; t.Born {
			o += fmt.Sprintf("reg%d(%v):%s|%d meta=(k%d,%d,%d) ", tb, int(s.Cur) == tb, t.W.St, t.W.Gen, t.MK, t.M1, t.M2)
		}
	}
	o += fmt.Sprintf("T=%v K=%v", s.T, s.K)
	for i, f := range s.Ino {
		if f.Born {
			o += fmt.Sprintf(" ino%d{reg%d key%d gen%d linked=%v fill=%d dmg=%v SH=%b EX=%b}", i, f.Tb, f.Key, f.Gen, f.Linked, f.Fill, f.Damaged, f.SH, f.EX)
		}
	}
	return o
}

// ---- recovery ---------------------------------------------------------------

// recovery returns the test of I9. States that differ only in their processes
// recover alike, so that the answer is remembered by what survives the kill.
func (c *segConfig) recovery() func(segState) string {
	known := map[stateKey]string{}
	return func(s segState) string {
		n := s
		for p := range n.P {
			n.dropLocks(p)
			n.close(p)
			n.P[p] = segProc{}
		}
		for i := range n.Ino {
			n.Ino[i].EX &^= outsideBit
			n.Ino[i].Open &^= outsideBit
			n.reap(uint8(i))
		}
		n.Kid = 0
		n.Faults = faults{}
		key := keyOf(n)
		v, ok := known[key]
		if !ok {
			v = c.recoverAlone(n)
			known[key] = v
		}
		return v
	}
}

// recoverAlone lets one getter and one collector run. "Nothing lost": the getter
// gets its model, no lock is held, and exactly one file is in memory.
func (c *segConfig) recoverAlone(n segState) string {
	alone := *c
	alone.Crash, alone.Rm, alone.RmReg, alone.Host, alone.Enospc = 0, 0, 0, 0, false
	alone.maxGen++
	alone.FlockLies, alone.NoK, alone.NoT = false, false, false
	run := func(kind segKind, key uint8) (outcome, bool) {
		n.P[0] = segProc{Kind: kind, Key: key, PC: kind.start()}
		for range 300 {
			t := alone.step(&n, 0)
			if len(t) == 0 {
				return 0, false
			}
			n = t[0].to
			if n.P[0].PC == segInUse && alone.check(n) != "" {
				return 0, false
			}
			if n.P[0].PC == segDone {
				return n.P[0].Got, true
			}
		}
		return 0, false
	}
	if n.Cur == 0 && n.Tab[2].Born {
		return "" // model bound: no third registry
	}
	want := uint8(1)
	if n.Cur != 0 {
		if t := n.Tab[n.Cur]; t.W.St == ready && n.Name[c.name(n.Cur, t.MK, t.W.Gen)] != 0 {
			want = t.MK
		}
	}
	got, ok := run(segGetter, want)
	if !ok {
		return "a restarted getter gets stuck or reads wrong bytes"
	}
	if got != gotModel {
		return fmt.Sprintf("a restarted getter alone does not get its model (result %d)", got)
	}
	if _, ok := run(segCollector, 0); !ok {
		return "the collector gets stuck"
	}
	n.P[0] = segProc{}
	if n.T != [3]uint8{} || n.K != [3][3]uint8{} {
		return "a lock is still held after recovery"
	}
	files := 0
	for _, f := range n.Ino {
		if f.Born {
			files++
		}
	}
	if t := n.Tab[n.Cur]; t.W.St != ready || files != 1 {
		return fmt.Sprintf("after recovery: word %s, %d files in memory (leak)", t.W.St, files)
	}
	return ""
}
