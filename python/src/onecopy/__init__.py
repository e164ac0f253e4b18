"""One copy of every model per machine, shared by all processes, without a daemon.

    import onecopy
    with onecopy.open("minilm", "/models/all-MiniLM-L6-v2") as model:
        os.fspath(model)              # a folder, for any runtime that opens a path
        model["config.json"]          # the bytes of a file: a read-only memoryview
        model.tensors()               # safetensors as numpy views, without a copy

    weights = onecopy.get_or_load("my-weights", load_weights, version="3")

:func:`open` shares files, :func:`get_or_load` what a function returns: arrays, state
dicts, whole modules. One process per machine loads, the others wait and map the same
physical pages; a model outlives the processes that use it. :func:`status` says whether
and why (not), :func:`entries` what is loaded, :func:`remove` removes it.

All exceptions are :class:`Error`; see :mod:`onecopy.errors`. The default registry is
$ONECOPY_DIR, else /dev/shm/onecopy-<uid>; :class:`Registry` opens another one.
"""

from __future__ import annotations

import os as _os
from sys import platform as _platform

from ._registry import Registry
from .errors import (
    Busy,
    Closed,
    Corrupt,
    Error,
    Gone,
    InUse,
    InvalidKey,
    InvalidPath,
    Limit,
    LoadFailed,
    NestedLoad,
    NoRegistry,
    NoSpace,
    NotFound,
    ReadOnly,
    SourceChanged,
    SourceFailed,
    TableFull,
    Timeout,
    Unsupported,
    Untrusted,
    VersionMismatch,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from ._arena import Writer
    from ._check import Problem
    from ._inspect import Entry, Stats, Status
    from ._model import File, Model
    from ._remove import GCReport

    T = TypeVar("T")

__version__ = "0.1.0"

__all__ = [
    "Busy", "Closed", "Corrupt", "Entry", "Error", "File", "GCReport", "Gone", "InUse", "InvalidKey",
    "InvalidPath", "Limit", "LoadFailed", "Model", "NestedLoad", "NoRegistry", "NoSpace", "NotFound",
    "Problem", "ReadOnly", "Registry", "SourceChanged", "SourceFailed", "Stats", "Status", "TableFull",
    "Timeout", "Unsupported", "Untrusted", "VersionMismatch", "Writer", "aget_or_load", "aopen", "check",
    "default_registry", "entries", "gc", "get", "get_or_load", "open", "release", "remove", "stats", "status",
]  # fmt: skip


def _refuse_subinterpreters() -> None:
    # ctypes and the cache belong to the process, not to an interpreter of it.
    for name in ("_interpreters", "_xxsubinterpreters"):
        try:
            module: Any = __import__(name)
        except ImportError:
            continue
        current, main = module.get_current(), module.get_main()
        if current != main:
            raise ImportError("onecopy does not run in sub-interpreters: use processes or threads")
        return


_refuse_subinterpreters()

if _platform.startswith("linux"):
    # What every attach needs, so that the first one is as fast as the others; what loads
    # and inspects comes when it is called for. (Elsewhere there is no fcntl.)
    from . import _attach, _model, _objects  # noqa: F401

_default = Registry()
_cached = _default._objects
_pread: Any = getattr(_os, "pread", None)


def default_registry() -> Registry:
    """The registry that the functions of this module use."""
    return _default


def open(
    key: str,
    path: str | _os.PathLike[str] | None = None,
    *,
    timeout: float | None = None,
    fallback: str = "auto",
    on_change: str = "error",
    replace: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """The model of key, loaded from path (a file or a folder) if no process has done so.

    timeout: seconds to wait for another process's load (default 600). on_change: "error"
    (SourceChanged), "replace" or "ignore" when the source is not what was loaded.
    fallback: "auto" and "private" map the source's own files where nothing can be shared,
    "raise" raises NoSpace, Unsupported, ... All the rest: help(onecopy.Registry.open).
    """
    return _default.open(
        key, path, timeout=timeout, fallback=fallback, on_change=on_change, replace=replace, progress=progress
    )


def get(key: str) -> Model:
    """The model of key if it is loaded; never waits. NotFound."""
    return _default.get(key)


def get_or_load(
    key: str,
    loader: Callable[[], T] | Callable[[Writer], T],
    *,
    version: str | None = None,
    mode: str | None = None,
    timeout: float | None = None,
    fallback: str = "auto",
    on_change: str = "error",
) -> T:
    """What loader returns, made once per machine and shared by all processes.

    loader() returns anything that can be pickled; its numpy arrays and torch tensors become
    views of the shared memory, with the same shape, dtype and strides. loader(writer) may
    make them there: writer.empty(shape, dtype), writer.tensor(shape, dtype).
    version: a string that changes when the loader makes something else; SourceChanged then.
    mode: "r" read-only (default), "c" copy on write (default for torch); an object for each
    of them. timeout: seconds.
    LoadFailed: the loader raised (the cause), or was killed three times in a row; NoSpace:
    memory is short. All the rest: help(onecopy.Registry.get_or_load).
    """
    # The hit, written out: two dictionary look-ups and one pread of the slot's word. (A
    # mapped word would be faster, and SIGBUS when somebody truncates the table.)
    try:
        e = _cached[key][mode]
        if (
            (e.version == (version or "") or on_change == "ignore")
            # Below 0 it is this process's own.
            and (_pread(e.fd, 8, e.offset) == e.word if e.fd >= 0 else fallback != "raise")
        ):
            e.hits += 1
            if e.hits & 1023 or e.fd < 0 or not e.attachment.place.is_gone():
                return e.value  # type: ignore[no-any-return]
    except (KeyError, OSError, TypeError):  # not there, descriptors closed, a key that is none
        pass
    return _default.get_or_load(  # type: ignore[no-any-return]
        key, loader, version=version, mode=mode, timeout=timeout, fallback=fallback, on_change=on_change
    )


async def aopen(key: str, path: str | _os.PathLike[str] | None = None, **options: Any) -> Model:
    """open() for asyncio: the wait is in a thread. Cancelling leaves the load running."""
    return await _default.aopen(key, path, **options)


async def aget_or_load(key: str, loader: Callable[..., T], **options: Any) -> T:
    """get_or_load() for asyncio: a cached object at once, else in a thread."""
    return await _default.aget_or_load(key, loader, **options)  # type: ignore[no-any-return]


def status(key: str) -> Status:
    """What this process knows of a key: shared or not, why, how often loaders died."""
    return _default.status(key)


def release(key: str) -> None:
    """Drops this process's cached object of key; its views stay valid."""
    _default.release(key)


def entries() -> list[Entry]:
    """What is loaded, by key."""
    return _default.entries()


def remove(key: str, *, timeout: float | None = 10.0) -> None:
    """Removes the model of key from memory. NotFound, InUse."""
    _default.remove(key, timeout=timeout)


def gc(*, timeout: float | None = 10.0) -> GCReport:
    """Cleans up after dead processes; never removes a healthy model."""
    return _default.gc(timeout=timeout)


def check(key: str | None = None, *, data: bool = False) -> list[Problem]:
    """Every broken invariant of the registry; an empty list means sound."""
    return _default.check(key, data=data)


def stats() -> Stats:
    """Counts of this process."""
    return _default.stats()


_LAZY = {
    "Model": "_model", "File": "_model", "Entry": "_inspect", "Problem": "_check", "GCReport": "_remove",
    "Writer": "_arena", "Stats": "_inspect", "Status": "_inspect",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # What an importing process may never need, and what only Linux has.
    if name in _LAZY:
        from importlib import import_module

        value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
