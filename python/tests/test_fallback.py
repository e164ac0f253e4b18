"""Where nothing can be shared: loud, and never worse than without this package."""

from __future__ import annotations

import asyncio
import gc
import os
import pathlib
import subprocess
import sys
import threading
import time
import warnings

import pytest

import onecopy
from conftest import SRC
from onecopy import _cgroup

np = pytest.importorskip("numpy")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> onecopy.Registry:
    monkeypatch.setattr(sys, "platform", "darwin")
    return onecopy.Registry(tmp_path / "r")


def test_path_elsewhere(elsewhere: onecopy.Registry, model: pathlib.Path) -> None:
    with pytest.warns(RuntimeWarning, match='"k" is not shared: unsupported operation: sharing needs Linux'):
        m = elsewhere.open("k", model)
    with m:
        assert not m.shared and os.fspath(m) == str(model) and sorted(m) == ["a.bin", "empty", "sub/b.txt"]
        assert m["a.bin"] == (model / "a.bin").read_bytes() and m["empty"] == b"" and m["a.bin"].readonly
        assert not m.stale and "not shared" in repr(m) and m.key == "k"
        m.verify()
        with pytest.raises(onecopy.Unsupported):
            m.lease()
        with pytest.raises(onecopy.InvalidPath):
            m["../x"]
        (model / "a.bin").write_bytes(b"")
        assert m.stale
        (model / "a.bin").unlink()
        assert m.stale
    with pytest.raises(onecopy.Closed):
        m["a.bin"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = elsewhere.open("k", model / "sub" / "b.txt")  # one warning for a key
    assert one["b.txt"] == b"hello" and pathlib.Path(one / "b.txt").exists()
    one.close()
    s = elsewhere.status("k")
    assert (s.shared, s.backing, s.state) == (False, "source", "unknown") and "needs Linux" in s.reason
    with pytest.raises(onecopy.Unsupported):
        elsewhere.open("k", model, fallback="raise")
    assert elsewhere.stats().fallbacks == 2


def test_object_elsewhere(elsewhere: onecopy.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def load(w: onecopy.Writer) -> list[object]:
        calls.append(1)
        a = w.empty((3, 2))
        a[:] = 1
        return [a, w.empty(0)]

    with pytest.warns(RuntimeWarning, match="this process's own memory"):
        v = elsewhere.get_or_load("k", load, version="1")
    for _ in range(3):
        assert elsewhere.get_or_load("k", load, version="1") is v
    assert calls == [1] and v[0].sum() == 6
    assert elsewhere.status("k").backing == "private"
    for mode in ("r", "c", "r"):  # it is this process's own in any case
        assert elsewhere.get_or_load("k", load, version="1", mode=mode) is v
    assert calls == [1] and elsewhere.stats().hits == 6
    monkeypatch.setattr(onecopy, "_default", elsewhere)
    monkeypatch.setattr(onecopy, "_cached", elsewhere._objects)
    for get in (elsewhere.get_or_load, onecopy.get_or_load):
        with pytest.raises(onecopy.Unsupported):
            get("k", load, version="1", fallback="raise")
    with pytest.raises(onecopy.Unsupported):
        asyncio.run(elsewhere.aget_or_load("k", load, version="1", fallback="raise"))
    assert elsewhere.get_or_load("k", load, version="1") is v
    assert elsewhere.get_or_load("k", load, version="2") is not v
    with pytest.raises(onecopy.Unsupported):
        elsewhere.get_or_load("k2", load, fallback="raise")
    with pytest.raises(onecopy.LoadFailed):
        elsewhere.get_or_load("k3", lambda: 1 / 0)


# What os, time and ctypes lack there; asyncio and numpy are imported before they are taken away.
ELSEWHERE = """
import asyncio, ctypes, os, pathlib, sys, time, warnings
import numpy as np
sys.platform = sys.argv[1]
linux = ["O_TMPFILE", "O_DIRECT", "posix_fadvise", "posix_fallocate", "RWF_NOWAIT", "memfd_create"]
windows = ["fork", "register_at_fork", "geteuid", "getuid", "pread", "preadv", "pwrite", "fchmod", "fchown", "statvfs",
           "fstatvfs", "sysconf", "mkfifo", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY", "SEEK_DATA"]
for name in linux + windows * (sys.platform == "win32"):
    if hasattr(os, name):
        delattr(os, name)
del time.CLOCK_BOOTTIME
if sys.platform == "win32":
    del time.clock_gettime_ns
    sys.modules["fcntl"] = sys.modules["resource"] = None
    def no_handle(name, *args, **options):
        raise TypeError("argument of type 'NoneType' is not iterable")
    ctypes.CDLL = no_handle

import onecopy
warnings.simplefilter("error", ResourceWarning)
for name in onecopy.__all__:
    getattr(onecopy, name)
path, made = pathlib.Path(sys.argv[2]), []
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    with onecopy.open("k", path) as m:
        assert not m.shared and m["a.bin"] == (path / "a.bin").read_bytes() and not m.stale
        assert pathlib.Path(m / "sub/b.txt").read_text() == "hello" and list(m) == ["a.bin", "empty", "sub/b.txt"]
    onecopy.open("k", path / "a.bin").close()
    def load(w):
        made.append(1)
        return {"a": w.empty(9), "b": np.ones(3)}
    v = onecopy.get_or_load("o", load, version="1")
    async def two():
        with await onecopy.aopen("k", path) as m:
            return await onecopy.aget_or_load("o", load, version="1"), m["sub/b.txt"]
    again, text = asyncio.run(two())
    assert v is again is onecopy.get_or_load("o", load, version="1") and made == [1] and text == b"hello"
heads = [(w.category.__name__, str(w.message)[:14]) for w in said]
assert heads == [("RuntimeWarning", f'onecopy: "{k}" i') for k in "ko"], heads
assert all(w.filename == __file__ and "needs Linux" in str(w.message) for w in said), said
for key, backing in (("k", "source"), ("o", "private")):
    s = onecopy.status(key)
    assert (s.backing, s.shared, s.private_bytes) == (backing, False, 0) and sys.platform in s.reason
assert onecopy.stats().fallbacks == 4 and onecopy.stats().hits == 2, onecopy.stats()
r = onecopy.default_registry()
for call in (onecopy.entries, onecopy.gc, onecopy.check, lambda: onecopy.get("k"), lambda: onecopy.remove("k"),
             lambda: r.pin("k"), lambda: onecopy.open("k", path, fallback="raise"),
             lambda: onecopy.get_or_load("x", load, fallback="raise")):
    try:
        call()
    except onecopy.Unsupported as e:
        assert "needs Linux" in str(e)
    else:
        raise AssertionError(call)
onecopy.release("o")
print("ok")
"""


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_the_whole_package_elsewhere(model: pathlib.Path, tmp_path: pathlib.Path, platform: str) -> None:
    """In a process that lacks what Python lacks on that system: it imports, and works privately."""
    script = tmp_path / "script.py"
    script.write_text(ELSEWHERE)
    p = subprocess.run(
        [sys.executable, str(script), platform, str(model)], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": SRC, "ONECOPY_DIR": str(tmp_path / "r")},
    )  # fmt: skip
    assert p.stdout == "ok\n", p.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody who may not")
def test_where_nothing_may_be_made(shm: str, model: pathlib.Path) -> None:
    """A read-only /dev/shm, for example: paths are mapped from their source, loaders say why."""
    from onecopy import _arena, _load, _model, _remove  # noqa: F401  # the other user may not read them

    os.chmod(shm, 0o555)
    os.seteuid(65533)
    try:
        r = onecopy.Registry(shm + "/r")
        with pytest.raises(onecopy.ReadOnly, match="permission denied"):
            r.get_or_load("k", lambda: [1])
        with pytest.warns(RuntimeWarning, match="permission denied"):
            assert r.get_or_load("k", lambda: [1], fallback="private") == [1]
        try:
            os.stat(model)
        except PermissionError:
            return  # the source is not for everybody
        with pytest.warns(RuntimeWarning, match="permission denied"), r.open("m", model) as m:
            assert not m.shared and m["a.bin"][1] == 1
    finally:
        os.seteuid(0)


def test_private_on_request_where_memory_is_short(shm: str) -> None:
    r = onecopy.Registry(shm + "/r", budget=1)
    with pytest.raises(onecopy.NoSpace):
        r.get_or_load("k", lambda: np.ones(100_000))
    with pytest.warns(RuntimeWarning):
        assert r.get_or_load("k", lambda: np.ones(100_000), fallback="private").sum() == 100_000


def test_untrusted_registry_falls_back_for_paths_only(shm: str, model: pathlib.Path) -> None:
    os.mkdir(shm + "/r")
    os.chmod(shm + "/r", 0o777)
    r = onecopy.Registry(shm + "/r")
    with pytest.warns(RuntimeWarning, match="lets others"), r.open("k", model) as m:
        assert not m.shared
    with pytest.raises(onecopy.Untrusted):
        r.get_or_load("k", lambda: [1])


def test_tensors_of_a_fallback(elsewhere: onecopy.Registry, tmp_path: pathlib.Path) -> None:
    lib = pytest.importorskip("safetensors.numpy")
    lib.save_file({"w": np.arange(5)}, tmp_path / "m.safetensors")
    with pytest.warns(RuntimeWarning), elsewhere.open("k", tmp_path / "m.safetensors") as m:
        assert m.tensors()["w"].tolist() == [0, 1, 2, 3, 4]


def test_asyncio(shm: str, model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r = onecopy.Registry(shm + "/r")
    monkeypatch.setattr(onecopy, "_default", r)
    monkeypatch.setattr(onecopy, "_cached", r._objects)
    inside = threading.Event()

    def slow() -> list[int]:
        inside.set()
        time.sleep(0.2)
        return [1]

    async def main() -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.01)

        t = asyncio.ensure_future(tick())
        a, b = await asyncio.gather(onecopy.aget_or_load("k", slow), onecopy.aget_or_load("k", slow))
        assert a is b and ticks > 3
        assert await onecopy.aget_or_load("k", slow) is a
        with await onecopy.aopen("m", model) as m:
            assert m["a.bin"][1] == 1
        t.cancel()
        inside.clear()
        task = asyncio.ensure_future(onecopy.aget_or_load("k2", slow))
        await asyncio.get_running_loop().run_in_executor(None, inside.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await onecopy.aget_or_load("k2", slow) == [1]

    asyncio.run(main())


@pytest.mark.parametrize("what", ["model", "error"])
def test_cancelled_open(shm: str, model: pathlib.Path, what: str) -> None:
    """Nobody waits for the model any more: it is given back, without a ResourceWarning."""
    r = onecopy.Registry(shm + "/r")
    inside, go = threading.Event(), threading.Event()
    complaints: list[object] = []

    def progress(done: int, total: int) -> None:
        inside.set()
        go.wait(30)
        if what == "error":
            raise ZeroDivisionError

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        task = asyncio.ensure_future(r.aopen("k", model, progress=progress))
        await loop.run_in_executor(None, inside.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go.set()

    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        asyncio.run(main())  # which waits for the thread
        gc.collect()
    assert not complaints and [e.leased for e in r.entries()] == [False] * (what == "model")


def tree(root: pathlib.Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        p = root / name
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text(text)
    return str(root)


V2 = {
    "proc/self/cgroup": "0::/a/b\n",
    "proc/self/mountinfo": "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
    "sys/fs/cgroup/a/b/memory.max": "max\n",
    "sys/fs/cgroup/a/memory.max": "1000\n", "sys/fs/cgroup/a/memory.current": "900\n",
    "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 200\nactive_file 100\n",
}  # fmt: skip


def test_cgroup_v2(tmp_path: pathlib.Path) -> None:
    assert _cgroup.headroom(tree(tmp_path, V2), 10_000) == 400
    assert _cgroup.headroom(str(tmp_path), 1000) is None  # a limit that is none
    (tmp_path / "sys/fs/cgroup/a/memory.stat").unlink()
    assert _cgroup.headroom(str(tmp_path), 10_000) is None
    assert _cgroup.headroom(str(tmp_path / "nothing"), 10_000) is None


def test_cgroup_v2_of_another_namespace(tmp_path: pathlib.Path) -> None:
    root = tree(tmp_path, {
        "proc/self/cgroup": "0::/../x\n", "proc/self/mountinfo": "bad - cgroup2\n30 20 0:26 / /cg\\040x rw - cgroup2 c rw\n",
        "cg x/memory.max": "500", "cg x/memory.current": "100", "cg x/memory.stat": "inactive_file 0\n",
    })  # fmt: skip
    assert _cgroup.headroom(root, 10_000) == 400


@pytest.mark.parametrize(("hierarchy", "want"), [("1", 150), ("0", 250)])
def test_cgroup_v1(tmp_path: pathlib.Path, hierarchy: str, want: int) -> None:
    base = "sys/fs/cgroup/memory"
    root = tree(tmp_path, {
        "proc/self/cgroup": "4:cpu,memory:/d/e\nx\n", "proc/self/mountinfo": "35 31 0:32 /d /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
        f"{base}/e/memory.limit_in_bytes": "500", f"{base}/e/memory.usage_in_bytes": "300", f"{base}/e/memory.use_hierarchy": hierarchy,
        f"{base}/e/memory.stat": "inactive_file 50\ntotal_inactive_file 100\n",
        f"{base}/memory.limit_in_bytes": "9223372036854771712", f"{base}/memory.usage_in_bytes": "400",
        f"{base}/memory.use_hierarchy": hierarchy, f"{base}/memory.stat": "hierarchical_memory_limit 500\ntotal_active_file 50\n",
    })  # fmt: skip
    assert _cgroup.headroom(root, 10_000) == want
