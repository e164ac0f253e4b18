"""A registry as this process sees it."""

from __future__ import annotations

import contextvars
import os
import sys
import threading
import time
import warnings
import weakref

from . import _layout as L
from . import errors
from ._names import check_key
from .errors import (
    Busy,
    Closed,
    Corrupt,
    Error,
    NestedLoad,
    NoRegistry,
    NoSpace,
    NotFound,
    ReadOnly,
    SourceChanged,
    TableFull,
    Timeout,
    Unsupported,
    Untrusted,
    operation,
    waited,
)

TYPE_CHECKING = False  # typing costs more to import than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from ._attach import Attachment
    from ._check import Problem
    from ._inspect import Entry, Stats, Status
    from ._load import Loader
    from ._model import Model
    from ._place import Place
    from ._remove import GCReport
    from ._source import Source

    Progress = Callable[[int, int], None]
    R = TypeVar("R")

_COUNTS = ("hits", "attaches", "loads", "waits", "takeovers", "fallbacks", "bytes_loaded", "bytes_saved")
FALLBACKS = ("auto", "private", "raise")
MODES = (None, "r", "c")

# Set while a loader runs: a load within a load would wait for itself.
loading: contextvars.ContextVar[bool] = contextvars.ContextVar("onecopy_loading", default=False)


class Flight:
    """A load that a thread of this process is about, which the others wait for."""

    __slots__ = ("__weakref__", "over", "thread")

    def __init__(self) -> None:
        self.over, self.thread = threading.Event(), threading.get_ident()


class Cached:
    """An object that this process has, and how to see that it is still the published one.

    version is the stored object's; with None it is only for those who ignore changes.
    modes: its own, and the others (None: without one) whose callers get it too.
    """

    __slots__ = ("attachment", "data", "fd", "hits", "modes", "offset", "reason", "value", "version", "word")

    def __init__(self, value: Any, version: str | None, modes: tuple[str | None, ...]) -> None:
        self.value, self.version, self.modes = value, version, modes
        self.data = memoryview(b"")
        self.fd, self.offset, self.word = -1, 0, b""
        self.hits = 0
        self.attachment: Any = None  # an Attachment
        self.reason = ""


def default_dir() -> str:
    """$ONECOPY_DIR, else /dev/shm/onecopy-<uid>."""
    return os.environ.get("ONECOPY_DIR") or f"/dev/shm/onecopy-{getattr(os, 'geteuid', int)()}"


class Registry:
    """One directory of shared models. It is opened, or made, when it is first used.

    dir: default $ONECOPY_DIR, else /dev/shm/onecopy-<uid>; on a tmpfs. A relative one
    belongs to the working directory that the process has now.
    objects=False forbids get_or_load: a skeleton is a pickle.
    trust_owner: a uid besides one's own and root whose registry may be read.
    mode, slots, budget: of a registry that is created: directory mode 0o700 or 0o755 (other
    users may read), capacity (8 to 32768; 0: 1024), bytes (0: 80 % of the tmpfs).
    load_timeout: longest wait in seconds for another process's load. threads: that fill a segment.

    Safe for any number of threads. Two registries of one directory in one process are
    independent: each maps a model for itself.
    """

    def __init__(
        self, dir: str | os.PathLike[str] | None = None, objects: bool = True, trust_owner: int | None = None, *,
        must_exist: bool = False, mode: int = 0o700, slots: int = 0, budget: int = 0,
        load_timeout: float = 600.0, threads: int = 0,
    ) -> None:  # fmt: skip
        if mode not in (0o700, 0o755):
            raise ValueError(f"mode {mode:#o}: want 0o700, or 0o755 to let other users read")
        if slots and not L.MIN_SLOTS <= slots <= L.MAX_SLOTS:
            raise ValueError(f"slots={slots}: want {L.MIN_SLOTS} to {L.MAX_SLOTS}, or 0 for {L.DEFAULT_SLOTS}")
        if not 0 <= budget < 1 << 63:
            raise ValueError(f"budget={budget}: want bytes from 0 on, below 2**63")
        self._dir = os.path.abspath(dir) if dir is not None else None
        self._objects_allowed, self._trust = objects, trust_owner
        self._must_exist, self._mode, self._slots, self._budget = must_exist, mode, slots, budget
        self._load_timeout = load_timeout
        self._threads = threads or min(2, os.cpu_count() or 1)
        self._place: Place | None = None
        self._cannot_write: Error | None = None
        self._closed = False
        self._mu = threading.Lock()
        self._local: weakref.WeakValueDictionary[str, Attachment] = weakref.WeakValueDictionary()
        # Weak: when an interrupt lost the thread's own reference, nobody flies.
        self._flights: weakref.WeakValueDictionary[object, Flight] = weakref.WeakValueDictionary()
        self._objects: dict[str, dict[str | None, Cached]] = {}  # by key and mode asked for
        self._fallen: dict[str, str] = {}  # key -> why it is not shared
        self._counts = dict.fromkeys(_COUNTS, 0)
        _registries.add(self)

    @property
    def dir(self) -> str:
        """The registry's directory."""
        if self._dir is None:
            self._dir = os.path.abspath(default_dir())
        return self._dir

    # The place.

    def _open_place(self, create: bool) -> Place:
        if not sys.platform.startswith("linux"):
            raise Unsupported(f"unsupported operation: sharing needs Linux, this is {sys.platform}")
        from ._place import Gone, Place

        with operation("open"):
            p = Place.open(
                self.dir, create=create, slots=self._slots, mode=self._mode, budget=self._budget, trust=self._trust
            )
            self._cannot_write = None
            if p.top.owner != os.geteuid() or p.top.readonly:
                self._cannot_write = p.read_only()
            else:
                try:
                    p.probe()
                except Unsupported as e:
                    self._cannot_write = e
                except OSError:
                    pass  # a full tmpfs has no room for the probe's page; that proves nothing
                if self._cannot_write is None and not self._must_exist and p.untidy():
                    from . import _remove

                    try:
                        _remove.collect(p, wait=False)
                    except (Timeout, Gone):
                        pass  # whoever holds T, or the next, collects
            return p

    def _here(self, create: bool = True) -> Place:
        with self._mu:
            if self._closed:
                raise Closed()
            p = self._place
            if p is None or p.is_gone():
                # Whoever only reads somebody else's registry must not make one in its
                # place: the name is not his, and would shut the owner out.
                p = self._place = self._open_place(create and not self._must_exist and (p is None or p.mine))
            return p

    def _each(self, fn: Callable[[Place], R], create: bool = True) -> R:
        from ._place import Gone

        for _ in range(100):
            try:
                return fn(self._here(create))
            except Gone:
                pass
        raise errors.Gone("removed while in use: it is deleted again and again")

    # Attaching and loading.

    def _count(self, name: str, n: int = 1) -> None:
        with self._mu:
            self._counts[name] += n

    def _hit(self, key: str) -> Attachment | None:
        a = self._local.get(key)
        return a if a is not None and a.current() and not a.place.is_gone() else None

    def _attach(self, place: Place, key: str) -> Attachment:
        from ._attach import attach

        a = self._hit(key)
        if a is None:
            a = attach(place, key)
            with self._mu:
                self._remember(key, a)
                self._counts["attaches"] += 1
        return a

    def _remember(self, key: str, a: Attachment) -> None:
        if not self._closed:  # meanwhile, by another thread
            self._local[key] = a

    def _accept(self, a: Attachment, source: Source) -> None:
        """Compares the source with the generation: each time, because a source may change at any time."""
        if source.on_change != "ignore":
            source.compare(a.manifest)
        self._count("bytes_saved", a.manifest.bytes)

    @staticmethod
    def _reload(e: Exception, source: Source) -> bool:
        """A reason to load although an entry may exist."""
        if isinstance(e, SourceChanged):
            return source.on_change == "replace"
        return isinstance(e, (NotFound, Busy, errors.Gone, Corrupt)) and not isinstance(e, NoRegistry)

    def _obtain(
        self, key: str, source: Source, deadline: float | None, progress: Progress | None
    ) -> tuple[Attachment, Loader | None]:
        from ._place import Again, Gone

        place: Place | None = None
        a: Attachment | None
        while True:
            if place is not None and deadline is not None and time.monotonic() > deadline:
                raise self._who_loads(place, key)
            if not source.replace:
                try:
                    a = self._each(lambda p: self._attach(p, key))
                    self._accept(a, source)
                    return a, None
                except Error as e:
                    if not self._reload(e, source):
                        raise
                a = None  # what is to be replaced may be evicted meanwhile
            place = self._each(lambda p: p)
            if self._cannot_write is not None:
                if not isinstance(self._cannot_write, ReadOnly):
                    raise self._again(self._cannot_write)
                self._await_foreign(place, key, deadline)
                continue
            if loading.get():
                raise NestedLoad()
            from ._load import load

            leave = self._join(key, deadline)
            if leave is None:
                continue  # another thread's load ended
            try:
                a, job = load(
                    place, key, source, deadline, self._load_timeout, self._threads, progress,
                    self._accept, self._attach, self._reload, lambda: self._count("waits"),
                )  # fmt: skip
                if job is not None:
                    with self._mu:  # before the others look
                        self._remember(key, a)
                        self._counts["loads"] += 1
                        self._counts["takeovers"] += job.takeovers
                        self._counts["bytes_loaded"] += a.manifest.bytes
            except (Again, Gone):
                continue
            except Timeout as e:
                if e.text != Timeout.default:  # it says itself what it has waited for
                    raise
                raise self._who_loads(place, key) from None
            finally:
                leave()
            return a, job

    @staticmethod
    def _again(e: Error) -> Error:
        return type(e)(e.text)

    def _join(self, key: object, deadline: float | None) -> Callable[[], None] | None:
        """Waits for another thread's load of key (None), or makes this thread the one that
        loads: then the result must be called when the load is over."""
        mine = Flight()

        def leave() -> None:
            try:
                with self._mu:
                    if self._flights.get(key) is mine:
                        del self._flights[key]
            finally:
                mine.over.set()

        with self._mu:
            flight = self._flights.get(key)
            if flight is None or flight.thread == mine.thread:
                self._flights[key] = mine
        if flight is None:
            return leave
        over, left_over = flight.over, flight.thread == mine.thread
        del flight  # only its own thread keeps it
        if left_over:  # by an interrupt, whose traceback somebody may still have
            over.set()
            return leave
        self._count("waits")
        # Not for ever: it may be a thread of that very loader that waits here.
        left = self._load_timeout if deadline is None else max(0.0, deadline - time.monotonic())
        if not over.wait(min(left, threading.TIMEOUT_MAX)):
            raise waited("another thread of this process is loading it, or hangs", hint="a longer timeout waits longer")
        return None

    def _who_loads(self, place: Place, key: str) -> Timeout:
        from . import _table as T

        pid = 0
        try:
            f = place.find(key)
            pid = place.snapshot().hint(f.slot, T.LOADER_PID) if f is not None else 0
        except Error:
            pass
        return waited(f"pid {pid} is loading it, or hangs" if pid else "another load holds this key's lock")

    def _await_foreign(self, place: Place, key: str, deadline: float | None) -> None:
        """Waits, as a user who can only read, for a load that is running."""
        from . import _table as T

        until = time.monotonic() + self._load_timeout
        until = until if deadline is None else min(until, deadline)
        delay = 1e-3
        while True:
            f = place.find(key)
            state = L.FREE if f is None else T.state_of(f.word)
            if state == L.READY:
                return
            if state != L.LOADING:
                assert self._cannot_write is not None
                raise self._again(self._cannot_write)
            if time.monotonic() > until:
                raise self._who_loads(place, key)
            time.sleep(delay)
            delay = min(2 * delay, 0.05)

    # Models.

    def get(self, key: str) -> Model:
        """The model of key if it is loaded; never waits. NotFound."""
        from ._model import Model

        with operation("get", str(key)):
            key = check_key(key)
            a = self._hit(key)
            if a is None:
                a = self._each(lambda p: self._attach(p, key))
            return Model(a, False)

    def open(
        self, key: str, path: str | os.PathLike[str] | None = None, *, timeout: float | None = None,
        fallback: str = "auto", on_change: str = "error", replace: bool = False, progress: Progress | None = None,
    ) -> Model:  # fmt: skip
        """The model of key, loaded from path (a file or a folder) if no process has done so.

        One process per machine loads, the others wait without using the processor, at
        most timeout seconds; when the loader dies one of them takes over. Without path:
        only what is loaded (NotFound).

        on_change says what to do when the source is not what was loaded: "error"
        (SourceChanged), "replace" (publish a new generation; old ones stay valid for
        their holders) or "ignore". replace=True loads a new generation in any case.
        fallback: where nothing can be shared, "auto" and "private" map the source's own
        files, with one warning; "raise" does not. progress(done, total) in bytes is called
        by any of the threads that load, by several at once too.
        """
        from ._model import Model
        from ._source import PathSource

        if path is None:
            return self.get(key)
        _one_of("fallback", fallback, FALLBACKS)
        with operation("load", str(key)):
            key = check_key(key)
            source = PathSource(path, on_change, replace)
            deadline = None if timeout is None else time.monotonic() + timeout
            try:
                with operation("load", key):
                    a, job = self._obtain(key, source, deadline, progress)
                self._fallen.pop(key, None)
                return Model(a, job is not None)
            except (NoSpace, TableFull, Untrusted, Unsupported, ReadOnly, errors.Limit, NoRegistry) as e:
                if fallback == "raise":
                    raise
                return self._source_model(key, source.path, e)

    def _source_model(self, key: str, path: str, e: Error) -> Model:
        from ._model import SourceModel

        m = SourceModel(key, path, e.text)
        self._fall(key, e, "its own file is mapped instead (one copy in the page cache)")
        return m

    def _fall(self, key: str, e: Error, instead: str) -> None:
        self._count("fallbacks")
        if key not in self._fallen:
            self._fallen[key] = e.text
            hint = f" ({e.hint})" if e.hint else ""
            text = f'onecopy: "{key}" is not shared: {e.text}{hint}; {instead}'
            warnings.warn(text, RuntimeWarning, stacklevel=_outside())

    # Objects.

    def get_or_load(
        self, key: str, loader: Callable[..., Any], *, version: str | None = None, mode: str | None = None,
        timeout: float | None = None, fallback: str = "auto", on_change: str = "error",
    ) -> Any:  # fmt: skip
        """What loader returns, made once per machine and shared by all processes.

        loader() may return anything that can be pickled: arrays, state dicts, modules.
        Its numpy arrays and torch tensors become views of memory that all processes
        share. A loader that takes one argument gets a Writer, whose empty(shape, dtype)
        makes arrays that already lie there, so that no second copy is ever needed.

        version identifies what the loader makes: another one, or other versions of
        Python, numpy, torch than the stored object's, raise SourceChanged, or load anew
        (on_change="replace"), or are ignored ("ignore").
        mode: "r" (default) read-only pages; "c" (default for torch) copy on write: a
        write costs private memory and is seen by no other process. Each process has one
        object per key and mode.
        fallback: "auto" raises where memory is short and loads privately, once per
        process and with one warning, where sharing is impossible; "private" does so in
        both cases, "raise" in none. A private object is writable, whatever the mode.

        The result is cached in this process until release(key): further calls cost less
        than a microsecond.
        """
        e = self._cached(key, version, mode, fallback, on_change)
        if e is not None:
            return e.value
        _one_of("fallback", fallback, FALLBACKS)
        _one_of("mode", mode, MODES)
        with operation("load", str(key)):
            return self._load_object(check_key(key), loader, version, mode, timeout, fallback, on_change)

    def _cached(
        self, key: str, version: str | None = None, mode: str | None = None, fallback: str = "auto",
        on_change: str = "error", **_: Any,
    ) -> Cached | None:  # fmt: skip
        try:
            e = self._objects[key][mode]
            if (e.version != (version or "") and on_change != "ignore") or (e.fd < 0 and fallback == "raise"):
                return None
            e.hits += 1
            if e.fd >= 0:
                place = e.attachment.place
                if os.pread(e.fd, 8, e.offset) != e.word or place.gone or not (e.hits & 1023 or not place.is_gone()):
                    return None
            return e
        except (KeyError, OSError, TypeError):  # as in the function of the module
            return None

    def _load_object(
        self, key: str, loader: Callable[..., Any], version: str | None, mode: str | None,
        timeout: float | None, fallback: str, on_change: str,
    ) -> Any:  # fmt: skip
        from ._objects import ObjectSource

        source = ObjectSource(loader, version, on_change)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            e = self._cached(key, version, mode, fallback, on_change)
            if e is not None:
                return e.value
            if loading.get():
                # Reading within a loader is fine; waiting for oneself is not.
                leave: Callable[[], None] | None = _nothing
            else:
                leave = self._join(("object", key), deadline)
            if leave is None:
                continue
            try:
                e = self._build_object(key, source, mode, deadline, fallback)
                self._keep(key, e)  # before the others look
            finally:
                leave()
            return e.value

    def _keep(self, key: str, e: Cached) -> None:
        with self._mu:
            if self._closed:  # meanwhile, by another thread
                return
            old = self._objects.get(key, {})
            # Of an older generation nothing is kept: it would stay in memory.
            same = [c for c in old.values() if (c.fd, c.offset, c.word) == (e.fd, e.offset, e.word)]
            new = {m: c for c in same for m in c.modes if m not in e.modes}
            new.update(dict.fromkeys(e.modes, e))
            self._objects[key] = new
            self._counts["hits"] += sum(c.hits for c in set(old.values()) - set(new.values()))

    def _build_object(self, key: str, source: Any, mode: str | None, deadline: float | None, fallback: str) -> Cached:
        from . import _objects

        may_fall = (Unsupported,) if fallback == "auto" else ()
        if fallback == "private":
            may_fall = (Unsupported, NoSpace, TableFull, Untrusted, ReadOnly, errors.Limit, NoRegistry)  # type: ignore[assignment]
        try:
            with operation("load", key):
                self._trust_objects(self._each(lambda p: p))
                a, _ = self._obtain(key, source, deadline, None)
                self._trust_objects(a.place)
                o = _objects.load(a, mode)
        except may_fall as e:
            if loading.get():
                raise NestedLoad() from None
            self._fall(key, e, "it is loaded into this process's own memory")
            from ._arena import Writer

            c = Cached(_objects.call(source.loader, Writer()), source.version, ("c", "r", None))
            c.reason = e.text
            return c
        self._fallen.pop(key, None)
        c = Cached(o.value, source.version, o.modes)
        if source.on_change == "ignore":  # which must not decide for other callers
            c.version = _objects.version_here(a.manifest)
        c.fd, c.offset, c.word = a.place.fd, a.offset, a.word
        c.attachment, c.data = a, o.data
        return c

    def _trust_objects(self, place: Place) -> None:
        if not self._objects_allowed:
            raise Untrusted("not trusted: this registry was opened with objects=False, and a skeleton is a pickle")
        if place.top.owner != os.geteuid() and place.top.owner != self._trust:
            raise Untrusted(
                f"not trusted: {self.dir} belongs to uid {place.top.owner}: objects are pickles and are only"
                " loaded from one's own registry, or that of trust_owner"
            )

    def release(self, key: str) -> None:
        """Drops this process's cached objects of key, of all modes. Views of them stay valid and keep
        the lease."""
        with self._mu:
            old = self._objects.pop(key, {})
            self._counts["hits"] += sum(e.hits for e in set(old.values()))
            self._fallen.pop(key, None)

    # For asyncio.

    async def aopen(self, key: str, path: str | os.PathLike[str] | None = None, **options: Any) -> Model:
        """open() for asyncio: the wait is in a thread. Cancelling leaves the load running."""
        return await _in_thread(self.open, key, path, **options)

    async def aget_or_load(self, key: str, loader: Callable[..., Any], **options: Any) -> Any:
        """get_or_load() for asyncio: a cached object at once, else in a thread."""
        e = self._cached(key, **options)
        if e is not None:
            return e.value
        return await _in_thread(self.get_or_load, key, loader, **options)

    # What the host decides.

    def pin(self, key: str) -> None:
        """Keeps the model of key from being evicted by the budget, a full table or its TTL, for all
        processes. It survives a replacement and ends with unpin() or remove(). NotFound."""
        self._edit("pin", key, 1)

    def unpin(self, key: str) -> None:
        """Undoes pin(). NotFound."""
        self._edit("unpin", key, 0)

    def set_ttl(self, key: str, seconds: float | None) -> None:
        """Sets how long the model of key may be idle before it is removed: 0 is the registry's
        default, None is for ever. It ends with remove(). NotFound."""
        if seconds is not None and not 0 <= seconds < 1 << 33:
            raise ValueError(f"seconds={seconds!r}: want a time from 0 on, or None")
        self._edit("ttl", key, (1 << 64) - 1 if seconds is None else int(seconds * 1e9))

    def _edit(self, op: str, key: str, value: int) -> None:
        from . import _table as T

        hint, deadline = T.TTL if op == "ttl" else T.PIN, time.monotonic() + 10

        def edit(p: Place) -> None:
            with p.table("edit.lock-table", deadline) as t:
                f = t.lookup(key)
                if f is None or T.state_of(f.word) != L.READY:
                    raise NotFound()
                t.set_hint(f.slot, hint, value)

        with operation(op, str(key)):
            key = check_key(key)
            try:
                self._each(edit, create=False)
            except NoRegistry:
                raise NotFound() from None

    # Looking and cleaning.

    def status(self, key: str) -> Status:
        """What this process knows of a key; never raises because of the registry's state."""
        from . import _inspect

        with operation("status", str(key)):
            return _inspect.status(self, check_key(key))

    def entries(self) -> list[Entry]:
        """What the header table names, by key."""
        from . import _inspect

        with operation("list"):
            try:
                return self._each(_inspect.entries, create=False)
            except NoRegistry:
                return []

    def remove(self, key: str, *, timeout: float | None = 10.0) -> None:
        """Removes the model of key from memory. NotFound, InUse."""
        from . import _inspect, _remove

        with operation("remove", str(key)):
            key = check_key(key)
            deadline = None if timeout is None else time.monotonic() + timeout
            try:
                self._each(lambda p: _remove.remove(p, key, deadline), create=False)
            except NoRegistry:
                raise NotFound() from None
            except errors.InUse as e:
                if e.text == errors.InUse.default:
                    e.pids = tuple(self._each(lambda p: _inspect.holders(p, key)))
                    e.text = _inspect.in_use(e.pids)
                raise

    def gc(self, *, timeout: float | None = 10.0) -> GCReport:
        """Cleans up after dead processes and removes expired and orphaned generations.

        It never removes a healthy model whose TTL is not over.
        """
        from . import _remove

        with operation("gc"):
            deadline = None if timeout is None else time.monotonic() + timeout
            return self._each(lambda p: _remove.collect(p, deadline))

    def check(self, key: str | None = None, *, data: bool = False) -> list[Problem]:
        """Every broken invariant; an empty list means sound. data=True digests the payload again.

        It finds what ``shmctl check`` finds, which also names the processes that hold a lock.
        """
        from . import _check

        with operation("check", key):
            if key is not None and check_key(key) not in {e.key for e in self.entries()}:
                raise NotFound()
            return self._each(lambda p: _check.check(self, p, key, data), create=False)

    def stats(self) -> Stats:
        """Counts of this process."""
        from ._inspect import Stats

        with self._mu:
            counts = dict(self._counts)
            counts["hits"] += sum(e.hits for modes in self._objects.values() for e in set(modes.values()))
        return Stats(**counts)

    def close(self) -> None:
        """Ends the use of the registry by this object; models and views stay valid."""
        with self._mu:
            self._closed = True
            self._place = None
            # Emptied, not replaced: get_or_load of the module looks into this one. What was
            # in it goes after the lock, because a user's __del__ may call this registry.
            old = [e for modes in self._objects.values() for e in set(modes.values())]
            self._counts["hits"] += sum(e.hits for e in old)
            self._objects.clear()
            self._local = weakref.WeakValueDictionary()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<onecopy.Registry {self._dir or default_dir()}>"

    def _after_fork(self) -> None:
        self._mu = threading.Lock()
        self._flights = weakref.WeakValueDictionary()


def _nothing() -> None:
    pass


def _outside() -> int:
    """The stacklevel, for a warning of the function that asks, of the line that called this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__package__") == __package__:
        level, frame = level + 1, frame.f_back
    return level


async def _in_thread(fn: Callable[..., R], *args: Any, **options: Any) -> R:
    import asyncio
    import functools

    context = contextvars.copy_context()  # a loader that asks for a load is found out here too
    call = functools.partial(context.run, fn, *args, **options)
    work = asyncio.get_running_loop().run_in_executor(None, call)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(_drop)
        raise


def _drop(work: Any) -> None:
    """Nobody waits for it any more: gives back what came, and asks for the exception."""
    if not work.cancelled() and work.exception() is None:
        from ._model import Model

        if isinstance(work.result(), Model):
            work.result().close()


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: want one of {', '.join(map(repr, allowed))}")


_registries: weakref.WeakSet[Registry] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for name in ("_locks", "_place", "_attach"):
        module = sys.modules.get(f"{__package__}.{name}")
        if module is not None:
            module.after_fork()
    for r in list(_registries):
        r._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
