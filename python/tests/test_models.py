"""Files: load, attach, lifetimes, replacement, sources that are bad, damage."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import os
import pathlib
import shutil
import socket
import threading
import time
from typing import Any

import pytest

import onecopy
from conftest import interrupted
from onecopy import _attach, _load, _locks, _place, _segment, _sys, errors


def mappings(text: str) -> int:
    with open("/proc/self/maps") as f:
        return sum(text in line for line in f)


def bind(path: pathlib.Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))


def leased(r: onecopy.Registry, key: str) -> bool:
    return next(e.leased for e in r.entries() if e.key == key)


def test_load_and_attach(reg: onecopy.Registry, model: pathlib.Path) -> None:
    seen: list[tuple[int, int]] = []
    with reg.open("org/m:1", model, progress=lambda d, t: seen.append((d, t))) as m:
        assert m.loaded and m.shared and m.key == "org/m:1" and m.generation == 1
        assert os.fspath(m) == m.path and os.path.basename(m.path) == "m-1"
        assert sorted(m) == ["a.bin", "empty", "sub/b.txt"] and len(m) == 3 and "a.bin" in m and "x" not in m
        assert m["a.bin"] == (model / "a.bin").read_bytes()
        assert bytes(m["empty"]) == b""
        assert pathlib.Path(m / "sub/b.txt").read_text() == "hello"
        assert m["a.bin"].readonly and m["a.bin"] is m["a.bin"]
        assert m.nbytes == 8197 == seen[-1][0] == seen[-1][1]
        assert all(f.digest.startswith("xxh3-128:") for f in m.files)
        assert not m.stale
        m.verify()
        assert "org/m:1" in repr(m)
        with reg.open("org/m:1", model) as again, reg.get("org/m:1") as third:
            assert not again.loaded and again["a.bin"] is m["a.bin"] is third["a.bin"]
    for f in os.scandir(reg.dir + "/v1/m"):
        assert f.is_dir() or f.stat().st_mode & 0o777 == 0o444
    e = reg.entries()[0]
    assert (e.key, e.state, e.nbytes, e.deaths) == ("org/m:1", "ready", 8197, 0)
    s = reg.stats()
    assert s.loads == 1 and s.bytes_loaded == 8197


@pytest.mark.parametrize("size", [1, 4 << 20, (4 << 20) + 1, (6 << 20) + 4096, (64 << 20) + (3 << 20) + 7])
def test_sizes(reg: onecopy.Registry, tmp_path: pathlib.Path, size: int) -> None:
    src = tmp_path / "f.bin"
    block = os.urandom(1 << 20)
    with src.open("wb") as f:
        for at in range(0, size, 1 << 20):
            f.write(block[: min(1 << 20, size - at)])
    with reg.open("k", src) as m:
        v = m["f.bin"]
        assert v.nbytes == size
        assert all(v[at : at + (1 << 20)] == block[: min(1 << 20, size - at)] for at in range(0, size, 1 << 20))
        m.verify()
    del v
    assert reg.check(data=True) == []


def test_without_huge_pages(reg: onecopy.Registry, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_segment._sys, "MADV_COLLAPSE", 9999)
    (tmp_path / "f").write_bytes(os.urandom(9 << 20))
    with reg.open("k", tmp_path / "f") as m:
        assert m["f"] == (tmp_path / "f").read_bytes()
    monkeypatch.setattr(_segment.Window, "__init__", _enomem)
    (tmp_path / "g").write_bytes(os.urandom(9 << 20))
    monkeypatch.setattr(_segment, "SMALL", 8 << 20)
    with reg.open("k2", tmp_path / "g") as m:
        assert m["g"] == (tmp_path / "g").read_bytes()


def _enomem(*args: object) -> None:
    raise OSError(12, "Cannot allocate memory")


def test_views_keep_the_lease_in_any_order(reg: onecopy.Registry, model: pathlib.Path) -> None:
    m = reg.open("k", model)
    view = m["a.bin"][10:20]
    path = m.path
    m.close()
    m.close()
    with pytest.raises(onecopy.Closed, match='use "k": closed'):
        m["a.bin"]
    with pytest.raises(onecopy.Closed):
        _ = m.stale
    del m
    gc.collect()
    assert leased(reg, "k")
    with pytest.raises(onecopy.InUse, match=f"pid {os.getpid()}") as e:
        reg.remove("k")
    assert e.value.pids == (os.getpid(),) and "holders" in e.value.hint
    assert bytes(view) == bytes(range(10, 20))
    del view
    gc.collect()
    assert not leased(reg, "k") and not mappings(os.path.basename(os.path.dirname(path)))
    reg.remove("k")
    with pytest.raises(onecopy.NotFound, match='remove "k": not loaded'):
        reg.remove("k")


def test_registry_closed_before_its_models(reg: onecopy.Registry, model: pathlib.Path) -> None:
    m = reg.open("k", model)
    reg.close()
    assert m["a.bin"][:2] == b"\0\1" and not m.stale
    with pytest.raises(onecopy.Closed):
        reg.get("k")
    m.close()


def test_with_gives_back_only_its_own_borrow(reg: onecopy.Registry, model: pathlib.Path) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(30):
                with reg.open("k", model) as m:
                    assert m["a.bin"][255] == 255
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failures == [] and reg.stats().loads == 1


def test_forgotten_model_is_reported(reg: onecopy.Registry, model: pathlib.Path) -> None:
    reg.open("k", model).close()
    m = reg.open("k", model)
    with pytest.warns(ResourceWarning, match="unclosed"):
        del m
        gc.collect()


def test_a_changed_source_is_an_error(reg: onecopy.Registry, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    old = reg.open("k", model)
    (model / "sub" / "b.txt").write_text("hello, world")
    again = onecopy.Registry(reg.dir)
    with pytest.raises(
        onecopy.SourceChanged, match="size of sub/b.txt was 5 when the model was loaded and is 12 now"
    ) as e:
        again.open("k", model)
    assert (e.value.field, e.value.op, e.value.key) == ("size of sub/b.txt", "load", "k")
    again.open("k", model, on_change="ignore").close()
    with again.open("k", model, on_change="replace") as new:
        assert new.loaded and new.generation == 2 and new["sub/b.txt"] == b"hello, world"
        assert old.stale and old["sub/b.txt"] == b"hello"
        assert len(os.listdir(reg.dir + "/v1/m")) == 6
    old.close()
    del e, new  # a traceback refers to the old generation too
    gc.collect()
    assert len(os.listdir(reg.dir + "/v1/m")) == 3  # the last lease took the old generation along
    fields = []
    for change in (
        lambda: (model / "new").touch(),
        lambda: (model / "empty").unlink(),
        lambda: os.utime(model / "a.bin", ns=(1, 5 * 10**9 + 1)),
    ):
        change()
        with pytest.raises(onecopy.SourceChanged) as e:
            onecopy.Registry(reg.dir).open("k", model)
        fields.append(e.value.field)
        with reg.open("k", model, replace=True) as m:
            assert m.loaded
    assert fields == ["file new", "file empty", "mtime of a.bin"]
    (model / "link").symlink_to("nowhere")
    with pytest.raises(onecopy.SourceFailed, match="/link: no such file or directory"):
        onecopy.Registry(reg.dir).open("k", model)
    (model / "link").unlink()
    os.rename(model, tmp_path / "moved")
    with pytest.raises(onecopy.SourceChanged, match="which does not exist"):
        onecopy.Registry(reg.dir).open("k", model)
    with pytest.raises(onecopy.SourceChanged, match="path was"):
        onecopy.Registry(reg.dir).open("k", tmp_path / "moved")
    with pytest.raises(onecopy.SourceFailed):
        onecopy.Registry(reg.dir).open("k", model, on_change="replace")


def test_bad_sources(reg: onecopy.Registry, tmp_path: pathlib.Path) -> None:
    d = tmp_path / "d"
    d.mkdir()
    for path, text in [(tmp_path / "absent", "no such file"), (d, "a folder without files"), ("a\0b", "null")]:
        with pytest.raises(onecopy.SourceFailed, match=text):
            reg.open("k", path)
    with pytest.raises(TypeError):
        reg.open("k", 5)  # type: ignore[arg-type]
    cases: dict[str, Any] = {
        "FIFO": lambda p: os.mkfifo(p),
        "link to a folder": lambda p: p.symlink_to("/tmp"),
        "no such file": lambda p: p.symlink_to("/nowhere"),
        "not a valid path": lambda p: (p.parent / "a\\b").touch(),
        "socket": bind,
    }
    for text, make in cases.items():
        bad = d / "bad"
        make(bad)
        with pytest.raises(onecopy.SourceFailed, match=text):
            reg.open("k", d, fallback="raise")
        for f in d.iterdir():
            f.unlink()
    (d / "link").symlink_to(__file__)  # as in a Hugging Face snapshot
    with reg.open("k", bytes(d)) as m:  # type: ignore[arg-type]
        assert m["link"] == pathlib.Path(__file__).read_bytes()
    for e in reg.entries():
        assert e.state == "ready"


@pytest.mark.parametrize("how", ["shrink", "grow", "touch", "vanish"])
def test_source_that_changes_during_the_load(
    reg: onecopy.Registry, model: pathlib.Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    f = model / "a.bin"
    real = _segment.Pending.copy

    def copy(self: Any, src: int, path: str, size: int, fill: Any) -> bytes:
        if how == "shrink":
            os.truncate(f, 5)
        sums = real(self, src, path, size, fill)
        if how == "grow":
            f.write_bytes(b"x" * 9000)
        if how == "touch":
            os.utime(f, ns=(1, 1))
        if how == "vanish":
            (model / "sub" / "b.txt").unlink(missing_ok=True)
        return sums

    monkeypatch.setattr(_segment.Pending, "copy", copy)
    with pytest.raises(onecopy.SourceFailed):
        reg.open("k", model)
    assert reg.entries() == [] and os.listdir(reg.dir + "/v1/m") == []


@pytest.mark.parametrize("key", ["", "a\nb", "x" * 300, 7, None, ["k"]])
def test_bad_keys_are_typed_errors(reg: onecopy.Registry, model: pathlib.Path, key: Any) -> None:
    for call in (
        lambda: reg.open(key, model), lambda: reg.get(key), lambda: reg.remove(key), lambda: reg.status(key),
        lambda: reg.get_or_load(key, dict), lambda: onecopy.get_or_load(key, dict), lambda: reg.check(key or ""),
    ):  # fmt: skip
        with pytest.raises(onecopy.InvalidKey):
            call()


def test_bad_arguments(reg: onecopy.Registry, model: pathlib.Path) -> None:
    for call in (
        lambda: reg.open("k", model, fallback="x"), lambda: reg.open("k", model, on_change="x"),
        lambda: reg.get_or_load("k", dict, mode="w"), lambda: onecopy.Registry(mode=0o777),
        lambda: reg.get_or_load("k", dict, fallback="x"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="want"):
            call()
    with pytest.raises(TypeError):
        reg.get_or_load("k", 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        reg.get_or_load("k", dict, version=5)  # type: ignore[arg-type]
    with reg.open("k", model) as m:
        for name in ("../a.bin", "nothing", 5, "/etc/passwd"):
            with pytest.raises(onecopy.InvalidPath, match="no such file"):
                m[name]  # type: ignore[index]
        with pytest.raises(ValueError, match="framework"):
            m.tensors("tf")
        with pytest.raises(onecopy.InvalidPath, match="no .safetensors file"):
            m.tensors()


def test_paths_that_lead_out_of_a_model(reg: onecopy.Registry, model: pathlib.Path) -> None:
    with reg.open("k", model) as m:
        for bad in ("../x", "sub/../../x", "/etc/passwd", "..", "", "a\0b", "sub//b.txt"):
            with pytest.raises(onecopy.InvalidPath, match='path "k": not a valid path'):
                m / bad
        assert m / "sub" == m.path + "/sub" and m / pathlib.PurePath("sub", "b.txt") == m.path + "/sub/b.txt"
        with pytest.raises(TypeError):
            m / 5  # type: ignore[operator]


def test_a_source_that_changes_while_it_is_open(reg: onecopy.Registry, model: pathlib.Path) -> None:
    """Each call looks: a process that has it open is no more stale than a new one."""
    with reg.open("k", model) as m:
        reg.open("k", model).close()
        (model / "a.bin").write_bytes(b"new")
        with pytest.raises(onecopy.SourceChanged, match=r"size of a.bin was 8192 .* is 3 now"):
            reg.open("k", model)
        with reg.open("k", model, on_change="ignore") as n:
            assert not n.stale and n.generation == m.generation
        with reg.open("k", model, on_change="replace") as n:
            assert m.stale and n["a.bin"] == b"new" and m["a.bin"].nbytes == 8192


def test_pins_and_ttl(reg: onecopy.Registry, model: pathlib.Path) -> None:
    for call in (lambda: reg.pin("k"), lambda: reg.unpin("k"), lambda: reg.set_ttl("k", 1)):
        with pytest.raises(onecopy.NotFound):
            call()
    assert not os.path.exists(reg.dir)
    reg.open("k", model).close()
    gc.collect()
    reg.pin("k")
    reg.set_ttl("k", 1e-9)
    e = reg.entries()[0]
    assert e.pinned and e.ttl == 1e-9 and reg.gc().expired == 0
    reg.set_ttl("k", None)
    reg.unpin("k")
    assert reg.gc().expired == 0 and not reg.entries()[0].pinned
    for bad in (-1, 1e30, float("nan")):
        with pytest.raises(ValueError, match="want a time"):
            reg.set_ttl("k", bad)
    with pytest.raises(onecopy.InvalidKey):
        reg.pin("")
    reg.set_ttl("k", 1e-9)
    assert reg.gc().expired + reg.gc().expired == 1 and reg.entries() == []
    with pytest.raises(onecopy.NotFound, match='pin "k": not loaded'):
        reg.pin("k")


def test_an_interrupt_waits_for_the_threads_that_fill(reg: onecopy.Registry, tmp_path: pathlib.Path) -> None:
    """Else they would write to descriptors that are closed by then, or somebody else's."""
    import signal
    import sys

    main, both, ended = threading.get_ident(), threading.Barrier(2), []

    def work(off: int, n: int) -> None:
        both.wait()
        if threading.get_ident() == main:
            return
        names: list[str] = []
        while "_each_window" not in names or "work" in names:  # until the other one can but wait for us
            f, names = sys._current_frames()[main], []
            while f is not None:
                names.append(f.f_code.co_name)
                f = f.f_back  # type: ignore[assignment]
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        ended.append(1)

    with pytest.raises(KeyboardInterrupt):
        _segment._each_window(2, 1, 2, work)
    assert ended == [1]

    source = tmp_path / "f"
    source.write_bytes(bytes(9 << 20))
    with pytest.raises(KeyboardInterrupt):
        reg.open("k", source, progress=lambda done, total: os.kill(os.getpid(), signal.SIGINT))
    assert reg.entries() == [] and os.listdir(reg.dir + "/v1/m") == []
    with reg.open("k", source) as m:
        assert m.loaded


@pytest.mark.parametrize("size", [100, 3 << 20])
def test_an_interrupt_leaves_nothing_mapped(reg: onecopy.Registry, tmp_path: pathlib.Path, size: int) -> None:
    source = tmp_path / "f"
    source.write_bytes(bytes(size))
    reg.open("k", source).close()
    for _ in interrupted(lambda: reg.get("k").close(), _attach, _sys):
        assert mappings(reg.dir) == 0
    reg.remove("k")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt in a finalizer
@pytest.mark.parametrize("what", ["gc", "pin", "remove", "open"])
def test_an_interrupt_leaves_no_lock(reg: onecopy.Registry, model: pathlib.Path, what: str) -> None:
    """The whole machine waits for T, and every load of the key for K."""
    other = onecopy.Registry(reg.dir, slots=8)  # few, because it takes a while
    other.gc()

    def remove() -> None:
        with contextlib.suppress(onecopy.NotFound):
            reg.remove("k")

    def load() -> None:
        reg.open("k", model, replace=True).close()

    load()
    for _ in interrupted(
        {"gc": reg.gc, "pin": lambda: reg.pin("k"), "remove": remove, "open": load}[what], _locks, _place
    ):
        other.gc(timeout=1)
        other.open("k", model, replace=what == "open", timeout=5).close()


def test_an_interrupt_while_waiting_for_a_load_lock(reg: onecopy.Registry) -> None:
    """The helper thread goes on for the others, and gives away no lock to one who has left."""
    place = reg._here()
    held = place.lock_key(1, None, lambda: None)

    timers: list[threading.Timer] = []

    def wait() -> None:
        timers.append(threading.Timer(0.02, held.unlock))
        timers[-1].start()
        place.lock_key(1, time.monotonic() + 5, lambda: None).unlock()

    for _ in interrupted(wait, _locks):
        timers.pop().join()  # a lock is one thread's at a time
        held = place.lock_key(1, time.monotonic() + 5, lambda: None)
    held.unlock()


def test_not_found(reg: onecopy.Registry) -> None:
    with pytest.raises(onecopy.NotFound, match='get "k": not loaded'):
        reg.get("k")
    with pytest.raises(LookupError):
        reg.open("k")
    absent = onecopy.Registry(reg.dir + "-absent", must_exist=True)
    with pytest.raises(onecopy.NoRegistry):
        absent.get("k")
    assert absent.entries() == []
    with pytest.raises(onecopy.NotFound):
        absent.remove("k")


def damaged(reg: onecopy.Registry, model: pathlib.Path) -> tuple[str, str]:
    with reg.open("k", model) as m:
        folder = m.path
    gc.collect()
    return folder, os.path.dirname(folder)


def test_damage_is_found_and_healed(reg: onecopy.Registry, model: pathlib.Path) -> None:
    folder, gen = damaged(reg, model)
    f = folder + "/a.bin"
    os.chmod(f, 0o644)
    assert [p.kind for p in reg.check()] == ["payload"]
    with open(f, "r+b") as w:
        w.seek(5000)
        w.write(b"!")
    os.chmod(f, 0o444)
    assert reg.check() == []
    problems = reg.check("k", data=True)
    assert [p.kind for p in problems] == ["digest"] and "a.bin: chunk 0" in problems[0].text
    with reg.get("k") as m, pytest.raises(onecopy.Corrupt, match="bytes 0 to 8192 differ"):
        m.verify()
    gc.collect()
    os.chmod(f, 0o644)
    os.truncate(f, 100)
    os.chmod(f, 0o444)
    assert [p.kind for p in reg.check("k")] == ["payload"]
    with reg.get("k") as m, pytest.raises(onecopy.Corrupt, match="has 100 bytes, published were 8192"):
        m["a.bin"]
    with reg.open("k", model, replace=True) as m:
        assert m.loaded and m["a.bin"].nbytes == 8192
    folder, gen = damaged(reg, model)
    os.unlink(folder + "/a.bin")
    os.unlink(gen + ".digests")
    assert sorted(p.kind for p in reg.check()) == ["digest", "payload"]
    with reg.get("k") as m, pytest.raises(onecopy.Gone):
        m["a.bin"]
    with reg.open("k", model, replace=True) as m:
        assert m.loaded
        os.unlink(m.path.rsplit("/", 1)[0] + ".digests")
        with pytest.raises(onecopy.Gone):
            m.verify()
    folder, gen = damaged(reg, model)
    os.unlink(gen + ".manifest")
    assert "missing although the slot is READY" in reg.check()[0].text
    with pytest.raises(onecopy.NotFound):
        reg.get("k")
    reg.remove("k")
    assert reg.gc().removed == ()
    (pathlib.Path(reg.dir) / "v1" / "m" / "stray").touch()
    (pathlib.Path(reg.dir) / "other").touch()
    assert sorted(p.kind for p in reg.check()) == ["leftover", "leftover"]
    assert reg.gc().leftovers == 1
    (pathlib.Path(reg.dir) / "other").unlink()


def test_hostile_manifest(reg: onecopy.Registry, model: pathlib.Path) -> None:
    _, gen = damaged(reg, model)
    text = pathlib.Path(gen + ".manifest").read_text()
    for bad, why in [
        ("", "has 0 bytes"), ("{", "not a valid manifest"), (text.replace('"k"', '"other"', 1).replace('"name": "k"', '"name": "other"'), "describes key"),
        (text.replace('"schema": 1', '"schema": 9'), "schema 9"),
    ]:  # fmt: skip
        os.unlink(gen + ".manifest")
        pathlib.Path(gen + ".manifest").write_text(bad)
        os.chmod(gen + ".manifest", 0o444)
        with pytest.raises((onecopy.Corrupt, onecopy.VersionMismatch), match=why):
            reg.get("k")
        assert reg.check()[0].kind == "manifest"
        assert reg.entries()[0].path == "" or "describes" in why
    os.unlink(gen + ".manifest")
    os.symlink("/etc/passwd", gen + ".manifest")
    with pytest.raises(onecopy.Untrusted, match="is a symbolic link"):
        reg.get("k")
    os.unlink(gen + ".manifest")


def test_registry_deleted_under_a_running_process(reg: onecopy.Registry, model: pathlib.Path, shm: str) -> None:
    old = reg.open("k", model)
    assert old["a.bin"][1] == 1  # mapped now: the path goes, the mapping stays
    value = reg.get_or_load("o", lambda: [1, 2])
    for where in ("/r/v1", "/r"):
        shutil.rmtree(shm + where)
        assert old.stale and old["a.bin"][1] == 1
        with pytest.raises(onecopy.Gone):
            old.lease()
        with pytest.raises(onecopy.NotFound):
            reg.get("k")
        with reg.open("k", model) as m:
            assert m.loaded
        old_value, value = value, reg.get_or_load("o", lambda: [1, 2])
        assert value is not old_value  # that somebody else has looked is enough
    old.close()


@pytest.mark.parametrize("how", ["function", "method", "asyncio"])
def test_a_cached_object_of_a_deleted_registry(
    reg: onecopy.Registry, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The cache asks every 1,024th time, also where nobody else has looked."""
    monkeypatch.setattr(onecopy, "_default", reg)
    monkeypatch.setattr(onecopy, "_cached", reg._objects)
    get: Any = {
        "function": lambda load: onecopy.get_or_load("o", load),
        "method": lambda load: reg.get_or_load("o", load),
        "asyncio": lambda load: asyncio.run(reg.aget_or_load("o", load)),
    }[how]
    assert get(lambda: [1]) == [1]
    shutil.rmtree(reg.dir)
    seen = [get(lambda: [2])[0] for _ in range(1100)]
    assert seen == sorted(seen) and seen[-1] == 2


def test_looking_at_a_deleted_registry(reg: onecopy.Registry, model: pathlib.Path) -> None:
    """It is the first call after the deletion that must notice."""
    with reg.open("k", model):
        shutil.rmtree(reg.dir)
        assert reg.entries() == [] and not os.path.exists(reg.dir)
    with reg.open("k", model):
        shutil.rmtree(reg.dir)
        s = reg.status("k")
        assert (s.state, s.generation, s.shared) == ("unknown", 0, True) and not os.path.exists(reg.dir)


def test_truncated_table_is_an_error_and_no_signal(reg: onecopy.Registry, model: pathlib.Path, shm: str) -> None:
    m = reg.open("k", model)
    assert m["a.bin"][1] == 1
    value = reg.get_or_load("o", lambda: [1])
    table = shm + "/r/v1/registry"
    image = pathlib.Path(table).read_bytes()
    os.truncate(table, 5000)
    assert m.stale and m["a.bin"][1] == 1
    for call in (
        lambda: reg.get("k"), lambda: reg.get("k2"), reg.entries, lambda: reg.open("k", model, fallback="raise"),
        reg.gc, lambda: reg.remove("k"), lambda: reg.get_or_load("o", lambda: [2]),
    ):  # fmt: skip
        with pytest.raises(onecopy.Corrupt):
            call()
    reg.status("k")
    pathlib.Path(table).write_bytes(image)
    assert reg.get_or_load("o", lambda: [2]) == value
    m.close()


def test_lease_for_a_child(reg: onecopy.Registry, model: pathlib.Path) -> None:
    with reg.open("k", model) as m:
        fd = m.lease()
    del m
    gc.collect()
    assert leased(reg, "k")
    os.close(fd)
    assert not leased(reg, "k")


def test_expiry_and_counts(reg: onecopy.Registry, model: pathlib.Path) -> None:
    from onecopy import _layout as L
    from onecopy import _table as T

    reg.open("k", model).close()
    gc.collect()
    place = reg._here()
    with place.table("x") as t:
        f = t.find("k")
        assert f is not None
        t.set_hint(f.slot, T.TTL, 1)
    m = reg.get("k")
    assert reg.gc().expired == 0
    m.close()
    gc.collect()
    with place.table("x") as t:
        t.set_hint(f.slot, T.PIN, 1)
    assert reg.gc().expired == 0
    with place.table("x") as t:
        t.set_hint(f.slot, T.PIN, 0)
    time.sleep(0.001)
    assert reg.gc().expired + reg.gc().expired == 1 and reg.entries() == []
    assert place.snapshot().q[L.HEADER_COUNT_EVICTED_TTL // 8] == 1


def test_full_table_evicts_the_least_recently_used(shm: str, model: pathlib.Path) -> None:
    r = onecopy.Registry(shm + "/r", slots=8)
    for i in range(8):
        r.open(f"k{i}", model).close()
    held = r.get("k0")
    r.open("new", model).close()
    keys = [e.key for e in r.entries()]
    assert "k0" in keys and "new" in keys and "k1" not in keys and len(keys) == 8
    models = [r.get(k) for k in keys]
    with pytest.raises(onecopy.TableFull):
        r.open("more", model, fallback="raise")
    for m in [*models, held]:
        m.close()
    assert r.check() == []


def test_no_space(shm: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r = onecopy.Registry(shm + "/r", budget=3 << 20)
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(os.urandom(2 << 20))
    b.write_bytes(os.urandom(2 << 20))
    held = r.open("a", a)
    with pytest.raises(onecopy.NoSpace, match="0 B are idle and can be evicted, 2.0 MiB are in use") as e:
        r.open("b", b, fallback="raise")
    assert e.value.pids == (os.getpid(),) and f"2.0 MiB are in use by pid {os.getpid()} (" in e.value.text
    assert e.value.budget == 3 << 20 and e.value.headroom >= -1 and e.value.need > 2 << 20
    with pytest.warns(RuntimeWarning, match="not shared: not enough memory"), r.open("b", b) as m:
        assert not m.shared and m["b"] == b.read_bytes() and "not enough" in m.reason
    assert r.status("b").backing == "source" and r.stats().fallbacks == 1
    with pytest.raises(onecopy.NoSpace):
        r.get_or_load("o", lambda: __import__("numpy").ones(1 << 20))
    held.close()
    gc.collect()
    with r.open("b", b) as m:  # evicts a
        assert m.shared and [e.key for e in r.entries()] == ["b"]
    gc.collect()
    monkeypatch.setattr(_load.R, "headroom", lambda: 1000)
    with pytest.raises(onecopy.NoSpace, match="the cgroup of this process has 1000 B left"):
        r.open("c", a, fallback="raise")
    assert r.check() == []


def test_memory_that_goes_during_the_load(
    reg: onecopy.Registry, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(os.urandom(9 << 20))
    left = [None, 100]
    monkeypatch.setattr(_load.R, "headroom", lambda: left.pop(0) if len(left) > 1 else left[0])
    with pytest.raises(onecopy.NoSpace):
        reg.open("k", tmp_path / "f", fallback="raise")
    assert os.listdir(reg.dir + "/v1/m") == []


def test_a_writer_that_is_left_is_found(
    reg: onecopy.Registry, model: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    real = _segment.Pending.seal

    def seal(self: Any) -> int:
        if len(kept) < 1:
            kept.append(os.dup(self.fd))
        return real(self)

    monkeypatch.setattr(_segment.Pending, "seal", seal)
    with reg.open("k", model) as m:  # the second copy is nobody else's
        m.verify()
    os.close(kept[0])


def test_errors_can_be_pickled() -> None:
    import pickle

    e = onecopy.SourceChanged("version", "1", "2")
    e.op, e.key = "load", "k"
    again = pickle.loads(pickle.dumps(e))
    assert str(again) == str(e) and again.field == "version" and type(again) is onecopy.SourceChanged
    e2 = pickle.loads(pickle.dumps(errors.Untrusted("x", "/p")))
    assert str(e2) == "/p: x"
    for n, text in [(5, "5 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (1 << 62, "4.0 EiB")]:
        assert errors.size(n) == text
    for num, kind in [
        (28, errors.NoSpace),
        (24, errors.Limit),
        (23, errors.Limit),
        (12, errors.Limit),
        (5, errors.Error),
    ]:
        assert type(errors.from_os(OSError(num, "x"), "op", "/p")) is kind
    with pytest.raises(errors.NoSpace, match="load: /x: not enough memory"), errors.operation("load"):
        raise OSError(28, "x", "/x")


def test_an_expired_model_goes_when_somebody_opens(reg: onecopy.Registry, model: pathlib.Path) -> None:
    from onecopy import _table as T

    reg.open("a", model).close()
    reg.open("b", model).close()
    gc.collect()
    with reg._here().table("x") as t:
        f = t.find("a")
        assert f is not None
        for h in (T.TTL, T.IDLE_SINCE, T.LAST_ATTACH, T.LAST_RELEASE):
            t.set_hint(f.slot, h, 1)
    assert [e.key for e in onecopy.Registry(reg.dir, must_exist=True).entries()] == ["a", "b"]
    assert [e.key for e in onecopy.Registry(reg.dir).entries()] == ["b"]


def test_what_the_dead_left_makes_room_first(shm: str, model: pathlib.Path) -> None:
    """Nothing is evicted while there is memory that belongs to nobody."""
    reg = onecopy.Registry(shm + "/r", threads=1, budget=4 << 20)
    reg.open("a", model).close()
    stray = pathlib.Path(reg.dir, "v1", "m", "0123456789abcdef-7")
    stray.mkdir()
    (stray / "data").write_bytes(bytes(3 << 20))
    (model / "a.bin").write_bytes(bytes(2 << 20))
    reg.open("b", model).close()
    assert [e.key for e in reg.entries()] == ["a", "b"] and not stray.exists()
    (model / "a.bin").write_bytes(bytes(5 << 20))
    with pytest.raises(onecopy.NoSpace):
        reg.open("c", model, fallback="raise")
    assert [e.key for e in reg.entries()] == ["a", "b"] and reg.check() == []


def test_a_name_that_is_taken_is_left_alone(reg: onecopy.Registry, model: pathlib.Path) -> None:
    with reg.open("a", model) as m:
        taken = (
            pathlib.Path(os.path.dirname(os.path.dirname(m.path)))
            / f"{os.path.basename(os.path.dirname(m.path))[:17]}2.manifest"
        )
    taken.write_text("a stranger's")
    with open(taken) as lease:
        fcntl.flock(lease, fcntl.LOCK_SH)
        with pytest.raises(errors.Error):
            reg.open("b", model)
        assert taken.read_text() == "a stranger's"
        reg.open("b", model).close()
