"""What the Python package promised itself, beside what this machine does.

    python targets.py [--rounds 7] [--size 1536] [--processes 10] [--dir /dev/shm] [--work DIR] [--quick] [only ...]

Parts: import, attach, cached, scan, load, module, memory. numpy is needed for objects, torch for modules; what is
not installed is skipped by name. Every time is taken inside a fresh process with warm bytecode. No check fails
because of a time: the table says yes or no.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import common
import models

PARTS = ("import", "attach", "cached", "scan", "load", "module", "memory")
CHUNK = 1 << 20


# What runs in the child processes.


def now() -> float:
    """Microseconds."""
    return time.perf_counter_ns() / 1e3


def read(view: memoryview) -> float:
    """Every byte, by way of a buffer that stays in the cache. Milliseconds."""
    start, out = now(), memoryview(bytearray(CHUNK))
    for at in range(0, len(view), CHUNK):
        part = view[at : at + CHUNK]
        out[: len(part)] = part
    return (now() - start) / 1e3


def child_attach() -> dict[str, Any]:
    import onecopy

    took = []
    for _ in range(50):
        start = now()
        model = onecopy.get("file")
        took.append(now() - start)
        model.close()
        del model  # the last reference, and with it goes the mapping
    return {"first": took[0], "again": sorted(took)[25]}


def child_scan() -> dict[str, Any]:
    import onecopy

    with onecopy.get("file") as model:
        view = model[next(iter(model))]
        first = read(view)
        return {"first": first, "second": min(read(view) for _ in range(3))}


def child_cached() -> dict[str, Any]:
    import onecopy

    get, n, best = onecopy.get_or_load, 200_000, float("inf")
    load = bytes  # not called
    for _ in range(5):
        start = now()
        for _ in range(n):
            get("array", load, version="1")
        best = min(best, (now() - start) / n)
    return {"us": best}


def child_load(source: str) -> dict[str, Any]:
    import onecopy

    start = now()
    model = onecopy.open("loaded", source)
    took = now() - start
    model.close()
    return {"ms": took / 1e3}


def child_module() -> dict[str, Any]:
    import torch

    import onecopy

    start = now()
    module = onecopy.get_or_load("bert", models.bert)
    first = now() - start
    with torch.no_grad():
        total = sum(float(p.sum()) for p in module.parameters())
    start = now()
    onecopy.get_or_load("bert-2", models.bert)
    return {"first": first / 1e3, "second": (now() - start) / 1e3, "sum": total}


def state_dict() -> dict[str, Any]:
    """A loader that knows nothing of onecopy."""
    return dict(models.bert().state_dict())


LOADERS: dict[str, Callable[..., Any]] = {
    "array": lambda w: models.fill(w, models.plain_shapes(450_000_000)),
    "state dict": state_dict,
    "module": models.bert,
}


def child_memory(kind: str, idle: str) -> None:
    """Waits for a line, gets the object and reads all of it."""
    import onecopy

    importlib.import_module("numpy" if kind == "array" else "torch")  # idle workers, too
    kept = None
    print(json.dumps({}), flush=True)
    for _ in sys.stdin:
        if idle != "idle":
            kept = onecopy.get_or_load(kind, LOADERS[kind])
            tensors = kept.parameters() if kind == "module" else kept.values()
            for t in tensors:
                float(t.detach().sum() if kind != "array" else t.sum())
        print(json.dumps({}), flush=True)


def child_make(key: str, size: str) -> dict[str, Any]:
    """Loads what the others find."""
    import onecopy

    if key == "array":
        onecopy.get_or_load(key, lambda: {"a": __import__("numpy").zeros(1 << 20)}, version="1")
    elif key.startswith("bert"):
        onecopy.get_or_load(key, models.bert)
    else:
        onecopy.open(key, size).close()
    return {}


# Rows of the table: what, target, figure, whether it is met.

Row = list[str]
MS, US, TIMES = "{:.2f} ms".format, "{:.0f} µs".format, "{:.2f}x".format


def row(what: str, values: list[float], text: Callable[[float], str], limit: float | None, least: bool = False) -> Row:
    """One figure against its target; limit None: there is none."""
    figure = sorted(values)[len(values) // 2]
    if limit is None:
        return [what, "-", common.middle(values, text), ""]
    met = figure >= limit if least else figure <= limit
    return [what, f"{'≥' if least else '≤'} {text(limit)}", common.middle(values, text), "yes" if met else "NO"]


class Bench:
    """One run."""

    def __init__(self, o: argparse.Namespace, registry: str, work: str) -> None:
        self.o, self.registry, self.source = o, registry, os.path.join(work, "source.bin")
        self.parent = o.dir

    def child(self, *args: str, registry: str = "") -> Any:
        """One answer of a fresh process."""
        with common.children(__file__, [("child", *args)], registry or self.registry) as (c,):
            return c.answer()

    def rounds(self, call: Callable[[], Any]) -> list[Any]:
        """A first one for the caches, then as many as asked for."""
        call()
        return [call() for _ in range(self.o.rounds)]

    @functools.cached_property
    def size(self) -> int:
        """Bytes of the file; it is written when it is first needed."""
        with open(self.source, "wb") as f:
            for _ in range(self.o.size):
                f.write(os.urandom(1 << 20))
            f.flush()
            os.fsync(f.fileno())
        return int(self.o.size) << 20

    def need_file(self) -> None:
        """The model "file" is in the registry."""
        common.prewarm(self.size)
        self.child("make", "file", self.source)

    def do_import(self) -> list[Row]:
        """Beyond the interpreter, alternating; and without numpy."""
        over = []
        check = "import onecopy, sys; assert 'numpy' not in sys.modules and 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", check], env=common.environment(), check=True)
        for _ in range(3 * self.o.rounds):
            took = []
            for code in ("pass", "import onecopy"):
                start = now()
                subprocess.run([sys.executable, "-c", code], env=common.environment(), check=True)
                took.append(now() - start)
            over.append((took[1] - took[0]) / 1e3)
        return [row("import onecopy, beyond the interpreter and without numpy", over, MS, 20)]

    def do_attach(self) -> list[Row]:
        """A model of one file."""
        self.need_file()
        got = self.rounds(lambda: self.child("attach"))
        return [
            row("attach, registry open", [g["again"] for g in got], US, 300),
            row("first attach of a process, opens the registry", [g["first"] for g in got], US, None),
        ]

    def do_cached(self) -> list[Row]:
        """get_or_load of what the process has."""
        if not importlib.util.find_spec("numpy"):
            return [["cached get_or_load", "≤ 1.00 µs", "skipped: no numpy", ""]]
        self.child("make", "array", "")
        us = [g["us"] for g in self.rounds(lambda: self.child("cached"))]
        return [row("cached get_or_load", us, "{:.2f} µs".format, 1)]

    def do_scan(self) -> list[Row]:
        """The whole file."""
        self.need_file()
        got = self.rounds(lambda: self.child("scan"))
        return [row("first full scan / second", [g["first"] / g["second"] for g in got], TIMES, 1.1)]

    def do_load(self) -> list[Row]:
        """onecopy.open against cp, alternating, warm and cold."""
        size = self.size  # writes the file
        ratios: dict[bool, list[float]] = {False: [], True: []}
        for cold, speeds in ratios.items():
            for n in range(self.o.rounds):
                took = {}
                for way in ("cp", "onecopy") if n % 2 else ("onecopy", "cp"):
                    self.cache(cold)
                    common.prewarm((2 if cold else 1) * size + (64 << 20))  # the page cache and the copy
                    with common.folder(self.parent) as target:
                        if way == "cp":
                            start = now()
                            subprocess.run(["cp", self.source, target], check=True)
                            took[way] = (now() - start) / 1e3
                        else:
                            took[way] = self.child("load", self.source, registry=target + "/r")["ms"]
                speeds.append(took["cp"] / took["onecopy"])
        return [
            row(f"load {self.o.size} MiB, warm: speed / cp", ratios[False], TIMES, 1.5, least=True),
            row(f"load {self.o.size} MiB, cold: speed / cp", ratios[True], TIMES, 1.4, least=True),
        ]

    def cache(self, cold: bool) -> None:
        """The source is in the page cache, or it is not."""
        with open(self.source, "rb", buffering=0) as f:
            if cold:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                return
            buf = bytearray(1 << 20)
            while f.readinto(buf):
                pass

    def do_module(self) -> list[Row]:
        """A module of the size of BERT base, after all imports."""
        if not importlib.util.find_spec("torch"):
            return [["BERT-sized module, attach", "≤ 4.00 ms", "skipped: no torch", ""]]
        for key in ("bert", "bert-2"):
            self.child("make", key, "")
        got = self.rounds(lambda: self.child("module"))
        if len({g["sum"] for g in got}) != 1:
            raise SystemExit("the processes do not have the same module")
        return [
            row("BERT-sized module: first attach of a process, opens the registry", [g["first"] for g in got], MS, 4),
            row("BERT-sized module: another one in the same process", [g["second"] for g in got], MS, None),
        ]

    def do_memory(self) -> list[Row]:
        """The sum over all workers, loader included, against one copy."""
        rows: list[Row] = []
        for kind in LOADERS:
            library = "numpy" if kind == "array" else "torch"
            if importlib.util.find_spec(library):
                rows += self.memory(kind)
            else:
                head = f"{self.o.processes} workers, {kind}: memory / one copy"
                rows.append([head, "≤ 1.020x", f"skipped: no {library}", ""])
        return rows

    def memory(self, kind: str) -> list[Row]:
        """One kind of object."""
        argv = [("child", "memory", kind, "use")] * self.o.processes + [("child", "memory", kind, "idle")]
        with common.folder(self.parent) as parent, common.children(__file__, argv, parent + "/r") as workers:
            for step in ("ready", "read"):
                for w in workers:
                    if step == "read":
                        w.tell()
                for w in workers:
                    w.answer()
            one = sum(
                os.stat(os.path.join(at, name)).st_size
                for at, _, names in os.walk(parent + "/r/v1/m") for name in names if name == "data"
            )  # fmt: skip
            pages = [common.pss(w.pid, parent + "/r") for w in workers]
        idle = pages.pop()[1]
        model, rest = sum(p[0] for p in pages), sum(p[1] - idle for p in pages)
        text = "{:.3f}x".format
        head = f"{self.o.processes} workers, {kind} of {one / 1e6:.0f} MB"
        return [
            row(f"{head}: PSS of the pages / one copy", [model / one], text, 1.02),
            row(f"{head}: with what they have more in anonymous memory", [(model + rest) / one], text, None),
        ]


def main() -> None:
    """Prints the table."""
    args = argparse.ArgumentParser(description="targets of the Python package, and what was measured")
    args.add_argument("only", nargs="*", metavar="part", help=", ".join(PARTS))
    args.add_argument("--rounds", type=int, default=7)
    args.add_argument("--size", type=int, default=1536, help="MiB of the file")
    args.add_argument("--processes", type=int, default=10)
    args.add_argument("--dir", default="/dev/shm", help="tmpfs for registries of its own")
    args.add_argument("--work", help="folder on a disk, for the file")
    args.add_argument("--quick", action="store_true", help="a small file, one round")
    o = args.parse_args()
    unknown = set(o.only) - set(PARTS)
    if unknown:
        args.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if o.quick:
        o.rounds, o.size, o.processes = 1, 16, 3
    rows: list[Row] = [["what", "target", "measured: median (range)", "met"]]
    print(common.machine())
    work = o.work or next((d for d in ("/var/tmp", "/tmp") if os.access(d, os.W_OK)), ".")
    with common.folder(o.dir) as registry, common.folder(work) as disk:
        bench = Bench(o, registry + "/r", disk)
        for part in PARTS:
            if not o.only or part in o.only:
                print(f"{part} ...", file=sys.stderr)
                rows += getattr(bench, f"do_{part}")()
    common.table(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        name, *rest = sys.argv[2:]
        answer = globals()[f"child_{name}"](*rest)
        if answer is not None:
            print(json.dumps(answer), flush=True)
    else:
        main()
