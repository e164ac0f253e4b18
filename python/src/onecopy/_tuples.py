"""NamedTuple without the typing module, which costs more to import than the rest of the package."""

from __future__ import annotations

from collections import namedtuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _Meta(type):
    def __new__(cls, name: str, bases: tuple[type, ...], ns: dict[str, Any]) -> Any:
        if not bases:
            return super().__new__(cls, name, bases, ns)
        fields = tuple(ns["__annotations__"])  # there because the module has annotations from __future__
        defaults = [ns.pop(f) for f in fields if f in ns]
        base = namedtuple("base", fields, defaults=defaults, module=ns["__module__"])  # type: ignore[misc]
        return type(name, (base,), {"__slots__": (), **ns})


class NamedTuple(metaclass=_Meta):
    """A tuple with named fields: class Point(NamedTuple), with annotated fields in the order of the tuple."""
