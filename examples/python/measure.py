"""How much memory of its own a process has: what it did not share."""

from __future__ import annotations


def private() -> int:
    """Bytes of anonymous memory of this process: heap, and copied pages."""
    with open("/proc/self/smaps_rollup") as f:
        return sum(int(line.split()[1]) * 1024 for line in f if line.startswith("Anonymous:"))


class Added:
    """What a block adds to it."""

    bytes = 0

    def __enter__(self) -> Added:
        self._before = private()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bytes = private() - self._before

    def share(self, of: int) -> str:
        return f"{self.bytes / 2**20:.1f} MiB private, {self.bytes / of:.1%} of the model's {of / 2**20:.0f} MiB"
