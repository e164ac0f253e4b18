"""For display: no lock is taken, and what is said may be outdated when it is read."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from . import _layout as L
from . import _locks
from . import _table as T
from ._attach import read_manifest
from ._manifest import Manifest
from ._names import gen_name, parse_gen_name
from ._place import Place, boottime
from .errors import Error, NoSpace

if TYPE_CHECKING:
    from ._registry import Registry


# How the kernel names the one that every other is in.
INITIAL_PID_NAMESPACE = "pid:[4026531836]"


class Status(NamedTuple):
    """What this process knows of a key.

    state: "ready", "loading", "evicting", "free" or "unknown" (no registry).
    shared: whether this process uses it through the registry. backing: "shm", "source"
    (the source's own file), "private", or "" if this process does not use it. reason:
    why it is not shared. attempts: loaders that died in a row; retry_after: seconds
    until the next is allowed. private_bytes: copied by writes into a copy-on-write
    mapping, of a mode "c" object or of tensors("pt"). mode: of the object that was made last.
    """

    key: str
    state: str
    shared: bool
    backing: str
    reason: str
    generation: int
    nbytes: int
    mode: str | None
    private_bytes: int
    attempts: int
    retry_after: float


class Stats(NamedTuple):
    """Counts of this process: answers from its own cache, attaches, loads, waits for a load of
    another process or thread, loads begun after a loader died, and uses that fell back to private memory."""

    hits: int
    attaches: int
    loads: int
    waits: int
    takeovers: int
    fallbacks: int
    bytes_loaded: int
    bytes_saved: int


class Entry(NamedTuple):
    """What a slot of the header table describes. nbytes in bytes; ttl and retry_after in
    seconds (0: none); deaths: loaders that died in a row; path: the folder ("" unless ready)."""

    key: str
    state: str
    generation: int
    nbytes: int
    leased: bool
    pinned: bool
    ttl: float
    deaths: int
    retry_after: float
    loader_pid: int
    path: str
    version: str
    loaded_at: str


def entries(p: Place) -> list[Entry]:
    """By key."""
    t, n = p.snapshot(), boottime()
    leased = set(_leased(p))
    out = []
    for slot, w in t.in_use():
        key = t.key(slot)
        if key is None or T.state_of(w) > L.EVICTING:
            continue
        gen, man = T.gen_of(w), None
        if T.state_of(w) == L.READY:
            man = _manifest(p, gen)
        retry = t.hint(slot, T.RETRY_AFTER)
        out.append(
            Entry(
                key, T.STATES[T.state_of(w)], gen, man.bytes if man else t.hint(slot, T.BYTES),
                gen in leased or (man is not None and _leased_outside(p, gen)),
                t.hint(slot, T.PIN) != 0, t.hint(slot, T.TTL) / 1e9, t.hint(slot, T.DEATHS),
                (retry - n) / 1e9 if retry > n else 0.0, t.hint(slot, T.LOADER_PID),
                p.m.join(f"{man.stem}/{man.name}") if man else "", man.origin.version if man else "",
                man.loaded_at if man else "",
            )
        )  # fmt: skip
    return sorted(out)


def _manifest(p: Place, gen: int) -> Manifest | None:
    name = gen_name(p.ident.epoch, gen) + L.MANIFEST_EXT
    try:
        fd, _ = p.m.open(name)
    except (OSError, Error):
        return None
    try:
        return read_manifest(p, fd, name)[0]
    except (OSError, Error):
        return None
    finally:
        os.close(fd)


def _leased(p: Place) -> dict[int, set[int]]:
    """Generation to pids that took a lock, from the kernel's list: trying the locks, however
    briefly, could make a reader believe that the model is busy."""
    inodes: dict[tuple[str, int], int] = {}
    for n in p.m.names():
        parsed = parse_gen_name(n)
        if parsed is not None and parsed[2] == L.MANIFEST_EXT and parsed[0] == p.ident.epoch:
            try:
                st = p.m.stat(n)
            except OSError:
                continue
            dev = f"{os.major(st.st_dev):02x}:{os.minor(st.st_dev):02x}"
            inodes[dev, st.st_ino] = parsed[1]
    out: dict[int, set[int]] = {}
    try:
        with open("/proc/locks", encoding="ascii", errors="replace") as f:
            for line in f:
                part = line.split()  # 1: FLOCK ADVISORY READ 4711 00:19:123 0 EOF
                if len(part) < 6 or part[1] != "FLOCK":
                    continue
                dev, _, ino = part[5].rpartition(":")
                gen = inodes.get((dev, int(ino))) if ino.isdigit() else None
                if gen is not None:
                    out.setdefault(gen, set()).add(int(part[4]))
    except (OSError, ValueError):
        pass
    return out


def _leased_outside(p: Place, gen: int) -> bool:
    """Whether somebody leases a generation for which /proc/locks has no lock: in a PID namespace
    of its own it does not list those of the processes outside. Then the lock is tried."""
    try:
        if os.readlink("/proc/self/ns/pid") == INITIAL_PID_NAMESPACE:
            return False
        fd, _ = p.m.open(gen_name(p.ident.epoch, gen) + L.MANIFEST_EXT)
    except (OSError, Error):
        return False
    try:
        return not _locks.try_exclusive(fd)
    except OSError:
        return False
    finally:
        os.close(fd)


def holders(p: Place, key: str | None = None) -> list[int]:
    """Pids that map the manifest of key, or any manifest, as far as this process may see."""
    if key is None:
        names = [n for n in p.m.names() if n.endswith(L.MANIFEST_EXT)]
    else:
        f = p.find(key)
        names = [] if f is None else [gen_name(p.ident.epoch, T.gen_of(f.word)) + L.MANIFEST_EXT]
    # By device and inode: the loader's own mapping has the name of an anonymous file.
    want = []
    for n in names:
        try:
            st = p.m.stat(n)
        except OSError:
            continue
        want.append([f"{os.major(st.st_dev):02x}:{os.minor(st.st_dev):02x}", str(st.st_ino)])
    if not want:
        return []
    pids = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
                if any(line.split(None, 5)[3:5] in want for line in maps):
                    pids.add(int(pid))
        except OSError:
            pass
    return sorted(pids)


def in_use(pids: tuple[int, ...]) -> str:
    """The text of InUse."""
    return "in use" + (_by(pids) if pids else " by a process that is not visible from here")


def name_holders(p: Place, e: NoSpace) -> None:
    """Says in the error who leases the memory that cannot be had."""
    if e.leased > 0 and not e.pids:
        e.pids = tuple(holders(p))
        if e.pids:
            e.text = e.text.replace(" are in use", " are in use" + _by(e.pids), 1)


def _by(pids: tuple[int, ...]) -> str:
    shown = []
    for pid in pids[:5]:
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as f:
                command = f.read(200).replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            command = ""
        shown.append(f" pid {pid}" + (f" ({command[:60]}{'...' if len(command) > 60 else ''})" if command else ""))
    more = f" and {len(pids) - 5} more" if len(pids) > 5 else ""
    return " by" + ",".join(shown) + more


def status(r: Registry, key: str) -> Status:
    """See Registry.status."""
    from ._objects import private_bytes

    state, gen, nbytes, deaths, retry, why = "unknown", 0, 0, 0, 0.0, ""
    try:
        p = r._here(create=False)
        t = p.snapshot()
        f = t.lookup(key) or t.scan(key)
        state = "free"
        if f is not None:
            deaths = t.hint(f.slot, T.DEATHS)
            at, n = t.hint(f.slot, T.RETRY_AFTER), boottime()
            retry = (at - n) / 1e9 if at > n else 0.0
            if T.state_of(f.word) != L.FREE:
                state, gen = T.STATES[min(T.state_of(f.word), L.EVICTING)], T.gen_of(f.word)
                nbytes = t.hint(f.slot, T.BYTES)
    except Error as e:
        why = e.text
    reason = r._fallen.get(key, "")
    objects = r._objects.get(key, {})
    cached = next(reversed(list(objects.values())), None)
    a = r._local.get(key) if cached is None else cached.attachment
    mode = None if cached is None else cached.modes[0]
    if cached is not None and a is None:
        return Status(key, state, False, "private", cached.reason, gen, nbytes, mode, 0, deaths, retry)
    if a is not None and not (cached is None and reason):
        views = [view for (_, private), view in list(a.mapped.items()) if private]
        copied = sum(map(private_bytes, views + [e.data for e in set(objects.values())]))
        return Status(key, state, True, "shm", "", gen, nbytes, mode, copied, deaths, retry)
    if reason:
        return Status(key, state, False, "source", reason, gen, nbytes, None, 0, deaths, retry)
    return Status(key, state, False, "", why, gen, nbytes, None, 0, deaths, retry)
