"""A file or folder as the source of a model, and the fingerprint that tells a change."""

from __future__ import annotations

import os
import re
import stat
import time

from . import _layout as L
from . import _manifest as M
from ._dir import kind
from ._names import check_path, check_paths, clip, quote
from .errors import Error, Limit, SourceChanged, SourceFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple

    from ._load import Loader
else:
    from ._tuples import NamedTuple

CHANGES = ("error", "replace", "ignore")


class Plan(NamedTuple):
    """A source as it was found before a load. It has no digests yet."""

    origin: M.Origin
    files: list[M.ManifestFile]
    paths: list[str]  # where to read each file
    bytes: int


class Source:
    """What a load copies or calls."""

    def __init__(self, on_change: str, replace: bool = False) -> None:
        if on_change not in CHANGES:
            raise ValueError(f"on_change={on_change!r}: want one of {', '.join(CHANGES)}")
        self.on_change, self.replace = on_change, replace

    def survey(self) -> Plan:
        """Lists what will be copied; reads no contents."""
        raise NotImplementedError

    def compare(self, man: M.Manifest) -> None:
        """SourceChanged unless the generation is what this source describes."""
        raise NotImplementedError

    def fill(self, load: Loader) -> None:
        """Makes the segments."""
        raise NotImplementedError


class PathSource(Source):
    """A file or a folder tree."""

    def __init__(self, path: str | os.PathLike[str], on_change: str = "error", replace: bool = False) -> None:
        super().__init__(on_change, replace)
        try:
            self.path = os.fspath(path)
        except TypeError:
            raise TypeError(f"path: want str or os.PathLike, not {type(path).__name__}") from None
        if isinstance(self.path, bytes):
            self.path = os.fsdecode(self.path)

    def survey(self) -> Plan:
        path = os.path.abspath(self.path)
        try:
            real = os.path.realpath(path)
            st = os.stat(real)
        except (OSError, ValueError) as e:
            reason = (os.strerror(e.errno).lower() if isinstance(e, OSError) and e.errno else str(e)).lower()
            err = SourceFailed(f"source failed: stat {path}: {reason}")
            raise err from e
        # As the library in Go has it: with U+FFFD for each byte that is not UTF-8.
        plan = Plan(M.Origin(L.ORIGIN_PATH, re.sub("[\ud800-\udfff]", "\ufffd", real)), [], [], 0)
        if not stat.S_ISDIR(st.st_mode):
            # The name as given: in a Hugging Face cache the real name is a hash.
            _add(plan, os.path.basename(path), real, st)
        else:
            _walk(plan, real, "")
            if not plan.files:
                raise SourceFailed(f"source failed: {self.path}: a folder without files")
            check_paths(f.path for f in plan.files)
        return plan._replace(bytes=sum(f.size for f in plan.files))

    def compare(self, man: M.Manifest) -> None:
        if self.on_change == "ignore":
            return
        try:
            plan = self.survey()
        except SourceFailed as e:
            missing = isinstance(e.__cause__, FileNotFoundError) and not os.path.exists(self.path)
            if missing and self.on_change == "error":
                raise SourceChanged("path", man.origin.path, f"{self.path} (which does not exist)") from None
            raise
        if man.origin.kind != L.ORIGIN_PATH:
            raise SourceChanged("kind", man.origin.kind, L.ORIGIN_PATH)
        if man.origin.path != plan.origin.path:
            raise SourceChanged("path", man.origin.path, plan.origin.path)
        loaded = {f.path: f for f in man.files}
        for f in plan.files:
            old = loaded.pop(f.path, None)
            if old is None:
                raise SourceChanged(f"file {f.path}", "absent", "present")
            if old.size != f.size:
                raise SourceChanged(f"size of {f.path}", str(old.size), str(f.size))
            if old.mtime_ns != f.mtime_ns:
                raise SourceChanged(f"mtime of {f.path}", _stamp(old.mtime_ns), _stamp(f.mtime_ns))
        for name in loaded:
            raise SourceChanged(f"file {name}", "present", "absent")

    def fill(self, load: Loader) -> None:
        from ._segment import WriterLeft

        for want, path in zip(load.plan.files, load.plan.paths):
            try:
                self._copy(load, want, path)
            except WriterLeft:
                # Somebody, a child of fork for instance, could still write the
                # first copy. Nobody ever had the second one.
                self._copy(load, want, path)

    def _copy(self, load: Loader, want: M.ManifestFile, path: str) -> None:
        from ._segment import Pending

        try:
            src = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise SourceFailed(f"source failed: open {path}: {(e.strerror or '').lower()}") from e
        try:
            _unchanged(src, path, want)
            p = Pending(load.place.m, want.path)
            try:
                sums = p.copy(src, path, want.size, load.fill)
                _unchanged(src, path, want)
                load.add(want, p.seal(), sums)
            finally:
                p.abort()
        finally:
            os.close(src)


def _walk(plan: Plan, folder: str, rel: str) -> None:
    try:
        with os.scandir(folder) as it:
            entries = sorted(it, key=lambda e: e.name)
        for e in entries:
            name = rel + e.name
            if e.is_dir(follow_symlinks=False):
                _walk(plan, e.path, name + "/")
            else:
                _add(plan, name, e.path, os.stat(e.path))
    except OSError as e:
        raise SourceFailed(f"source failed: {e.filename}: {(e.strerror or '').lower()}") from e


def _add(plan: Plan, rel: str, path: str, st: os.stat_result) -> None:
    if not stat.S_ISREG(st.st_mode):
        what = "link to a folder" if stat.S_ISDIR(st.st_mode) else kind(st.st_mode)
        raise SourceFailed(f"source failed: {path} is a {what}: only files, and links to files, can be loaded")
    try:
        check_path(rel)
    except Error as e:
        raise SourceFailed(f"source failed: {e.text}") from e
    if len(plan.files) == L.MAX_FILES:
        raise Limit(f"limit reached: more than {L.MAX_FILES} files")
    plan.files.append(M.ManifestFile(rel, st.st_size, "", st.st_mtime_ns))
    plan.paths.append(path)


def _unchanged(src: int, path: str, want: M.ManifestFile) -> None:
    st = os.fstat(src)
    if not stat.S_ISREG(st.st_mode):
        raise SourceFailed(f"source failed: {path} is a {kind(st.st_mode)} now")
    if st.st_size != want.size:
        raise SourceFailed(f"source failed: {path} changed during the load: {want.size} bytes, then {st.st_size}")
    if st.st_mtime_ns != want.mtime_ns:
        raise SourceFailed(f"source failed: {path} was written to during the load")


def _stamp(ns: int) -> str:
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ns // 10**9))
    frac = f".{ns % 10**9:09d}".rstrip("0").rstrip(".")
    return f"{text}{frac}Z"


def quoted(s: str) -> str:
    return quote(clip(s, 200))
