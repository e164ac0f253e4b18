"""Go and Python on one registry, through shmctl."""

from __future__ import annotations

import gc
import json
import os
import pathlib
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

import onecopy

Ctl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def ctl(shmctl: str, shm: str) -> Ctl:
    def run(*args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        p = subprocess.run([shmctl, "--dir", shm + "/r", *args], capture_output=True, text=True, timeout=120)
        assert not check or p.returncode == 0, p.stderr
        return p

    return run


def test_go_loads_python_reads(reg: onecopy.Registry, ctl: Ctl, tmp_path: pathlib.Path) -> None:
    (tmp_path / "m" / "onnx").mkdir(parents=True)
    (tmp_path / "m" / "big.bin").write_bytes(os.urandom((5 << 20) + 3))
    (tmp_path / "m" / "onnx" / "x").write_bytes(b"x")
    (tmp_path / "m" / "nothing").touch()
    ctl("load", "org/k", str(tmp_path / "m"))
    with reg.get("org/k") as m, reg.open("org/k", tmp_path / "m") as n:
        assert not n.loaded
        assert m["big.bin"] == (tmp_path / "m" / "big.bin").read_bytes() and m["onnx/x"] == b"x" and m["nothing"] == b""
        m.verify()
        assert ctl("path", "org/k").stdout.strip() == m.path
        p = ctl("rm", "--yes", "org/k", check=False)
        assert p.returncode == 5 and str(os.getpid()) in p.stderr
    assert reg.check(data=True) == []
    del m, n
    gc.collect()
    ctl("rm", "--yes", "org/k")
    with pytest.raises(onecopy.NotFound):
        reg.get("org/k")


def test_source_whose_path_is_not_utf8(reg: onecopy.Registry, ctl: Ctl, tmp_path: pathlib.Path) -> None:
    folder = os.fsencode(tmp_path) + b"/a\xff\xe2\x82"
    os.mkdir(folder)
    pathlib.Path(os.fsdecode(folder), "w.bin").write_bytes(b"weights")
    ctl("load", "go", os.fsdecode(folder))
    assert "already present" in ctl("load", "go", os.fsdecode(folder)).stdout
    with reg.open("python", folder) as m, reg.open("go", folder) as n:
        assert m.loaded and not n.loaded
    assert "already present" in ctl("load", "python", os.fsdecode(folder)).stdout
    pathlib.Path(os.fsdecode(folder + b"/\xff")).touch()
    with pytest.raises(onecopy.SourceFailed, match="not UTF-8"):
        reg.open("file", folder)
    with pytest.raises(ValueError, match="surrogates"):
        reg.get_or_load("v", dict, version="\udcff")


def test_python_loads_go_reads(reg: onecopy.Registry, ctl: Ctl, tmp_path: pathlib.Path) -> None:
    (tmp_path / "f.bin").write_bytes(os.urandom((9 << 20) + 5))
    reg.open("k", tmp_path / "f.bin").close()
    value = reg.get_or_load("o", lambda: {"x": __import__("numpy").ones(100_000)}, version="7")
    assert "already" in (lambda p: p.stdout + p.stderr)(ctl("load", "k", str(tmp_path / "f.bin")))
    p = subprocess.run(ctl("path", "k").args, capture_output=True, text=True)
    assert p.stdout.strip().endswith("/k")
    assert ctl("check", "--data").returncode == 0
    rows = json.loads(ctl("ls", "-o", "json").stdout)
    text = json.dumps(rows)
    assert '"k"' in text and '"o"' in text
    st = json.loads(ctl("stat", "o", "-o", "json").stdout)
    assert '"7"' in json.dumps(st) and "python" in json.dumps(st)
    assert (pathlib.Path(ctl("path", "o").stdout.strip()) / "data").stat().st_size == 800_000
    os.utime(tmp_path / "f.bin", ns=(1, 1))
    assert ctl("load", "k", str(tmp_path / "f.bin"), check=False).returncode == 8
    del value


def test_host_policy(reg: onecopy.Registry, ctl: Ctl, model: pathlib.Path) -> None:
    def seen() -> dict[str, Any]:
        return json.loads(ctl("stat", "k", "-o", "json").stdout)

    reg.open("k", model).close()
    reg.pin("k")
    reg.set_ttl("k", 90)
    assert seen()["pinned"] is True and seen()["ttl_seconds"] == 90 == reg.entries()[0].ttl
    ctl("unpin", "k")
    ctl("ttl", "k", "never")
    assert not reg.entries()[0].pinned
    never = reg.entries()[0].ttl
    reg.set_ttl("k", 0)
    assert reg.entries()[0].ttl == 0
    reg.set_ttl("k", None)
    assert reg.entries()[0].ttl == never


def test_the_same_texts(reg: onecopy.Registry, ctl: Ctl, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The message of an error is that of the inspector."""

    def same(call: Callable[[], object], *args: str) -> None:
        with pytest.raises(onecopy.Error) as e:
            call()
        said = ctl(*args, check=False).stderr
        assert e.value.text in said, said

    reg.open("k0", model).close()
    gc.collect()
    same(lambda: reg.remove("absent"), "rm", "--yes", "absent")
    (tmp_path / "e").mkdir()
    same(lambda: reg.open("k", tmp_path / "e"), "load", "k", str(tmp_path / "e"))
    same(lambda: reg.get("a\nb"), "path", "a\nb")
    reg.open("k", model).close()
    (model / "sub" / "b.txt").write_text("changed")
    same(lambda: onecopy.Registry(reg.dir).open("k", model), "load", "k", str(model))
    os.chmod(reg.dir, 0o770)
    same(lambda: onecopy.Registry(reg.dir).get("k"), "ls")
    os.chmod(reg.dir, 0o700)


@pytest.mark.parametrize("first", ["go", "python"])
def test_mixed_loaders_race(
    reg: onecopy.Registry, ctl: Ctl, shmctl: str, start: Any, tmp_path: pathlib.Path, first: str
) -> None:
    src = tmp_path / "f.bin"
    src.write_bytes(os.urandom(20 << 20))
    code = "sys.stdin.readline()\nm = onecopy.open('k', sys.argv[1])\nprint(m.loaded, m.generation, m['f.bin'].nbytes, flush=True)"
    for _ in range(5):
        procs = [start(code, str(src)) for _ in range(3)]
        if first == "python":
            for p in procs:
                p.go()
        gos = [
            subprocess.Popen(
                [shmctl, "--dir", reg.dir, "load", "k", str(src)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for _ in range(3)
        ]
        if first == "go":
            for p in procs:
                p.go()
        lines = [p.line().split() for p in procs]
        outs = [g.communicate()[0] for g in gos]
        assert all(g.returncode == 0 for g in gos), outs
        loads = sum(line[0] == "True" for line in lines) + sum("already" not in o for o in outs)
        assert len({line[1] for line in lines}) == 1 and loads == 1, (lines, outs)
        for p in procs:
            assert p.wait() == 0
        assert ctl("check", "--data").returncode == 0
        reg.remove("k")


def test_mixed_kill(reg: onecopy.Registry, ctl: Ctl, shmctl: str, start: Any, tmp_path: pathlib.Path) -> None:
    """Loaders of either kind are killed at random moments; the other kind takes over."""
    import random
    import time

    rng = random.Random(1)
    src = tmp_path / "f.bin"
    src.write_bytes(os.urandom(30 << 20))
    code = "onecopy.open('k', sys.argv[1], replace=True)"
    for i in range(10):
        python = start(code, str(src))
        go = subprocess.Popen(
            [shmctl, "--dir", reg.dir, "load", "k", str(src), "--replace"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(rng.random() * 0.25)  # any moment will do
        go.send_signal(signal.SIGKILL)
        python.kill()
        go.wait()
        with reg._here().table("x") as t:  # no back-off in this test
            f = t.find("k")
            if f is not None:
                from onecopy import _table as T

                t.set_hint(f.slot, T.DEATHS, 0)
        if i % 2:
            ctl("load", "k", str(src))
        else:
            reg.open("k", src).close()
        gc.collect()
        reg.gc() if i % 3 else ctl("gc")
        assert reg.check(data=True) == [] and ctl("check", "--data").returncode == 0
