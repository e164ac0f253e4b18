"""Attaching a published generation: the reader's half of the protocol.

No lock is held and no permission to write is needed. The mapping of the manifest is
the lease: the kernel keeps the shared lock as long as it is mapped, so the
descriptor is closed at once. Every view of a payload file keeps the lease.
"""

from __future__ import annotations

import os
import threading
import time
import weakref

from . import _crash, _locks, _sys
from . import _layout as L
from . import _manifest as M
from . import _table as T
from ._names import gen_name, quote
from ._place import Gone as PlaceGone
from ._place import Moved, Place, boottime
from .errors import Busy, Corrupt, Error, Gone, InvalidPath, NotFound, Untrusted, VersionMismatch, from_os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

EAGER_FILES = 1

_map_mu = threading.Lock()  # keeps two threads from mapping one file twice


def after_fork() -> None:
    """In the child: another thread of the parent may have held it."""
    global _map_mu
    _map_mu = threading.Lock()


class Attachment:
    """A process's mapping of a generation. It ends when nothing refers to it and its views."""

    def __init__(self, place: Place, man: M.Manifest, slot: int, word: int, lease: Any) -> None:
        self.place, self.manifest, self.slot = place, man, slot
        self.word = word.to_bytes(8, "little")
        self.offset = place.word_offset(slot)
        self.lease = lease
        self.folder = f"{man.stem}/{man.name}"
        self.path = place.m.join(self.folder)
        self.index = {f.path: i for i, f in enumerate(man.files)}
        self.mapped: dict[tuple[int, bool], memoryview] = {}

    def current(self) -> bool:
        """Whether this is still the published generation."""
        try:
            return os.pread(self.place.fd, 8, self.offset) == self.word and not self.place.gone
        except OSError:  # somebody closed all descriptors of the process
            self.place.is_gone()
            return False

    def file(self, name: str, private: bool = False) -> memoryview:
        """The bytes of a file, mapped once per process; private ones are copied on write."""
        try:
            i = self.index[name]
        except (KeyError, TypeError):
            raise InvalidPath("not a valid path of a model's file: the model has no such file", str(name)) from None
        view = self.mapped.get((i, private))
        if view is None:
            fd = self.open(i)
            try:
                view = self.map(i, fd, private)
            finally:
                os.close(fd)
        return view

    def open(self, i: int) -> int:
        """Opens file i, checked against the manifest."""
        want = self.manifest.files[i]
        name = f"{self.folder}/{want.path}"
        try:
            fd, st = self.place.m.open(name)
        except FileNotFoundError as e:
            raise Gone(f"removed while in use: open {self.place.m.join(name)}: no such file or directory") from e
        except Untrusted:
            raise  # an OSError as well
        except OSError as e:
            raise from_os(e, "open", self.place.m.join(name)) from e
        if st.st_size != want.size:
            os.close(fd)
            raise Corrupt(f"damaged: {self.place.m.join(name)} has {st.st_size} bytes, published were {want.size}")
        return fd

    def map(self, i: int, fd: int, private: bool = False) -> memoryview:
        """Maps file i from its descriptor."""
        with _map_mu:
            view = self.mapped.get((i, private))
            if view is None:
                view = self.mapped[i, private] = self._mapping(i, fd, private)
            return view

    def copy(self, name: str) -> memoryview:
        """The bytes of a file, copied on write, in a mapping that nobody has written to."""
        i = self.index[name]
        fd = self.open(i)
        try:
            return self._mapping(i, fd, True)
        finally:
            os.close(fd)

    def _mapping(self, i: int, fd: int, private: bool) -> memoryview:
        size = self.manifest.files[i].size
        if not size:
            return memoryview(b"")
        prot, flags = _sys.PROT_READ, _sys.MAP_SHARED
        if private:
            # Without NORESERVE every 4 GiB mapped would count as 4 GiB of
            # commit charge, written to or not.
            prot |= _sys.PROT_WRITE
            flags = _sys.MAP_PRIVATE | _sys.MAP_NORESERVE
        try:
            array = _sys.map_array(fd, size, prot, flags, self.lease)
        except OSError as e:
            raise from_os(e, "mmap", f"{self.path}/{self.manifest.files[i].path}") from e
        view = memoryview(array).cast("B")
        return view if private else view.toreadonly()

    def map_all(self) -> None:
        """Maps a model of one file; the others when they are asked for (docs/adr/0005)."""
        if len(self.manifest.files) <= EAGER_FILES:
            for i in range(len(self.manifest.files)):
                if (i, False) not in self.mapped:
                    fd = self.open(i)
                    try:
                        self.map(i, fd)
                    finally:
                        os.close(fd)

    def lease_fd(self) -> int:
        """A further lease, on a description of its own."""
        name = self.manifest.stem + L.MANIFEST_EXT
        try:
            fd, st = self.place.m.open(name)
        except FileNotFoundError as e:
            raise Gone(f"removed while in use: open {self.place.m.join(name)}: no such file or directory") from e
        try:
            if not _locks.try_shared(fd) or st.st_nlink == 0:
                raise Gone()
        except BaseException:
            os.close(fd)
            raise
        return fd

    def verify(self) -> None:
        """Digests every chunk again. Corrupt names the file and the chunk."""
        name = self.manifest.stem + L.DIGESTS_EXT
        try:
            fd, st = self.place.m.open(name)
        except FileNotFoundError as e:
            raise Gone(f"removed while in use: open {self.place.m.join(name)}: no such file or directory") from e
        try:
            data = os.pread(fd, min(st.st_size, 1 << 30), 0)
        finally:
            os.close(fd)
        step = self.manifest.chunk_bytes
        for f, sums in zip(self.manifest.files, M.decode_digests(data, self.manifest)):
            root = M.root(f.size, sums)
            if root != f.digest:
                raise Corrupt(f"damaged: {f.path}: its chunk digests make {root}, the manifest says {f.digest}")
            fd = self.open(self.index[f.path])
            try:
                # By pread: a file that somebody truncates is an error, and no signal.
                for n, off in enumerate(range(0, f.size, step)):
                    want = min(step, f.size - off)
                    b = os.pread(fd, want, off)
                    if len(b) != want or M.chunk_digest(b) != sums[n * L.DIGEST_SIZE : (n + 1) * L.DIGEST_SIZE]:
                        raise Corrupt(
                            f"{f.path}: chunk {n}: damaged: bytes {off} to {off + want} differ from what was loaded"
                        )
            finally:
                os.close(fd)


def attach(place: Place, key: str) -> Attachment:
    """Attaches the published generation of key. NotFound, Busy, Gone, Corrupt; PlaceGone."""
    busy = 0
    for _ in range(10_000):
        try:
            a = _attach_once(place, key)
            place.touch(a.slot)
            return a
        except Moved:
            busy = 0
        except _Locked:
            # An evictor or collector tries the lock for a moment; a stranger may
            # hold it for ever.
            busy += 1
            if busy == 4:
                break
            time.sleep(50e-6 * 4**busy)
        except (Error, OSError):
            if place.is_gone():
                raise PlaceGone from None
            raise
    raise Busy()


class _Locked(Exception):
    pass


def _attach_once(place: Place, key: str) -> Attachment:
    f = place.find(key)
    if f is None or T.state_of(f.word) != L.READY:
        raise NotFound()
    word = f.word.to_bytes(8, "little")
    gen = T.gen_of(f.word)
    name = gen_name(place.ident.epoch, gen) + L.MANIFEST_EXT
    try:
        try:
            fd, st = place.m.open(name)
        except FileNotFoundError:
            raise NotFound() from None
        try:
            _crash.hit("acquire.open-manifest")
            if not _locks.try_shared(fd):
                raise _Locked
            _crash.hit("acquire.lease")
            if place.word_bytes(f.slot) != word:
                raise Moved
            man, st = read_manifest(place, fd, name)
            if st.st_nlink == 0:
                raise NotFound()
            if (man.key, man.generation, man.epoch) != (key, gen, place.ident.epoch):
                raise Corrupt(
                    f"damaged: the manifest {place.m.join(name)} describes key {quote(man.key)},"
                    f" generation {man.generation}"
                )
            lease = Lease(place, fd, st.st_size, f.slot, f.word)
        finally:
            os.close(fd)
        _crash.hit("acquire.map")
        a = Attachment(place, man, f.slot, f.word, lease)
        a.map_all()
        return a
    except (Error, OSError, _Locked):
        if place.word_bytes(f.slot) != word:
            raise Moved from None
        raise


def read_manifest(place: Place, fd: int, name: str) -> tuple[M.Manifest, os.stat_result]:
    """Reads and validates by pread, which a truncated file cannot turn into a fault."""
    st = os.fstat(fd)
    path = place.m.join(name)
    if not 0 < st.st_size <= L.MAX_MANIFEST:
        raise Corrupt(f"damaged: {path} has {st.st_size} bytes")
    b = os.pread(fd, st.st_size, 0)
    try:
        return M.decode(b), st
    except VersionMismatch:
        raise
    except Corrupt as e:
        raise Corrupt(f"damaged: {path}: {e.text}") from None


class Lease:
    """The mapping of a locked manifest. Every view of the model's files refers to it."""

    def __init__(self, place: Place, fd: int, size: int, slot: int, word: int) -> None:
        try:
            base = _sys.placeholder(size)
            weakref.finalize(self, _released, place, slot, word, base, size, os.getpid()).atexit = False
            _sys.map_at(fd, 0, size, _sys.PROT_READ, _sys.MAP_SHARED, base)
        except OSError as e:
            raise from_os(e, "mmap", "manifest") from e


def _released(place: Place, slot: int, word: int, base: int, size: int, pid: int) -> None:
    """The last view is gone. Called by the garbage collector, in any thread, at any
    moment: it takes no lock of this process and waits for nothing."""
    _sys.munmap(base, size)
    _crash.hit("use.release")
    try:
        if place.w is None or place.gone or not place.mine or pid != os.getpid():
            return  # a child of fork: the parent's lease goes on
        if place.word_bytes(slot) == word.to_bytes(8, "little"):
            place.write_hints(slot, (T.LAST_RELEASE, boottime()))
        elif place.ident.epoch:
            from ._remove import retire

            retire(place, T.gen_of(word), wait=False)
    except Exception:  # the next load, open or gc does it
        pass
