//go:build (amd64 || arm64) && !onecopy_private

package registry

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/edsrzf/mmap-go"
	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/crashpoint"
	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/internal/procfs"
	"github.com/onecopy/onecopy/lockfile"
	"github.com/onecopy/onecopy/shm"
)

// place is one life of a registry on the tmpfs: its directories and its mapped
// table. When somebody deletes the registry the place is dead for new models
// (gone), but stays until the last model attached from it is closed.
type place struct {
	top, v1, m *shm.Dir
	w          *shm.Dir // nil for those who may only read
	fd         int      // the table, for fstat
	stat       unix.Stat_t
	mem        shm.Mapping
	table      *layout.Table

	mine bool // this process's user owns it

	counts *localStats // of the Registry that has it open

	sizes map[string]int64 // of published generations' names, which do not change. Under T

	refs   atomic.Int64
	gone   atomic.Bool
	closed atomic.Bool // by the Registry: nothing is to be waited for

	boot struct {
		sync.Once
		other bool
	}
	keys struct {
		sync.Mutex
		queues map[int]*keyQueue // by stripe; made when the first goroutine waits
	}
}

// Errors that never leave the package: they say how to go on.
var (
	errGone  = errors.New("the registry was deleted") // open it again
	errMoved = errors.New("the entry moved")          // look up again
	errAgain = errors.New("somebody loaded it")       // attach
)

// openPlace opens the registry of r and, with create, makes what is missing.
// Somebody may delete it again while it is being made.
func openPlace(r *Registry, create bool) (p *place, err error) {
	for range 100 {
		p, err = openPlaceOnce(r.dir, &r.opts, create)
		if err == nil || !create || !errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrNoRegistry) {
			break
		}
	}
	if err == nil {
		p.counts = &r.stats
	}
	return p, err
}

func openPlaceOnce(dir string, o *Options, create bool) (p *place, err error) {
	perm := uint32(0o700)
	if o.Mode == 0o755 {
		perm = 0o755
	}
	p = &place{fd: -1}
	mine := true
	defer func() {
		if err != nil {
			p.destroy()
			p = nil
			if errors.Is(err, fs.ErrNotExist) && (!create || !mine) {
				err = ErrNoRegistry
			}
		}
	}()
	if p.top, err = shm.OpenDir(dir, shm.DirOptions{Create: create, Perm: perm, TrustOwner: o.TrustOwner}); err != nil {
		return p, err
	}
	perm = p.top.Perm() &^ 0o7000
	mine = p.top.Owner() == uint32(os.Geteuid())
	p.mine = mine
	if p.v1, err = p.top.Sub(layout.Folder, perm, create && mine); err != nil {
		return p, err
	}
	made := false
	err = p.openTable()
	if create && mine && errors.Is(err, fs.ErrNotExist) {
		if err = p.createTable(o); err == nil || errors.Is(err, fs.ErrExist) {
			made = true
			crashpoint.Hit("open.registry")
			err = p.openTable()
		}
	}
	if err != nil {
		return p, err
	}
	if p.m, err = p.v1.Sub(layout.ModelsDir, perm, mine); err != nil {
		return p, err
	}
	if (mine || os.Geteuid() == 0) && !p.top.ReadOnly() {
		if p.w, err = p.v1.Sub(layout.LocksDir, 0o700, mine); err != nil {
			return p, err
		}
	}
	if p.m.Device() != p.top.Device() || uint64(p.stat.Dev) != p.top.Device() {
		return p, fmt.Errorf("%w: another file system is mounted within %s", ErrUntrusted, dir)
	}
	if made {
		// The lock file of T must be there for root, who creates none.
		if held, err := p.lockFile(layout.TableLock).TryLock(); err == nil {
			_ = held.Unlock()
		}
	}
	p.v1.TryHold()
	p.refs.Store(1)
	return p, nil
}

func (p *place) openTable() (err error) {
	if p.fd, p.stat, err = p.v1.OpenFD(layout.TableFile); err != nil {
		return err
	}
	path := p.v1.Join(layout.TableFile)
	if p.stat.Size < layout.HeaderSize || p.stat.Size > int64(layout.TableSize(layout.MaxSlots)) {
		return fmt.Errorf("%w: %s has %d bytes", ErrCorrupt, path, p.stat.Size)
	}
	if p.mem, err = shm.Map(p.fd, p.stat.Size, false); err != nil {
		return &fs.PathError{Op: "mmap", Path: path, Err: err}
	}
	return guarded(func() error {
		p.table, err = layout.NewTable(p.mem.Bytes)
		return tableErr(path, err)
	})
}

// tableErr gives the errors of package layout their place and their name here.
func tableErr(path string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, layout.ErrCorrupt):
		return fmt.Errorf("%w: %s: %w", ErrCorrupt, path, err)
	}
	return fmt.Errorf("%s: %w", path, err)
}

func (p *place) createTable(o *Options) error {
	id := layout.Identity{Slots: o.Slots, Created: time.Now().UnixNano()}
	if id.Slots == 0 {
		id.Slots = layout.DefaultSlots
	}
	for id.Epoch == 0 {
		var b [8]byte
		if _, err := unix.Getrandom(b[:], 0); err != nil {
			return os.NewSyscallError("getrandom", err)
		}
		id.Epoch = binary.LittleEndian.Uint64(b[:])
	}
	id.BootID, _ = bootID()
	image, err := layout.NewImage(id, uint64(max(o.Budget, 0)), 0)
	if err != nil {
		return err
	}
	return p.v1.Create(layout.TableFile, image, 0o644)
}

// otherBoot reports whether the table was made before this machine started: its
// times mean nothing. It is asked only when a time matters.
func (p *place) otherBoot() bool {
	p.boot.Do(func() {
		if boot, ok := bootID(); ok {
			made := p.table.Identity().BootID
			p.boot.other = made != boot && made != [16]byte{}
		}
	})
	return p.boot.other
}

// bootID is the kernel's name for the time since this machine started.
func bootID() (id [16]byte, ok bool) {
	boot, err := procfs.BootID()
	if err != nil {
		return id, false
	}
	b, err := hex.DecodeString(strings.ReplaceAll(boot, "-", ""))
	if err != nil || len(b) != len(id) {
		return id, false
	}
	return [16]byte(b), true
}

// lockFile is a lock file of w/. Only the owner creates one: root's own file
// would shut the owner out.
func (p *place) lockFile(name string) *lockfile.File {
	if p.mine {
		return lockfile.At(p.w.FDPath(name))
	}
	return lockfile.Existing(p.w.FDPath(name))
}

// foreign is ErrReadOnly when the registry is another user's, or cannot be written
// from here.
func (p *place) foreign() error {
	if p.mine && !p.top.ReadOnly() {
		return nil
	}
	return p.readOnly()
}

// tryKey takes the load lock of key if nobody has it.
func (p *place) tryKey(key string) (*lockfile.Held, error) {
	return p.lockFile(layout.StripeLock(layout.Stripe(key))).TryLock()
}

// keyFree reports whether nobody holds the load lock of key: who has begun to load
// it is dead.
func (p *place) keyFree(key string) bool {
	held, err := p.tryKey(key)
	if err != nil {
		return false
	}
	_ = held.Unlock()
	return true
}

// readOnly says whose registry it is, or how it is mounted.
func (p *place) readOnly() error {
	if p.top.ReadOnly() {
		return fmt.Errorf("%w: %s is mounted so: %w", ErrReadOnly, p.top.Path(), unix.EROFS)
	}
	return fmt.Errorf("%w: %s belongs to uid %d", ErrReadOnly, p.top.Path(), p.top.Owner())
}

func (p *place) ref() { p.refs.Add(1) }

func (p *place) unref() {
	if p.refs.Add(-1) == 0 {
		p.destroy()
	}
}

func (p *place) destroy() {
	for _, d := range []*shm.Dir{p.top, p.v1, p.m, p.w} {
		if d != nil {
			d.Close()
		}
	}
	_ = p.mem.Unmap()
	if p.fd >= 0 {
		unix.Close(p.fd)
	}
}

// isGone asks the kernel whether the table, and the folder of the models, still
// have a name, and the table the owner that it had. If the kernel cannot tell they have: opening the registry anew
// would not help.
func (p *place) isGone() bool {
	var st unix.Stat_t
	if p.gone.Load() || unix.Fstat(p.fd, &st) == nil && (st.Nlink == 0 || st.Size != p.stat.Size || st.Uid != p.stat.Uid) || !p.m.Alive() {
		p.gone.Store(true)
		return true
	}
	return false
}

// word reads a slot's word; ok is false when the table was truncated.
func (p *place) word(slot int) (w layout.Word, ok bool) {
	old := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(old)
		if recover() != nil {
			w, ok = 0, false
		}
	}()
	return p.table.Word(slot), true
}

// find looks a key up.
func (p *place) find(key string) (f layout.Found, ok bool, err error) {
	old := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(old)
		if x := recover(); x != nil {
			err = faultErr(x)
		}
	}()
	f, ok = p.table.Lookup(key)
	return f, ok, nil
}

// guarded runs fn and turns a fault on mapped memory, which is what a truncated
// file gives, into an error.
func guarded(fn func() error) (err error) {
	old := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(old)
		if x := recover(); x != nil {
			err = faultErr(x)
		}
	}()
	return fn()
}

func faultErr(x any) error {
	if _, ok := x.(interface{ Addr() uintptr }); !ok {
		panic(x)
	}
	return fmt.Errorf("%w: a file was truncated while it was in use (%v)", ErrCorrupt, x)
}

// tx is what may be done while T is held: change the table through a writable
// mapping that does not outlive the lock.
type tx struct {
	layout.Editor
	p     *place
	held  *lockfile.Held
	mem   mmap.MMap
	inUse []int // see used
}

// withTable runs fn under T, waiting for it until ctx ends. errGone: the
// registry was deleted, nothing was done.
//
// Lock order: K before T; a manifest's lock is only tried under T.
func (p *place) withTable(ctx context.Context, step string, fn func(*tx) error) error {
	return p.locked(step, fn, func(f *lockfile.File) (*lockfile.Held, error) { return f.Lock(ctx) })
}

// tryTable is withTable for callers that must not wait: lockfile.ErrLocked.
func (p *place) tryTable(step string, fn func(*tx) error) error {
	return p.locked(step, fn, (*lockfile.File).TryLock)
}

func (p *place) locked(step string, fn func(*tx) error, lock func(*lockfile.File) (*lockfile.Held, error)) (err error) {
	if p.w == nil {
		return p.readOnly()
	}
	held, err := lock(p.lockFile(layout.TableLock))
	if err != nil {
		if errors.Is(err, lockfile.ErrGone) || errors.Is(err, fs.ErrNotExist) {
			if no := shm.NeedProc(); no != nil {
				return no
			}
		}
		if errors.Is(err, lockfile.ErrGone) {
			p.gone.Store(true)
			return errGone
		}
		return err
	}
	t := &tx{p: p, held: held}
	defer t.end()
	crashpoint.Hit(step)
	if p.gone.Load() || !p.m.Alive() {
		p.gone.Store(true)
		return errGone
	}
	f, st, err := p.v1.OpenWritable(layout.TableFile)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) { // deleted
			p.gone.Store(true)
			return errGone
		}
		return err
	}
	if st.Ino != p.stat.Ino || st.Dev != p.stat.Dev || st.Nlink == 0 || st.Size != p.stat.Size { // made anew
		f.Close()
		p.gone.Store(true)
		return errGone
	}
	t.mem, err = mmap.MapRegion(f, int(p.stat.Size), mmap.RDWR, 0, 0)
	f.Close()
	if err != nil {
		return &fs.PathError{Op: "mmap", Path: f.Name(), Err: shm.MapError(err)}
	}
	// A child of fork has no business with it.
	_ = unix.Madvise(t.mem, unix.MADV_DONTFORK)
	_ = unix.Madvise(t.mem, unix.MADV_DONTDUMP)
	return guarded(func() error {
		if t.Editor, err = p.table.Edit(t.mem); err != nil {
			return tableErr(f.Name(), err)
		}
		return fn(t)
	})
}

// end releases T; it may be called before fn returns.
func (t *tx) end() {
	if t.mem != nil {
		_ = t.mem.Unmap()
		t.mem = nil
	}
	if t.held != nil {
		_ = t.held.Unlock()
		t.held = nil
	}
}

// keyQueue hands one load lock to the goroutines of this process in turn, so
// that at most one thread of the process blocks on it in the kernel.
type keyQueue struct {
	mu      sync.Mutex
	running bool
	waiting []*keyWaiter
}

type keyWaiter struct {
	got  chan keyGrant // capacity 1
	done func() bool   // the lock is not wanted any more; may be nil
	left bool          // under mu: nobody reads got any more
}

type keyGrant struct {
	held *lockfile.Held
	err  error
}

// lockKey takes the load lock of a stripe. Waiting uses no processor and ends
// with ctx. If done, which may be nil, is true when the lock is granted the next
// one in the queue gets it at once and the caller errAgain. waits, which may be
// nil, counts those who do not get it at once. errGone: the registry was deleted,
// closed or moved while it waited, whatever its holder does.
func (p *place) lockKey(ctx context.Context, stripe int, done func() bool, waits *atomic.Uint64) (*lockfile.Held, error) {
	file := p.lockFile(layout.StripeLock(stripe))
	held, err := file.TryLock()
	if err == nil {
		return held, nil
	}
	if !errors.Is(err, lockfile.ErrLocked) {
		return nil, p.lockErr(err)
	}
	if waits != nil {
		waits.Add(1)
	}
	p.keys.Lock()
	if p.keys.queues == nil {
		p.keys.queues = map[int]*keyQueue{}
	}
	q := p.keys.queues[stripe]
	if q == nil {
		q = &keyQueue{}
		p.keys.queues[stripe] = q
	}
	p.keys.Unlock()
	me := &keyWaiter{got: make(chan keyGrant, 1), done: done}
	q.mu.Lock()
	q.waiting = append(q.waiting, me)
	if !q.running {
		q.running = true
		p.ref()
		go func() {
			defer p.unref()
			q.serve(file)
		}()
	}
	q.mu.Unlock()
	p.prepare()
	look := time.NewTicker(lookAgain)
	defer look.Stop()
	for {
		select {
		case g := <-me.got:
			return g.held, p.lockErr(g.err)
		case <-look.C:
			if !p.closed.Load() && !p.isGone() && !p.top.Moved() {
				continue
			}
			err = errGone
		case <-ctx.Done():
			err = ctx.Err()
		}
		q.mu.Lock()
		me.left = true
		q.mu.Unlock()
		select {
		case g := <-me.got: // granted in the same moment
			if g.held != nil {
				_ = g.held.Unlock()
			}
		default:
		}
		return nil, err
	}
}

// lookAgain is how soon a waiter notices that what it waits in is over.
const lookAgain = time.Second

func (p *place) lockErr(err error) error {
	if errors.Is(err, lockfile.ErrGone) {
		p.gone.Store(true)
		return errGone
	}
	return err
}

// serve blocks for the lock and hands it to the first waiter that still wants
// it, until nobody waits. With 200 processes in the kernel's queue the time for
// which each of them keeps the lock decides when the last one is through.
func (q *keyQueue) serve(file *lockfile.File) {
	for {
		held, err := file.WaitUnless(q.unwanted)
		q.mu.Lock()
		var still []*keyWaiter
		for _, w := range q.waiting {
			switch {
			case w.left:
			case w.isDone():
				w.got <- keyGrant{err: errAgain}
			case held != nil || err != nil:
				w.got <- keyGrant{held, err}
				held, err = nil, nil
			default:
				still = append(still, w)
			}
		}
		q.waiting = still
		q.running = len(still) > 0
		again := q.running
		q.mu.Unlock()
		if held != nil {
			_ = held.Unlock()
		}
		if !again {
			return
		}
	}
}

// unwanted reports whether none of the waiters would do anything with the lock.
func (q *keyQueue) unwanted() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, w := range q.waiting {
		if !w.left && !w.isDone() {
			return false
		}
	}
	return true
}

func (w *keyWaiter) isDone() bool { return w.done != nil && w.done() }

// prepare does, for a process that waits for a load lock, what its load would
// have to do first: the kernel enters the table into its page table, and the
// control group is looked at once.
func (p *place) prepare() {
	_ = unix.Madvise(p.mem.Bytes, unix.MADV_POPULATE_READ)
	headroom()
}
