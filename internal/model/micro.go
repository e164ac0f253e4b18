package model

import "fmt"

// ---- may a lock file be removed after use? ----------------------------------

// A lockFile is three processes that lock the same path.
type lockFile struct {
	Unlink  bool // the holder removes the file before it closes it
	Recheck bool // after locking, the path must still name the locked inode
}

type lockState struct {
	Path  uint8    // inode the path names, 0 = none
	Held  [6]uint8 // by inode: holder + 1
	PC    [3]uint8
	Fd    [3]uint8
	Crash uint8
}

const (
	lockOpen = iota
	lockFlock
	lockStat
	lockInside
	lockUnlink
	lockClose
	lockDone
	lockDead
)

func (c lockFile) next(s lockState) []transition[lockState] {
	var out []transition[lockState]
	for p := range s.PC {
		if s.PC[p] >= lockDone {
			continue
		}
		n := s
		add := func(label string) { out = append(out, transition[lockState]{proc: int8(p), label: label, to: n}) }
		closeFd := func() {
			if n.Held[n.Fd[p]] == uint8(p)+1 {
				n.Held[n.Fd[p]] = 0
			}
			n.Fd[p] = 0
		}
		switch s.PC[p] {
		case lockOpen: // O_CREAT
			if s.Path == 0 {
				var used [6]bool
				for _, f := range s.Fd {
					used[f] = true
				}
				for i := uint8(1); i < 6; i++ {
					if !used[i] {
						n.Path = i
						break
					}
				}
			}
			n.Fd[p] = n.Path
			n.PC[p] = lockFlock
			add("open")
		case lockFlock:
			if s.Held[s.Fd[p]] == 0 {
				n.Held[s.Fd[p]] = uint8(p) + 1
				n.PC[p] = lockStat
				if !c.Recheck {
					n.PC[p] = lockInside
				}
				add("flock EX")
			}
		case lockStat:
			if s.Path != s.Fd[p] {
				closeFd()
				n.PC[p] = lockOpen
				add("inode changed: close, reopen")
			} else {
				n.PC[p] = lockInside
				add("stat: same inode")
			}
		case lockInside:
			if c.Unlink {
				n.PC[p] = lockUnlink
			} else {
				n.PC[p] = lockClose
			}
			add("leave critical section")
		case lockUnlink:
			n.Path = 0
			n.PC[p] = lockClose
			add("unlink lock file")
		case lockClose:
			closeFd()
			n.PC[p] = lockDone
			add("close")
		}
		if s.Crash < 2 {
			n = s
			n.Crash++
			closeFd()
			n.PC[p] = lockDead
			out = append(out, transition[lockState]{proc: int8(p), fault: true, label: "KILL", to: n})
		}
	}
	return out
}

func (c lockFile) system() system[lockState] {
	return system[lockState]{
		next: c.next,
		check: func(s lockState) string {
			n := 0
			for _, pc := range s.PC {
				if pc == lockInside {
					n++
				}
			}
			if n > 1 {
				return "two processes inside the critical section"
			}
			return ""
		},
		finished: func(s lockState) bool {
			for _, pc := range s.PC {
				if pc < lockDone {
					return false
				}
			}
			return true
		},
		describe: func(s lockState) string { return fmt.Sprintf("path=%d fds=%v held=%v", s.Path, s.Fd, s.Held) },
	}
}

// ---- how may several processes create the registry at once? -----------------

// A creation is three processes that open a registry which does not exist yet.
type creation struct {
	InPlace bool  // O_CREAT|O_EXCL on the final name, then initialise
	Rename  bool  // build aside, publish with rename(), which replaces
	MaxRm   uint8 // third party removes the registry
}

type creationState struct {
	Path  uint8    // inode the path names, 0 = none
	Init  [6]uint8 // fields initialised, by inode
	PC    [3]uint8
	Fd    [3]uint8
	Crash uint8
	Rm    uint8
}

const creationComplete = 3 // fields

const (
	createOpen = iota
	createInit
	createPublish
	createUse
	createDone
	createDead
)

func (c creation) next(s creationState) []transition[creationState] {
	var out []transition[creationState]
	fresh := func() uint8 {
		used := [6]bool{}
		used[s.Path] = true
		for _, f := range s.Fd {
			used[f] = true
		}
		for i := uint8(1); i < 6; i++ {
			if !used[i] {
				return i
			}
		}
		return 0
	}
	for p := range s.PC {
		if s.PC[p] >= createDone {
			continue
		}
		n := s
		add := func(label string) { out = append(out, transition[creationState]{proc: int8(p), label: label, to: n}) }
		switch s.PC[p] {
		case createOpen:
			if s.Path != 0 {
				n.Fd[p] = s.Path
				n.PC[p] = createUse
				add("open existing, map")
				break
			}
			i := fresh()
			n.Init[i] = 0
			n.Fd[p] = i
			n.PC[p] = createInit
			if c.InPlace {
				n.Path = i
				add("O_CREAT|O_EXCL final name")
			} else {
				add("O_TMPFILE")
			}
		case createInit:
			n.Init[s.Fd[p]]++
			if n.Init[s.Fd[p]] == creationComplete {
				n.PC[p] = createPublish
				if c.InPlace {
					n.PC[p] = createUse
				}
			}
			add("initialise one field")
		case createPublish:
			if s.Path != 0 && !c.Rename {
				n.Init[s.Fd[p]] = 0
				n.Fd[p] = 0
				n.PC[p] = createOpen
				add("linkat EEXIST: drop mine, open theirs")
				break
			}
			n.Path = s.Fd[p]
			n.PC[p] = createUse
			add("publish")
		case createUse:
			n.PC[p] = createDone // keeps its mapping: Fd stays
			add("use")
		}
		if s.Crash < 2 {
			n = s
			n.Crash++
			if n.PC[p] != createUse && n.Fd[p] != n.Path {
				n.Init[n.Fd[p]] = 0
			}
			n.Fd[p] = 0
			n.PC[p] = createDead
			out = append(out, transition[creationState]{proc: int8(p), fault: true, label: "KILL", to: n})
		}
	}
	if s.Rm < c.MaxRm && s.Path != 0 {
		n := s
		n.Rm++
		n.Path = 0
		out = append(out, transition[creationState]{proc: outsider, fault: true, label: "third party rm registry", to: n})
	}
	return out
}

func (c creation) system() system[creationState] {
	return system[creationState]{
		next: c.next,
		check: func(s creationState) string {
			first := uint8(0)
			for p, pc := range s.PC {
				if pc == createUse || pc == createDone {
					if s.Init[s.Fd[p]] != creationComplete {
						return fmt.Sprintf("p%d maps a half-initialised registry", p)
					}
					if s.Rm == 0 {
						if first == 0 {
							first = s.Fd[p]
						} else if first != s.Fd[p] {
							return "split brain: two processes use two registries"
						}
					}
				}
			}
			return ""
		},
		finished: func(s creationState) bool {
			for _, pc := range s.PC {
				if pc < createDone {
					return false
				}
			}
			return true
		},
		describe: func(s creationState) string { return fmt.Sprintf("path=%d fd=%v init=%v", s.Path, s.Fd, s.Init) },
		recover: func(s creationState) string {
			if s.Path != 0 && s.Init[s.Path] != creationComplete {
				// everyone dies now: can the next process use what it finds?
				return "a crash here leaves a half-initialised registry under the final name"
			}
			return ""
		},
	}
}
