"""Every broken invariant: in the table, and between table, manifests, payload and locks."""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING, NamedTuple

from . import _layout as L
from . import _locks
from . import _table as T
from ._attach import read_manifest
from ._names import gen_name, parse_gen_name, quote
from ._place import Place
from .errors import Error, NotFound, ReadOnly, Timeout

if TYPE_CHECKING:
    from ._registry import Registry

_GC = "shmctl gc"
_RELOAD = "shmctl rm KEY, then load it again"
_HOLDER = "let the process that holds it go on, or end it: fuser PATH names it"


class Problem(NamedTuple):
    """kind: table, version, manifest, payload, digest, leftover, loading, evicting, lock."""

    kind: str
    key: str
    path: str
    text: str
    repair: str


def check(r: Registry, p: Place, key: str | None, data: bool) -> list[Problem]:
    """Changes nothing. With T obtainable within a second it sees one moment."""
    c = _Checker(p, key)
    try:
        with p.table("check.lock-table", time.monotonic() + 1) as t:
            c.structure(t)
    except Timeout:
        c.add(
            "lock", "", f"{p.v1.path}/{L.LOCKS_DIR}/{L.TABLE_LOCK}", _HOLDER,
            "the table lock could not be had for a second: a process that holds it is stopped or hangs",
        )  # fmt: skip
        c.structure(p.snapshot())
    except ReadOnly:
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
            except NotFound:
                pass  # removed meanwhile
            except Error as e:
                c.add("payload", k, "", _RELOAD, str(e))
    return c.problems


class _Checker:
    def __init__(self, p: Place, only: str | None) -> None:
        self.p, self.only = p, only
        self.problems: list[Problem] = []

    def add(self, kind: str, key: str, path: str, repair: str, text: str) -> None:
        if self.only is None or key == self.only:
            self.problems.append(Problem(kind, key, path, text, repair))

    def structure(self, t: T.Table) -> None:
        p, m = self.p, self.p.m
        path = p.v1.join(L.TABLE_FILE)
        for slot, text in t.problems():
            self.add("table", (t.key(slot) or "") if slot >= 0 else "", path, _GC, f"slot {slot}: {text}")
        for n in p.top.names():
            if n != L.FOLDER:
                self.add(
                    "version", "", p.top.join(n), "",
                    "belongs to another layout version, or to nobody: it is not read or counted here",
                )  # fmt: skip
        names = set(m.names())
        used: set[int] = set()
        for slot, w in t.in_use():
            key = t.key(slot)
            if key is None:
                continue
            gen, state = T.gen_of(w), T.state_of(w)
            used.add(gen)
            if state == L.LOADING:
                if self.key_free(key):
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
                if t.hint(slot, T.LOAD_START) and self.key_free(key):
                    self.add("loading", key, path, _GC, f"slot {slot}: the loader of a replacement died")
        for n in names:
            parsed = parse_gen_name(n)
            if parsed is not None and parsed[0] == p.ident.epoch and parsed[1] in used:
                continue
            if parsed is not None and parsed[2] == L.MANIFEST_EXT:
                try:
                    fd, _ = m.open(n)
                except (OSError, Error):
                    continue
                try:
                    if _locks.try_exclusive(fd):
                        self.add("leftover", "", m.join(n), _GC, "no slot names this generation and nobody leases it")
                finally:
                    os.close(fd)
            elif parsed is None or gen_name(parsed[0], parsed[1]) + L.MANIFEST_EXT not in names:
                self.add("leftover", "", m.join(n), _GC, "belongs to no generation")

    def key_free(self, key: str) -> bool:
        """Whether nobody holds the load lock of key."""
        held = self.p.try_key(T.stripe(key))
        if held is None:
            return False
        held.unlock()
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
            self.add("manifest", key, m.join(name + L.MANIFEST_EXT), _RELOAD, str(e))
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
                self.add("payload", key, m.join(path), _RELOAD, str(e))
                continue
            if not stat.S_ISREG(st.st_mode):
                self.add("payload", key, m.join(path), _RELOAD, "is no regular file")
            elif st.st_size != f.size:
                self.add("payload", key, m.join(path), _RELOAD, f"has {st.st_size} bytes, published were {f.size}")
            elif st.st_mode & 0o222:
                self.add("payload", key, m.join(path), "chmod a-w", f"is writable (mode 0{st.st_mode & 0o777:o})")
