"""Any Python object as a model: a skeleton and its buffers.

The object is pickled (protocol 5) with every numpy array and torch storage left out.
What is left is the segment "skeleton"; the buffers are the segment "data", each at a
multiple of 64 bytes. Ranges of memory that overlap are stored once, so that tied
weights and views share storage again wherever the object is loaded.

A skeleton is a pickle: it is loaded only from a registry that the caller's own user
(or ``trust_owner``) owns and nobody else can write, which is the trust of a .pyc.
"""

from __future__ import annotations

import ctypes
import io
import pickle
import struct
import sys
import warnings
from collections.abc import Callable

from . import _layout as L
from . import _manifest as M
from . import _sys
from ._source import Plan, Source, quoted
from .errors import Corrupt, Error, LoadFailed, NoSpace, SourceChanged, from_os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, NamedTuple

    from ._attach import Attachment
    from ._load import Loader
else:
    from ._tuples import NamedTuple

SKELETON, DATA = "skeleton", "data"
_MAGIC = b"ocobj\0\0\1"
_HEAD = struct.Struct("<8sIIIIQ")  # magic, flags, blocks, out-of-band buffers, 0, bytes of the pickle
_BLOCK = struct.Struct("<QQQ")  # offset in data, length, what was cut off before it
_TORCH = 1
_ALIGN = 64
_OUT_OF_BAND = 64 << 10
_DEEPEST = 100  # how far down the culprit is looked for


class _Block:
    """A piece of memory that arrays and tensors look into; only [low, high) of it is used."""

    __slots__ = ("high", "keep", "low", "start")

    def __init__(self, start: int, keep: object) -> None:
        self.start, self.low, self.high, self.keep = start, -1, -1, keep

    def use(self, low: int, high: int) -> None:
        low -= low % _ALIGN
        self.low = low if self.low < 0 else min(low, self.low)
        self.high = max(high, self.high)


def _collector(buffers: list[memoryview]) -> Callable[[pickle.PickleBuffer], bool]:
    def collect(b: pickle.PickleBuffer) -> bool:
        raw = b.raw()
        if raw.nbytes < _OUT_OF_BAND:
            return True
        buffers.append(raw)
        return False

    return collect


class _Pickler(pickle.Pickler):
    """Leaves memory out. Placeholders are found again by _Unpickler.find_class."""

    def __init__(self, file: Any) -> None:
        # No method of its own: a cycle would keep the loader's copy until somebody collects.
        self.buffers: list[memoryview] = []
        super().__init__(file, protocol=5, buffer_callback=_collector(self.buffers))
        self.blocks: list[_Block] = []
        self.packages: set[str] = set()
        self.torch = False
        self._by_range: dict[tuple[int, int], int] = {}

    def _block(self, start: int, nbytes: int, keep: object) -> int:
        k = self._by_range.setdefault((start, nbytes), len(self.blocks))
        if k == len(self.blocks):
            self.blocks.append(_Block(start, keep))
        return k

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        named = isinstance(obj, type) or callable(obj)
        module = getattr(obj if named else kind, "__module__", None)
        if isinstance(module, str):
            self.packages.add(module.partition(".")[0])
        np = sys.modules.get("numpy")
        if np is not None and isinstance(obj, np.ndarray):
            return self._ndarray(np, obj) if kind in (np.ndarray, np.memmap) else _subclass(np, obj)
        torch = sys.modules.get("torch")
        if torch is not None and hasattr(torch, "Tensor"):
            if isinstance(obj, torch.Tensor):
                return self._tensor(torch, obj)
            if isinstance(obj, torch.UntypedStorage):
                return _storage, (self._storage(obj), None)
            if isinstance(obj, torch.storage.TypedStorage):
                return _storage, (self._storage(obj._untyped_storage), obj.dtype)
        return NotImplemented

    def _ndarray(self, np: Any, a: Any) -> Any:
        if a.dtype.hasobject or not a.nbytes:
            return NotImplemented
        base = a
        while isinstance(base.base, np.ndarray):
            base = base.base
        start, end = _span(base)
        low, high = _span(a)
        if not start <= low <= high <= end:  # as_strided beyond its base
            base, start, end = a, low, high
        k = self._block(start, end - start, base)
        self.blocks[k].use(low - start, high - start)
        at = a.__array_interface__["data"][0] - start
        strides = None if a.flags.c_contiguous else a.strides
        return _array, (k, at, a.dtype, a.shape, strides)

    def _storage(self, s: Any) -> int:
        if s.device.type != "cpu":
            raise TypeError(f"storage on device {s.device}: only memory of the CPU can be shared")
        self.torch = True
        k = self._block(s.data_ptr(), s.nbytes(), s)
        self.blocks[k].use(0, s.nbytes())
        return k

    def _tensor(self, torch: Any, t: Any) -> Any:
        kind = type(t)
        if t.device.type not in ("cpu", "meta"):
            raise TypeError(f"tensor on device {t.device}: move it to the CPU (tensor.cpu()) to share it")
        self.torch = True
        plain = kind is torch.Tensor or kind is torch.nn.Parameter
        if (
            not plain or t.layout is not torch.strided or t.is_quantized or t.device.type == "meta"
            or t.is_conj() or t.is_neg()
        ):  # fmt: skip
            return NotImplemented  # torch's own way, whose storages come back here
        s = t.untyped_storage()
        k = -1
        if s.nbytes():
            k = self._block(s.data_ptr(), s.nbytes(), s)
            item = t.element_size()
            low = t.storage_offset() * item
            reach = sum((n - 1) * st for n, st in zip(t.shape, t.stride())) if t.numel() else -1
            self.blocks[k].use(low, max(low, low + (reach + 1) * item))
        at = t.storage_offset() * t.element_size()
        args = (k, at, t.dtype, tuple(t.shape), tuple(t.stride()), t.requires_grad, kind is not torch.Tensor)
        if t.__dict__:
            return _tensor, args, t.__dict__, None, None, _set_attributes
        return _tensor, args


def _subclass(np: Any, a: Any) -> Any:
    """A masked array, record array, matrix: numpy's own way would copy it into the skeleton."""
    kind, plain = type(a), np.ndarray
    ma = sys.modules.get("numpy.ma")
    if ma is not None and kind is ma.MaskedArray and a._baseclass is plain:
        return _masked, (a.data, None if a.mask is ma.nomask else a.mask, a._fill_value, a.hardmask)
    if any(getattr(kind, n) is not getattr(plain, n) for n in ("__reduce__", "__reduce_ex__", "__setstate__")):
        return NotImplemented  # it knows better
    if a.dtype.hasobject or not a.nbytes:
        return NotImplemented
    return _view, (a.view(plain), kind), a.__dict__ or None, None, None, _set_attributes


def _span(a: Any) -> tuple[int, int]:
    """The range of addresses that an array's elements lie in."""
    low = high = a.__array_interface__["data"][0]
    for n, stride in zip(a.shape, a.strides):
        if n == 0:
            return low, low
        if stride < 0:
            low += (n - 1) * stride
        else:
            high += (n - 1) * stride
    return low, high + a.itemsize


# Placeholders: they only have a name. _Unpickler replaces them by its methods.


def _array(*args: Any) -> Any:
    raise Corrupt("damaged: a skeleton can only be loaded with its data")


def _tensor(*args: Any) -> Any:
    raise Corrupt("damaged: a skeleton can only be loaded with its data")


def _storage(*args: Any) -> Any:
    raise Corrupt("damaged: a skeleton can only be loaded with its data")


def _set_attributes(obj: Any, state: dict[str, Any]) -> None:
    obj.__dict__.update(state)


def _view(base: Any, kind: type) -> Any:
    return base.view(kind)


def _masked(data: Any, mask: Any, fill_value: Any, hard: bool) -> Any:
    from numpy import ma

    kept = ma.nomask if mask is None else mask
    return ma.MaskedArray(data, kept, copy=False, fill_value=fill_value, hard_mask=hard)


class Dump(NamedTuple):
    """A pickled object whose buffers are not copied yet."""

    skeleton: bytes
    pieces: list[tuple[int, Any]]  # offset in data, and the bytes to put there
    size: int  # of data
    packages: set[str]
    keep: list[object]  # the memory that pieces look at


def dump(obj: object, arena: tuple[int, int] = (0, 0)) -> Dump:
    """Pickles; allocates nothing but the skeleton. arena is memory (address, size) that
    already is the beginning of data."""
    file = io.BytesIO()
    p = _Pickler(file)
    try:
        p.dump(obj)
    except (Error, MemoryError):
        raise
    except Exception as e:
        try:
            where = _culprit(obj)
        except Exception:  # a repr that raises
            where = type(obj).__name__
        raise LoadFailed(f"the load failed: {where} cannot be shared: {type(e).__name__}: {e}") from e
    size = arena[1]
    pieces: list[tuple[int, Any]] = []
    table: list[tuple[int, int, int]] = [(0, 0, 0)] * len(p.blocks)
    used = sorted((b.start + b.low, b.start + b.high, k) for k, b in enumerate(p.blocks) if b.high > b.low)
    i = 0
    while i < len(used):
        low, high = used[i][0], used[i][1]
        j = i + 1
        while j < len(used) and used[j][0] < high:  # overlapping ranges are one region
            high = max(high, used[j][1])
            j += 1
        if arena[0] <= low and high <= arena[0] + arena[1]:
            at = low - arena[0]
        else:
            at = -(-size // _ALIGN) * _ALIGN
            size = at + high - low
            pieces.append((at, memoryview((ctypes.c_ubyte * (high - low)).from_address(low)).cast("B")))
        for lo, hi, k in used[i:j]:
            table[k] = (at + lo - low, hi - lo, p.blocks[k].low)
        i = j
    for raw in p.buffers:
        at = -(-size // _ALIGN) * _ALIGN
        size = at + raw.nbytes
        pieces.append((at, raw))
        table.append((at, raw.nbytes, 0))
    body = file.getvalue()
    head = _HEAD.pack(_MAGIC, _TORCH if p.torch else 0, len(table), len(p.buffers), 0, len(body))
    skeleton = head + b"".join(_BLOCK.pack(*row) for row in table) + body
    return Dump(skeleton, pieces, size, p.packages, [b.keep for b in p.blocks])


def _culprit(obj: object) -> str:
    """Names the innermost attribute or item that cannot be pickled."""
    path, seen = type(obj).__name__, {id(obj): obj}
    while len(seen) < _DEEPEST:
        for name, child in _children(obj):
            if id(child) in seen:
                continue
            try:
                _Pickler(io.BytesIO()).dump(child)
            except Exception:
                path, obj = path + name, child
                seen[id(obj)] = obj
                break
        else:
            break
    return f"{path} ({type(obj).__name__})"


def _children(obj: object) -> Iterator[tuple[str, object]]:
    """What an object's pickle consists of, with names."""
    if isinstance(obj, type):
        return
    if isinstance(obj, dict):
        yield from ((f"[{k!r}]", v) for k, v in obj.items())
        yield from ((f" key {k!r}", k) for k in obj)
    elif isinstance(obj, (list, tuple)):
        yield from ((f"[{i}]", v) for i, v in enumerate(obj))
    elif isinstance(obj, (set, frozenset)):
        yield from ((f" element {v!r}", v) for v in obj)
    yield from ((f".{k}", v) for k, v in getattr(obj, "__dict__", {}).items())
    for kind in type(obj).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for k in (slots,) if isinstance(slots, str) else slots:
            if hasattr(obj, k):
                yield f".{k}", getattr(obj, k)
    try:
        reduced = obj.__reduce_ex__(5)
    except Exception:
        return
    if isinstance(reduced, tuple) and isinstance(reduced[1], tuple):
        yield from ((f"(argument {i})", v) for i, v in enumerate(reduced[1]))
        yield from ((".__getstate__()", v) for v in reduced[2:3])


class _Unpickler(pickle.Unpickler):
    def __init__(self, body: memoryview, rebuild: _Rebuild, buffers: list[memoryview]) -> None:
        super().__init__(io.BytesIO(body), buffers=buffers)
        self._rebuild = rebuild

    def find_class(self, module: str, name: str) -> Any:
        if module == __name__:
            # Methods of another object than this one, which would keep itself alive.
            found = getattr(self._rebuild, name, None)
            if found is not None and name in ("_array", "_tensor", "_storage", "_set_attributes"):
                return found
        return super().find_class(module, name)


class _Rebuild:
    """What the placeholders of a skeleton stand for."""

    def __init__(self, views: list[memoryview], lows: list[int]) -> None:
        self._views, self._lows = views, lows
        self._storages: dict[int, Any] = {}

    _set_attributes = staticmethod(_set_attributes)

    def _array(self, k: int, at: int, dtype: Any, shape: Any, strides: Any) -> Any:
        import numpy as np

        return np.ndarray(shape, dtype, self._views[k], at - self._lows[k], strides)

    def _memory(self, torch: Any, k: int) -> Any:
        s = self._storages.get(k)
        if s is None:
            view = self._views[k]
            if not view.nbytes:
                s = torch.UntypedStorage(0)
            else:
                s = torch.frombuffer(view, dtype=torch.uint8).untyped_storage()
            self._storages[k] = s
        return s

    def _storage(self, k: int, dtype: Any) -> Any:
        import torch

        s = self._memory(torch, k)
        if dtype is None:
            return s
        return torch.storage.TypedStorage(wrap_storage=s, dtype=dtype, _internal=True)

    def _tensor(self, k: int, at: int, dtype: Any, shape: Any, stride: Any, grad: bool, parameter: bool) -> Any:
        import torch

        t = torch.empty(0, dtype=dtype)
        if k >= 0:
            t.set_(self._memory(torch, k), (at - self._lows[k]) // t.element_size(), shape, stride)
        else:
            t = t.as_strided(shape, stride)
        if parameter:
            return torch.nn.Parameter(t, grad)
        if grad:
            t.requires_grad_()
        return t


class Parsed(NamedTuple):
    """A validated skeleton."""

    torch: bool
    blocks: list[tuple[int, int, int]]
    out_of_band: int
    body: memoryview


def parse(skeleton: memoryview, data_size: int) -> Parsed:
    """Corrupt unless every block lies within the data."""
    if skeleton.nbytes < _HEAD.size:
        raise Corrupt("damaged: not a skeleton: too short")
    magic, flags, n, oob, _, length = _HEAD.unpack_from(skeleton)
    start = _HEAD.size + n * _BLOCK.size
    if magic != _MAGIC or oob > n or start + length != skeleton.nbytes:
        raise Corrupt("damaged: not a skeleton that this version knows")
    blocks = list(_BLOCK.iter_unpack(skeleton[_HEAD.size : start]))
    for off, size, _ in blocks:
        if off + size > data_size:
            raise Corrupt(f"damaged: a buffer ends at {off + size}, the data at {data_size}")
    return Parsed(bool(flags & _TORCH), blocks, oob, skeleton[start:])


class Object(NamedTuple):
    value: Any
    modes: tuple[str | None, ...]  # its own, and None if that is the default
    data: memoryview


def load(a: Attachment, mode: str | None) -> Object:
    """Rebuilds the object on this process's mapping of its data."""
    if SKELETON not in a.index:
        raise Corrupt("damaged: the model holds no Python object: it was loaded by other means")
    empty = memoryview(b"")
    parsed = parse(a.file(SKELETON), a.manifest.files[a.index[DATA]].size if DATA in a.index else 0)
    # torch knows no read-only tensors: a write would kill the process.
    default = "c" if parsed.torch else "r"
    modes = (default, None) if mode in (default, None) else (mode,)
    data = empty
    if DATA in a.index:
        data = a.file(DATA) if modes[0] == "r" else a.copy(DATA)
    if parsed.torch and mode == "r":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # asked for: read-only tensors
            return Object(_rebuild(parsed, data), modes, data)
    return Object(_rebuild(parsed, data), modes, data)


def _rebuild(parsed: Parsed, data: memoryview) -> Any:
    views = [data[off : off + size] for off, size, _ in parsed.blocks]
    first = len(views) - parsed.out_of_band
    lows = [low for _, _, low in parsed.blocks]
    try:
        return _Unpickler(parsed.body, _Rebuild(views, lows), views[first:]).load()
    except (Error, MemoryError):
        raise
    except Exception as e:
        failed = LoadFailed(f"the load failed: the object cannot be rebuilt here: {type(e).__name__}: {e}")
        if data.readonly and "read-only" in str(e):
            failed.hint = 'it writes into its own arrays when it is loaded: pass mode="c"'
        else:
            failed.hint = (
                "every process must find the object's classes and functions by the same names:"
                " define them in a module, not in the script that is run"
            )
        raise failed from e


def _rehearse(skeleton: bytes, size: int, fd: int) -> None:
    """What cannot be rebuilt is not published: it would fail in every process."""
    data = memoryview(b"")
    if size:
        prot, flags = _sys.PROT_READ | _sys.PROT_WRITE, _sys.MAP_PRIVATE | _sys.MAP_NORESERVE
        try:
            addr, base, whole = _sys.map_file(fd, 0, size, prot, flags)
        except OSError as e:
            raise from_os(e, "mmap", DATA) from e
        data = memoryview(_sys.array(addr, size, base, whole)).cast("B")
    _rebuild(parse(memoryview(skeleton), size), data)


def version_of(package: str) -> str | None:
    """The version that belongs into the environment stamp."""
    if package == "python":
        return f"{sys.version_info[0]}.{sys.version_info[1]}"
    try:
        module = sys.modules.get(package) or __import__(package)
    except Exception:  # a package may look for a device, or for a file, and raise anything
        return None
    v = getattr(module, "__version__", None)
    return str(v) if v is not None else None


def _compare(was: M.Origin, version: str) -> None:
    if was.kind != L.ORIGIN_FUNC:
        raise SourceChanged("kind", was.kind, L.ORIGIN_FUNC)
    if was.version != version:
        raise SourceChanged("version", quoted(was.version), quoted(version))
    for name, loaded in was.environment.items():
        current = version_of(name)
        if current != loaded:
            shown = "not importable" if current is None else quoted(current)
            raise SourceChanged(f"environment {name}", quoted(loaded), shown)


def version_here(man: M.Manifest) -> str | None:
    """The version that the object was stored with; None if anything else of it differs."""
    try:
        _compare(man.origin, man.origin.version)
    except SourceChanged:
        return None
    return man.origin.version


class ObjectSource(Source):
    """What a loader returns."""

    def __init__(
        self, loader: Callable[..., Any], version: str | None, on_change: str = "error", replace: bool = False
    ) -> None:
        super().__init__(on_change, replace)
        if not callable(loader):
            raise TypeError(f"loader: want a callable, not {type(loader).__name__}")
        if version is not None and not isinstance(version, str):
            raise TypeError(f"version: want str, not {type(version).__name__}")
        if version is not None and any("\ud800" <= c <= "\udfff" for c in version):
            raise ValueError(f"version={version!r}: has surrogates, which no UTF-8 has")
        self.loader, self.version = loader, version or ""

    def survey(self) -> Plan:
        return Plan(M.Origin(L.ORIGIN_FUNC, "", self.version, {}), [], [], 0)

    def compare(self, man: M.Manifest) -> None:
        if self.on_change != "ignore":
            _compare(man.origin, self.version)

    def fill(self, load: Loader) -> None:
        from ._arena import Arena, data_segment
        from ._segment import Pending

        arena = Arena(load)
        try:
            obj = call(self.loader, arena)
            arena.over = True  # a thread of the loader may go on
            d = dump(obj, arena.range())
            environment = {"python": version_of("python") or ""}
            for package in sorted(d.packages - {"builtins", __name__.partition(".")[0]}):
                v = version_of(package) if package in sys.modules else None
                if v is not None and package not in sys.builtin_module_names:
                    environment[package] = v
            load.origin = load.origin._replace(environment=environment)
            p = Pending(load.place.m, SKELETON)
            try:
                load.fill.reserve(len(d.skeleton), False)
                p.write(d.skeleton, 0)
                sums = p.sums(len(d.skeleton))
                load.add(M.ManifestFile(SKELETON, len(d.skeleton), "", 0), p.seal(), sums)
                load.fill.done(0, len(d.skeleton))
            finally:
                p.abort()
            if d.size:
                data_segment(load, arena, d.pieces, d.size)
            _rehearse(d.skeleton, d.size, load.sealed[-1])
            del d, obj
        finally:
            arena.close()


def call(loader: Callable[..., Any], writer: Any) -> Any:
    """Calls the user's loader, with the writer if it takes one."""
    from ._registry import loading

    try:
        loading.set(True)  # within the try, and without a token: an interrupt would lose it
        value = loader(writer) if _takes_writer(loader) else loader()
    except (NoSpace, LoadFailed):
        raise
    except Exception as e:
        raise LoadFailed(f"the load failed: the loader raised {type(e).__name__}: {e}") from e
    finally:
        loading.set(False)
    if value is None:
        raise LoadFailed("the load failed: the loader returned None")
    return value


def _takes_writer(loader: Callable[..., Any]) -> bool:
    import inspect

    try:
        parameters = inspect.signature(loader).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def private_bytes(data: memoryview) -> int:
    """Bytes of a mapping that writes have copied into this process."""
    if not data.nbytes or data.readonly:
        return 0
    start = ctypes.addressof(ctypes.c_ubyte.from_buffer(data))
    total, inside = 0, False
    try:
        with open("/proc/self/smaps", encoding="ascii", errors="replace") as f:
            for line in f:
                if line[0] in "0123456789abcdef":
                    low, _, rest = line.partition("-")
                    inside = int(low, 16) < start + data.nbytes and int(rest.split(" ", 1)[0], 16) > start
                elif inside and line.startswith("Anonymous:"):
                    total += int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return total
