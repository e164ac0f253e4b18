"""One life of a registry on the tmpfs: its directories, its table, its locks."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import _crash, _locks, _sys
from . import _layout as L
from . import _table as T
from ._dir import Dir, open_top
from .errors import Corrupt, Error, Limit, NoRegistry, ReadOnly, Timeout, Unsupported, Untrusted, VersionMismatch

_PIECE = 128 * L.SLOT_SIZE

now = getattr(time, "clock_gettime_ns", lambda _: 0)


def boottime() -> int:
    """CLOCK_BOOTTIME in nanoseconds: it runs on during suspend and nobody sets it."""
    return int(now(time.CLOCK_BOOTTIME))


def boot_id() -> bytes:
    """The kernel's name for the time since this machine started; zeros if it has none."""
    try:
        fd = os.open("/proc/sys/kernel/random/boot_id", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return bytes.fromhex(os.read(fd, 100).decode().strip().replace("-", ""))
        finally:
            os.close(fd)
    except (OSError, ValueError):
        return bytes(16)


class Gone(Exception):
    """The registry was deleted: open it again."""


class Moved(Exception):
    """The entry moved: look up again."""


class Again(Exception):
    """Somebody loaded it, or memory was freed: try again."""


class Place:
    """The directories, held open, and the table, read by pread (see _table)."""

    def __init__(self) -> None:
        self._fds: list[_Owned] = []
        self.gone = False
        self.queues: dict[int, _locks.KeyQueue] = {}
        self._mu = threading.Lock()
        weakref.finalize(self, _close_all, self._fds).atexit = False
        _places.add(self)

    top: Dir
    v1: Dir
    m: Dir
    w: Dir | None  # None for those who may only read
    fd: int
    stat: os.stat_result
    ident: T.Identity
    mine = True  # until it is known whose registry it is

    @classmethod
    def open(cls, path: str, *, create: bool, slots: int, mode: int, budget: int, trust: int | None) -> Place:
        """Opens the registry and, with create, makes what is missing.

        Somebody may delete it again while it is being made.
        """
        for _ in range(100):
            p = cls()
            try:
                p._open(path, create, slots, mode, budget, trust)
                return p
            except (FileNotFoundError, _locks.Gone) as e:
                p.close()
                missing = e
            except BaseException:
                p.close()
                raise
            if not (create and p.mine and os.path.isdir(os.path.dirname(os.path.abspath(path)))):
                break
        where = getattr(missing, "filename", None) or path
        raise NoRegistry(f"no registry here: open {where}: no such file or directory") from missing

    def close(self) -> None:
        """Closes the descriptors; only for a place that nobody uses."""
        _close_all(self._fds)

    def _keep(self, d: Dir) -> Dir:
        try:
            self._own(d.fd, os.fstat(d.fd))
        except OSError:
            d.close()
            raise
        return d

    def _own(self, fd: int, st: os.stat_result) -> None:
        _owners[fd] = self._fds
        self._fds.append((fd, st.st_dev, st.st_ino))

    def _open(self, path: str, create: bool, slots: int, mode: int, budget: int, trust: int | None) -> None:
        self.top = self._keep(open_top(path, mode, create, trust))
        perm = self.top.perm & 0o777
        self.mine = self.top.owner == os.geteuid()
        self.v1 = self._keep(self.top.sub(L.FOLDER, perm, create and self.mine))
        made = False
        try:
            self._open_table()
        except FileNotFoundError:
            if not (create and self.mine):
                raise
            try:
                self._create_table(slots, budget)
            except FileExistsError:
                pass
            made = True
            _crash.hit("open.registry")
            self._open_table()
        self.m = self._keep(self.v1.sub(L.MODELS_DIR, perm, self.mine))
        self._m_ino = self._fds[-1][2]
        self.w = None
        if (self.mine or os.geteuid() == 0) and not self.top.readonly:
            self.w = self._keep(self.v1.sub(L.LOCKS_DIR, 0o700, self.mine))
        if self.m.dev != self.top.dev or self.stat.st_dev != self.top.dev:
            raise Untrusted(f"not trusted: another file system is mounted within {path}")
        if made and self.w is not None:
            # The lock file of T must be there for root, who creates none.
            held = _locks.acquire(self.w, L.TABLE_LOCK, True, False)
            if held is not None:
                held.unlock()
        self.v1.hold()

    def _open_table(self) -> None:
        fd, st = self.v1.open(L.TABLE_FILE)
        self._own(fd, st)
        self.fd, self.stat = fd, st
        path = self.v1.join(L.TABLE_FILE)
        if not L.HEADER_SIZE <= st.st_size <= T.table_size(L.MAX_SLOTS):
            raise Corrupt(f"damaged: {path} has {st.st_size} bytes")
        try:
            self.ident = T.read_identity(os.pread(fd, L.HEADER_SIZE, 0), st.st_size)
        except (Corrupt, VersionMismatch) as e:
            e.path = path
            raise
        # The table was made before this machine started: its times mean nothing.
        self.other_boot = self.ident.boot_id not in (boot_id(), bytes(16))
        self.mask = T.index_entries(self.ident.slots) - 1
        self.slots_at = T.slots_offset(self.ident.slots)

    def _create_table(self, slots: int, budget: int) -> None:
        epoch = 0
        while not epoch:
            epoch = int.from_bytes(os.urandom(8), "little")
        ident = T.Identity(epoch, boot_id(), slots or L.DEFAULT_SLOTS, time.time_ns())
        self.v1.create(L.TABLE_FILE, T.new_image(ident, budget), 0o644)

    def read_only(self) -> ReadOnly:
        """Whose registry it is, or how it is mounted."""
        why = "is mounted so: read-only file system" if self.top.readonly else f"belongs to uid {self.top.owner}"
        return ReadOnly(f"{ReadOnly.default}: {self.top.path} {why}")

    # Reading, without any lock.

    def is_gone(self) -> bool:
        """Asks the kernel whether the table, and the folder of the models, still have a name."""
        if not self.gone:
            try:
                st = os.fstat(self.fd)
                folder = os.fstat(self.m.fd)
            except OSError:  # somebody closed all descriptors of the process
                self.gone = True
                return True
            self.gone = (
                st.st_nlink == 0 or st.st_size != self.stat.st_size or st.st_ino != self.stat.st_ino
                or folder.st_nlink == 0 or folder.st_ino != self._m_ino
            )  # fmt: skip
        return self.gone

    def word_offset(self, slot: int) -> int:
        return self.slots_at + slot * L.SLOT_SIZE

    def word_bytes(self, slot: int) -> bytes:
        """The word's 8 bytes; fewer when the table was truncated."""
        return os.pread(self.fd, 8, self.word_offset(slot))

    def find(self, key: str) -> T.Found | None:
        """Looks a key up: three preads, as a rule."""
        kb = key.encode()
        h = T.hash_key(kb)
        tag, pos, left = h >> 48, h & self.mask, self.mask + 1
        n = len(kb)
        while left > 0:
            run = os.pread(self.fd, min(256, 4 * (self.mask + 1 - pos)), L.HEADER_SIZE + 4 * pos)
            if len(run) < 4:
                self._truncated()
            for e in memoryview(run[: len(run) & ~3]).cast("I"):
                if e == 0:
                    return None
                slot = (e & 0xFFFF) - 1
                if e >> 16 == tag and 0 <= slot < self.ident.slots:
                    for _ in range(8):  # a live writer moves the word a few times at most
                        b = os.pread(self.fd, L.SLOT_KEY + n, self.word_offset(slot))
                        if len(b) < L.SLOT_KEY + n:
                            self._truncated()
                        w = int.from_bytes(b[:8], "little")
                        if (
                            w >> 56 == L.FREE
                            or b[L.SLOT_KEY :] != kb
                            or int.from_bytes(b[L.SLOT_KEY_LEN : L.SLOT_KEY], "little") != n
                        ):
                            break
                        if self.word_bytes(slot) == b[:8]:
                            return T.Found(slot, w)
            left -= len(run) // 4
            pos = (pos + len(run) // 4) & self.mask
        return None

    def _truncated(self) -> None:
        self.is_gone()
        raise Corrupt(f"damaged: a file was truncated while it was in use: {self.v1.join(L.TABLE_FILE)}")

    def snapshot(self) -> T.Table:
        """A private copy of the whole table; what it says may be outdated already."""
        size = self.stat.st_size
        b = bytearray(size)
        try:
            n = os.preadv(self.fd, [b], 0)
        except OSError:
            self.is_gone()  # then the next call opens the registry anew
            raise
        if n != size:
            self._truncated()
        return T.Table(memoryview(b), self.ident)

    def untidy(self) -> bool:
        """Without a lock: could a collector find work?"""
        try:
            names, states = self.m.names(), []
            # In pieces: most slots were never used, and every open pays for this.
            for at in range(self.slots_at, self.stat.st_size, _PIECE):
                b = memoryview(os.pread(self.fd, _PIECE, at))
                q = b[: len(b) & ~7].cast("Q")
                words = q[:: L.SLOT_SIZE // 8].tolist()
                states += [w >> 56 for w in words if w]
                if not self.other_boot and any(w >> 56 == L.READY and self._late(q, i) for i, w in enumerate(words)):
                    return True
        except (OSError, Error):
            return False
        ready = states.count(L.READY)
        return len(states) - states.count(L.FREE) != ready or len(names) != 3 * ready

    def _late(self, q: memoryview, i: int) -> bool:
        """Whether the model of the i-th slot in q may have outlived its TTL, by hints only."""
        at = i * L.SLOT_SIZE // 8
        if q[at + T.PIN]:
            return False
        ttl: int = q[at + T.TTL] or int.from_bytes(os.pread(self.fd, 8, L.HEADER_TTL), "little")
        return bool(ttl) and boottime() - max(q[at + T.LAST_ATTACH], q[at + T.LAST_RELEASE]) >= ttl

    def write_hints(self, slot: int, *hints: tuple[int, int]) -> None:
        """Stores hints without a lock, each by one aligned 8-byte write; they decide nothing."""
        try:
            fd, st = self.v1.open(L.TABLE_FILE, os.O_RDWR)
        except (OSError, Untrusted):
            return
        try:
            if st.st_size == self.stat.st_size and st.st_ino == self.stat.st_ino:
                for h, v in hints:
                    os.pwrite(fd, v.to_bytes(8, "little"), self.word_offset(slot) + 8 * h)
        except OSError:
            pass
        finally:
            os.close(fd)

    def touch(self, slot: int) -> None:
        """Notes an attach."""
        if self.w is not None:
            at = self.word_offset(slot) + 8 * T.ATTACHES
            n = int.from_bytes(os.pread(self.fd, 8, at), "little")
            self.write_hints(slot, (T.LAST_ATTACH, boottime()), (T.ATTACHES, (n + 1) & (1 << 64) - 1))

    # Locks. Order: K before T; a manifest's lock is only tried.

    def try_key(self, stripe: int) -> _locks.Held | None:
        """K of a stripe, if it can be had now."""
        if self.w is None:
            return None
        with self._alive():
            return _locks.acquire(self.w, L.STRIPE_LOCK % stripe, self.mine, False)

    def key_free(self, key: str) -> bool:
        """Whether nobody holds the load lock of key: who has begun to load it is dead."""
        held = self.try_key(T.stripe(key))
        if held is None:
            return False
        held.unlock()
        return True

    def lock_key(self, stripe: int, deadline: float | None, waits: Callable[[], None]) -> _locks.Held:
        """Waits for K of a stripe; waits is called if somebody has it. Gone, Timeout."""
        if self.w is None:
            raise self.read_only()
        with self._mu:
            queue = self.queues.setdefault(stripe, _locks.KeyQueue())
        with self._alive():
            return queue.wait(self.w, L.STRIPE_LOCK % stripe, self.mine, deadline, waits)

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Gone for what a deleted registry, or a descriptor that somebody has closed, gives."""
        try:
            yield
        except _locks.Gone:
            self.gone = True
            raise Gone from None
        except OSError:
            if self.is_gone():
                raise Gone from None
            raise

    @contextmanager
    def table(self, step: str, deadline: float | None = None, wait: bool = True) -> Iterator[Tx]:
        """Holds T for the block and maps the table writable.

        Timeout at the deadline; without wait at once. Gone: the registry was deleted.
        """
        if self.w is None:
            raise self.read_only()
        held: _locks.Held | None = None
        t: Tx | None = None
        try:
            with self._alive():
                if wait:
                    held = _locks.poll(self.w, L.TABLE_LOCK, self.mine, deadline)
                else:
                    held = _locks.acquire(self.w, L.TABLE_LOCK, self.mine, False)
                if held is None:
                    raise Timeout()
                _crash.hit(step)
                if self.is_gone() or not self.v1.same(L.TABLE_FILE, self.stat):
                    self.gone = True
                    raise Gone
                t = Tx(self, held)
                yield t
        finally:
            # Whatever comes, KeyboardInterrupt too: the whole machine waits for T.
            try:
                if t is not None:
                    t.end()
            finally:
                if held is not None:
                    held.unlock()

    def probe(self) -> None:
        """Checks what everything rests on: that flock excludes and that a mapping keeps the lock."""
        if self.top.dev in _probed:
            return
        fd = self.top.anonymous("lock probe")
        try:
            os.fchmod(fd, 0o600)  # whatever the umask is
            os.pwrite(fd, b"\1", 0)
            ro = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                _locks.try_shared(ro)
                _, base, whole = _sys.map_file(ro, 0, 1, _sys.PROT_READ, _sys.MAP_SHARED)
            finally:
                os.close(ro)
            try:
                mapped = _locks.try_exclusive(fd)
            finally:
                _sys.munmap(base, whole)
            if mapped:
                raise Unsupported(
                    "unsupported operation: a lock (flock) does not last as long as its mapping on"
                    f" {self.top.path}: nothing here can tell which models are in use"
                )
            if not _locks.try_exclusive(fd):
                raise Unsupported(
                    f"unsupported operation: a lock (flock) outlives its mapping on {self.top.path}:"
                    " no model could ever be removed"
                )
        finally:
            os.close(fd)
        _probed.add(self.top.dev)


_Owned = tuple[int, int, int]  # a descriptor; device and inode of what was opened
_owners: dict[int, list[_Owned]] = {}  # whose a descriptor is
_probed: set[int] = set()
_places: weakref.WeakSet[Place] = weakref.WeakSet()


def after_fork() -> None:
    """In the child: the threads that waited for locks are not there."""
    for p in list(_places):
        p.queues = {}
        p._mu = threading.Lock()


def _close_all(fds: list[_Owned]) -> None:
    # Daemon libraries close every descriptor of the process. Then a number may be
    # another place's by now, or a file of the application.
    while fds:
        fd, dev, ino = fds.pop()
        if _owners.get(fd) is fds:
            del _owners[fd]
            try:
                st = os.fstat(fd)
                ours = (st.st_dev, st.st_ino) == (dev, ino)
            except OSError as e:
                ours = e.errno != errno.EBADF
            if ours:
                os.close(fd)


class Tx(T.Editor):
    """What may be done while T is held; the mapping does not outlive the lock."""

    def __init__(self, p: Place, held: _locks.Held) -> None:
        self.p, self._held = p, held
        fd, st = p.v1.open(L.TABLE_FILE, os.O_RDWR)
        try:
            if st.st_size != p.stat.st_size or st.st_ino != p.stat.st_ino:
                p.gone = True
                raise Gone
            prot = _sys.PROT_READ | _sys.PROT_WRITE
            addr, self._base_addr, self._whole = _sys.map_file(fd, 0, st.st_size, prot, _sys.MAP_SHARED)
        except OSError as e:
            raise Limit(f"mmap {p.v1.join(L.TABLE_FILE)}: {(e.strerror or '').lower()}") from e
        finally:
            os.close(fd)
        _sys.madvise(addr, st.st_size, _sys.MADV_DONTFORK)  # a child has no business with it
        # Now, where it is an error; a table truncated later is a signal at the first store.
        _sys.madvise(addr, st.st_size, _sys.MADV_POPULATE_WRITE)
        self._raw = memoryview((ctypes.c_ubyte * st.st_size).from_address(addr))
        self._buf = self._raw.cast("B")
        try:
            with self._buf[: L.HEADER_SIZE] as header:
                ident = T.read_identity(bytes(header), st.st_size)
            super().__init__(self._buf, ident)
        except BaseException:
            self._buf.release()
            self._raw.release()
            _sys.munmap(self._base_addr, self._whole)
            raise

    def end(self) -> None:
        """Releases T; may be called before the block ends."""
        # Once, although an interrupt may come in between: the addresses may be another
        # thread's by the second call.
        whole, self._whole = self._whole, 0
        if whole:
            self.release()
            self._buf.release()
            self._raw.release()
            _sys.munmap(self._base_addr, whole)
        self._held.unlock()

    def gen_name(self, word: int) -> str:
        from ._names import gen_name

        return gen_name(self.ident.epoch, T.gen_of(word))

    def find(self, key: str) -> T.Found | None:
        """Lookup that does not believe in a miss: a torn index is mended here.

        It also finds the FREE slot that named key last.
        """
        f = self.lookup(key)
        if f is None:
            f = self.scan(key)
            if f is not None and T.state_of(f.word) != L.FREE:
                self.index_insert(f.slot, key)
        return f
