"""Every broken invariant: in the table, and between table, manifests, payload and locks."""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING, NamedTuple

from . import _layout as L
from . import _locks
from . import _manifest as M
from . import _table as T
from ._attach import read_manifest
from ._names import gen_name, parse_gen_name, quote
from ._place import Place
from ._remove import has_manifest
from .errors import Busy, Corrupt, Error, NotFound, ReadOnly, Timeout, Untrusted, VersionMismatch, from_os

if TYPE_CHECKING:
    from ._registry import Registry

_GC = "shmctl gc"
_RELOAD = "shmctl rm KEY, then load it again"
_DELETE = "remove the directory when no process uses it; models load anew"
_NAME = "remove it if nobody needs it"
_UNLINK = "remove this name, then shmctl gc"
_HOLDER = "let the process that holds it go on, or end it: fuser PATH names it"
_LOCK = "end the processes that use the registry, then remove this name"
_LEASE = "end that process; until then a load of the key replaces the model"


class Problem(NamedTuple):
    """kind: table, version, manifest, payload, digest, leftover, loading, evicting, lock.

    What ``repair`` gives to shmctl, ``gc`` and ``remove`` of this package do as well. A ``note`` is worth knowing,
    and nothing is broken.
    """

    kind: str
    key: str
    path: str
    text: str
    repair: str
    note: bool = False


def check(r: Registry, p: Place, key: str | None, data: bool) -> list[Problem]:
    """Changes nothing. With T obtainable within a second it sees one moment."""
    c = _Checker(p, key)
    try:
        with p.table("check.lock-table", time.monotonic() + 1) as t:
            c.structure(t)
            c.locked(t)
    except Timeout:
        c.add(
            "lock", "", f"{p.v1.path}/{L.LOCKS_DIR}/{L.TABLE_LOCK}", _HOLDER,
            "the table lock could not be had for a second: a process that holds it is stopped or hangs",
        )  # fmt: skip
        c.structure(p.snapshot())
    except ReadOnly:
        c.structure(p.snapshot())
    except (Corrupt, VersionMismatch) as e:  # of all keys
        c.problems = [Problem("table", "", p.v1.join(L.TABLE_FILE), str(e), _DELETE)]
        c.structure(p.snapshot())
    if data:
        for slot, w in p.snapshot().in_use():
            k = p.snapshot().key(slot)
            if T.state_of(w) != L.READY or k is None or key not in (None, k):
                continue
            try:
                with r.get(k) as m:
                    path = m.path
                    try:
                        m.verify()
                    except Error as e:
                        c.add("digest", k, path, _RELOAD, str(e))
            except (NotFound, Busy):
                pass  # removed meanwhile, or locked() has said so
            except Error as e:
                c.add("payload", k, "", _RELOAD, str(e))
    return c.problems


def _why(e: OSError | Error, what: str, path: str) -> str:
    return str(e if isinstance(e, Error) else from_os(e, what, path))


def _named(repair: str, key: str) -> str:
    """Puts the key into a command, so that it can be pasted."""
    if not key:
        return repair
    if not all((c.isascii() and c.isalnum()) or c in "-_./:@%+=," for c in key):
        key = "'" + key.replace("'", "'\\''") + "'"
    return repair.replace("KEY", "-- " + key if key.startswith("-") else key)


class _Checker:
    def __init__(self, p: Place, only: str | None) -> None:
        self.p, self.only = p, only
        self.problems: list[Problem] = []

    def add(self, kind: str, key: str, path: str, repair: str, text: str, note: bool = False) -> None:
        if self.only is None or key == self.only:
            self.problems.append(Problem(kind, key, path, text, _named(repair, key), note))

    def structure(self, t: T.Table) -> None:
        p, m = self.p, self.p.m
        path = p.v1.join(L.TABLE_FILE)
        if t.generation >= L.MAX_GEN:
            self.add(
                "table", "", path, _GC,
                f"the generation counter says {t.generation}: every number is used up",
            )  # fmt: skip
        for slot, text in t.problems():
            self.add("table", (t.key(slot) or "") if slot >= 0 else "", path, _GC, f"slot {slot}: {text}")
        for n in p.top.names():
            if n == L.FOLDER:
                continue
            if n[0] == "v" and n[1:].isascii() and n[1:].isdigit():
                text = "holds another layout version: it is neither read nor counted here"
                self.add("version", "", p.top.join(n), "", text, note=True)
            else:
                self.add("leftover", "", p.top.join(n), _NAME, "belongs to no layout version")
        self.lock_files()
        names = set(m.names())
        used: set[int] = set()
        for slot, w in t.in_use():
            key = t.key(slot)
            if key is None:
                continue
            gen, state = T.gen_of(w), T.state_of(w)
            used.add(gen)
            if state == L.LOADING:
                if self.p.key_free(key):
                    self.add("loading", key, path, _GC, f"slot {slot}: its loader died")
            elif state == L.EVICTING:
                self.add("evicting", key, path, _GC, f"slot {slot}: its remover died")
            elif state == L.READY:
                manifest = gen_name(p.ident.epoch, gen) + L.MANIFEST_EXT
                if manifest not in names:
                    self.add(
                        "manifest", key, m.join(manifest), _GC,
                        "missing although the slot is READY: a third party deleted it",
                    )  # fmt: skip
                    continue
                self.generation(key, gen)
                if t.hint(slot, T.LOAD_START) and self.p.key_free(key):
                    self.add("loading", key, path, _GC, f"slot {slot}: the loader of a replacement died")
        for n in names:
            parsed = parse_gen_name(n)
            if parsed is not None and parsed[0] == p.ident.epoch and parsed[1] in used:
                continue
            if parsed is not None and parsed[2] == L.MANIFEST_EXT:
                try:
                    fd, _ = m.open(n)
                except FileNotFoundError:
                    continue  # removed since
                except OSError as e:
                    why = _why(e, "open", m.join(n))
                    self.add("leftover", "", m.join(n), _GC, f"no slot names this generation: {why}")
                    continue
                try:
                    if _locks.try_exclusive(fd):
                        self.add("leftover", "", m.join(n), _GC, "no slot names this generation and nobody leases it")
                finally:
                    os.close(fd)
            elif parsed is None or not (
                (stem := gen_name(parsed[0], parsed[1])) + L.MANIFEST_EXT in names or has_manifest(p, stem)
            ):  # nor in the making: linked after the listing passed its place
                self.add("leftover", "", m.join(n), _GC, "belongs to no generation")

    def lock_files(self) -> None:
        """Looks for lock files that nobody can lock: a load of their keys would fail."""
        w = self.p.w
        if w is None:
            return
        for n in w.names():
            try:
                st = w.stat(n)
            except OSError:
                continue  # gone since
            if not stat.S_ISREG(st.st_mode):
                self.add("lock", "", w.join(n), _LOCK, "is no regular file: nobody can lock it")
            elif st.st_uid != w.owner:
                self.add(
                    "lock", "", w.join(n), _LOCK, f"belongs to uid {st.st_uid}, the registry to uid {w.owner}"
                )  # fmt: skip

    def locked(self, t: T.Table) -> None:
        """Under T, where none of us locks a manifest exclusively: models that nobody can get."""
        for slot, w in t.in_use():
            key = t.key(slot)
            name = gen_name(self.p.ident.epoch, T.gen_of(w)) + L.MANIFEST_EXT
            if T.state_of(w) == L.READY and key is not None and self.only in (None, key) and self.stays_locked(name):
                self.add(
                    "lock", key, self.p.m.join(name), _LEASE,
                    "locked exclusively by a process that fuser names: nobody can get the model",
                )  # fmt: skip

    def stays_locked(self, name: str) -> bool:
        """Whether a manifest stays exclusively locked for as long as a reader would try."""
        for attempt in range(4):
            try:
                fd, _ = self.p.m.open(name)
            except (OSError, Error):
                return False
            try:
                if _locks.try_shared(fd):
                    return False
            finally:
                os.close(fd)
            time.sleep(0.001 * (1 << 2 * attempt))
        return True

    def generation(self, key: str, gen: int) -> None:
        p, m = self.p, self.p.m
        name = gen_name(p.ident.epoch, gen)
        try:
            fd, _ = m.open(name + L.MANIFEST_EXT)
            try:
                man, _ = read_manifest(p, fd, name + L.MANIFEST_EXT)
            finally:
                os.close(fd)
        except (OSError, Error) as e:
            path = m.join(name + L.MANIFEST_EXT)
            # What is untrusted nothing here opens, not even to remove it.
            self.add("manifest", key, path, _UNLINK if isinstance(e, Untrusted) else _RELOAD, _why(e, "open", path))
            return
        if (man.key, man.generation, man.epoch) != (key, gen, p.ident.epoch):
            self.add(
                "manifest", key, m.join(name + L.MANIFEST_EXT), _RELOAD,
                f"describes key {quote(man.key)}, generation {man.generation}",
            )  # fmt: skip
            return
        try:
            m.stat(name + L.DIGESTS_EXT)
        except OSError:
            self.add("digest", key, m.join(name + L.DIGESTS_EXT), _RELOAD, "missing: the contents cannot be verified")
        for f in man.files:
            path = f"{name}/{man.name}/{f.path}"
            try:
                st = m.stat(path)
            except FileNotFoundError:
                self.add("payload", key, m.join(path), _RELOAD, "missing: a third party deleted it")
                continue
            except OSError as e:
                self.add("payload", key, m.join(path), _RELOAD, _why(e, "stat", m.join(path)))
                continue
            if not stat.S_ISREG(st.st_mode):
                self.add("payload", key, m.join(path), _RELOAD, "is no regular file")
            elif st.st_size != f.size:
                self.add("payload", key, m.join(path), _RELOAD, f"has {st.st_size} bytes, published were {f.size}")
            elif st.st_mode & 0o222:
                self.add("payload", key, m.join(path), "chmod a-w", f"is writable (mode 0{st.st_mode & 0o777:o})")
        self.strangers(key, name, man)

    def strangers(self, key: str, gen: str, man: M.Manifest) -> None:
        """Files in a generation's folder that are none of the model's: memory that nobody uses."""
        m, root = self.p.m, f"{gen}/{man.name}"
        ours, folders = {f"{root}/{f.path}" for f in man.files}, {gen, root}
        for f in man.files:
            parts = f.path.split("/")
            folders |= {f"{root}/{'/'.join(parts[:n])}" for n in range(1, len(parts))}
        for folder in folders:
            try:
                dir = m.sub(folder, 0, False)
            except (OSError, Error):
                continue  # its files are missing, and listed already
            try:
                names = dir.names()
            finally:
                dir.close()
            for n in names:
                if f"{folder}/{n}" not in ours | folders:
                    self.add("payload", key, m.join(f"{folder}/{n}"), _NAME, "is none of the model's files")
