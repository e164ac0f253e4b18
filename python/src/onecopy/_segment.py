"""Segments in the making: anonymous files of the tmpfs, filled, sealed, linked.

Whoever dies drops them. A window is allocated by one pwrite per 2 MiB (a full
tmpfs says ENOSPC there, where a store would be SIGBUS), collapsed into 2 MiB
pages, and read into through a mapping; where the kernel grants none, plain writes.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from . import _layout as L
from . import _sys
from ._dir import Dir
from ._locks import close, private
from ._manifest import chunk_count, chunk_digest
from .errors import LoadFailed, SourceFailed, Unsupported, from_os

# Out of the page cache a copy is bound by memory, and one or two threads are enough.
# From a disk, reading past the cache straight into 2 MiB pages is fastest, with several
# small windows in flight, and leaves nothing behind in the cache.
WINDOW = 64 << 20
COLD_WINDOW, COLD_THREADS = 16 << 20, 8
SMALL = 4 << 20  # below it plain writes are as good
_DIRECT_ALIGN = 4096
_HUGE = _sys.HUGE_PAGE
_CHUNK = L.CHUNK_BYTES


class WriterLeft(LoadFailed):
    """The kernel says that somebody can still write the file."""

    def __init__(self, path: str) -> None:
        super().__init__(f"the load failed: lease {path}: a writer is left")
        self.hint = "a child that the loader forked still has the memory: let it end before the loader returns"


class Fill:
    """How segments are filled, and what happened; one may serve several files.

    reserve(n, again) is asked before n further bytes are allocated; again says that
    2 MiB pages were refused and the memory must be looked at anew, because a write
    beyond a cgroup's limit is no error but a signal.
    """

    def __init__(self, reserve: Callable[[int, bool], None], progress: Callable[[int], None], threads: int) -> None:
        self.reserve, self.progress, self.threads = reserve, progress, threads
        self.collapsed = self.copied = self.direct = self.fallbacks = 0
        self._mu = threading.Lock()

    def done(self, collapsed: int, copied: int, direct: int = 0) -> None:
        with self._mu:
            self.collapsed += collapsed
            self.copied += copied
            self.direct += direct
        self.progress(collapsed + copied)

    def stats(self) -> dict[str, int]:
        return {"collapsed": self.collapsed, "copied": self.copied, "direct": self.direct, "fallbacks": self.fallbacks}


class Window:
    """A writable mapping of a part of a segment, for the time of one ``with`` block."""

    def __init__(self, fd: int, off: int, length: int) -> None:
        prot = _sys.PROT_READ | _sys.PROT_WRITE
        self.addr, self._base, self._whole = _sys.map_file(fd, off, length, prot, _sys.MAP_SHARED)
        # A child of fork must not keep a writable mapping alive.
        _sys.madvise(self.addr, length, _sys.MADV_DONTFORK)
        self.length = length
        self._raw = memoryview((ctypes.c_ubyte * length).from_address(self.addr))
        self.view = self._raw.cast("B")

    def __enter__(self) -> memoryview:
        return self.view

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        whole, self._whole = self._whole, 0  # once, although an interrupt may come in between
        if whole:
            self.view.release()
            self._raw.release()
            _sys.munmap(self._base, whole)


class Pending:
    """An anonymous file that is being written."""

    def __init__(self, d: Dir, name: str) -> None:
        self.dir, self.name = d, name
        self.fd = private(d.anonymous(name))

    def abort(self) -> None:
        """Drops the segment and its memory; after seal() it does nothing."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            close(fd)

    def write(self, data: bytes | bytearray | memoryview, off: int) -> None:
        """Writes all of data."""
        view = memoryview(data)
        while view.nbytes:
            try:
                n = os.pwrite(self.fd, view, off)
            except OSError as e:
                raise from_os(e, "write", self.dir.join(self.name)) from e
            view, off = view[n:], off + n

    def huge_window(self, off: int, n: int, fill: Fill) -> Window | None:
        """Allocates the whole 2 MiB blocks of [off, off+n), which hold nothing yet, as 2 MiB pages
        and maps them. None: the kernel did not grant them.
        """
        huge = n & ~(_HUGE - 1)
        if not huge:
            return None
        for at in range(off, off + huge, _HUGE):
            self.write(b"\0", at)
        try:
            w = Window(self.fd, off, huge)
        except OSError:
            pass
        else:
            if _sys.madvise(w.addr, huge, _sys.MADV_COLLAPSE) == 0:
                return w
            w.close()
        fill.fallbacks += 1
        fill.reserve(huge, True)
        return None

    def copy(self, src: int, path: str, size: int, fill: Fill) -> bytes:
        """Fills the segment with the first size bytes of src; returns the digests of its chunks."""
        sums = bytearray(chunk_count(size, _CHUNK) * L.DIGEST_SIZE)
        job = _Copy(self, src, path, sums, fill)
        if size < SMALL:
            cold = _uncached(src, 0, size, 1)
            fill.reserve(size, False)
            job.plain(0, size)
            if cold:  # leave the page cache as it was
                os.posix_fadvise(src, 0, size, os.POSIX_FADV_DONTNEED)
            return bytes(sums)
        os.ftruncate(self.fd, size)
        direct = _open_direct(src) if _uncached(src, 0, size, 16) else -1
        try:
            if direct >= 0:
                # The threads wait for the disk, not for the processor.
                job.direct = direct
                _each_window(size, COLD_WINDOW, max(fill.threads, COLD_THREADS), job.window)
            else:
                _each_window(size, WINDOW, fill.threads, job.window)
        finally:
            if direct >= 0:
                os.close(direct)
        return bytes(sums)

    def sums(self, size: int) -> bytes:
        """Digests the chunks of what was written."""
        out = bytearray()
        for off in range(0, size, WINDOW):
            n = min(WINDOW, size - off)
            with Window(self.fd, off, n) as view:
                for at in range(0, n, _CHUNK):
                    with view[at : at + _CHUNK] as chunk:
                        out += chunk_digest(chunk)
        return bytes(out)

    def seal(self) -> int:
        """Mode 0444, no writer left anywhere; returns a read-only descriptor, to be closed by _locks.close.

        WriterLeft: somebody, for instance a child of fork, could still write.
        """
        try:
            os.fchmod(self.fd, 0o444)
            try:
                fd = private(os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC))
            except FileNotFoundError as e:
                raise Unsupported("unsupported: /proc is not mounted: models can be read but not loaded") from e
        finally:
            self.abort()
        try:
            prove(fd, self.dir.join(self.name))
        except BaseException:
            close(fd)
            raise
        return fd


def prove(fd: int, path: str) -> None:
    """Asks for a read lease: granted only while nobody has the file open or mapped for writing."""
    import fcntl

    delay = 1e-4
    while True:
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            return
        except OSError as e:
            if e.errno != errno.EAGAIN:
                raise Unsupported(
                    f"lease {path}: unsupported: file leases (F_SETLEASE): models can be read but not loaded:"
                    f" {(e.strerror or '').lower()}"
                ) from e
        if delay >= 0.1:
            raise WriterLeft(path)
        time.sleep(delay)  # a child between fork and exec holds every descriptor for a moment
        delay *= 2


def _each_window(size: int, window: int, threads: int, work: Callable[[int, int], None]) -> None:
    offsets = iter(range(0, size, window))
    mu = threading.Lock()
    errors: list[BaseException] = []

    def run() -> None:
        while not errors:
            with mu:
                off = next(offsets, -1)
            if off < 0:
                return
            try:
                work(off, min(window, size - off))
            except BaseException as e:
                errors.append(e)

    def help(done: threading.Event) -> None:
        run()
        done.set()

    started = []
    try:
        for _ in range(min(threads, (size + window - 1) // window) - 1):
            done = threading.Event()
            threading.Thread(target=help, args=(done,), name="onecopy-load", daemon=True).start()
            started.append(done)
        run()
    except BaseException as e:
        errors.append(e)
    # Whatever comes, KeyboardInterrupt too: nobody may still write to what the caller closes
    # then. (Up to Python 3.12 Thread.join, once interrupted, takes the thread for ended.)
    for done in started:
        while not done.is_set():
            try:
                done.wait()
            except BaseException as e:
                errors.append(e)
    if errors:
        raise errors[0]


class _Copy:
    __slots__ = ("direct", "fill", "p", "path", "src", "sums")

    def __init__(self, p: Pending, src: int, path: str, sums: bytearray, fill: Fill) -> None:
        self.p, self.src, self.path, self.sums, self.fill = p, src, path, sums, fill
        self.direct = -1  # the source, opened for reading past the page cache

    def window(self, off: int, n: int) -> None:
        self.fill.reserve(n, False)
        cold = _uncached(self.src, off, n, 4)
        w = self.p.huge_window(off, n, self.fill)
        at = 0
        if w is not None:
            with w as view:
                while at + _CHUNK <= w.length:
                    with view[at : at + _CHUNK] as chunk:
                        direct = self.chunk(chunk, off + at, cold)
                    self.fill.done(_CHUNK, 0, direct)
                    at += _CHUNK
                if at < w.length:  # the file's last chunk: a 2 MiB page, then perhaps a tail
                    with view[at : w.length] as head:
                        self.read(head, off + at, cold)
                        tail = bytearray(n - w.length)
                        self.read(tail, off + w.length)
                        self.p.write(tail, off + w.length)
                        self.put(off + at, chunk_digest(bytes(head) + bytes(tail)))
                    self.fill.done(w.length - at, len(tail))
                    at = n
        self.plain(off + at, n - at)
        if cold:  # leave the page cache as it was
            os.posix_fadvise(self.src, off, n, os.POSIX_FADV_DONTNEED)

    def chunk(self, view: memoryview, off: int, cold: bool) -> int:
        """Fills and digests a chunk that lies in 2 MiB pages. Returns the bytes read past the page cache."""
        if _hole(self.src, off, len(view)):  # the pages are zero already
            self.put(off, _zero_digest())
            return 0
        direct = self.read(view, off, cold)
        self.put(off, chunk_digest(view))
        return len(view) if direct else 0

    def plain(self, off: int, n: int) -> None:
        for at in range(off, off + n, _CHUNK):
            b = bytearray(min(_CHUNK, off + n - at))
            self.read(b, at)
            self.p.write(b, at)
            self.put(at, chunk_digest(b))
            self.fill.done(0, len(b))

    def read(self, buf: Any, off: int, cold: bool = False) -> bool:
        """Fills buf from the source, past the page cache if it can be; says whether it was."""
        direct = False
        with memoryview(buf) as view:
            got = 0
            while got < len(view):
                with view[got:] as rest:
                    fd = self.direct
                    if not cold or fd < 0 or (off + got) % _DIRECT_ALIGN or len(rest) % _DIRECT_ALIGN:
                        fd = self.src
                    try:
                        n = os.preadv(fd, [rest], off + got)
                        direct = fd != self.src
                    except OSError as e:
                        if fd != self.src and e.errno == errno.EINVAL:
                            self.direct = -1  # some file systems take the open and refuse the read
                            continue
                        raise SourceFailed(f"read {self.path}: source failed: {(e.strerror or '').lower()}") from e
                if n == 0:
                    raise SourceFailed(
                        f"read {self.path}: source failed: it ends at byte {off + got}"
                        " and was longer when the load began"
                    )
                got += n
        return direct

    def put(self, off: int, digest: bytes) -> None:
        i = off // _CHUNK * L.DIGEST_SIZE
        self.sums[i : i + L.DIGEST_SIZE] = digest


_NOWAIT = getattr(os, "RWF_NOWAIT", 0)


def _uncached(fd: int, off: int, n: int, probes: int) -> bool:
    # Would most of the probes have to be read from the disk?
    missing, b = 0, bytearray(1)
    for i in range(probes):
        try:
            os.preadv(fd, [b], off + n * i // probes, _NOWAIT)
        except OSError as e:
            missing += e.errno == errno.EAGAIN
    return 2 * missing > probes


def _open_direct(fd: int) -> int:
    """A descriptor that reads past the page cache; -1 where the file system has none."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return -1


def _hole(fd: int, off: int, n: int) -> bool:
    """Whether [off, off+n) is a hole of a sparse file."""
    try:
        return os.lseek(fd, off, os.SEEK_DATA) >= off + n
    except OSError as e:
        return e.errno == errno.ENXIO


@functools.cache
def _zero_digest() -> bytes:
    return chunk_digest(bytes(_CHUNK))
