"""The recipes run, and share. Each worker may copy at most a stated share of the model."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import importlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from conftest import HERE

MODELS = os.environ.get("ONECOPY_MODELS", "")
EXTRA = os.environ.get("ONECOPY_EXTRA", "").replace("-", "_").split()  # what must not be missing


def need(name: str, package: str = "") -> Any:
    """Imports a module; without it the test is skipped, unless make python-extra has installed it."""
    return importlib.import_module(name) if (package or name) in EXTRA else pytest.importorskip(name)


def run(env: dict[str, str], *args: str) -> str:
    p = subprocess.run(
        [sys.executable, *args], env=env, cwd=HERE, capture_output=True, text=True, timeout=300, check=False
    )
    assert p.returncode == 0, p.stderr
    print(p.stdout)
    return p.stdout


def shares(text: str) -> list[float]:
    return [float(s) for s in re.findall(r"private, (-?[\d.]+)% of the model", text)]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pool(env: dict[str, str], method: str) -> None:
    out = run(env, "pool.py", method)
    assert out.count("loads") == 1 and shares(out) and max(shares(out)) < 5


@contextlib.contextmanager
def server(env: dict[str, str], *args: str) -> Iterator[str]:
    """Starts a server on a free port and yields its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    args = tuple(a.replace("PORT", str(port)) for a in args)
    p = subprocess.Popen([sys.executable, "-m", *args], env=env, cwd=HERE, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}"
        p.send_signal(signal.SIGINT)
        p.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(p.pid, signal.SIGKILL)
        p.wait()


def ask(url: str, method: str = "GET") -> dict[str, Any]:
    for _ in range(100):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=30) as r:
                return json.load(r)
        except (OSError, http.client.HTTPException, json.JSONDecodeError):
            time.sleep(0.1)  # not up yet, or a worker was killed with our request
    raise AssertionError("no answer")


def test_gunicorn(env: dict[str, str]) -> None:
    pytest.importorskip("gunicorn")
    seen: dict[int, dict[str, Any]] = {}
    with server(env, "gunicorn", "--workers", "4", "--bind", "127.0.0.1:PORT", "gunicorn_app:app") as url:
        killed: set[int] = set()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for i, a in enumerate(pool.map(lambda i: ask(f"{url}/?{i % 64}"), range(600))):
                assert a["sum"] == (i % 64) * 2.0**19 and a["shared"]
                seen[a["pid"]] = a
                if i % 25 == 12 and len(killed) < 5 and a["pid"] not in killed:
                    killed.add(a["pid"])
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(a["pid"], signal.SIGKILL)
        assert len(killed) == 5 and set(seen) - killed  # four at a time: one that was started anew was killed, too
        assert sum(a["loaded"] for a in seen.values()) <= 1  # also by workers that were killed
        assert all(a["private"] < 0.1 * a["model"] for a in seen.values() if not a["loaded"])


def test_fastapi(env: dict[str, str], tmp_path: pathlib.Path) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    save = pytest.importorskip("safetensors.numpy").save_file
    save({"weights": np.ones(1 << 24, "float32")}, tmp_path / "m.safetensors")
    with server(
        {**env, "WEIGHTS": str(tmp_path)}, "uvicorn", "--workers", "2", "--port", "PORT", "fastapi_app:app"
    ) as url:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:

            def both() -> list[dict[str, Any]]:
                """Answers, of each worker at least one."""
                answers: list[dict[str, Any]] = []
                while len({a["pid"] for a in answers}) < 2:
                    assert len(answers) < 2000
                    answers += pool.map(lambda _: ask(url), range(8))
                return answers

            first = both()
            assert {(a["generation"], a["value"]) for a in first} == {(1, 1.0)} and all(a["shared"] for a in first)
            save({"weights": np.full(1 << 24, 2, "float32")}, tmp_path / "m.safetensors")
            meanwhile = [pool.submit(ask, url) for _ in range(40)]
            assert ask(url + "/replace", "POST") == {"generation": 2}
            second = both()  # no request sees the old one any more
            assert {(a["generation"], a["value"]) for a in second} == {(2, 2.0)}
            between = [f.result() for f in meanwhile]
            assert {(a["generation"], a["value"]) for a in between} <= {(1, 1.0), (2, 2.0)}
        assert all(a["private"] < 0.1 * a["model"] for a in first + second)


def test_safetensors(env: dict[str, str], tmp_path: pathlib.Path) -> None:
    save = pytest.importorskip("safetensors.numpy").save_file
    save({f"t{i}": np.full((1 << 22,), i, "float32") for i in range(4)}, tmp_path / "m.safetensors")
    views, copies = shares(run(env, "safetensors_file.py", str(tmp_path / "m.safetensors")))
    assert views < 5 < 90 < copies


@pytest.mark.skipif(not MODELS, reason="ONECOPY_MODELS is not set: make python-extra")
def test_transformers(env: dict[str, str]) -> None:
    need("torch")
    need("transformers")
    folder = next(p.parent for p in pathlib.Path(MODELS).rglob("model.safetensors"))
    run(env, "transformers_model.py", str(folder))
    out = run(env, "transformers_model.py", str(folder))  # the second worker
    assert len(shares(out)) == 2 and max(shares(out)) < 5


@pytest.mark.skipif(not MODELS, reason="ONECOPY_MODELS is not set: make python-extra")
def test_llama(env: dict[str, str]) -> None:
    need("llama_cpp", "llama_cpp_python")
    gguf = next(pathlib.Path(MODELS).rglob("*.gguf"))
    run(env, "llama.py", str(gguf))
    assert max(shares(run(env, "llama.py", str(gguf)))) < 40


def test_onnxruntime(env: dict[str, str], tmp_path: pathlib.Path) -> None:
    need("onnxruntime")
    onnx = need("onnx")
    w = onnx.numpy_helper.from_array(np.random.default_rng(1).random((2048, 4096), "float32"), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
        [onnx.helper.make_tensor_value_info("x", 1, [1, 2048])], [onnx.helper.make_tensor_value_info("y", 1, [1, 4096])], [w],  # noqa: E501
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "m.onnx")
    run(env, "onnx_session.py", str(tmp_path / "m.onnx"))
    plain, shared = shares(run(env, "onnx_session.py", str(tmp_path / "m.onnx")))
    assert shared < 25 < plain
