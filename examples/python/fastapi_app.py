"""FastAPI under uvicorn: attach at start, and take a new generation between two requests.

    uvicorn --workers 2 fastapi_app:app

POST /replace?version=2 publishes a new generation from whichever worker it reaches; the
others notice at their next request by one look at the shared table (model.stale), and
requests that are running keep the old one. WEIGHTS names a folder of safetensors.
"""

from __future__ import annotations

import asyncio
import os

import numpy as np
from fastapi import FastAPI
from measure import Added

import onecopy

PATH = os.environ["WEIGHTS"]
KEY = "example/fastapi"

app = FastAPI()
model: onecopy.Model | None = None
attaching = asyncio.Lock()  # one request does it, the others wait
added = Added()


async def current() -> onecopy.Model:
    """The published generation; views of the one before stay valid."""
    global model
    if model is None or model.stale:
        async with attaching:
            if model is None or model.stale:
                with added:
                    new = await onecopy.aopen(KEY, PATH, on_change="ignore")
                    new.tensors()["weights"]
                print(f"worker {os.getpid()}: generation {new.generation}, {added.share(new.nbytes)}", flush=True)
                if model is not None:
                    model.close()
                model = new
    return model


@app.get("/")
async def answer() -> dict[str, object]:
    m = await current()
    weights = m.tensors()["weights"]
    return {
        "pid": os.getpid(), "generation": m.generation, "value": float(np.asarray(weights).max()),
        "private": added.bytes, "model": m.nbytes, "shared": m.shared,
    }  # fmt: skip


@app.post("/replace")
async def replace() -> dict[str, int]:
    with await onecopy.aopen(KEY, PATH, replace=True) as new:
        return {"generation": new.generation}
