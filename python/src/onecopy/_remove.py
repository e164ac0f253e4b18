"""Removing a generation, cleaning up after the dead, and making room.

Whoever removes has LOCK_EX on the manifest, or knows that no lease can exist. The
manifest goes first, under T: without it nobody can lease the generation, and what
is left is a leftover that anybody may remove. The payload goes after T was
dropped, because freeing its pages takes 150 ms per GiB.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from . import _cgroup, _crash, _locks
from . import _layout as L
from . import _table as T
from ._attach import read_manifest
from ._names import gen_name, parse_gen_name
from ._place import Place, Tx, boottime
from .errors import Busy, Error, InUse, NoSpace, NotFound, TableFull, Untrusted, no_space

# No death march: after MAX_DEATHS killed loaders in a row the next attempt has to
# wait, twice as long each time.
MAX_DEATHS = 3
_FIRST_PAUSE, LONG_PAUSE = 10 * 10**9, 300 * 10**9

LOADER_HINTS = (T.PROMISED, T.RESERVED, T.LOADER_PID, T.LOAD_START)
# What ended with the model that a FREE slot held last; deaths and back-off do not.
_LIFE = (T.PIN, T.TTL, T.PREVIOUS, T.ATTACHES, T.LAST_ATTACH, T.LAST_RELEASE, T.IDLE_SINCE)


class Removal(NamedTuple):
    """A generation whose manifest is gone and whose payload is left."""

    name: str  # below m/
    step: str  # prefix of the crash points


def remove_all(p: Place, gone: list[Removal]) -> int:
    """Frees the memory of generations without a manifest; T is not held. Returns bytes."""
    freed = 0
    for g in gone:
        try:
            freed += p.m.usage(g.name) + p.m.usage(g.name + L.DIGESTS_EXT)
            p.m.remove_tree(g.name)
            _crash.hit(g.step + ".unlink-payload")
            p.m.unlink(g.name + L.DIGESTS_EXT)
        except OSError:
            pass  # a collector tries again
        _crash.hit(g.step + ".rmdir")
    gone.clear()
    return freed


def has_manifest(p: Place, stem: str) -> bool:
    """Whether the manifest of a generation is linked."""
    try:
        p.m.stat(stem + L.MANIFEST_EXT)
    except FileNotFoundError:
        return False
    return True


def free(t: Tx, slot: int, word: int) -> bool:
    """Makes a slot FREE; its key stays, because deaths and back-off outlive generations."""
    key = t.key(slot)
    if not t.change(slot, word, T.make_word(L.FREE, T.gen_of(word))):
        return False
    if key is not None:
        t.index_delete(slot, key)
    return True


def _unfinished(t: Tx) -> list[tuple[int, int]]:
    words, started, reserved = t.words(), t.hints(T.LOAD_START), t.hints(T.RESERVED)
    return [
        (slot, w)
        for slot, (w, s, r) in enumerate(zip(words, started, reserved))
        if T.state_of(w) == L.LOADING or s or r
    ]


def bury_stripe(t: Tx, stripe: int, key: str) -> tuple[list[Removal], int]:
    """As the holder of a load lock: whoever else has an unfinished load on the stripe is dead.

    Returns what to remove, and how many dead loads of key there were.
    """
    gone: list[Removal] = []
    takeovers = 0
    for slot, w in _unfinished(t):
        k = t.key(slot)
        if k is None or T.stripe(k) != stripe:
            continue
        if k == key:
            takeovers += 1
            t.count(L.HEADER_COUNT_TAKEOVERS)
        gone += bury(t, slot, w)
    return gone, takeovers


def bury_dead(t: Tx) -> list[Removal]:
    """Cleans up after every dead loader whose load lock can be had."""
    gone: list[Removal] = []
    for slot, w in _unfinished(t):
        key = t.key(slot)
        held = t.p.try_key(T.stripe(key)) if key is not None else None
        if held is not None:
            try:
                gone += bury(t, slot, w)
            finally:
                held.unlock()
    return gone


def bury(t: Tx, slot: int, word: int) -> list[Removal]:
    """Ends the load of a dead loader, whose K is held; counts the death."""
    if t.hint(slot, T.LOAD_START):
        deaths = t.hint(slot, T.DEATHS) + 1
        t.set_hint(slot, T.DEATHS, deaths)
        if deaths >= MAX_DEATHS:
            pause = min(_FIRST_PAUSE << min(deaths - MAX_DEATHS, 10), LONG_PAUSE)
            t.set_hint(slot, T.RETRY_AFTER, boottime() + pause)
    for h in LOADER_HINTS:
        t.set_hint(slot, h, 0)
    if T.state_of(word) != L.LOADING:
        return []  # a replacement that was never published is left to the collector
    name = t.gen_name(word)
    t.p.m.unlink(name + L.MANIFEST_EXT)  # nobody can lease what was never READY
    _crash.hit("reclaim.unlink-dead-load")
    free(t, slot, word)
    t.count(L.HEADER_COUNT_RECLAIMED)
    _crash.hit("reclaim.free")
    return [Removal(name, "reclaim")]


def _open_manifest(p: Place, name: str) -> int | None:
    """None if it is missing; -1 if it is not what we made."""
    try:
        return p.m.open(name + L.MANIFEST_EXT)[0]
    except FileNotFoundError:
        return None
    except (OSError, Untrusted):
        return -1


def reclaim(t: Tx, slot: int, word: int) -> list[Removal]:
    """Finishes, or undoes, what a dead remover began; live leases bring the generation back."""
    name = t.gen_name(word)
    fd = _open_manifest(t.p, name)
    try:
        if fd is not None and fd >= 0:
            if not _locks.try_exclusive(fd):
                _crash.hit("reclaim.lock-manifest")
                sh = _open_manifest(t.p, name)
                if sh is not None and sh >= 0:
                    try:
                        shared = _locks.try_shared(sh)
                        _crash.hit("reclaim.try-shared")
                    finally:
                        os.close(sh)
                    if shared:
                        t.change(slot, word, T.make_word(L.READY, T.gen_of(word)))
                        _crash.hit("reclaim.undo")
                        return []
                # Refused too: somebody sits on LOCK_EX, so no lease exists, and
                # none will be granted while the slot is EVICTING.
            else:
                _crash.hit("reclaim.lock-manifest")
        t.p.m.unlink(name + L.MANIFEST_EXT)
        _crash.hit("reclaim.unlink-manifest")
    finally:
        if fd is not None and fd >= 0:
            os.close(fd)
    free(t, slot, word)
    t.count(L.HEADER_COUNT_RECLAIMED)
    _crash.hit("reclaim.free")
    return [Removal(name, "reclaim")]


def lock_victim(t: Tx, word: int) -> int | None:
    """LOCK_EX on a READY manifest: the descriptor, or None if it is leased. FileNotFoundError.

    The caller must close it whatever comes: nobody can attach the model as long as it is open.
    """
    fd, _ = t.p.m.open(t.gen_name(word) + L.MANIFEST_EXT)
    try:
        _crash.hit("evict.open-manifest")
        if _locks.try_exclusive(fd):
            _crash.hit("evict.lock-manifest")
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def evict(t: Tx, slot: int, word: int, counter: int) -> list[Removal] | None:
    """Removes a READY generation whose manifest is locked exclusively."""
    evicting = T.make_word(L.EVICTING, T.gen_of(word))
    if not t.change(slot, word, evicting):
        return None
    _crash.hit("evict.mark")
    name = t.gen_name(word)
    t.p.m.unlink(name + L.MANIFEST_EXT)
    _crash.hit("evict.unlink-manifest")
    free(t, slot, evicting)
    t.count(counter)
    _crash.hit("evict.free")
    return [Removal(name, "evict")]


def new_life(t: Tx, slot: int) -> None:
    """Clears what ended with the model that a FREE slot held last."""
    for h in _LIFE:
        t.set_hint(slot, h, 0)


def can_lease(t: Tx, word: int) -> bool:
    """Whether the manifest of a READY slot can be locked by readers."""
    fd = _open_manifest(t.p, t.gen_name(word))
    if fd is None or fd < 0:
        return False
    try:
        return _locks.try_shared(fd)
    finally:
        os.close(fd)


class Victim(NamedTuple):
    """A model that may be evicted if nobody leases it."""

    used: int  # last use, CLOCK_BOOTTIME
    slot: int
    word: int
    size: int


def stamp(t: Tx, slot: int, h: int) -> int:
    """A hint that is a time: one still to come counts as now, one of another boot as never."""
    return 0 if t.p.other_boot else min(t.hint(slot, h), boottime())


def generation_usage(p: Place, name: str) -> int:
    """Memory of a generation by its name."""
    return p.m.usage(name) + p.m.usage(name + L.MANIFEST_EXT) + p.m.usage(name + L.DIGESTS_EXT)


def candidates(t: Tx, but: str) -> tuple[list[Victim], int]:
    """READY models that are not pinned, least recently used first, and the bytes of pinned ones."""
    out, pinned = [], 0
    for slot, w in t.in_use():
        if T.state_of(w) != L.READY or (but and t.key_is(slot, but)):
            continue
        size = generation_usage(t.p, t.gen_name(w))
        if t.hint(slot, T.PIN):
            pinned += size
        else:
            used = max(stamp(t, slot, T.LAST_ATTACH), stamp(t, slot, T.LAST_RELEASE))
            out.append(Victim(used, slot, w, size))
    return sorted(out), pinned


class Idle:
    """Locks the manifests of candidates that nobody leases until they make up short bytes.

    No more than needed, because a reader that meets the lock must try again.
    """

    def __init__(self, t: Tx, victims: list[Victim], short: int) -> None:
        self.victims: list[Victim] = []
        self._fds: list[int] = []
        self.bytes = 0
        try:
            for v in victims:
                if self.bytes >= short:
                    break
                try:
                    fd = lock_victim(t, v.word)
                except (OSError, Untrusted):
                    continue
                if fd is not None:
                    self._fds.append(fd)
                    self.victims.append(v)
                    self.bytes += v.size
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Idle:
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in self._fds:
            os.close(fd)


def free_slot(t: Tx, gone: list[Removal]) -> int | None:
    """A slot that names nothing, evicting the least recently used idle model when there is none.

    None: look again. TableFull.
    """
    best = -1
    for slot in range(t.slots):
        if t.insane(slot):
            t.reset(slot)
        if T.state_of(t.word(slot)) != L.FREE or _promised(t, slot):
            continue
        if not t.hint(slot, T.DEATHS):
            return slot
        best = slot  # remembers the deaths of its key: only if there is no other
    if best >= 0:
        return best
    more = bury_dead(t)
    if not more:
        with Idle(t, candidates(t, "")[0], 1) as idle:  # the first one that can be had
            for v in idle.victims:
                more = evict(t, v.slot, v.word, L.HEADER_COUNT_EVICTED_TABLE) or []
    if not more:
        raise TableFull()
    gone += more
    return None


def _promised(t: Tx, slot: int) -> bool:
    """A FREE slot holds what a running load was promised: one that replaces a generation
    which somebody has removed meanwhile."""
    key = t.key(slot)
    if key is None or not (t.hint(slot, T.PROMISED) or t.hint(slot, T.RESERVED)):
        return False
    return not t.p.key_free(key)


class Demand(NamedTuple):
    """What a registry's memory is used for: linked by all generations that have a name,
    reserved: running loads have still to allocate, promised: running loads may use in
    all (their generations are not in linked)."""

    linked: int
    reserved: int
    promised: int


def usage(t: Tx, mine: str) -> Demand:
    """Adds it up, besides the load of the key mine; reservations of dead loaders are cleared."""
    linked = reserved = promised = 0
    loading: set[int] = set()
    for slot, (w, r, most) in enumerate(zip(t.words(), t.hints(T.RESERVED), t.hints(T.PROMISED))):
        key = t.key(slot) if r or most or T.state_of(w) == L.LOADING else None
        if key is None or key == mine:
            continue
        if not mine or T.stripe(key) != T.stripe(mine):  # on our own stripe its loader is dead
            held = t.p.try_key(T.stripe(key))
            if held is None:
                reserved += r
                most = max(r, most)
                if T.state_of(w) == L.LOADING:
                    most = max(most, t.hint(slot, T.BYTES))
                    loading.add(T.gen_of(w))
                promised += most
                continue
            held.unlock()
        t.set_hint(slot, T.PROMISED, 0)
        t.set_hint(slot, T.RESERVED, 0)
    for n in t.p.m.names():
        parsed = parse_gen_name(n)
        if parsed is None or parsed[0] != t.ident.epoch or parsed[1] not in loading:
            linked += t.p.m.usage(n)
    return Demand(linked, reserved, promised)


def budget(p: Place, t: T.Table) -> tuple[int, int, int]:
    """Bytes that the registry may use; free bytes and size of the tmpfs."""
    space, total = p.m.free()
    b, ppm = t.budget()
    if not 0 < b < 1 << 63:
        b = total // 1_000_000 * ppm
    return b, space, total


def headroom() -> int | None:
    """What the cgroups allow, less a reserve for the process itself."""
    n = _cgroup.headroom()
    return None if n is None else max(0, n - (8 << 20))


def admit(t: Tx, key: str, need: int, filled: int, swept: bool = True, may_evict: bool = True) -> list[Removal]:
    """Decides under T whether need bytes may be loaded. NoSpace.

    Idle models are evicted to make that so, least recently used first, unless all of
    them would not be enough; a list that is not empty asks to try again, because the
    memory comes only when T is dropped.
    """
    limit, space, _ = budget(t.p, t)
    d = usage(t, key)
    linked = d.linked + filled  # of this load: it has no name yet
    head = headroom()
    short = max(linked + d.promised + need - limit, d.reserved + need - space)
    if head is not None:
        short = max(short, need - head)
    if short <= 0:
        return []
    if not may_evict:
        raise NoSpace()
    gone: list[Removal] = []
    if not swept:
        sweep(t, gone)
        if gone:
            return gone
    victims, pinned = candidates(t, key)
    with Idle(t, victims, short) as idle:
        if idle.bytes >= short:
            for v in idle.victims:
                gone += evict(t, v.slot, v.word, L.HEADER_COUNT_EVICTED_SPACE) or []
        refusal = no_space(
            need, space, limit, linked, d.promised, idle.bytes, linked - idle.bytes - pinned, pinned,
            -1 if head is None else head, t.p.m.path,
        )  # fmt: skip
    if not gone:
        # What somebody is removing just now, evicted or replaced, counts until its
        # payload is gone, but it is nobody's any more.
        sweep(t, gone)
    if not gone:
        raise refusal
    return gone


def sweep(t: Tx, gone: list[Removal]) -> None:
    """Collects as gc() does."""
    _collect(t, gone)


def expires(t: Tx) -> bool:
    """Whether a model has a TTL that runs."""
    default = t.q[L.HEADER_TTL // 8]
    return any(
        T.state_of(w) == L.READY and not t.hint(slot, T.PIN) and (default or t.hint(slot, T.TTL))
        for slot, w in t.in_use()
    )


def named(t: T.Table) -> set[int]:
    """The generations that a slot names."""
    return {T.gen_of(w) for _, w in t.in_use()}


def retire(p: Place, gen: int, deadline: float | None = None, wait: bool = True) -> None:
    """Removes a generation if no slot names it and nobody leases it."""
    gone: list[Removal] = []
    name = gen_name(p.ident.epoch, gen)
    with p.table("retire.lock-table", deadline, wait) as t:
        fd = None if gen in named(t) else _open_manifest(p, name)
        if fd is not None and fd >= 0:
            try:
                # Refused: the last one to release it, or a collector, removes it.
                if _locks.try_exclusive(fd):
                    _crash.hit("retire.lock-manifest")
                    p.m.unlink(name + L.MANIFEST_EXT)
                    _crash.hit("retire.unlink-manifest")
                    gone.append(Removal(name, "retire"))
            finally:
                os.close(fd)
    remove_all(p, gone)


def remove(p: Place, key: str, deadline: float | None) -> None:
    """Removes the model of key. NotFound, InUse."""
    gone: list[Removal] = []
    try:
        with p.table("evict.lock-table", deadline) as t:
            _remove(t, key, gone)
    finally:
        remove_all(p, gone)


def _remove(t: Tx, key: str, gone: list[Removal]) -> None:
    f = t.find(key)
    if f is not None and T.state_of(f.word) == L.EVICTING:
        gone += reclaim(t, f.slot, f.word)
        f = f._replace(word=t.word(f.slot))
        if T.state_of(f.word) == L.FREE:
            return
    if f is None or T.state_of(f.word) == L.FREE:
        raise NotFound()
    if T.state_of(f.word) == L.LOADING:
        held = t.p.try_key(T.stripe(key))
        if held is None:
            raise InUse("in use: it is being loaded")
        try:
            gone += bury(t, f.slot, f.word)
        finally:
            held.unlock()
        raise NotFound()
    try:
        fd = lock_victim(t, f.word)
    except FileNotFoundError:
        free(t, f.slot, f.word)
        gone.append(Removal(t.gen_name(f.word), "evict"))
        return
    if fd is None:
        raise InUse()
    try:
        more = evict(t, f.slot, f.word, L.HEADER_COUNT_REMOVED)
        if more is None:
            raise Busy()
        gone += more
        t.end()
        _crash.hit("evict.unlock-table")
    finally:
        os.close(fd)


class GCReport(NamedTuple):
    """What gc() removed: slots whose owner died, idle models past their TTL, generations that
    no slot names, files without a manifest; bytes freed; names below m/."""

    reclaimed: int
    expired: int
    orphans: int
    leftovers: int
    freed: int
    removed: tuple[str, ...]


def collect(p: Place, deadline: float | None = None, wait: bool = True) -> GCReport:
    """Cleans up; never removes a healthy model whose TTL is not over."""
    gone: list[Removal] = []
    with p.table("collect.lock-table", deadline, wait) as t:
        reclaimed, expired, orphans, leftovers = _collect(t, gone)
    _crash.hit("collect.unlock-table")
    removed = tuple(g.name for g in gone)
    return GCReport(reclaimed, expired, orphans, leftovers, remove_all(p, gone), removed)


def _collect(t: Tx, gone: list[Removal]) -> tuple[int, int, int, int]:
    repair_generation(t)
    reclaimed, expired = _disown(t), 0
    for slot in range(t.slots):
        if t.insane(slot):
            t.reset(slot)
            reclaimed += 1
            continue
        w = t.word(slot)
        state = T.state_of(w)
        if state == L.EVICTING:
            gone += reclaim(t, slot, w)
            reclaimed += 1
        elif state == L.READY and not has_manifest(t.p, t.gen_name(w)):
            free(t, slot, w)
            reclaimed += 1
            _crash.hit("collect.slot")
        elif state == L.READY and _expired(t, slot, w):
            try:
                fd = lock_victim(t, w)
            except (OSError, Untrusted):
                continue
            if fd is not None:
                try:
                    more = evict(t, slot, w, L.HEADER_COUNT_EVICTED_TTL) or []
                finally:
                    os.close(fd)
                gone += more
                expired += len(more)
    dead = bury_dead(t)
    reclaimed += len(dead)
    gone += dead
    t.repair_index()
    orphans, leftovers = _collect_unnamed(t, gone)
    t.count(L.HEADER_COUNT_LEFTOVERS, orphans + leftovers)
    return reclaimed, expired, orphans, leftovers


def _collect_unnamed(t: Tx, gone: list[Removal]) -> tuple[int, int]:
    """Removes the manifests that no slot names and nobody leases; finds what has no manifest."""
    doomed = {g.name for g in gone}
    names = t.p.m.names()
    _crash.hit("collect.next")
    used, epoch = named(t), t.ident.epoch
    keep: set[str] = set()
    orphans = leftovers = 0
    for n in names:
        parsed = parse_gen_name(n)
        if parsed is None or parsed[2] != L.MANIFEST_EXT:
            continue
        stem = gen_name(parsed[0], parsed[1])
        if stem in doomed:
            continue
        if parsed[0] == epoch and parsed[1] in used:
            keep.add(stem)
            continue
        fd = _open_manifest(t.p, stem)
        try:
            if fd is not None and fd >= 0 and not _locks.try_exclusive(fd):
                keep.add(stem)  # leased, or in the making
                continue
            _crash.hit("collect.lock-manifest")
            t.p.m.unlink(n)
            _crash.hit("collect.unlink-manifest")
        finally:
            if fd is not None and fd >= 0:
                os.close(fd)
        doomed.add(stem)
        gone.append(Removal(stem, "collect"))
        orphans += 1
    for n in names:
        parsed = parse_gen_name(n)
        if parsed is not None:
            stem = gen_name(parsed[0], parsed[1])
            if stem in keep or stem in doomed or (parsed[0] == epoch and parsed[1] in used):
                continue
            if parsed[2] == L.MANIFEST_EXT or has_manifest(t.p, stem):
                continue  # in the making: it was linked after the listing passed its place
            doomed.add(stem)
            gone.append(Removal(stem, "collect"))
        else:  # nothing of this layout version has such a name
            gone.append(Removal(n, "collect"))
        leftovers += 1
    return orphans, leftovers


def repair_generation(t: Tx) -> None:
    """Mends a counter that only a stranger can have changed: one that is used up, and one that is
    behind a generation that exists, which would make healthy slots senseless and give a number
    out twice."""
    counter = t.generation
    if counter < L.MAX_GEN and max(map(T.gen_of, t.words())) <= counter:
        return
    highest = 0
    for n in t.p.m.names():
        parsed = parse_gen_name(n)
        if parsed is not None and parsed[0] == t.ident.epoch and parsed[2] == L.MANIFEST_EXT:
            highest = max(highest, parsed[1])
    if highest > counter or counter >= L.MAX_GEN:
        t.set_generation(highest)


def _disown(t: Tx) -> int:
    """Empties slots that name a key or a generation which is another slot's, as only a stranger's
    bytes do: removing the one must not take the other's files."""
    keys: dict[str, int] = {}
    gens: dict[int, int] = {}
    n = 0
    for slot, w in t.in_use():
        key = t.key(slot)
        if key is None or t.insane(slot):
            continue
        kept = True
        for other in {keys.get(key, slot), gens.get(T.gen_of(w), slot)} - {slot}:
            if not kept or T.state_of(t.word(other)) == L.FREE:
                continue  # it has lost already
            loser = slot
            if _owns(t, slot) and (not _owns(t, other) or T.gen_of(t.word(other)) < T.gen_of(w)):
                loser = other
            t.reset(loser)
            n += 1
            kept = loser != slot
        if kept:
            keys[key] = gens[T.gen_of(w)] = slot
    return n


def _owns(t: Tx, slot: int) -> bool:
    """Whether the manifest of a slot's generation, if there is one, is that of its key."""
    w = t.word(slot)
    name = t.gen_name(w) + L.MANIFEST_EXT
    try:
        fd, _ = t.p.m.open(name)
        try:
            man, _ = read_manifest(t.p, fd, name)
        finally:
            os.close(fd)
    except (OSError, Error):
        return T.state_of(w) != L.READY
    return t.key_is(slot, man.key) and man.generation == T.gen_of(w)


def _expired(t: Tx, slot: int, word: int) -> bool:
    """Keeps the idle clock of a READY slot; a lease stops it, and is a use that begins now."""
    ttl = t.hint(slot, T.TTL) or t.q[L.HEADER_TTL // 8]
    if not ttl or t.hint(slot, T.PIN):
        return False
    try:
        fd = lock_victim(t, word)
    except (OSError, Untrusted):
        fd = None
    if fd is None:
        t.set_hint(slot, T.IDLE_SINCE, 0)
        t.set_hint(slot, T.LAST_ATTACH, boottime())
        return False
    os.close(fd)
    n = boottime()
    for h in (T.LAST_ATTACH, T.LAST_RELEASE, T.IDLE_SINCE):
        if t.hint(slot, h) > n:
            t.set_hint(slot, h, n)  # or it would be now for ever
    used = stamp(t, slot, T.LAST_ATTACH)
    since = stamp(t, slot, T.IDLE_SINCE)
    if not since or since < used:
        t.set_hint(slot, T.IDLE_SINCE, n)
        since = n
    rel = stamp(t, slot, T.LAST_RELEASE)
    if rel and rel >= used:
        since = rel
    return n - since >= ttl
