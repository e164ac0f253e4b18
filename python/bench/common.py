"""What the benchmarks of this folder share: child processes, memory, tables."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
SRC = HERE.parent / "src"


def environment(registry: str = "") -> dict[str, str]:
    """For child processes: the package of this checkout, with its bytecode kept as an installed one has it."""
    path = os.pathsep.join([str(SRC), str(HERE)])
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "", "ONECOPY_DIR": registry}


class Child:
    """A Python process that answers lines of JSON."""

    def __init__(self, script: str, *args: str, registry: str) -> None:
        self.p = subprocess.Popen(
            [sys.executable, str(HERE / script), *args],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(registry),
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.p.pid

    def tell(self, word: str = "") -> None:
        """Sends a line."""
        assert self.p.stdin is not None
        self.p.stdin.write(word + "\n")
        self.p.stdin.flush()

    def answer(self) -> Any:
        """Waits for a line."""
        assert self.p.stdout is not None
        line = self.p.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended without an answer, code {self.p.wait()}")
        return json.loads(line)

    def ask(self, word: str) -> Any:
        """Sends a line and waits for one."""
        self.tell(word)
        return self.answer()

    def end(self) -> None:
        """kill -9, which needs nobody's consent."""
        self.p.kill()
        self.p.communicate()


@contextlib.contextmanager
def children(script: str, argv: Iterable[tuple[str, ...]], registry: str) -> Iterator[list[Child]]:
    """Starts all of them at once; they are gone after the block."""
    all_: list[Child] = []
    try:
        for args in argv:
            all_.append(Child(script, *args, registry=registry))
        yield all_
    finally:
        for c in all_:
            c.end()


@contextlib.contextmanager
def folder(parent: str) -> Iterator[str]:
    """A folder that is gone after the block."""
    path = tempfile.mkdtemp(prefix="onecopy-bench-", dir=parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def pss(pid: int, below: str) -> tuple[int, int]:
    """Bytes of a process: PSS of its mappings of files below a folder, and of its anonymous ones."""
    inside, anonymous, kind = 0, 0, ""
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as f:
        for line in f:
            words = line.split(None, 5)
            if not words[0].endswith(":"):
                path = words[5].rstrip("\n") if len(words) > 5 else ""
                kind = "model" if path.startswith(below + "/") else "anonymous" if words[4] == "0" else ""
            elif words[0] == "Pss:" and kind == "model":
                inside += int(words[1]) << 10
            elif words[0] == "Pss:" and kind == "anonymous":
                anonymous += int(words[1]) << 10
    return inside, anonymous


def available() -> int:
    """Bytes of memory that can still be used."""
    with open("/proc/meminfo", encoding="ascii") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith("MemAvailable:"))


def prewarm(size: int) -> None:
    """Touches and frees memory: a hypervisor that gives it back late would be measured otherwise.

    Much memory is held for longer than a guest waits before it reports free memory to its
    hypervisor (2 s in Linux), so that the next report comes after the trial.
    """
    settle = 2.2 if size >= 400 << 20 else 0
    code = f"""
import mmap, time
m = mmap.mmap(-1, {size}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
m.madvise(14)  # MADV_HUGEPAGE: the blocks that a load takes
for i in range(0, {size}, 4096):
    m[i] = 1
time.sleep({settle})
"""
    subprocess.run([sys.executable, "-S", "-E", "-c", code], check=True)


def machine() -> str:
    """One line for the head of a table."""
    with open("/proc/loadavg", encoding="ascii") as f:
        load = " ".join(f.read().split()[:3])
    return f"Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} CPUs, load average {load}"


def middle(values: Iterable[float], text: Callable[[float], str]) -> str:
    """The median and, of several values, the range."""
    all_ = sorted(values)
    if len(all_) == 1:
        return text(all_[0])
    return f"{text(statistics.median(all_))} ({text(all_[0])}..{text(all_[-1])})"


def table(rows: list[list[str]]) -> None:
    """The first row is the head; the first column is text, the others are numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for n, row in enumerate(rows):
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip())
        if n == 0:
            print("  ".join("-" * w for w in widths))
