"""What can go wrong, grouped by the moment.

Every exception of this package is an :class:`Error`. Its text is that of the Go
library and of ``shmctl``: operation, key, what happened. :attr:`Error.hint` says
what to do about it.
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType


class Error(Exception):
    """Base of all exceptions of onecopy.

    ``op`` is the operation that failed, ``key`` the model's key, ``path`` the file
    or folder; each may be None.
    """

    default = "failed"
    hint = ""

    def __init__(self, text: str = "", path: str | None = None) -> None:
        super().__init__(text)
        self.text = text or self.default
        self.op: str | None = None
        self.key: str | None = None
        self.path = path

    def __str__(self) -> str:
        head = self.op or ""
        if self.key:
            from ._names import quote

            head += (" " if head else "") + quote(self.key)
        body = f"{self.path}: {self.text}" if self.path else self.text
        return f"{head}: {body}" if head else body

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.args, self.__dict__.copy()))


def _rebuild(cls: type[Error], args: tuple[object, ...], state: dict[str, object]) -> Error:
    e = cls.__new__(cls, *args)
    e.args = args
    e.__dict__.update(state)
    return e


# Opening a registry.
class NoRegistry(Error):
    """There is no registry here, and it was not to be created."""

    default = "no registry here"
    hint = "load a model first: shmctl load KEY PATH"


class Untrusted(Error, PermissionError):
    """Somebody else could have made or changed the directory or a file in it."""

    default = "not trusted"
    hint = "choose another directory with ONECOPY_DIR, or have its owner repair it"


class VersionMismatch(Error):
    """Made by another layout version, which is neither read nor touched."""

    default = "another layout version"
    hint = "use the program version that made it; another version never touches it"


class Corrupt(Error):
    """Table, manifest or payload is not what was published."""

    default = "damaged"
    hint = "shmctl check lists the damage; shmctl rm KEY and load it again"


class Unsupported(Error):
    """The system or its kernel cannot share models."""

    default = "unsupported"


class Limit(Error):
    """A limit of the process or the system: descriptors, mappings, files per model."""

    default = "limit reached"
    hint = "raise the limit that the text names"


class ReadOnly(Error, PermissionError):
    """The registry belongs to another user, or this one may make nothing here: it can at most be read."""

    default = "this user may read here, not write"
    hint = "load it as the user who owns the registry"


class Closed(Error, ValueError):
    """A registry or model was used after close()."""

    default = "closed"


class InvalidKey(Error, ValueError):
    """A key has 1 to 255 bytes of UTF-8 without control characters."""

    default = "not a valid key"


class InvalidPath(Error, ValueError):
    """A file name that no model may have, or that this model does not have."""

    default = "not a valid path of a model's file"


# Getting a model.
class NotFound(Error, LookupError):
    """No generation of this key is published."""

    default = "not loaded"
    hint = "see what is loaded with shmctl ls; load it with shmctl load KEY PATH"


class Busy(Error):
    """Published, but its manifest stays exclusively locked by somebody else."""

    default = "held by somebody else"
    hint = "somebody holds the manifest exclusively: shmctl holders KEY"


class Gone(Error):
    """A third party deleted files under the lease."""

    default = "removed while in use"
    hint = "shmctl check lists the damage; shmctl rm KEY and load it again"


class Timeout(Error, TimeoutError):
    """The wait for another loader, or for a lock, ended."""

    default = "timed out: context deadline exceeded"
    hint = "a longer timeout gives it more time; shmctl check names who keeps a lock"


def waited(
    who: str, hint: str = "another process is loading; shmctl ls shows it, a longer timeout waits longer"
) -> Timeout:
    """The Timeout of one who waited for another load."""
    e = Timeout(f"{Timeout.default}: {who}")
    e.hint = hint
    return e


# Loading a model.
class SourceFailed(Error):
    """The source is missing, unreadable or empty, or changed during the load."""

    default = "source failed"


class SourceChanged(Error):
    """The source differs from what was loaded.

    ``field`` names the first difference ("version", "environment torch", "path",
    "size of NAME", ...), ``loaded`` and ``current`` its two values.
    """

    default = "the source changed"
    hint = 'pass on_change="replace" to load the new version beside the old one, or use another key for another model'

    def __init__(self, field: str = "", loaded: str = "", current: str = "") -> None:
        super().__init__(f"the source changed: {field} was {loaded} when the model was loaded and is {current} now")
        self.args = (field, loaded, current)
        self.field, self.loaded, self.current = field, loaded, current


class LoadFailed(Error):
    """The loader raised (``__cause__``), returned what cannot be shared, left a child of fork that
    can still write it, or loaders keep dying.

    ``deaths`` counts loaders that were killed in a row, ``retry_after`` is the time
    in seconds until the next attempt is allowed.
    """

    default = "the load failed"
    hint = "look for the killer (dmesg, the cgroup's memory.events), then try again"

    def __init__(self, text: str = "", deaths: int = 0, retry_after: float = 0.0) -> None:
        if deaths:
            text = (
                f"loaders keep dying: {deaths} were killed in a row (out of memory?);"
                f" the next attempt is allowed in {round(retry_after)}s"
            )
        super().__init__(text)
        self.args = (text,)
        self.deaths, self.retry_after = deaths, retry_after
        if not deaths:
            self.hint = ""  # the text says it all


class NoSpace(Error):
    """Not enough memory for the model. All numbers are bytes; ``headroom`` is -1 without a limit.
    ``pids``: who leases what cannot be evicted, as far as this process may see."""

    default = "not enough memory"
    hint = (
        "free models with shmctl rm KEY, or give the tmpfs more room:"
        " mount -o remount,size=SIZE /dev/shm (containers: --shm-size)"
    )

    need = free = budget = used = reserved = evictable = leased = pinned = 0
    headroom = -1
    pids: tuple[int, ...] = ()


class TableFull(Error):
    """Every slot of the header table is in use and none is idle."""

    default = "the header table is full"
    hint = "remove models with shmctl rm KEY, or create the registry with more slots"


class NestedLoad(Error):
    """A loader asked for a load: it would wait for itself."""

    default = "a load function asked for a load"


# Removing a model.
class InUse(Error):
    """The model is in use; ``pids`` are the processes that can be seen."""

    default = "in use"
    hint = "shmctl holders KEY shows who; the memory goes when the last of them ends"
    pids: tuple[int, ...] = ()


def no_space(
    need: int, free: int, budget: int, used: int, reserved: int,
    evictable: int, leased: int, pinned: int, headroom: int, where: str,
) -> NoSpace:  # fmt: skip
    """The arithmetic behind NoSpace, in words."""
    s = (
        f"not enough memory: the model needs {size(need)}; {where} has {size(free)} free,"
        f" the registry uses {size(used)} of its budget of {size(budget)}"
    )
    if reserved > 0:
        s += f", running loads still need {size(reserved)}"
    if headroom >= 0:
        s += f", the cgroup of this process has {size(headroom)} left"
    s += f"; {size(evictable)} are idle and can be evicted, {size(leased)} are in use"
    if pinned > 0:
        s += f", {size(pinned)} are pinned"
    e = NoSpace(s)
    e.need, e.free, e.budget, e.used, e.reserved = need, free, budget, used, reserved
    e.evictable, e.leased, e.pinned, e.headroom = evictable, leased, pinned, headroom
    return e


def size(n: int) -> str:
    """Bytes with a binary unit: 1536 is "1.5 KiB"."""
    f, u = float(n), -1
    while f >= 1024 and u < 5:
        f, u = f / 1024, u + 1
    return f"{n} B" if u < 0 else f"{f:.1f} {'KMGTPE'[u]}iB"


def from_os(e: OSError, what: str, path: str) -> Error:
    """An errno with operation and path, as the error that it means."""
    reason = (os.strerror(e.errno) if e.errno else str(e)).lower()
    if e.errno == errno.ENOSPC:
        return NoSpace(f"{what} {path}: not enough memory: {reason}")
    if e.errno == errno.EDQUOT:
        return NoSpace(
            f"{what} {path}: not enough memory: the quota of this user or group on the tmpfs is used up: {reason}"
        )
    if e.errno == errno.EMFILE:
        return Limit(f"{what} {path}: limit reached: too many open files: raise the limit (ulimit -n): {reason}")
    if e.errno == errno.ENFILE:
        return Limit(
            f"{what} {path}: limit reached: too many open files on this machine (sysctl fs.file-max): {reason}"
        )
    if e.errno == errno.EFBIG:
        return Limit(f"{what} {path}: limit reached: files of this size: raise the limit (ulimit -f): {reason}")
    if e.errno == errno.ENOMEM:
        return Limit(
            f"{what} {path}: limit reached: no more mappings, or address space"
            f" (sysctl vm.max_map_count, ulimit -v, vm.overcommit_memory): {reason}"
        )
    denied = e.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    return (ReadOnly if denied else Error)(f"{what} {path}: {reason}")


class operation:
    """Names operation and key on every error that leaves the block."""

    __slots__ = ("key", "op")

    def __init__(self, op: str, key: str | None = None) -> None:
        self.op, self.key = op, key

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(e, Error):
            if e.op is None:
                e.op, e.key = self.op, self.key
        elif isinstance(e, OSError):
            new = from_os(e, "", str(e.filename) if e.filename is not None else "")
            new.text = new.text.strip(" :")
            new.op, new.key = self.op, self.key
            raise new from e
