"""A model in the hands of one caller."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from types import TracebackType

from ._names import check_path
from .errors import Closed, InvalidPath, Unsupported, operation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NamedTuple

    from ._attach import Attachment
else:
    from ._tuples import NamedTuple


class File(NamedTuple):
    """One file of a model: relative path, size in bytes, digest ("xxh3-128:...", "" if unknown)."""

    path: str
    size: int
    digest: str


class Model(os.PathLike[str]):
    """One generation of a model, attached to this process.

    It is a path: ``os.fspath(model)`` is the folder with exactly the model's files,
    ``model / "name"`` one of them. ``model["name"]`` are the bytes of a file as a
    read-only memoryview of memory that all processes share. Views stay valid after
    close(), and keep the model in memory until the last of them is gone.

    Use it in a ``with`` block, which gives back this borrow only. A copy or a pickle of
    it is the path as a string.
    """

    #: Whether other processes see the same physical memory through the registry.
    shared: bool = True
    #: Why not, if not.
    reason: str = ""

    def __init__(self, a: Attachment, loaded: bool) -> None:
        self._a: Attachment | None = a
        self._key, self._path, self._generation = a.manifest.key, a.path, a.manifest.generation
        #: Whether the call that returned this model loaded it.
        self.loaded = loaded

    @property
    def _attached(self) -> Attachment:
        a = self._a
        if a is None:
            e = Closed()
            e.op, e.key = "use", self._key
            raise e
        return a

    @property
    def key(self) -> str:
        """The model's key."""
        return self._key

    @property
    def generation(self) -> int:
        """Number of the published generation; a replacement has another one."""
        return self._generation

    @property
    def path(self) -> str:
        """The folder with the model's files; valid as long as a lease is held."""
        return self._path

    @property
    def files(self) -> tuple[File, ...]:
        """The model's files."""
        return tuple(File(f.path, f.size, f.digest) for f in self._attached.manifest.files)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)

    @property
    def stale(self) -> bool:
        """Whether another generation was published, or the model or the registry removed,
        since this one was obtained. This one stays valid."""
        a = self._attached
        return not a.current() or a.place.is_gone()

    def __fspath__(self) -> str:
        return self._path

    def __str__(self) -> str:
        """The path, as of any other path."""
        return self._path

    def __truediv__(self, name: str | os.PathLike[str]) -> str:
        """Path of a file or folder of the model. InvalidPath: a name with "..", an absolute one."""
        rel = os.fspath(name)
        with operation("path", self._key):
            check_path(rel)
        return os.path.join(self._path, rel)

    def __getitem__(self, name: str) -> memoryview:
        """The bytes of a file, read-only. InvalidPath (a KeyError elsewhere) if there is none."""
        with operation("bytes", self._key):
            return self._attached.file(name)

    def __contains__(self, name: object) -> bool:
        return any(f.path == name for f in self.files)

    def __iter__(self) -> Iterator[str]:
        return (f.path for f in self.files)

    def __len__(self) -> int:
        return len(self.files)

    def tensors(self, framework: str = "np", file: str | None = None) -> Mapping[str, Any]:
        """The tensors of the model's safetensors files, as views without a copy.

        A lazy mapping from name to array. framework "np" gives read-only numpy arrays
        (bf16 and fp8 through ml_dtypes, else their bits as integers), "pt" torch
        tensors on a private copy-on-write mapping, because torch knows no read-only
        tensors. file restricts it to one file. Corrupt: a header that is not sound.
        """
        from ._safetensors import Tensors

        if framework not in ("np", "pt"):
            raise ValueError(f'framework={framework!r}: want "np" or "pt"')
        with operation("tensors", self._key):
            names = [f.path for f in self.files if f.path.endswith(".safetensors")] if file is None else [file]
            if not names:
                raise InvalidPath("not a valid path of a model's file: the model has no .safetensors file")
            views = [self._view(n, framework == "pt") for n in names]
            return Tensors(names, views, framework)

    def _view(self, name: str, private: bool) -> memoryview:
        return self._attached.file(name, private)

    def verify(self) -> None:
        """Digests all bytes again. Corrupt names the file and the chunk that differ."""
        with operation("verify", self._key):
            self._attached.verify()

    def lease(self) -> int:
        """A further lease as a file descriptor, which the caller closes; children that inherit
        it (pass_fds) hold the lease too. Give it to a program that opens the path by itself."""
        with operation("lease", self._key):
            return self._attached.lease_fd()

    def close(self) -> None:
        """Gives this borrow back; idempotent. Views stay valid."""
        self._a = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        # Libraries keep the path that they were given in their configuration, and copy
        # that: a copy, or pickle, is the path as a string, without a borrow.
        return str, (self._path,)

    def __del__(self, _warn: Any = warnings.warn, _finalizing: Any = sys.is_finalizing) -> None:
        if getattr(self, "_a", None) is not None and not _finalizing():
            _warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        closed = " closed" if self._a is None else ""
        return f"<onecopy.Model {self._key!r} generation {self._generation} at {self._path}{closed}>"


class SourceModel(Model):
    """The source's own files, mapped: what a path falls back to where nothing can be shared.

    The page cache still holds one copy for all processes of this machine that map the
    same file. A file that somebody truncates is a signal to whoever reads the rest.
    """

    shared = False

    def __init__(self, key: str, path: str, reason: str) -> None:
        import mmap

        path = os.path.abspath(path)
        self._key, self._generation, self.reason, self.loaded = key, 0, reason, False
        self._a = None
        self._open = True
        self._views: dict[str, memoryview] = {}
        self._mmap = mmap
        if os.path.isdir(path):
            self._path = path
            found = []
            for folder, folders, names in os.walk(path):
                folders.sort()
                for n in sorted(names):
                    full = os.path.join(folder, n)
                    rel = os.path.relpath(full, path).replace(os.sep, "/")
                    found.append(File(rel, os.stat(full).st_size, ""))
            self._files = tuple(found)
        else:
            self._path = os.path.dirname(path)
            self._files = (File(os.path.basename(path), os.stat(path).st_size, ""),)

    @property
    def files(self) -> tuple[File, ...]:
        """The model's files."""
        if not self._open:
            e = Closed()
            e.op, e.key = "use", self._key
            raise e
        return self._files

    @property
    def stale(self) -> bool:
        """Whether a file has another size than it had."""
        for f in self.files:
            try:
                if os.stat(os.path.join(self._path, f.path)).st_size != f.size:
                    return True
            except OSError:
                return True
        return False

    def __getitem__(self, name: str) -> memoryview:
        with operation("bytes", self._key):
            return self._view(name, False)

    def _view(self, name: str, private: bool) -> memoryview:
        size = next((f.size for f in self.files if f.path == name), None)
        if size is None:
            raise InvalidPath("not a valid path of a model's file: the model has no such file", str(name))
        key = f"{name}\0{private}"
        if key not in self._views:
            if not size:
                self._views[key] = memoryview(b"")
            else:
                access = self._mmap.ACCESS_COPY if private else self._mmap.ACCESS_READ
                with open(os.path.join(self._path, name), "rb") as f:
                    self._views[key] = memoryview(self._mmap.mmap(f.fileno(), size, access=access))
        return self._views[key]

    def verify(self) -> None:
        """There are no digests of a source."""

    def lease(self) -> int:
        """A source has no lease."""
        e = Unsupported(f"unsupported: the model is not shared: {self.reason}")
        e.op, e.key = "lease", self._key
        raise e

    def close(self) -> None:
        """Gives this borrow back; views stay valid."""
        self._open = False
        self._views = {}

    def __repr__(self) -> str:
        return f"<onecopy.Model {self._key!r} not shared, at {self._path}>"
