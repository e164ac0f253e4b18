"""Fixtures: a fresh registry on /dev/shm, real processes, and shmctl."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SRC = str(ROOT / "python" / "src")

if not sys.platform.startswith("linux"):
    collect_ignore_glob = ["test_[!fs]*.py"]

import onecopy  # noqa: E402


def interrupted(fn: Callable[[], object], *modules: Any) -> Iterator[None]:
    """Calls fn again and again, with a KeyboardInterrupt at another place of the modules each time,
    and yields after each, until it comes through. The places are those where the interpreter looks for
    signals: where a function begins, and where a built-in one has returned, its result lost. Not in
    finalizers, which nobody calls: the exception would be dropped with what they had to do."""
    files = {m.__file__ for m in modules}
    left = 0

    def profile(frame: Any, event: str, arg: object) -> None:
        nonlocal left
        code = frame.f_code
        finalizer = code.co_name in ("__del__", "_released", "munmap")
        if event in ("call", "c_return") and code.co_filename in files and not finalizer:
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

    for at in itertools.count(1):
        left = at
        sys.setprofile(profile)
        try:
            fn()
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        yield
        if left > 0:
            return


@pytest.fixture
def shm() -> Iterator[str]:
    """A fresh folder on the tmpfs."""
    path = tempfile.mkdtemp(prefix="onecopy-test-", dir="/dev/shm")
    yield path
    gc.collect()
    subprocess.run(["chmod", "-R", "u+rwx", path], check=False)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def reg(shm: str) -> Iterator[onecopy.Registry]:
    """A registry, which must be sound at the end of the test."""
    r = onecopy.Registry(shm + "/r", threads=1)
    yield r
    gc.collect()
    if os.path.exists(shm + "/r/v1/registry"):
        with onecopy.Registry(shm + "/r") as again:
            again.gc()
            assert again.check() == []


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    """A small model folder."""
    m = tmp_path / "model"
    (m / "sub").mkdir(parents=True)
    (m / "a.bin").write_bytes(bytes(range(256)) * 32)
    (m / "sub" / "b.txt").write_text("hello")
    (m / "empty").touch()
    return m


@pytest.fixture(scope="session")
def shmctl() -> Iterator[str]:
    """The inspector: $ONECOPY_SHMCTL, else built here."""
    given = os.environ.get("ONECOPY_SHMCTL")
    if given:
        yield os.path.abspath(given)
        return
    if shutil.which("go") is None:
        pytest.skip("needs Go, or ONECOPY_SHMCTL")
    with tempfile.TemporaryDirectory() as tmp:
        out = os.path.join(tmp, "shmctl")
        subprocess.run(["go", "build", "-o", out, "./cmd/shmctl"], cwd=ROOT, check=True)
        yield out


class Proc:
    """A Python process that runs a piece of code; its lines are read one by one."""

    def __init__(self, code: str, directory: str, *args: str, **env: str) -> None:
        head = "import os, sys, time\nimport onecopy\n"
        full = {**os.environ, "PYTHONPATH": SRC, "ONECOPY_DIR": directory, **env}
        self.p = subprocess.Popen(
            [sys.executable, "-u", "-W", "ignore", "-c", head + code, *args],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=full,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.p.pid

    def line(self) -> str:
        assert self.p.stdout is not None
        s = self.p.stdout.readline()
        if not s:
            assert self.p.stderr is not None
            raise AssertionError(f"no line; stderr: {self.p.stderr.read()}")
        return s.rstrip("\n")

    def go(self, text: str = "") -> None:
        assert self.p.stdin is not None
        self.p.stdin.write(text + "\n")
        self.p.stdin.flush()

    def kill(self, sig: int = signal.SIGKILL) -> None:
        self.p.send_signal(sig)
        self.wait()

    def wait(self) -> int:
        self.out, self.err = self.p.communicate(timeout=120)
        return self.p.returncode


@pytest.fixture
def start(shm: str) -> Iterator[Any]:
    """Starts processes that use the registry of ``reg``; they are killed at the end."""
    procs: list[Proc] = []

    def start_(code: str, *args: str, **env: str) -> Proc:
        procs.append(Proc(code, shm + "/r", *args, **env))
        return procs[-1]

    yield start_
    for p in procs:
        if p.p.poll() is None:
            p.p.kill()
        for f in (p.p.stdin, p.p.stdout, p.p.stderr):  # not to their end: a child of p may have them
            if f is not None:
                with contextlib.suppress(BrokenPipeError):
                    f.close()
        p.p.wait()


@pytest.fixture(autouse=True)
def _warnings_are_seen() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        yield
