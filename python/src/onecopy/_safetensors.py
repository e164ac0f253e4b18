"""Safetensors without a copy: the header is checked before anything is believed.

The checks are those of the format's own library: a header of at most 100 MB that
starts with "{", no duplicate names, every range within the data, without overlap and
without gap, sizes that agree with shape and type, and the exact end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from .errors import Corrupt

_MAX_HEADER = 100_000_000
_MAX_DIMS = 64

# name: bits, numpy name, torch name; numpy names with a dot come from ml_dtypes.
_DTYPES: dict[str, tuple[int, str, str]] = {
    "BOOL": (8, "bool", "bool"), "U8": (8, "uint8", "uint8"), "I8": (8, "int8", "int8"),
    "U16": (16, "uint16", "uint16"), "I16": (16, "int16", "int16"), "F16": (16, "float16", "float16"),
    "BF16": (16, "ml_dtypes.bfloat16", "bfloat16"),
    "U32": (32, "uint32", "uint32"), "I32": (32, "int32", "int32"), "F32": (32, "float32", "float32"),
    "U64": (64, "uint64", "uint64"), "I64": (64, "int64", "int64"), "F64": (64, "float64", "float64"),
    "C64": (64, "complex64", "complex64"),
    "F8_E4M3": (8, "ml_dtypes.float8_e4m3fn", "float8_e4m3fn"), "F8_E5M2": (8, "ml_dtypes.float8_e5m2", "float8_e5m2"),
    "F8_E8M0": (8, "ml_dtypes.float8_e8m0fnu", "float8_e8m0fnu"),
    "F6_E2M3": (6, "", ""), "F6_E3M2": (6, "", ""), "F4": (4, "", ""),
}  # fmt: skip


class Info(NamedTuple):
    """One tensor: its type's name in the file, shape, and range of bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def parse(data: memoryview, name: str = "") -> tuple[dict[str, Info], dict[str, str]]:
    """The tensors and the metadata of a file. Corrupt if the header is not sound."""

    def bad(why: str) -> Corrupt:
        return Corrupt(f"damaged: {name or 'safetensors'}: {why}")

    if data.nbytes < 8:
        raise bad("too short for a header")
    length = int.from_bytes(data[:8], "little")
    if length > _MAX_HEADER:
        raise bad(f"header of {length} bytes, at most {_MAX_HEADER}")
    if length > data.nbytes - 8:
        raise bad(f"header of {length} bytes, but the file has {data.nbytes}")
    raw = bytes(data[8 : 8 + length])
    if raw[:1] != b"{":
        raise bad("the header is no JSON object")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        d = dict(items)
        if len(d) != len(items):
            names = [k for k, _ in items]
            twice = next(k for k in names if names.count(k) > 1)
            raise bad(f"the name {twice!r} appears twice")
        return d

    def constant(text: str) -> None:
        raise bad(f"{text} in the header")

    try:
        header = json.JSONDecoder(object_pairs_hook=pairs, parse_constant=constant).decode(raw.decode())
    except (ValueError, RecursionError) as e:
        raise bad(f"the header cannot be parsed: {e}") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise bad("__metadata__ must map strings to strings")
    start = 8 + length
    out: dict[str, Info] = {}
    for key, t in header.items():
        if not isinstance(t, dict):
            raise bad(f"{key!r}: no description of a tensor")
        dtype, shape, offsets = t.get("dtype"), t.get("shape"), t.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise bad(f"{key!r}: dtype {dtype!r} is unknown")
        if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(_count(n) for n in shape):
            raise bad(f"{key!r}: shape {str(shape)[:80]}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(_count(n) for n in offsets):
            raise bad(f"{key!r}: data_offsets {str(offsets)[:80]}")
        bits = _DTYPES[dtype][0]
        for n in shape:
            bits *= n
            if bits >= 1 << 66:
                raise bad(f"{key!r}: shape {shape} overflows")
        first, last = offsets
        if bits % 8 or last < first or (last - first) * 8 != bits:
            raise bad(f"{key!r}: {dtype} of shape {shape} has {bits / 8:g} bytes, data_offsets say {last - first}")
        out[key] = Info(dtype, tuple(shape), start + first, start + last)
    at = start
    for key, info in sorted(out.items(), key=lambda kv: (kv[1].start, kv[1].end)):
        if info.start != at:
            raise bad(f"{key!r}: {'overlap' if info.start < at else 'gap'} at byte {min(info.start, at)} of the file")
        at = info.end
    if at != data.nbytes:
        raise bad(f"the tensors end at byte {at}, the file at {data.nbytes}")
    return out, dict(metadata)


def _count(n: object) -> bool:
    return type(n) is int and 0 <= n < 1 << 63


class Tensors(Mapping[str, Any]):
    """Name to array, made when asked for. ``metadata`` and ``info(name)`` need no framework."""

    def __init__(self, names: list[str], views: list[memoryview], framework: str) -> None:
        self._where: dict[str, tuple[memoryview, Info]] = {}
        self._framework = framework
        self.metadata: dict[str, str] = {}
        for name, view in zip(names, views):
            tensors, metadata = parse(view, name)
            self.metadata.update(metadata)
            for key, info in tensors.items():
                if key in self._where:
                    raise Corrupt(f"damaged: {name}: the name {key!r} is also in another file")
                self._where[key] = (view, info)

    def info(self, name: str) -> Info:
        """Type, shape and range of a tensor."""
        return self._where[name][1]

    def __getitem__(self, name: str) -> Any:
        view, info = self._where[name]
        raw = view[info.start : info.end]
        return _numpy(raw, info) if self._framework == "np" else _torch(raw, info)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _numpy(raw: memoryview, info: Info) -> Any:
    import numpy as np

    bits, name, _ = _DTYPES[info.dtype]
    if "." in name:
        try:
            import ml_dtypes

            dtype = np.dtype(getattr(ml_dtypes, name.partition(".")[2]))
        except (ImportError, AttributeError):
            dtype = np.dtype(f"uint{bits}")  # the bits; Info.dtype says what they are
    elif name:
        dtype = np.dtype(name)
    else:  # packed types: bytes
        return np.frombuffer(raw, np.uint8)
    if not raw.nbytes:
        return np.empty(info.shape, dtype)
    return np.ndarray(info.shape, dtype, raw)


def _torch(raw: memoryview, info: Info) -> Any:
    import torch

    name = _DTYPES[info.dtype][2]
    dtype = getattr(torch, name, None) if name else torch.uint8
    if dtype is None:
        dtype = torch.uint8
    if not raw.nbytes:
        return torch.empty(info.shape, dtype=dtype)
    t = torch.frombuffer(raw, dtype=torch.uint8)
    if not name or (dtype is torch.uint8 and name != "uint8"):
        return t
    if info.start % torch.empty(0, dtype=dtype).element_size():
        t = t.clone()  # older files do not align their data
    return t.view(dtype).view(info.shape)
