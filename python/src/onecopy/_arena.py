"""Memory of a segment in the making that a loader fills in place."""

from __future__ import annotations

import math
import operator
import os
import threading
from typing import TYPE_CHECKING, Any

from . import _locks, _sys
from . import _manifest as M
from ._segment import SMALL, WINDOW, Pending
from .errors import Closed, from_os

if TYPE_CHECKING:
    from ._load import Loader

_HUGE = _sys.HUGE_PAGE
_ALIGN = 64
_RW = _sys.PROT_READ | _sys.PROT_WRITE


def _dimensions(shape: Any) -> tuple[int, ...]:
    # As Python's own integers: a product of numpy's overflows.
    try:
        dims: tuple[int, ...] = (operator.index(shape),)
    except TypeError:
        dims = tuple(operator.index(n) for n in shape)
    if min(dims, default=0) < 0:
        raise ValueError(f"shape {dims}: no dimension can be negative")
    return dims


class Writer:
    """Given to loaders that take one argument: it makes arrays that already lie in the segment,
    so that a load needs one model of memory, not two.

    What the loader returns of them is part of the result without being copied; what it
    does not return stays in the segment all the same. Children of fork may fill them, and
    must have ended when the loader returns. After that it makes no more (Closed).
    """

    def empty(self, shape: Any, dtype: Any = "float32") -> Any:
        """A writable numpy array, zeroed, at a multiple of 64 bytes of the segment.

        shape: an int or a sequence of ints; dtype: whatever numpy.dtype takes. NoSpace.
        """
        import numpy as np

        dt, shape = np.dtype(dtype), _dimensions(shape)
        n = dt.itemsize * math.prod(shape)
        return np.ndarray(shape, dt, self._memory(n) if n else None)

    zeros = empty

    def tensor(self, shape: Any, dtype: Any = None) -> Any:
        """The same as a torch tensor; dtype: a torch.dtype, default torch.get_default_dtype()."""
        import torch

        dtype, shape = dtype or torch.get_default_dtype(), _dimensions(shape)
        n = torch.empty(0, dtype=dtype).element_size() * math.prod(shape)
        if not n:
            return torch.zeros(shape, dtype=dtype)
        return torch.frombuffer(self._memory(n), dtype=dtype).view(shape)

    def _memory(self, n: int) -> memoryview:
        return memoryview(bytearray(n))


class Arena(Writer):
    """The segment "data", mapped at a fixed address while it grows.

    Every page is allocated before it is handed out: a store never finds the tmpfs
    full. When the load ends the mapping becomes a private copy-on-write view of the
    sealed file, so that an array that the loader kept stays readable and a late write
    neither crashes nor reaches anybody.
    """

    def __init__(self, load: Loader) -> None:
        self._load = load
        self._pending: Pending | None = None
        self._addr = self._used = self._size = self._room = 0
        self._all: Any = None
        self.over = False
        self._mu = threading.Lock()  # threads of the loader may ask at the same time

    def range(self) -> tuple[int, int]:
        """Address and size of what was handed out."""
        return self._addr, self._used

    def pending(self) -> Pending:
        """The segment, also for what is appended behind the arena."""
        if self._pending is None:
            self._pending = Pending(self._load.place.m, "data")
        return self._pending

    def _memory(self, n: int) -> memoryview:
        with self._mu:
            if self.over:
                raise Closed("closed: a Writer is good for its own load only")
            at = -(-self._used // _ALIGN) * _ALIGN
            if self._all is None:
                self._reserve()
            missing = -(-(at + n - self._size) // _HUGE) * _HUGE
            if missing > 0:
                self._load.fill.reserve(missing, False)  # as a whole, before any of it is allocated
            while self._size < at + n:
                want = -(-(at + n - self._size) // _HUGE) * _HUGE
                self._grow(min(want, WINDOW))
            self._used = at + n
            return memoryview(self._all).cast("B")[at : at + n]

    def _reserve(self) -> None:
        _, total = self._load.place.m.free()
        self._room = -(-total // _HUGE) * _HUGE
        try:
            base, self._addr = _sys.reserve(self._room)
        except OSError as e:
            raise from_os(e, "reserve", "address space") from e
        self._all = _sys.array(self._addr, self._room, base, self._room + _HUGE)

    def _grow(self, n: int) -> None:
        p, fill, off = self.pending(), self._load.fill, self._size
        os.ftruncate(p.fd, off + n)
        for at in range(off, off + n, _HUGE):
            p.write(b"\0", at)
        try:
            _sys.map_at(p.fd, off, n, _RW, _sys.MAP_SHARED, self._addr + off)
        except OSError as e:
            raise from_os(e, "mmap", p.dir.join(p.name)) from e
        _sys.madvise(self._addr + off, n, _sys.MADV_DONTDUMP)
        if _sys.madvise(self._addr + off, n, _sys.MADV_COLLAPSE) == 0:
            fill.done(n, 0)
        else:
            fill.fallbacks += 1
            fill.reserve(n, True)
            try:
                os.posix_fallocate(p.fd, off, n)
            except OSError as e:
                raise from_os(e, "write", p.dir.join(p.name)) from e
            fill.done(0, n)
        self._size += n

    def freeze(self) -> None:
        """No store reaches the segment any more, and the kernel can prove it."""
        if self._all is None:
            return
        p = self.pending()
        fd = _locks.private(os.open(f"/proc/self/fd/{p.fd}", os.O_RDONLY | os.O_CLOEXEC))
        try:
            if self._size:
                _sys.map_at(fd, 0, self._size, _RW, _sys.MAP_PRIVATE | _sys.MAP_NORESERVE, self._addr)
        finally:
            _locks.close(fd)

    def close(self) -> None:
        """Drops what was not sealed; what the loader kept of it becomes zeros of its own."""
        self.over = True
        if self._pending is not None and self._pending.fd >= 0:
            if self._all is not None and self._size:
                flags = _sys.MAP_PRIVATE | _sys.MAP_ANONYMOUS | _sys.MAP_NORESERVE
                _sys.map_at(-1, 0, self._size, _RW, flags, self._addr)
            self._pending.abort()
        self._all = None


def data_segment(load: Loader, arena: Arena, pieces: list[tuple[int, Any]], size: int) -> None:
    """Completes the segment: what lies in the arena is there, the pieces are copied behind it."""
    p, fill = arena.pending(), load.fill
    _, used = arena.range()
    os.ftruncate(p.fd, size)
    end = arena._size if used else 0
    if pieces and size > end:
        at = end
        while at < size:
            n = min(WINDOW, size - at)
            fill.reserve(n, False)
            w = p.huge_window(at, n, fill) if n >= SMALL else None
            huge = 0
            if w is not None:
                huge = w.length
                w.close()
            at += n
            fill.done(huge, n - huge)
    for off, view in pieces:
        p.write(view, off)
    arena.freeze()
    sums = p.sums(size)
    load.add(M.ManifestFile("data", size, "", 0), p.seal(), sums)
