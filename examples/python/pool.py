"""multiprocessing: every worker of a pool gets the same weights.

    python pool.py [fork|spawn|forkserver]

With fork the parent may load before it forks, or not at all: the first worker that asks
loads, the others wait for it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys

import numpy as np
from measure import Added

import onecopy

SHAPE = (64, 1 << 20)  # 256 MiB of float32


def load(writer: onecopy.Writer) -> dict[str, np.ndarray]:
    print(f"pid {os.getpid()} loads", flush=True)
    weights = writer.empty(SHAPE, "float32")  # in the shared segment already
    weights[:] = np.arange(SHAPE[0], dtype="float32")[:, None]
    return {"weights": weights, "first": weights[0]}


def work(i: int) -> tuple[int, float, int]:
    with Added() as added:
        weights = onecopy.get_or_load("example/pool", load, version="1")["weights"]
        total = float(weights[i].sum())
    return os.getpid(), total, added.bytes


def main() -> None:
    method = sys.argv[1] if len(sys.argv) > 1 else "spawn"
    nbytes = SHAPE[0] * SHAPE[1] * 4
    with multiprocessing.get_context(method).Pool(4) as pool:
        results = pool.map(work, range(16), chunksize=1)
    for pid in sorted({r[0] for r in results}):
        most = max(r[2] for r in results if r[0] == pid)
        print(f"pid {pid}: {most / 2**20:.1f} MiB private, {most / nbytes:.1%} of the model's {nbytes >> 20} MiB")
    assert [r[1] for r in results] == [i * float(SHAPE[1]) for i in range(16)]


if __name__ == "__main__":
    main()
