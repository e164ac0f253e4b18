"""How much memory the visible control groups of this process still allow.

Page cache charged to a group counts as room, because the kernel gives it back
before it kills. Limits around our namespace, and what neighbours allocate
afterwards, cannot be known.
"""

from __future__ import annotations

import os
import posixpath
from typing import NamedTuple

_MAX = (1 << 63) - 1


class _Chain(NamedTuple):
    unified: bool
    mount: str
    rel: str  # our group below mount


def headroom(root: str = "", memory: int | None = None) -> int | None:
    """Bytes until the nearest limit, or None without one. root is the fake tree of a test."""
    if memory is None:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    best: int | None = None
    for c in _chains(root):
        rel = c.rel
        while True:
            level = posixpath.normpath(c.mount + "/" + rel)
            own, outermost = rel == c.rel, rel == "/"
            if c.unified:
                room = _room(root, level, _number(root, level, "memory.max"), "memory.current", "", memory)
            else:
                # Before Linux 5.11 a group could decide not to be charged for those below.
                alone = _number(root, level, "memory.use_hierarchy") == 0
                if alone and not own:
                    break
                limit = _number(root, level, "memory.limit_in_bytes")
                if limit is not None and outermost:
                    # The one trace of the groups that we cannot see.
                    limit = min(limit, _stat(root, level).get("hierarchical_memory_limit", _MAX))
                room = _room(root, level, limit, "memory.usage_in_bytes", "" if alone else "total_", memory)
            if room is not None and (best is None or room < best):
                best = room
            if outermost:
                break
            rel = posixpath.dirname(rel)
    return best


def _room(root: str, level: str, limit: int | None, usage_name: str, prefix: str, memory: int) -> int | None:
    if limit is None or limit >= memory:
        return None
    usage, stat = _number(root, level, usage_name), _stat(root, level)
    if usage is None or not stat:
        return None
    # The files are not read at one moment: there is never more cache than usage.
    cache = min(stat.get(prefix + "inactive_file", 0) + stat.get(prefix + "active_file", 0), usage)
    return max(0, limit - (usage - cache))


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as f:
            return f.read()
    except OSError:
        return None


def _bytes(text: str) -> int | None:
    return min(int(text), _MAX) if text.isascii() and text.isdigit() else None


def _number(root: str, level: str, name: str) -> int | None:
    text = _read(f"{root}{level}/{name}")
    if text is None:
        return None
    text = text.rstrip("\n")
    return _MAX if text == "max" else _bytes(text)


def _stat(root: str, level: str) -> dict[str, int]:
    stat = {}
    for line in (_read(f"{root}{level}/memory.stat") or "").split("\n"):
        name, _, value = line.partition(" ")
        n = _bytes(value)
        if n is not None:
            stat[name] = n
    return stat


def _chains(root: str) -> list[_Chain]:
    v1 = v2 = ""
    for line in (_read(root + "/proc/self/cgroup") or "").split("\n"):
        parts = line.split(":", 2)
        if len(parts) < 3 or not parts[2].startswith("/"):
            continue
        if parts[0] == "0" and not parts[1]:
            v2 = parts[2]
        elif "memory" in parts[1].split(","):
            v1 = parts[2]
    shown: list[_Chain] = []
    fallback: list[_Chain] = []
    for line in (_read(root + "/proc/self/mountinfo") or "").split("\n"):
        mount, _, system = line.partition(" - ")
        if not system.startswith("cgroup"):
            continue
        fields, kind = mount.split(), system.split()
        if len(fields) < 6 or len(kind) < 3:
            continue
        unified = kind[0] == "cgroup2"
        if not unified and not (kind[0] == "cgroup" and "memory" in kind[2].split(",")):
            continue
        group, top, point = (v2 if unified else v1), _unescape(fields[3]), _unescape(fields[4])
        if not group or not top.startswith("/") or not point.startswith("/"):
            continue
        top = top.rstrip("/")
        rel = group[len(top) :] if group.startswith(top) else ".."
        if (not rel or rel[0] == "/") and ".." not in rel.split("/"):
            rel = posixpath.normpath("/" + rel.lstrip("/"))
            if os.path.isdir(root + posixpath.normpath(point + rel)):
                shown.append(_Chain(unified, point, rel))
                continue
        # In a container the names may not fit: the mount point is what we have.
        fallback.append(_Chain(unified, point, "/"))
    return shown + [c for c in fallback if all(s.unified != c.unified for s in shown)]


def _unescape(s: str) -> str:
    return s.encode().decode("unicode_escape") if "\\" in s else s
