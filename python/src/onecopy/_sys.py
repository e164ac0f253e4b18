"""System calls that Python does not offer, by ctypes; Linux only.

mmap.mmap will not do: it duplicates the descriptor for as long as the mapping
lives, and it cannot map at a multiple of 2 MiB, without which a mapping never
uses 2 MiB pages.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import weakref

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HUGE_PAGE = 2 << 20

PROT_READ, PROT_WRITE = 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 1, 2, 0x10, 0x20
MAP_NORESERVE, MAP_POPULATE = 0x4000, 0x8000
MADV_DONTFORK, MADV_DONTDUMP, MADV_POPULATE_WRITE, MADV_COLLAPSE = 10, 16, 23, 25

_AT_FDCWD, _AT_SYMLINK_FOLLOW, _AT_EMPTY_PATH = -100, 0x400, 0x1000
TMPFS_MAGIC = 0x01021994

if sys.platform.startswith("linux"):  # elsewhere nothing of this is called
    _libc = ctypes.CDLL(None, use_errno=True)
    _mmap = _libc.mmap
    _mmap.restype = ctypes.c_void_p
    _mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
    )  # fmt: skip
    _munmap = _libc.munmap
    _munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    _madvise = _libc.madvise
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    _linkat = _libc.linkat
    _linkat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
    _fstatfs = _libc.fstatfs
    _fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
_FAILED = ctypes.c_void_p(-1).value


def _raise(path: str | None = None) -> None:
    e = ctypes.get_errno()
    raise OSError(e, os.strerror(e), path)


def _map(addr: int | None, length: int, prot: int, flags: int, fd: int, off: int) -> int:
    p = _mmap(addr, length, prot, flags, fd, off)
    if p == _FAILED:
        _raise()
    return int(p)


def munmap(addr: int, length: int) -> None:
    """Ends a mapping."""
    _munmap(addr, length)


def madvise(addr: int, length: int, advice: int) -> int:
    """0, or the errno."""
    return 0 if _madvise(addr, length, advice) == 0 else ctypes.get_errno()


def placeholder(length: int) -> int:
    """Address space without memory, for map_at. Who is to unmap it is settled before there is
    anything: KeyboardInterrupt may come right after a mapping was made, and lose its address."""
    return _map(None, length, 0, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)


def reserve(length: int) -> tuple[int, int]:
    """A placeholder, at least length bytes from a multiple of 2 MiB on.

    Returns the base for munmap and the aligned address; the whole is length + 2 MiB.
    """
    base = placeholder(length + HUGE_PAGE)
    return base, (base + HUGE_PAGE - 1) // HUGE_PAGE * HUGE_PAGE


def map_at(fd: int, off: int, length: int, prot: int, flags: int, addr: int) -> None:
    """Maps over what is at addr."""
    _map(addr, length, prot, flags | MAP_FIXED, fd, off)


def map_file(fd: int, off: int, length: int, prot: int, flags: int) -> tuple[int, int, int]:
    """Maps [off, off+length) of a file and returns address, and base and length to unmap.

    From 2 MiB on the address is a multiple of 2 MiB: the kernel does not align
    mappings of a tmpfs by itself unless it is mounted with huge=, so more is
    reserved and mapped at the boundary within.
    """
    if length < HUGE_PAGE:
        addr = _map(None, length, prot, flags, fd, off)
        base, whole = addr, length
    else:
        whole = length + HUGE_PAGE
        base, addr = reserve(length)
        try:
            map_at(fd, off, length, prot, flags, addr)
        except OSError:
            munmap(base, whole)
            raise
    madvise(addr, length, MADV_DONTDUMP)  # weights do not belong into core dumps
    return addr, base, whole


def array(addr: int, length: int, base: int, whole: int, *keep: object) -> Any:
    """A ctypes array over a mapping, which ends when the last view of the array is gone.

    keep lives as long. At interpreter exit nothing is unmapped: threads and
    destructors may still look, and the kernel unmaps a moment later anyway.
    """
    a: Any = (ctypes.c_ubyte * length).from_address(addr)
    a.keep = keep
    weakref.finalize(a, _munmap, base, whole).atexit = False
    return a


def map_array(fd: int, length: int, prot: int, flags: int, *keep: object) -> Any:
    """Maps the first length bytes of a file as map_file does, as an array."""
    if length < HUGE_PAGE:
        base = addr = placeholder(length)
        whole = length
    else:
        base, addr = reserve(length)
        whole = length + HUGE_PAGE
    a = array(addr, length, base, whole, *keep)
    map_at(fd, 0, length, prot, flags, addr)
    madvise(addr, length, MADV_DONTDUMP)
    return a


def linkat(fd: int, dir_fd: int, name: str) -> None:
    """Gives an anonymous file its name; never replaces a file.

    os.link cannot: without a directory descriptor it calls link(2), which does not
    follow /proc/self/fd and fails with EXDEV.
    """
    to = os.fsencode(name)
    if _linkat(fd, b"", dir_fd, to, _AT_EMPTY_PATH) == 0:
        return
    if ctypes.get_errno() in (errno.ENOENT, errno.EPERM, errno.EINVAL):
        # Without privileges old kernels know only the way through /proc.
        if _linkat(_AT_FDCWD, b"/proc/self/fd/%d" % fd, dir_fd, to, _AT_SYMLINK_FOLLOW) == 0:
            return
    _raise(name)


def fs_type(fd: int) -> int:
    """The file system's magic number."""
    buf = (ctypes.c_long * 32)()
    if _fstatfs(fd, buf) != 0:
        _raise()
    return int(buf[0])
