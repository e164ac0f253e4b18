"""The manifest of a generation, and its digests file."""

from __future__ import annotations

import json
import re
import struct
import time
from collections.abc import Mapping
from types import MappingProxyType

import xxhash

from . import _layout as L
from ._names import check_key, check_paths, clip, gen_name, quote, safe_name
from .errors import Corrupt, Error, VersionMismatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NamedTuple
else:
    from ._tuples import NamedTuple

_INT64 = (1 << 63) - 1
_HEX = frozenset("0123456789abcdefABCDEF")
_DIGEST = re.compile(r"[a-z0-9-]+:[0-9a-f]+")
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")


class ManifestFile(NamedTuple):
    path: str
    size: int
    digest: str
    mtime_ns: int


class Manifest(NamedTuple):
    """One published generation. The file is immutable; its mapping is the lease."""

    key: str
    name: str
    epoch: int
    generation: int
    bytes: int
    chunk_bytes: int
    origin: Origin
    loaded_at: str
    load_seconds: float
    fill: dict[str, int]
    files: tuple[ManifestFile, ...]

    @property
    def stem(self) -> str:
        return gen_name(self.epoch, self.generation)


class Origin(NamedTuple):
    """Where a generation came from; with names, sizes and mtimes its fingerprint."""

    kind: str
    path: str = ""
    version: str = ""
    environment: Mapping[str, str] = MappingProxyType({})


def _bad(why: str) -> Corrupt:
    return Corrupt(f"not a valid manifest: {why}")


def encode(m: Manifest) -> bytes:
    """The manifest's JSON."""
    origin: dict[str, Any] = {"kind": m.origin.kind}
    for name in ("path", "version", "environment"):
        v = getattr(m.origin, name)
        if v:
            origin[name] = dict(v) if name == "environment" else v
    files = []
    for f in m.files:
        d: dict[str, Any] = {"path": f.path, "size": f.size, "digest": f.digest}
        if f.mtime_ns:
            d["mtime_ns"] = f.mtime_ns
        files.append(d)
    b = (
        json.dumps(
            {
                "schema": L.SCHEMA, "key": m.key, "name": m.name, "epoch": f"{m.epoch:016x}",
                "generation": m.generation, "bytes": m.bytes, "backing": L.BACKING_SHM,
                "chunk_bytes": m.chunk_bytes, "origin": origin, "loaded_at": m.loaded_at,
                "load_seconds": m.load_seconds, "fill": m.fill, "files": files,
            },
            indent=1, ensure_ascii=False, allow_nan=False,
        ).encode()
        + b"\n"
    )  # fmt: skip
    if len(b) > L.MAX_MANIFEST:
        raise _bad(f"{len(b)} bytes, at most {L.MAX_MANIFEST}")
    decode(b)
    return b


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_decoder = json.JSONDecoder(parse_constant=_no_constant)


def decode(b: bytes) -> Manifest:
    """Parses and validates; Corrupt or VersionMismatch. Unknown members are ignored."""
    if len(b) > L.MAX_MANIFEST:
        raise _bad(f"{len(b)} bytes, at most {L.MAX_MANIFEST}")
    try:
        d = _decoder.decode(b.decode())
    except (ValueError, RecursionError) as e:
        raise _bad(str(e)) from None
    if not isinstance(d, dict):
        raise _bad("no JSON object")
    get = _Reader(d)
    if get.integer("schema") != L.SCHEMA:
        raise VersionMismatch(
            f"another layout version: manifest schema {get.integer('schema')}, this program knows {L.SCHEMA}"
        )
    key = get.string("key")
    try:
        check_key(key)
    except Error as e:
        raise _bad(e.text) from None
    name, hexepoch, gen = get.string("name"), get.string("epoch"), get.integer("generation")
    if name != safe_name(key):
        raise _bad(f"name {quote(clip(name))} does not belong to key {quote(key)}")
    if len(hexepoch) != 16 or not _HEX.issuperset(hexepoch):
        raise _bad(f"{quote(clip(hexepoch))}: want 16 hexadecimal digits")
    epoch = int(hexepoch, 16)
    if epoch == 0 or not 0 < gen <= L.MAX_GEN:
        raise _bad(f"epoch {epoch:x}, generation {gen}")
    if get.string("backing") != L.BACKING_SHM:
        raise _bad(f"backing {quote(clip(get.string('backing')))}")
    chunk = get.integer("chunk_bytes")
    if not 4096 <= chunk <= 1 << 30 or chunk & chunk - 1:
        raise _bad(f"chunk size {chunk}")
    o = _Reader(get.object("origin"))
    environment = o.object("environment")
    if not all(isinstance(v, str) for v in environment.values()):
        raise _bad("environment: want strings")
    origin = Origin(o.string("kind"), o.string("path"), o.string("version"), environment)
    if origin.kind not in (L.ORIGIN_PATH, L.ORIGIN_FUNC):
        raise _bad(f"origin kind {quote(clip(origin.kind))}")
    loaded_at = get.string("loaded_at")
    if loaded_at and not _RFC3339.fullmatch(loaded_at):
        raise _bad(f"loaded_at {quote(clip(loaded_at))}")
    seconds = d.get("load_seconds", 0)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise _bad("load_seconds: want a number")
    fr = _Reader(get.object("fill"))
    fill = {name: fr.integer(name) for name in ("collapsed", "copied", "direct", "fallbacks")}
    raw = d.get("files")
    if not isinstance(raw, list) or not 0 < len(raw) <= L.MAX_FILES:
        raise _bad(f"{len(raw) if isinstance(raw, list) else 0} files, want 1 to {L.MAX_FILES}")
    files, total = [], 0
    for x in raw:
        if not isinstance(x, dict):
            raise _bad("files: want objects")
        r = _Reader(x)
        f = ManifestFile(r.string("path"), r.integer("size"), r.string("digest"), r.integer("mtime_ns"))
        if f.size < 0 or f.size > _INT64 - total:
            raise _bad(f"{quote(clip(f.path))}: size {f.size}")
        total += f.size
        if len(f.digest) > 200 or not _DIGEST.fullmatch(f.digest):
            raise _bad(f"{quote(clip(f.path))}: digest {quote(clip(f.digest))}")
        files.append(f)
    size = get.integer("bytes")
    if total != size:
        raise _bad(f"files have {total} bytes, total says {size}")
    try:
        check_paths(f.path for f in files)
    except Error as e:
        raise _bad(e.text) from None
    return Manifest(key, name, epoch, gen, size, chunk, origin, loaded_at, float(seconds), fill, tuple(files))


class _Reader:
    """Typed access to a JSON object; a missing member is the zero value."""

    __slots__ = ("d",)

    def __init__(self, d: dict[str, Any]) -> None:
        self.d = d

    def integer(self, name: str) -> int:
        v = self.d.get(name)
        if v is None:
            return 0
        if type(v) is not int or not -_INT64 - 1 <= v <= 2 * _INT64 + 1:
            raise _bad(f"{name}: want an integer of 64 bits")
        return v

    def string(self, name: str) -> str:
        v = self.d.get(name)
        if v is None:
            return ""
        if type(v) is not str:
            raise _bad(f"{name}: want a string")
        return v

    def object(self, name: str) -> dict[Any, Any]:
        v = self.d.get(name)
        if v is None:
            return {}
        if type(v) is not dict:
            raise _bad(f"{name}: want an object")
        return v


def stamp() -> str:
    """The time now, RFC 3339 with milliseconds."""
    ns = time.time_ns()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ns // 10**9)) + f".{ns // 10**6 % 1000:03d}Z"


# Digests: XXH3-128 of every chunk, and a root over their list.


def chunk_count(size: int, chunk_bytes: int) -> int:
    return (size - 1) // chunk_bytes + 1 if size > 0 else 0


def chunk_digest(data: bytes | bytearray | memoryview) -> bytes:
    return xxhash.xxh3_128_digest(data)


def root(size: int, chunks: bytes) -> str:
    """The digest of a file, over its size, the chunk size and its chunks' digests."""
    h = xxhash.xxh3_128_hexdigest(struct.pack("<QQ", size, L.CHUNK_BYTES) + chunks)
    return f"{L.DIGEST_ALGORITHM}:{h}"


def encode_digests(m: Manifest, chunks: bytes) -> bytes:
    """The digests file: every chunk of every file, in the manifest's order."""
    b = bytearray(L.DIGESTS_CHUNKS)
    for off, v in (
        (L.DIGESTS_MAGIC, L.DIGESTS_MAGIC_VALUE), (L.DIGESTS_VERSION, L.VERSION), (L.DIGESTS_EPOCH, m.epoch),
        (L.DIGESTS_GENERATION, m.generation), (L.DIGESTS_CHUNK_BYTES, m.chunk_bytes),
        (L.DIGESTS_COUNT, len(chunks) // L.DIGEST_SIZE),
    ):  # fmt: skip
        struct.pack_into("<Q", b, off, v)
    alg = L.DIGEST_ALGORITHM.encode()
    b[L.DIGESTS_ALGORITHM : L.DIGESTS_ALGORITHM + len(alg)] = alg
    b += chunks
    return bytes(b) + struct.pack("<Q", xxhash.xxh64_intdigest(bytes(b)))


def decode_digests(b: bytes, m: Manifest) -> list[bytes]:
    """Validates a digests file and returns the chunk digests of each file."""

    def bad(why: str) -> Corrupt:
        return Corrupt(f"not a valid digests file: {why}")

    counts = [chunk_count(f.size, m.chunk_bytes) for f in m.files]
    want = L.DIGESTS_CHUNKS + sum(counts) * L.DIGEST_SIZE + 8
    if len(b) != want:
        raise bad(f"{len(b)} bytes, want {want}")

    def get(off: int) -> int:
        return int.from_bytes(b[off : off + 8], "little")

    if get(L.DIGESTS_MAGIC) != L.DIGESTS_MAGIC_VALUE:
        raise bad(f"magic {get(L.DIGESTS_MAGIC):#x}")
    if get(L.DIGESTS_VERSION) != L.VERSION:
        raise VersionMismatch(f"another layout version: digests file version {get(L.DIGESTS_VERSION)}")
    if (get(L.DIGESTS_EPOCH), get(L.DIGESTS_GENERATION)) != (m.epoch, m.generation):
        raise bad(f"belongs to generation {gen_name(get(L.DIGESTS_EPOCH), get(L.DIGESTS_GENERATION))}")
    if (get(L.DIGESTS_CHUNK_BYTES), get(L.DIGESTS_COUNT)) != (m.chunk_bytes, sum(counts)):
        raise bad(
            f"{get(L.DIGESTS_COUNT)} chunks of {get(L.DIGESTS_CHUNK_BYTES)} bytes,"
            f" want {sum(counts)} of {m.chunk_bytes}"
        )
    alg = b[L.DIGESTS_ALGORITHM : L.DIGESTS_ALGORITHM + 16].rstrip(b"\0")
    if alg != L.DIGEST_ALGORITHM.encode():
        raise bad(f"algorithm {alg!r}, want {L.DIGEST_ALGORITHM}")
    if get(len(b) - 8) != xxhash.xxh64_intdigest(b[:-8]):
        raise bad("checksum does not match")
    out, at = [], L.DIGESTS_CHUNKS
    for n in counts:
        out.append(b[at : at + n * L.DIGEST_SIZE])
        at += n * L.DIGEST_SIZE
    return out
