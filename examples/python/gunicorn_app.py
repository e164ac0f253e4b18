"""gunicorn: one line in every worker, and a worker that dies costs nothing but itself.

    gunicorn --workers 4 gunicorn_app:app

No --preload is needed: it would share memory too, until the first garbage collection
or reload. A worker that is killed is replaced in milliseconds, because the new one
attaches what is there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable

import numpy as np
from measure import Added

import onecopy

ROWS, COLUMNS = 64, 1 << 19  # 128 MiB of float32


def load() -> np.ndarray:
    return np.broadcast_to(np.arange(ROWS, dtype="float32")[:, None], (ROWS, COLUMNS)).copy()


begun = time.perf_counter()
with Added() as added:
    weights = onecopy.get_or_load("example/gunicorn", load, version="1")
ready = time.perf_counter() - begun
loaded = onecopy.stats().loads
print(f"worker {os.getpid()}: {'loaded' if loaded else 'attached'}, {added.share(weights.nbytes)}", flush=True)


def app(environ: dict[str, str], start_response: Callable[..., object]) -> Iterable[bytes]:
    row = int(environ.get("QUERY_STRING") or 0) % ROWS
    body = {
        "pid": os.getpid(), "sum": float(weights[row].sum()), "loaded": loaded, "ready_seconds": ready,
        "private": added.bytes, "model": weights.nbytes, "shared": onecopy.status("example/gunicorn").shared,
    }  # fmt: skip
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(body).encode()]
