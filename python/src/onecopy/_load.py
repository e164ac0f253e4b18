"""The loader's half of the protocol, from the claim of a slot to publication.

The order of the steps is what makes kill -9 harmless at each of them; it is that of
the Go package, which a model checker has been over. K is held all the time.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from . import _crash, _locks, _sys
from . import _layout as L
from . import _manifest as M
from . import _remove as R
from . import _table as T
from ._attach import EAGER_FILES, Attachment, Lease
from ._names import gen_name, safe_name
from ._place import Again, Gone, Place, Tx, boottime
from ._segment import Fill, Pending
from ._source import Plan, Source
from .errors import Busy, Corrupt, Error, LoadFailed, NoSpace, NotFound, SourceFailed, from_os, no_space
from .errors import Gone as GoneError

if TYPE_CHECKING:
    from collections.abc import Callable

# How much a load allocates between two looks at the memory that is left: the files
# that tell cost more to read than a small file to copy.
_MEMORY_STEP = 4 << 20
# Under the lock nobody else changes a word: only a stranger could have.
_REFUSED = "damaged: the slot of {!r} cannot be changed although the table is locked"
_EXTEND_STEP = 256 << 20


class Loader:
    """One load."""

    def __init__(
        self, place: Place, key: str, source: Source, plan: Plan, replace: bool, deadline: float | None,
        threads: int, progress: Callable[[int, int], None] | None,
    ) -> None:  # fmt: skip
        self.place, self.key, self.source, self.plan, self.replace = place, key, source, plan, replace
        self.deadline, self.progress = deadline, progress
        self.busy = False  # replace only because the manifest was found locked
        self.fill = Fill(self._reserve, self._filled, threads)
        self.origin = plan.origin
        self.takeovers = 0
        self.started = time.monotonic()
        self.slot, self.old, self.word, self.gen = -1, 0, 0, 0
        self.need = 0  # bytes admitted
        self._taken = self._trusted = self._done = self._noted = 0
        self._mu = threading.Lock()
        self.files: list[M.ManifestFile] = []
        self.sealed: list[int] = []  # descriptors, in the manifest's order, then manifest and digests
        self.sums: list[bytes] = []
        self.linked = False
        self._looked = self._swept = False  # at what the dead have left
        self._pid = os.getpid()
        self.man: M.Manifest

    def add(self, f: M.ManifestFile, fd: int, sums: bytes) -> None:
        """A finished segment; takes the descriptor over."""
        self.sealed.append(fd)
        self.sums.append(sums)
        self.files.append(f._replace(digest=M.root(f.size, sums)))

    def run(self) -> Attachment:
        """Loads and attaches. Again: look once more."""
        try:
            try:
                self._claim()
                self.source.fill(self)
                if os.getpid() != self._pid:
                    raise SourceFailed("source failed: the loader forked and returned in the child")
                manifest, digests, lease = self._seal()
                _crash.hit("load.fill")
                self._link(manifest, digests)
                if self.replace:
                    self._note(0, T.RESERVED, T.PROMISED)  # what has a name is counted by it
                self._publish()
            except BaseException:
                if os.getpid() == self._pid:  # a child of fork must not undo its parent's load
                    self._abort()
                raise
            a = Attachment(self.place, self.man, self.slot, T.make_word(L.READY, self.gen), lease)
            if len(self.files) <= EAGER_FILES:
                for i in range(len(self.files)):
                    a.map(i, self.sealed[i])
            return a
        finally:
            # Whatever comes, KeyboardInterrupt too: they keep the model's memory.
            try:
                self._close()
            finally:
                self._close()

    def _close(self) -> None:
        """Closes the descriptors; when it is interrupted a second call closes the rest."""
        while self.sealed:
            _locks.close(self.sealed[-1])
            self.sealed.pop()

    # A slot, a generation and the right to the memory.

    def _claim(self) -> None:
        while True:
            gone: list[R.Removal] = []
            try:
                with self.place.table("load.lock-table", self.deadline) as t:
                    done = self._claim_locked(t, gone)
                    if not done and not gone:
                        raise Corrupt(_REFUSED.format(self.key))
            finally:
                R.remove_all(self.place, gone)
            if done:
                return
            _crash.hit("load.unlock-table")

    def _claim_locked(self, t: Tx, gone: list[R.Removal]) -> bool:
        R.repair_generation(t)
        dead, takeovers = R.bury_stripe(t, T.stripe(self.key), self.key)
        gone += dead
        self.takeovers += takeovers
        first, self._looked = not self._looked, True
        if first and (self.place.untidy() or R.expires(t)):
            self._swept = True
            R.sweep(t, gone)
        slot = self._look(t, gone)
        _crash.hit("load.look")
        if slot is None or (first and gone):
            return False  # what is gone counts as used until its payload is removed
        w = t.word(slot)
        deaths, n = t.hint(slot, T.DEATHS), boottime()
        if deaths >= R.MAX_DEATHS and t.key_is(slot, self.key):
            wait = t.hint(slot, T.RETRY_AFTER) - n
            if 0 < wait <= R.LONG_PAUSE and not self.place.other_boot:
                raise LoadFailed(deaths=deaths, retry_after=wait / 1e9)
        self.need = self.plan.bytes + (len(self.plan.files) + 2) * 4096
        evicted = self._admit(t, self.need)
        if evicted:
            gone += evicted
            return False
        self.gen = t.next_generation()
        if not self.gen:
            raise Corrupt("damaged: every generation number is used up")
        _crash.hit("load.generation")
        self.slot, self.old, self.word = slot, w, w
        if T.state_of(w) == L.FREE:
            self._name(t, slot)
            R.new_life(t, slot)
            t.set_hint(slot, T.BYTES, self.need)
            self.word = T.make_word(L.LOADING, self.gen)
        t.set_hint(slot, T.RESERVED, self.need)
        t.set_hint(slot, T.PROMISED, self.need)
        t.set_hint(slot, T.LOADER_PID, os.getpid())
        t.set_hint(slot, T.LOAD_START, n)
        if self.word != w and not t.change(slot, w, self.word):
            return False
        _crash.hit("load.claim")
        t.end()
        _crash.hit("load.unlock-table")
        return True

    def _admit(self, t: Tx, need: int) -> list[R.Removal]:
        swept, self._swept = self._swept, True
        return R.admit(t, self.key, need, self._done, swept)

    def _name(self, t: Tx, slot: int) -> None:
        if not t.key_is(slot, self.key):
            old = t.key(slot)
            if old is not None:
                t.index_delete(slot, old)
            t.set_key(slot, self.key)
        _crash.hit("load.key")
        if not t.index_insert(slot, self.key):
            raise Corrupt("damaged: the index has no free entry")

    def _look(self, t: Tx, gone: list[R.Removal]) -> int | None:
        """The slot to load into: the key's own, or a free one. None: look again."""
        for _ in range(2 * t.slots):
            f = t.find(self.key)
            if f is None:
                return R.free_slot(t, gone)
            state = T.state_of(f.word)
            if t.insane(f.slot):
                t.reset(f.slot)
            elif state == L.FREE:
                return f.slot
            elif state == L.EVICTING:
                gone += R.reclaim(t, f.slot, f.word)
            elif state == L.LOADING:
                # K is ours and bury_stripe has seen this slot: a stranger's bytes.
                gone += R.bury(t, f.slot, f.word)
            elif not R.has_manifest(self.place, t.gen_name(f.word)):
                R.free(t, f.slot, f.word)
            elif not self.replace or (self.busy and R.can_lease(t, f.word)):
                raise Again  # busy: it was an evictor that looked at many models
            else:
                return f.slot
        raise Corrupt("damaged: the table changes although its lock is held")

    # Memory.

    def _reserve(self, n: int, again: bool) -> None:
        """Before every window: is the memory still there? The claim admitted the model as a
        whole, but the tmpfs and the cgroup have other users."""
        with self._mu:
            if not again:
                self._taken += n
                if self._taken > self.need:
                    self._extend(self._taken)
            self._trusted += n
            if self._trusted < _MEMORY_STEP and not again:
                return
            self._trusted = 0
        space, _ = self.place.m.free()
        head = R.headroom()
        if n > space or (head is not None and n > head):
            limit, _, _ = R.budget(self.place, self.place.snapshot())
            raise no_space(n, space, limit, 0, 0, 0, 0, 0, -1 if head is None else head, self.place.m.path)

    def _extend(self, total: int) -> None:
        # Admits a loader that made more than was known. In larger steps, so that T is
        # not taken for every window; but a model that just fits must fit.
        deadline = _at_most(10, self.deadline)
        while True:
            gone: list[R.Removal] = []
            try:
                with self.place.table("load.extend", deadline) as t:
                    want = total - self.need
                    left = max(0, self.need - self._done)
                    try:
                        n = max(want, _EXTEND_STEP)
                        R.admit(t, self.key, left + n, self._done, may_evict=False)
                    except NoSpace:  # no model is evicted for bytes that may never come
                        n = want
                        gone += self._admit(t, left + n)
                    if not gone:
                        self.need += n
                        t.set_hint(self.slot, T.RESERVED, left + n)
                        t.set_hint(self.slot, T.PROMISED, self.need)
                        if T.state_of(self.word) == L.LOADING:
                            t.set_hint(self.slot, T.BYTES, self.need)
                        return
            finally:
                R.remove_all(self.place, gone)

    def _filled(self, n: int) -> None:
        with self._mu:
            self._done += n
            done = self._done
            note = done - self._noted >= _EXTEND_STEP
            if note:
                self._noted = done
        if self.progress is not None:
            self.progress(done, self.plan.bytes)
        if note:
            self._note(max(0, self.need - done), T.RESERVED)

    def _note(self, n: int, *hints: int) -> None:
        """Stores n in hints of the running load if the table can be had at once."""
        try:
            with self.place.table("load.note", wait=False) as t:
                if t.key_is(self.slot, self.key):
                    for h in hints:
                        t.set_hint(self.slot, h, n)
        except (Error, Gone):
            pass

    # Manifest and digests, sealed like the payload, and the lease before anything
    # has a name: the collector leaves a generation whose manifest is locked alone.

    def _seal(self) -> tuple[int, int, Lease]:
        if not self.files:
            raise SourceFailed("source failed: no files")
        self.man = M.Manifest(
            self.key, safe_name(self.key), self.place.ident.epoch, self.gen, sum(f.size for f in self.files),
            L.CHUNK_BYTES, self.origin, M.stamp(), time.monotonic() - self.started, self.fill.stats(),
            tuple(self.files),
        )  # fmt: skip
        text = M.encode(self.man)
        manifest = self._small(L.MANIFEST_EXT, text)
        self.sealed.append(manifest)
        digests = self._small(L.DIGESTS_EXT, M.encode_digests(self.man, b"".join(self.sums)))
        self.sealed.append(digests)
        if not _locks.try_shared(manifest):
            raise Corrupt("damaged: an anonymous file is locked by somebody else")
        lease = Lease(self.place, manifest, len(text), self.slot, T.make_word(L.READY, self.gen))
        return manifest, digests, lease

    def _small(self, ext: str, data: bytes) -> int:
        p = Pending(self.place.m, gen_name(self.place.ident.epoch, self.gen) + ext)
        try:
            p.write(data, 0)
            return p.seal()
        finally:
            p.abort()

    def _link(self, manifest: int, digests: int) -> None:
        """The manifest first: its lock protects what follows, and only the slot makes it visible."""
        m, gen = self.place.m, self.man.stem
        perm = m.perm & 0o777
        folder = f"{gen}/{self.man.name}"
        try:
            _sys.linkat(manifest, m.fd, gen + L.MANIFEST_EXT)
            self.linked = True  # before, what had the name, if anything, was not ours to remove
            _crash.hit("load.link-manifest")
            _sys.linkat(digests, m.fd, gen + L.DIGESTS_EXT)
            _crash.hit("load.link-digests")
            m.mkdir(gen, perm)
            m.mkdir(folder, perm)
            _crash.hit("load.mkdir")
            made = set()
            for f, fd in zip(self.files, self.sealed):
                for i, c in enumerate(f.path):
                    if c == "/" and f.path[:i] not in made:
                        made.add(f.path[:i])
                        m.mkdir(f"{folder}/{f.path[:i]}", perm)
                _sys.linkat(fd, m.fd, f"{folder}/{f.path}")
                _crash.hit("load.link-payload")
        except FileNotFoundError as e:
            # A directory that vanished under us means that the registry did.
            if self.place.is_gone():
                raise Gone from None
            raise GoneError(f"removed while in use: link {e.filename}: no such file or directory") from e
        except OSError as e:
            raise from_os(e, "link", m.join(str(e.filename or gen))) from e

    def _publish(self) -> None:
        """Makes the generation visible: one change of the slot's word."""
        ready = T.make_word(L.READY, self.gen)
        while True:
            gone: list[R.Removal] = []
            try:
                with self.place.table("publish.lock-table", self.deadline) as t:
                    if self._publish_locked(t, ready, gone):
                        self.linked = False  # it is everybody's now: an interrupt undoes nothing
                        _crash.hit("publish.ready")
                        self._finish(t)
                        t.end()
                        _crash.hit("publish.unlock-table")
                        return
                    if not gone:
                        raise Corrupt(_REFUSED.format(self.key))
            finally:
                R.remove_all(self.place, gone)

    def _publish_locked(self, t: Tx, ready: int, gone: list[R.Removal]) -> bool:
        w = t.word(self.slot)
        if w == self.word and t.key_is(self.slot, self.key):
            self._settle(t, self.slot)
            return t.change(self.slot, w, ready)
        if T.state_of(self.word) != L.READY:
            raise Corrupt(
                f"damaged: slot {self.slot} was changed from {self.word:#x} to {w:#x} although its load lock is held"
            )
        # The generation that we replace was evicted meanwhile, and the slot may be
        # another key's by now. K is still ours.
        slot = self._look(t, gone)
        if slot is None:
            return False
        w = t.word(slot)
        if T.state_of(w) == L.FREE:
            self._name(t, slot)
            R.new_life(t, slot)
        self._settle(t, slot)
        if not t.change(slot, w, ready):
            return False
        self.slot = slot
        _crash.hit("publish.claim-evicted")
        return True

    def _settle(self, t: Tx, slot: int) -> None:
        """Stores what has to be true as soon as the word changes: a loader that is killed right
        after that has not failed, and an undo must not go back too far."""
        t.set_hint(slot, T.PREVIOUS, T.gen_of(self.old) if T.state_of(self.old) == L.READY else 0)
        t.set_hint(slot, T.LOAD_START, 0)

    def _finish(self, t: Tx) -> None:
        for h, v in (
            (T.BYTES, self.man.bytes), (T.DEATHS, 0), (T.RETRY_AFTER, 0), (T.PROMISED, 0), (T.RESERVED, 0),
            (T.LOADER_PID, 0), (T.LAST_ATTACH, boottime()), (T.IDLE_SINCE, 0),
        ):  # fmt: skip
            t.set_hint(self.slot, h, v)
        if T.state_of(self.old) == L.READY:
            t.count(L.HEADER_COUNT_REPLACED)
        t.count(L.HEADER_COUNT_LOADS)
        t.count(L.HEADER_COUNT_LOAD_NANOS, int((time.monotonic() - self.started) * 1e9))
        t.count(L.HEADER_COUNT_LOAD_BYTES, self.man.bytes)
        t.count(L.HEADER_COUNT_COLLAPSED_BYTES, self.man.fill["collapsed"])
        t.count(L.HEADER_COUNT_FALLBACKS, self.man.fill["fallbacks"])

    def _abort(self) -> None:
        """Undoes a load that failed: what was linked goes, the manifest first; the slot becomes
        free. Should T not be had within a moment, the next holder of K does it."""
        self._close()
        if self.slot < 0:
            return  # nothing was claimed
        _crash.hit("abort.drop-files")
        gen = gen_name(self.place.ident.epoch, self.gen)
        try:
            if self.linked:
                self.place.m.unlink(gen + L.MANIFEST_EXT)
                _crash.hit("abort.unlink-manifest")
                R.remove_all(self.place, [R.Removal(gen, "abort")])
            with self.place.table("abort.lock-table", time.monotonic() + 5) as t:
                if t.key_is(self.slot, self.key):
                    for h in R.LOADER_HINTS:
                        t.set_hint(self.slot, h, 0)
                    if T.state_of(self.word) == L.LOADING:
                        R.free(t, self.slot, self.word)
                    t.count(L.HEADER_COUNT_LOAD_ERRORS)
                    _crash.hit("abort.free")
        except (Error, Gone, OSError):
            pass


def _at_most(seconds: float, deadline: float | None) -> float:
    """The caller's deadline, or an earlier one."""
    until = time.monotonic() + seconds
    return until if deadline is None else min(until, deadline)


def load(
    place: Place, key: str, source: Source, deadline: float | None, load_timeout: float,
    threads: int, progress: Callable[[int, int], None] | None, accept: Callable[[Attachment, Source], None],
    attach: Callable[[Place, str], Attachment], reload: Callable[[Exception, Source], bool],
    waits: Callable[[], None],
) -> tuple[Attachment, Loader | None]:  # fmt: skip
    """Returns with the key's model, loaded by this call or by somebody else while it waited.

    Again, Gone.
    """
    plan = source.survey()
    begun = time.monotonic()
    held = place.lock_key(T.stripe(key), _at_most(load_timeout, deadline), waits)
    try:
        _crash.hit("load.lock-key")
        replace, busy = source.replace, False
        a: Attachment | None = None
        if not replace:
            try:
                a = attach(place, key)
                accept(a, source)
                return a, None
            except Error as e:
                a = None  # no lease on what is being replaced: it may be evicted meanwhile
                if not reload(e, source):
                    raise
                replace, busy = not isinstance(e, NotFound), isinstance(e, Busy)
        if time.monotonic() - begun > 1:  # the source may have changed while we waited
            plan = source.survey()
        job = Loader(place, key, source, plan, replace, deadline, threads, progress)
        job.busy = busy
        try:
            a = job.run()
        except FileNotFoundError:
            if place.is_gone():  # a folder in which a segment was to be made
                raise Gone from None
            raise
        except NoSpace as e:
            from ._inspect import name_holders

            name_holders(place, e)
            raise
    finally:
        held.unlock()
    _crash.hit("publish.unlock-key")
    if T.state_of(job.old) == L.READY:
        try:
            R.retire(place, T.gen_of(job.old), _at_most(5, deadline))
        except (Error, Gone):
            pass
    return a, job
