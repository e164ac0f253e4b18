"""get_or_load: whatever a loader returns."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import functools
import gc
import importlib
import itertools
import math
import os
import pathlib
import pickle
import sys
import threading
import time
from typing import Any

import pytest

import onecopy
from conftest import interrupted
from onecopy import _arena, _objects, _registry

np = pytest.importorskip("numpy")


class Box:
    """Stands for a user's model class."""

    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


def arrays() -> dict[str, Any]:
    a = np.arange(1 << 17, dtype="f8").reshape(256, 512)
    return {
        "a": a, "t": a.T, "row": a[3], "strided": a[::2, 1::3], "reversed": a[::-1], "scalar": np.array(3.5),
        "empty": np.zeros((0, 5)), "object": np.array([1, "x", None], dtype=object), "text": np.array(["ab", "c"]),
        "record": np.zeros(3, dtype=[("x", "i4"), ("y", "f8")]), "fortran": np.asfortranarray(a), "big": a.astype(">f4"),
        "broadcast": np.broadcast_to(np.float32(2), (4, 1000)), "same": a, "plain": 5, "bool": a > 7,
    }  # fmt: skip


@pytest.mark.parametrize("mode", [None, "r", "c"])
def test_numpy(reg: onecopy.Registry, mode: str | None) -> None:
    want = arrays()
    got = reg.get_or_load("k", arrays, mode=mode)
    assert reg.get_or_load("k", arrays, mode=mode) is got
    for name, v in want.items():
        g = got[name]
        if not isinstance(v, np.ndarray):
            assert g == v
            continue
        assert (type(g), g.dtype, g.shape, g.tolist()) == (type(v), v.dtype, v.shape, v.tolist())
        if not v.dtype.hasobject and v.nbytes:
            assert g.strides == v.strides and g.flags.writeable == (mode == "c"), name
    assert got["same"] is got["a"]
    for name in ("t", "row", "strided", "reversed"):
        assert np.shares_memory(got[name], got["a"])
    assert not np.shares_memory(got["fortran"], got["a"])
    assert got["a"].__array_interface__["data"][0] % 64 == 0
    s = reg.status("k")
    assert (s.shared, s.backing, s.mode, s.private_bytes) == (True, "shm", mode or "r", 0)
    if mode == "c":
        got["a"][0, 0] = 99
        assert got["row"][0] == want["row"][0] and got["t"][0, 0] == 99
        assert 0 < reg.status("k").private_bytes <= 1 << 21
        other = onecopy.Registry(reg.dir)
        assert other.get_or_load("k", arrays)["a"][0, 0] == 0
    else:
        with pytest.raises(ValueError, match="read-only"):
            got["a"][0, 0] = 1


def test_an_object_per_mode(reg: onecopy.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sees what a caller that asked for another mode has written."""
    monkeypatch.setattr(onecopy, "_default", reg)
    monkeypatch.setattr(onecopy, "_cached", reg._objects)
    mine = reg.get_or_load("k", lambda: np.ones(3), mode="c")
    mine[0] = 99
    for get in (reg.get_or_load, onecopy.get_or_load):
        plain = get("k", dict)
        assert plain[0] == 1 and not plain.flags.writeable
        assert get("k", dict, mode="r") is plain and get("k", dict, mode="c") is mine
    assert reg.stats().hits == 5 and reg.status("k").mode == "r" and reg.status("k").private_bytes > 0

    with reg.get("k"):  # which keeps the attachment
        reg.release("k")
        again = reg.get_or_load("k", dict, mode="c")
        assert again[0] == 1 and mine[0] == 99 and reg.stats().hits == 5
    del mine, again, plain
    reg.get_or_load("k", lambda: np.zeros(3), version="2", on_change="replace")
    gc.collect()  # the objects of the old generation went with it
    assert reg.get_or_load("k", dict, version="2", mode="c")[0] == 0
    assert len(os.listdir(reg.dir + "/v1/m")) == 3


def test_only_the_used_part_of_a_base_is_stored(reg: onecopy.Registry) -> None:
    big = np.zeros(1 << 22, dtype="u1")
    big[1000:1100] = 7
    got = reg.get_or_load(
        "k", lambda: {"small": big[1000:1100], "other": np.lib.stride_tricks.as_strided(big[:8], (3, 4), (2, 1))}
    )
    assert got["small"].tolist() == [7] * 100 and got["other"].shape == (3, 4)
    assert reg.entries()[0].nbytes < 8192


def test_kinds_of_results(reg: onecopy.Registry) -> None:
    Point = collections.namedtuple("Point", "x y")
    globals()["Point"] = Point
    Point.__module__, Point.__qualname__ = __name__, "Point"
    sys.modules.setdefault(__name__, sys.modules[Point.__module__])
    values: list[Any] = [
        [1, "two", 3.0], {"a": {1, 2}}, b"bytes" * 30_000, bytearray(b"x" * 100_000), Box(w=np.ones(100_000), n="n"),
        np.ma.masked_array([1, 2, 3], [0, 1, 0]), np.float32(3), Point(1, np.arange(9)), len, Box, 0, "", False,
    ]  # fmt: skip
    for i, v in enumerate(values):
        got = reg.get_or_load(f"k{i}", lambda v=v: v)
        assert type(got) is type(v)
        assert pickle.dumps(got) == pickle.dumps(v) or isinstance(v, (Box, Point, np.ma.MaskedArray)), v
    box = reg.get_or_load("k4", dict)
    assert box.n == "n" and not box.w.flags.writeable
    buffer = reg.get_or_load("k3", dict)
    assert isinstance(buffer, bytearray) and len(buffer) == 100_000


class Tagged(np.ndarray):  # type: ignore[misc,name-defined]
    """A user's array class."""


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # of matrix
def test_subclasses_of_arrays(reg: onecopy.Registry) -> None:
    """numpy alone would pickle their bytes, a copy in each process."""
    n = 100_000
    tagged = np.arange(n).view(Tagged)
    tagged.unit = "m"
    masked = np.ma.MaskedArray(np.arange(n), np.arange(n) % 3 == 0, fill_value=7, hard_mask=True)
    record = np.rec.fromarrays([np.arange(n), np.ones(n)], names="i,x")
    want = {
        "tagged": tagged, "matrix": np.asmatrix(np.ones((100, n // 100))), "record": record, "masked": masked,
        "no mask": np.ma.MaskedArray(np.ones(n)), "constant": np.ma.masked, "empty": tagged[:0],
        "objects": np.array([1, None], dtype=object).view(Tagged), "of records": np.ma.MaskedArray(record[:5]),
    }  # fmt: skip
    got = reg.get_or_load("k", lambda: want)
    for name, v in want.items():
        g = got[name]
        assert (type(g), g.dtype, g.shape) == (type(v), v.dtype, v.shape) and g.tolist() == v.tolist(), name
    assert got["tagged"].unit == "m" and got["record"].x[3] == 1 and got["record"][3].i == 3
    assert got["masked"].fill_value == 7 and got["masked"].hardmask and got["masked"].mask[3]
    assert got["no mask"].mask is np.ma.nomask
    for name in ("tagged", "matrix", "record", "masked", "no mask"):
        assert not got[name].flags.writeable
    with reg.get("k") as m:
        sizes = {f.path: f.size for f in m.files}
    assert sizes["skeleton"] < 20_000 and sizes["data"] > 5 * 8 * n


class OfOldTimes(np.ndarray):  # type: ignore[misc,name-defined]
    """An array class with a pickle of its own."""

    def __reduce__(self) -> Any:
        return old_times, (self.tolist(),)


def old_times(values: list[int]) -> Any:
    return np.array(values).view(OfOldTimes)


def test_a_subclass_with_a_pickle_of_its_own(reg: onecopy.Registry) -> None:
    got = reg.get_or_load("k", lambda: np.arange(5).view(OfOldTimes))
    assert type(got) is OfOldTimes and got.tolist() == [0, 1, 2, 3, 4]


def test_types_of_machine_learning(reg: onecopy.Registry) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    want = {n: np.arange(8).astype(getattr(ml_dtypes, n)) for n in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4")}
    got = reg.get_or_load("k", lambda: want)
    for name, v in want.items():
        assert got[name].dtype == v.dtype and got[name].tobytes() == v.tobytes() and not got[name].flags.writeable


def test_large_buffers_are_aligned(reg: onecopy.Registry) -> None:
    sizes = [65536, 65537, 100_003, 1 << 20, (1 << 20) + 8]
    got = reg.get_or_load("k", lambda: [np.full(n, 7, "u1")[:] for n in sizes])
    made = reg.get_or_load("w", lambda w: [w.empty(n, "u1") for n in sizes])
    for a, n in zip([*got, *made], sizes * 2):
        assert a.ctypes.data % 64 == 0 and a.shape == (n,)


def test_memmap_in_a_loader(reg: onecopy.Registry, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.arange(50_000))
    got = reg.get_or_load("k", lambda: np.load(path, mmap_mode="r")[5:])
    assert type(got) is np.ndarray and got[0] == 5 and got.shape == (49_995,)


def test_writer(reg: onecopy.Registry) -> None:
    kept: list[Any] = []

    def load(w: Any) -> dict[str, Any]:
        a = w.empty((1000, 1000))
        assert a.dtype == "f4" and not a.any()
        a[:] = 3
        b = w.zeros(70, "i8")
        b[:] = range(70)
        big = w.empty((5 << 20,), "u1")
        big[-1] = 9
        kept.append(a)
        return {"a": a, "b": b, "view": a[1:, ::2], "big": big, "outside": np.ones(1000), "none": w.empty(0)}

    got = reg.get_or_load("k", load)
    assert got["a"].sum() == 3_000_000 and got["b"][69] == 69 and got["outside"].sum() == 1000 and got["big"][-1] == 9
    assert np.shares_memory(got["view"], got["a"]) and got["none"].shape == (0,)
    a = kept.pop()
    assert a[0, 0] == 3
    a[0, 0] = 4  # late: neither crashes nor reaches anybody
    assert got["a"][0, 0] == 3
    assert reg.entries()[0].nbytes < 10 << 20
    assert reg.check(data=True) == []


def test_shapes_of_a_writer(shm: str) -> None:
    n = np.int32(1 << 16)
    reg = onecopy.Registry(shm + "/r", budget=64 << 20)

    def load(w: Any) -> list[Any]:
        for shape in (-1, (3, -1), (0, np.int64(-4))):
            with pytest.raises(ValueError, match="negative"):
                w.empty(shape)
        with pytest.raises(TypeError):
            w.empty(2.5)
        return [w.empty(np.int64(3)), w.empty([np.uint8(200), np.uint8(200)], "u1"), w.empty(())]

    assert [a.shape for a in reg.get_or_load("k", load)] == [(3,), (200, 200), ()]
    with pytest.raises(onecopy.NoSpace):  # and not the 0 bytes that int32 makes of it
        reg.get_or_load("k2", lambda w: w.empty((n, n), "u1"))


def test_threads_of_a_loader_share_a_writer(reg: onecopy.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    real, threads, made = _arena.Arena._grow, [], []

    def load(w: Any) -> Any:
        def grow(self: Any, n: int) -> None:
            real(self, n)
            if not threads:
                threads.append(threading.Thread(target=lambda: made.append(w.empty(1000))))
                threads[0].start()
                threads[0].join(0.1)  # it has to wait until this thread has its own

        monkeypatch.setattr(_arena.Arena, "_grow", grow)
        a = w.empty(1000)
        threads[0].join()
        assert not np.shares_memory(a, made[0])
        a[:], made[0][:] = 1, 2
        return [a, made.pop()]

    assert [v.sum() for v in reg.get_or_load("k", load)] == [1000, 2000]


def test_writer_without_huge_pages_and_without_room(shm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reg = onecopy.Registry(shm + "/r", budget=64 << 20)
    monkeypatch.setattr(_arena._sys, "MADV_COLLAPSE", 9999)
    got = reg.get_or_load("k", lambda w: w.empty((1 << 20,), "f8"))
    assert got.sum() == 0
    kept = []

    def load(w: Any) -> Any:
        kept.append(w.empty(1 << 20))
        kept.append(w.empty((1 << 40,), "u1"))

    with pytest.raises(onecopy.NoSpace):
        reg.get_or_load("k2", load)
    assert kept[0].sum() == 0  # what the loader kept stays readable
    assert [e.key for e in reg.entries()] == ["k"]


def test_loader_that_raises(reg: onecopy.Registry) -> None:
    with pytest.raises(onecopy.LoadFailed, match='load "k": the load failed: the loader raised ZeroDivisionError') as e:
        reg.get_or_load("k", lambda: 1 / 0)
    assert isinstance(e.value.__cause__, ZeroDivisionError)
    with pytest.raises(onecopy.LoadFailed, match="returned None"):
        reg.get_or_load("k", lambda: None)
    for interrupt in (KeyboardInterrupt, SystemExit):
        with pytest.raises(interrupt):
            reg.get_or_load("k", lambda i=interrupt: (_ for _ in ()).throw(i))
    assert reg.entries() == [] and reg.status("k").attempts == 0
    assert reg.get_or_load("k", lambda: [1]) == [1]


def test_what_cannot_be_shared_is_named(reg: onecopy.Registry) -> None:
    box = Box(inner=Box(layers=[1, {"hook": lambda: 0}]))
    with pytest.raises(onecopy.LoadFailed, match=r"Box.inner.layers\[1\]\['hook'\] \(function\) cannot be shared"):
        reg.get_or_load("k", lambda: box)
    loop: list[Any] = [threading.Lock()]
    loop.append(loop)
    with pytest.raises(onecopy.LoadFailed, match=r"list\[0\]"):
        reg.get_or_load("k", lambda: loop)
    assert os.listdir(reg.dir + "/v1/m") == []


class Slotted:
    """Stands for a class without __dict__."""

    __slots__ = ("conn", "unset")

    def __init__(self, conn: Any) -> None:
        self.conn = conn


class Stateful:
    """Pickles something else than its attributes."""

    def __getstate__(self) -> Any:
        return {"socket": threading.Lock()}


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda: {"a": Slotted(threading.Lock())}, r"dict\['a'\]\.conn \(lock\)"),
        (lambda: [functools.partial(len, threading.Lock())], r"list\[0\]\(argument 2\)|list\[0\].*\(lock\)"),
        (lambda: (Stateful(),), r"tuple\[0\]\.__getstate__\(\)\['socket'\] \(lock\)"),
        (lambda: {threading.Lock(): 1}, r"dict key <unlocked .* \(lock\)"),
        (lambda: {print, threading.Lock()}, r"set element <unlocked .* \(lock\)"),
        (lambda: collections.defaultdict(lambda: 0), r"defaultdict\(argument 0\) \(function\)"),
        (lambda: Box(kind=type("Local", (), {})), r"Box\.kind \(type\)"),
        (lambda: np.array([1, threading.Lock()], dtype=object), r"ndarray\.__getstate__\(\)\[4\]\[1\] \(lock\)"),
    ],
)  # fmt: skip
def test_the_name_of_what_cannot_be_shared(reg: onecopy.Registry, make: Any, path: str) -> None:
    with pytest.raises(onecopy.LoadFailed, match=path + " cannot be shared") as e:
        reg.get_or_load("k", make)
    assert e.value.hint == ""
    assert os.listdir(reg.dir + "/v1/m") == []


class Fragile:
    """Can be pickled, and not unpickled."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


def test_what_cannot_be_rebuilt_is_not_published(reg: onecopy.Registry) -> None:
    reg.get_or_load("k", lambda: [1], version="1")
    text = 'load "k": the load failed: the object cannot be rebuilt here: ValueError: invalid literal'
    for load in (lambda: Fragile(), lambda: [np.ones(100_000), Fragile()], lambda w: [w.empty(100_000), Fragile()]):
        with pytest.raises(onecopy.LoadFailed, match=text) as e:
            reg.get_or_load("k", load, version="2", on_change="replace")
        assert isinstance(e.value.__cause__, ValueError) and "in a module" in e.value.hint
        assert reg.get_or_load("k", list, version="1") == [1]
    gc.collect()
    assert len(os.listdir(reg.dir + "/v1/m")) == 3


def test_a_class_that_this_process_does_not_find(reg: onecopy.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    reg.get_or_load("k", lambda: Box(a=1))
    monkeypatch.delattr(sys.modules[__name__], "Box")
    other = onecopy.Registry(reg.dir)
    with pytest.raises(onecopy.LoadFailed, match="cannot be rebuilt here: AttributeError: .*Box") as e:
        other.get_or_load("k", dict)
    assert "in a module" in e.value.hint and other.status("k").state == "ready"


class Restless(Box):
    """Writes into its array when it is loaded."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.a[0] += 1


class Mute:
    """Says nothing, and cannot be pickled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __repr__(self) -> str:
        raise ZeroDivisionError


def test_objects_that_are_difficult(reg: onecopy.Registry) -> None:
    with pytest.raises(onecopy.LoadFailed, match="ValueError: .* is read-only") as e:
        reg.get_or_load("k", lambda: Restless(a=np.ones(100_000)))
    assert 'mode="c"' in e.value.hint
    got = reg.get_or_load("k", dict, mode="c")
    assert got.a[0] == 2 and got.a[1] == 1 and reg.status("k").private_bytes > 0
    with pytest.raises(onecopy.LoadFailed, match="set cannot be shared: TypeError"):
        reg.get_or_load("set", lambda: {Mute()})


def test_version_and_environment(reg: onecopy.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def other() -> onecopy.Registry:
        return onecopy.Registry(reg.dir)

    first = reg.get_or_load("k", arrays, version="1")
    with pytest.raises(onecopy.SourceChanged, match='version was "1" when the model was loaded and is "2" now'):
        other().get_or_load("k", arrays, version="2")
    with pytest.raises(onecopy.SourceChanged, match="version"):
        reg.get_or_load("k", arrays)
    assert other().get_or_load("k", arrays, version="2", on_change="ignore")["plain"] == 5
    with monkeypatch.context() as patch:
        patch.setattr(np, "__version__", "1.0")
        with pytest.raises(onecopy.SourceChanged, match="environment numpy was"):
            other().get_or_load("k", arrays, version="1")
    with monkeypatch.context() as patch:
        patch.setattr(_objects, "version_of", lambda name: None)
        with pytest.raises(onecopy.SourceChanged, match="and is not importable now"):
            other().get_or_load("k", arrays, version="1")
    assert _objects.version_of("no_such_package") is None
    new = other().get_or_load("k", lambda: [2], version="2", on_change="replace")
    assert new == [2] and first["a"][0, 1] == 1
    with pytest.raises(onecopy.SourceChanged):  # never silently stale
        reg.get_or_load("k", arrays, version="1")
    assert reg.get_or_load("k", arrays, version="2") == [2]


@pytest.mark.parametrize("error", ["RuntimeError('no GPU here')", "OSError('no file')", "ImportError"])
def test_a_package_that_cannot_be_imported(
    reg: onecopy.Registry, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    module = tmp_path / "onecopy_moody.py"
    module.write_text("__version__ = '1'\nclass A: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    reg.get_or_load("k", lambda: __import__("onecopy_moody").A())
    module.write_text(f"raise {error}\n")
    del sys.modules["onecopy_moody"]
    importlib.invalidate_caches()
    other = onecopy.Registry(reg.dir)
    with pytest.raises(onecopy.SourceChanged, match='onecopy_moody was "1" .* and is not importable now'):
        other.get_or_load("k", dict)
    with pytest.raises(onecopy.LoadFailed, match="cannot be rebuilt here: " + error.partition("(")[0]):
        other.get_or_load("k", dict, on_change="ignore")
    assert other.get_or_load("k", lambda: [2], on_change="replace") == [2]


def test_ignoring_a_change_does_not_decide_for_others(reg: onecopy.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onecopy, "_default", reg)
    monkeypatch.setattr(onecopy, "_cached", reg._objects)
    onecopy.Registry(reg.dir).get_or_load("k", lambda: [1], version="1")
    for get in (reg.get_or_load, onecopy.get_or_load):
        for _ in range(2):
            old = get("k", lambda: [2], version="2", on_change="ignore")
            assert old == [1] and get("k", dict, on_change="ignore") is old
            with pytest.raises(onecopy.SourceChanged, match='version was "1" when .* and is "2" now'):
                get("k", lambda: [2], version="2")
            assert get("k", lambda: [2], version="1") is old
    assert asyncio.run(reg.aget_or_load("k", dict, on_change="ignore")) is old
    with pytest.raises(onecopy.SourceChanged, match="version"):
        asyncio.run(reg.aget_or_load("k", dict))
    assert reg.get_or_load("k", lambda: [2], version="2", on_change="replace") == [2]

    reg.release("k")
    with monkeypatch.context() as patch:
        patch.setattr(_objects, "version_of", lambda name: "another")
        assert reg.get_or_load("k", dict, version="2", on_change="ignore") == [2]
        with pytest.raises(onecopy.SourceChanged, match="environment python"):
            reg.get_or_load("k", dict, version="2")
    assert reg.get_or_load("k", dict, version="2") == [2]


def test_a_model_of_files_is_no_object(reg: onecopy.Registry, model: pathlib.Path) -> None:
    with reg.open("k", model):
        with pytest.raises(onecopy.SourceChanged, match="kind was path"):
            reg.get_or_load("k", dict)
        with pytest.raises(onecopy.Corrupt, match="holds no Python object"):
            reg.get_or_load("k", dict, on_change="ignore")
    reg.get_or_load("o", lambda: [1])
    with pytest.raises(onecopy.SourceChanged, match="kind was func"):
        onecopy.Registry(reg.dir).open("o", model)


def test_nested_loads_are_refused(reg: onecopy.Registry) -> None:
    reg.get_or_load("there", lambda: [1])
    for key in ("k", "other"):
        with pytest.raises(onecopy.LoadFailed) as e:
            reg.get_or_load("k", lambda key=key: reg.get_or_load(key, dict, timeout=5))
        assert isinstance(e.value.__cause__, onecopy.NestedLoad)
    reg.release("there")
    assert reg.get_or_load("k", lambda: reg.get_or_load("there", dict) + [2]) == [1, 2]


def test_many_threads_one_load(reg: onecopy.Registry) -> None:
    calls, results, barrier = [], [], threading.Barrier(8)

    def load() -> Any:
        calls.append(1)
        return np.arange(1000)

    def work() -> None:
        barrier.wait()
        results.append(reg.get_or_load("k", load))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(calls) == 1 and len({id(r) for r in results}) == 1


@pytest.mark.parametrize("other", [False, True])
def test_a_thread_of_the_loader_that_asks_for_its_key(shm: str, other: bool) -> None:
    """A context variable does not reach it: it waits no longer than for any other load."""
    r = onecopy.Registry(shm + "/r", load_timeout=0.2)
    asked = onecopy.Registry(r.dir, load_timeout=0.2) if other else r
    seen: list[BaseException] = []

    def ask() -> None:
        try:
            asked.get_or_load("k", dict)
        except BaseException as e:
            seen.append(e)

    def load() -> list[int]:
        t = threading.Thread(target=ask)
        t.start()
        t.join()
        return [1]

    assert r.get_or_load("k", load) == [1]
    assert [type(e) for e in seen] == [onecopy.Timeout] and "is loading it, or hangs" in str(seen[0])


def test_a_waiting_thread_times_out(reg: onecopy.Registry) -> None:
    inside, go = threading.Event(), threading.Event()

    def slow() -> Any:
        inside.set()
        go.wait(30)
        return [1]

    t = threading.Thread(target=lambda: reg.get_or_load("k", slow))
    t.start()
    inside.wait(30)
    with pytest.raises(onecopy.Timeout):
        reg.get_or_load("k", slow, timeout=0.05)
    with pytest.raises(onecopy.Timeout, match="is loading it, or hangs"):
        onecopy.Registry(reg.dir).get_or_load("k", slow, timeout=0.05)
    with pytest.raises(onecopy.InUse, match="it is being loaded"):
        reg.remove("k")
    assert reg.status("k").state == "loading" and reg.entries()[0].loader_pid == os.getpid()
    go.set()
    t.join()
    assert reg.get_or_load("k", slow) == [1]


@pytest.mark.parametrize("where", ["call", "registry"])
def test_a_thread_that_waits_for_ever(shm: str, where: str) -> None:
    r = onecopy.Registry(shm + "/r", load_timeout=math.inf if where == "registry" else 600)
    timeout = math.inf if where == "call" else None
    go = threading.Event()
    got: list[Any] = []

    def work() -> None:
        got.append(r.get_or_load("k", lambda: [go.wait(30)], timeout=timeout))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    while not r.stats().waits:
        time.sleep(0.001)
    go.set()
    for t in threads:
        t.join()
    assert got == [[True]] * 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt in a finalizer
def test_an_interrupt_leaves_no_load_behind(shm: str) -> None:
    r = onecopy.Registry(shm + "/r", slots=8, load_timeout=0)
    versions = itertools.count()

    def load() -> Any:
        return r.get_or_load("k", list, version=str(next(versions)), on_change="replace")

    for _ in interrupted(load, _registry):
        assert not _registry.loading.get()
        load()
        with concurrent.futures.ThreadPoolExecutor(1) as other:
            other.submit(load).result()


def test_an_interrupt_leaves_no_loader_running() -> None:
    """The flag that refuses a load within a load."""
    for _ in interrupted(lambda: _objects.call(list, None), _objects):
        assert not _registry.loading.get()


def test_a_load_that_an_interrupt_has_left_is_taken_over(reg: onecopy.Registry) -> None:
    """Jupyter, for one, keeps the traceback, and with it what the thread was about."""
    left = reg._join(("object", "k"), None)
    assert reg.get_or_load("k", lambda: [1], timeout=5) == [1]
    del left


def test_release_and_views(reg: onecopy.Registry) -> None:
    a = reg.get_or_load("k", arrays)["a"]
    reg.release("k")
    reg.release("k")
    gc.collect()
    with pytest.raises(onecopy.InUse):
        reg.remove("k")
    piece = a[5, 5:7]
    del a
    gc.collect()
    assert piece.tolist() == [2565.0, 2566.0] and reg.entries()[0].leased
    del piece
    gc.collect()
    assert not reg.entries()[0].leased
    reg.remove("k")


def test_close_drops_what_is_cached(reg: onecopy.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onecopy, "_default", reg)
    monkeypatch.setattr(onecopy, "_cached", reg._objects)
    for _ in range(3):
        onecopy.get_or_load("k", lambda: np.ones(3))
    reg.close()
    assert reg.stats().hits == 2
    with pytest.raises(onecopy.Closed):
        onecopy.get_or_load("k", dict)
    gc.collect()
    onecopy.Registry(reg.dir).remove("k")  # no lease is left


def test_close_during_a_load(reg: onecopy.Registry) -> None:
    inside, go = threading.Event(), threading.Event()
    got: list[Any] = []

    def slow() -> Any:
        inside.set()
        go.wait(30)
        return np.ones(3)

    t = threading.Thread(target=lambda: got.append(reg.get_or_load("k", slow)))
    t.start()
    inside.wait(30)
    reg.close()
    go.set()
    t.join()
    assert got.pop().sum() == 3  # who waited for it has it
    for call in (lambda: reg.get_or_load("k", slow), lambda: reg.get("k")):
        with pytest.raises(onecopy.Closed):
            call()
    gc.collect()
    onecopy.Registry(reg.dir).remove("k")


class Curious:
    """Asks its registry something when it goes."""

    asked: list[Any] = []
    of: Any = None

    def __del__(self) -> None:
        if self.of is not None:
            self.asked.append(self.of._mu.locked())


def test_an_object_that_calls_its_registry_when_it_goes(reg: onecopy.Registry) -> None:
    drops = (lambda: reg.get_or_load("k", Box, version="2", on_change="replace"), lambda: reg.release("k"), reg.close)
    for drop in drops:
        reg.get_or_load("k", Curious, version="1", on_change="replace").of = reg
        drop()
    assert Curious.asked == [False] * 3


def test_objects_false_and_foreign_owner(reg: onecopy.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    reg.get_or_load("k", lambda: [1])
    with pytest.raises(onecopy.Untrusted, match="objects=False"):
        onecopy.Registry(reg.dir, objects=False).get_or_load("k", dict)
    if os.geteuid() == 0:
        os.chown(reg.dir, 65533, 65533)
        try:
            with pytest.raises(onecopy.Error):
                onecopy.Registry(reg.dir).get_or_load("k", dict)
            for sub in ("v1", "v1/m", "v1/w", "v1/registry"):
                os.chown(f"{reg.dir}/{sub}", 65533, 65533)
            for f in os.scandir(reg.dir + "/v1/m"):
                os.chown(f.path, 65533, 65533)
                for root, dirs, files in os.walk(f.path):
                    for n in [".", *dirs, *files]:
                        os.chown(os.path.join(root, n), 65533, 65533)
            with pytest.raises(onecopy.Untrusted, match="objects are pickles"):
                onecopy.Registry(reg.dir).get_or_load("k", dict)
            assert onecopy.Registry(reg.dir, trust_owner=65533).get_or_load("k", dict) == [1]
            with pytest.raises(onecopy.ReadOnly):
                onecopy.Registry(reg.dir, trust_owner=65533).get_or_load("new", dict)
            assert onecopy.Registry(reg.dir, trust_owner=65533).get_or_load("new", lambda: [2], fallback="private") == [
                2
            ]
        finally:
            for root, dirs, files in os.walk(reg.dir):
                for n in [".", *dirs, *files]:
                    os.chown(os.path.join(root, n), 0, 0)


def test_hostile_skeletons() -> None:
    d = _objects.dump({"a": np.arange(100)})
    good = d.skeleton
    view = memoryview
    assert _objects.parse(view(good), d.size).blocks == [(0, 800, 0)]
    for bad in (b"", good[:30], b"x" + good[1:], good[:-1], good[:8] + b"\0\0\0\0\xff\xff\xff\xff" + good[16:]):
        with pytest.raises(onecopy.Corrupt):
            _objects.parse(view(bad), d.size)
    with pytest.raises(onecopy.Corrupt, match="a buffer ends at 800"):
        _objects.parse(view(good), 799)
    for name in ("_array", "_tensor", "_storage"):
        with pytest.raises(onecopy.Corrupt):
            getattr(_objects, name)(1)


def test_module_level_functions(shm: str, model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r = onecopy.Registry(shm + "/r")
    monkeypatch.setattr(onecopy, "_default", r)
    monkeypatch.setattr(onecopy, "_cached", r._objects)
    assert onecopy.default_registry() is r
    value = onecopy.get_or_load("o", lambda: [1], version="1")
    for _ in range(2050):
        assert onecopy.get_or_load("o", lambda: [2], version="1") is value
    with pytest.raises(onecopy.InvalidKey):
        onecopy.get_or_load(["o"], dict)  # type: ignore[arg-type]
    with onecopy.open("k", model) as m, onecopy.get("k") as n:
        assert m.generation == n.generation
    assert onecopy.status("o").shared and onecopy.status("none").state == "free"
    assert [e.key for e in onecopy.entries()] == ["k", "o"]
    assert onecopy.stats().hits >= 2050
    del value
    onecopy.release("o")
    gc.collect()
    onecopy.remove("o")
    assert onecopy.gc().removed == () and onecopy.check(data=True) == []
    assert "Model" in dir(onecopy) and onecopy.Model.__name__ == "Model"
    with pytest.raises(AttributeError):
        onecopy.nothing  # noqa: B018
    for name in onecopy.__all__:
        assert getattr(onecopy, name).__doc__
