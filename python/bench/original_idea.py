"""The benchmark of the idea that onecopy started from: ten Python processes, one model.

    python original_idea.py [--processes 10] [--sizes whisper,1.5GB] [--dir /dev/shm] [--quick]

All processes call get_or_load at once. One of them makes the model, the others wait and map it. The table has
how often it was made, what each of the calls took, what all processes hold together (PSS of the model's pages,
loader included), what that saves against a copy in each, and what one further call costs (each process alone).
Needs numpy.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from typing import Any

import common
import models

KEY = "bench/idea"


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a size: whisper, or a number of bytes such as 1.5GB."""
    if size == "whisper":
        return models.whisper_shapes()
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size.upper().endswith(unit):
            return models.plain_shapes(int(float(size[: -len(unit)]) * factor))
    raise SystemExit(f"size {size!r}: want whisper, or for example 1.5GB")


def worker(size: str) -> None:
    """The whole life of a worker process: one line of JSON for each line of its input."""
    import numpy as np

    import onecopy

    made = []

    def load(writer: Any) -> dict[str, Any]:
        made.append(1)
        return models.fill(writer, shapes(size))

    def call() -> dict[str, Any]:
        return onecopy.get_or_load(KEY, load, version="1")

    weights: dict[str, Any] = {}
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        if line.strip() == "load":
            weights = call()
            took = time.perf_counter() - start
            total = sum(float(np.sum(w, dtype="float64")) for w in weights.values())  # every byte is read
            answer = {"ms": 1e3 * took, "made": len(made), "sum": total, "read_only": not any(
                w.flags.writeable for w in weights.values()
            )}  # fmt: skip
        else:
            n, get, best = 100_000, onecopy.get_or_load, float("inf")
            for _ in range(3):
                start = time.perf_counter_ns()
                for _ in range(n):
                    get(KEY, load, version="1")
                best = min(best, (time.perf_counter_ns() - start) / n)
            answer = {"ns": best}
        print(json.dumps(answer), flush=True)


def measure(size: str, processes: int, parent: str) -> list[str]:
    """One row."""
    nbytes = sum(4 * functools.reduce(lambda a, b: a * b, s) for s in shapes(size).values())
    if nbytes * 5 // 4 > common.available():
        return [size, "skipped: not enough memory", *[""] * 8]
    common.prewarm(nbytes + (64 << 20))
    with (
        common.folder(parent) as registry,
        common.children(__file__, [("worker", size)] * processes, registry) as workers,
    ):
        for w in workers:
            w.answer()  # all have imported everything
        for w in workers:
            w.tell("load")
        got = [w.answer() for w in workers]
        if len({g["sum"] for g in got}) != 1 or not all(g["read_only"] for g in got):
            raise SystemExit("the workers do not have the same weights")
        together = sum(common.pss(w.pid, registry)[0] for w in workers)
        hits = sorted(w.ask("hit")["ns"] for w in workers)
        late = common.Child(__file__, "worker", size, registry=registry)
        try:
            late.answer()
            attach = late.ask("load")
        finally:
            late.end()
    saved = 1 - together / (processes * nbytes)
    loaded, waited = [g["ms"] for g in got if g["made"]], [g["ms"] for g in got if not g["made"]]
    return [
        size, f"{nbytes / 4e6:.0f} M", f"{nbytes / 1e6:.0f}", f"{sum(g['made'] for g in got) + attach['made']}",
        f"{max(loaded):.0f}", f"{max(waited, default=0):.0f}", f"{attach['ms']:.2f}",
        f"{processes * nbytes / 1e6:.0f}", f"{together / 1e6:.1f}", f"{100 * saved:.1f} %",
        f"{hits[len(hits) // 2] / 1e3:.2f} ({hits[0] / 1e3:.2f}..{hits[-1] / 1e3:.2f})",
    ]  # fmt: skip


def main() -> None:
    """Prints the table."""
    args = argparse.ArgumentParser(description="ten Python processes, one model")
    args.add_argument("--processes", type=int, default=10)
    args.add_argument("--sizes", default="whisper,1.5GB")
    args.add_argument("--dir", default="/dev/shm", help="tmpfs for a registry of its own")
    args.add_argument("--quick", action="store_true", help="a small model only")
    o = args.parse_args()
    print(common.machine())
    rows = [[
        "model", "parameters", "MB", "made", "loader ms", "waiters ms", "later ms",
        "private MB", "together MB", "saved", "one more call, µs",
    ]]  # fmt: skip
    for size in ["12MB"] if o.quick else o.sizes.split(","):
        rows.append(measure(size, o.processes, o.dir))
        rows[-1] += [""] * (len(rows[0]) - len(rows[-1]))
    print(f"{o.processes} processes call get_or_load at once; the idea promised: made 1, 90 % saved, below 1 µs\n")
    common.table(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2])
    else:
        main()
