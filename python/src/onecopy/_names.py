"""Names of the format: keys, paths within a model, generations."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable

from . import _layout as L
from .errors import InvalidKey, InvalidPath


def is_control(c: str) -> bool:
    return c < " " or "\x7f" <= c <= "\x9f"


def quote(s: str) -> str:
    import json

    return json.dumps(s, ensure_ascii=False)


def check_key(key: object) -> str:
    """The key if it is valid: 1 to 255 bytes of UTF-8 without control characters."""
    if not isinstance(key, str):
        raise InvalidKey(f"not a valid key: want str, not {type(key).__name__}")
    try:
        n = len(key.encode())
    except UnicodeEncodeError:
        raise InvalidKey("not a valid key: not UTF-8") from None
    if not n:
        raise InvalidKey("not a valid key: empty")
    if n > L.MAX_KEY:
        raise InvalidKey(f"not a valid key: {n} bytes, at most {L.MAX_KEY}")
    for c in key:
        if is_control(c):
            raise InvalidKey(f"not a valid key: control character U+{ord(c):04X}")
    return key


def check_path(p: str) -> None:
    """A relative, slash-separated path: no "..", no control character, no backslash."""

    def bad(why: str) -> InvalidPath:
        return InvalidPath(f"not a valid path of a model's file: {quote(clip(p))}: {why}")

    try:
        n = len(p.encode())
    except UnicodeEncodeError:
        raise bad("not UTF-8") from None
    if not p:
        raise bad("empty")
    if n > L.MAX_PATH:
        raise bad(f"{n} bytes, at most {L.MAX_PATH}")
    if p[0] == "/":
        raise bad("absolute")
    if "\\" in p:
        raise bad("backslash")
    for c in p:
        if is_control(c):
            raise bad(f"control character U+{ord(c):04X}")
    for el in p.split("/"):
        if el in ("", ".", ".."):
            raise bad(f"element {quote(el)}")
        if len(el.encode()) > 255:
            raise bad("an element is over 255 bytes")


def check_paths(paths: Iterable[str]) -> None:
    """Each valid, none twice, none both a file and a folder."""
    seen: dict[str, bool] = {}  # path -> is a file
    for p in paths:
        check_path(p)
        if p in seen:
            raise InvalidPath(
                f"not a valid path of a model's file: {quote(clip(p))}: twice, or both a file and a folder"
            )
        seen[p] = True
        at = p.rfind("/")
        while at > 0:
            folder = p[:at]
            if seen.get(folder) is True:
                raise InvalidPath(
                    f"not a valid path of a model's file: {quote(clip(folder))}: both a file and a folder"
                )
            if folder in seen:
                break
            seen[folder] = False
            at = p.rfind("/", 0, at)


def clip(s: str, n: int = 80) -> str:
    return s[:n] + "..." if len(s) > n else s


_SAFE = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def safe_name(key: str) -> str:
    """The folder's name: the key's last component, made safe."""
    base = posixpath.basename(key.rstrip("/")) or "/"
    b = bytearray(base.encode()[:100])
    for i, c in enumerate(b):
        if c not in _SAFE:
            b[i] = 0x2D
    if b[0] == 0x2E:
        b[0] = 0x5F
    return b.decode()


def gen_name(epoch: int, gen: int) -> str:
    """The stem of everything of one generation below m/."""
    return f"{epoch:016x}-{gen}"


def parse_gen_name(name: str) -> tuple[int, int, str] | None:
    """Undoes gen_name: epoch, generation, and the extension ("" is the folder)."""
    ext = ""
    for e in (L.MANIFEST_EXT, L.DIGESTS_EXT):
        if name.endswith(e):
            name, ext = name[: -len(e)], e
            break
    if len(name) < 18 or name[16] != "-" or not name.isascii():
        return None
    try:
        epoch, gen = int(name[:16], 16), int(name[17:])
    except ValueError:
        return None
    if gen > L.MAX_GEN or gen_name(epoch, gen) != name:
        return None
    return epoch, gen, ext
