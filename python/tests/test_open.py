"""Opening and verifying a registry's directory: hazard H30."""

from __future__ import annotations

import gc
import os
import pathlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

import onecopy
from conftest import ROOT, SRC
from onecopy import _attach, _dir, _load, _locks, _place, _remove, _segment

ME = os.geteuid()
root_only = pytest.mark.skipif(ME != 0, reason="needs root to become another user")


@pytest.mark.parametrize("umask", [0, 0o022, 0o077, 0o777])
def test_modes_do_not_depend_on_the_umask(shm: str, model: pathlib.Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        for mode in (0o700, 0o755):
            d = f"{shm}/{mode:o}"
            onecopy.Registry(d, mode=mode).open("k", model).close()
            seen = {
                p: os.stat(f"{d}/{p}").st_mode & 0o777 for p in ("", "v1", "v1/m", "v1/w", "v1/registry", "v1/w/table")
            }
            assert seen == {
                "": mode,
                "v1": mode,
                "v1/m": mode,
                "v1/w": 0o700,
                "v1/registry": 0o644,
                "v1/w/table": 0o600,
            }
    finally:
        os.umask(old)


HOSTILE: dict[str, tuple[Callable[[str], object], str]] = {
    "symlink": (lambda p: os.symlink("/tmp", p), "is a symbolic link"),
    "fifo": (os.mkfifo, "is a FIFO"),
    "file": (lambda p: open(p, "w").close(), "is a file"),
    "group": (lambda p: (os.mkdir(p), os.chmod(p, 0o770)), "mode 0770 lets others"),
    "world": (lambda p: (os.mkdir(p), os.chmod(p, 0o707)), "mode 0707 lets others"),
    "v1 symlink": (lambda p: (os.mkdir(p), os.symlink("/tmp", p + "/v1")), "is a symbolic link"),
    "table symlink": (lambda p: (os.makedirs(p + "/v1"), os.symlink("/etc/passwd", p + "/v1/registry")), "is a symbolic link"),
    "table fifo": (lambda p: (os.makedirs(p + "/v1"), os.mkfifo(p + "/v1/registry", 0o600)), "is a FIFO"),
    "table mode": (lambda p: (os.makedirs(p + "/v1"), open(p + "/v1/registry", "w").close(), os.chmod(p + "/v1/registry", 0o666)), "lets others write"),
    "table link": (lambda p: (os.makedirs(p + "/v1"), open(p + "/x", "w").close(), os.link(p + "/x", p + "/v1/registry")), "hard link"),
}  # fmt: skip


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_names(shm: str, how: str) -> None:
    os.umask(0o022)
    make, text = HOSTILE[how]
    make(shm + "/r")
    with pytest.raises(onecopy.Untrusted, match=text):
        onecopy.Registry(shm + "/r").get("k")


@root_only
def test_foreign_owner_by_name(shm: str) -> None:
    os.mkdir(shm + "/r", 0o755)
    os.makedirs(shm + "/r/v1")
    os.chown(shm + "/r", 65533, 65533)
    with pytest.raises(onecopy.Untrusted, match="owned by uid 0"):
        onecopy.Registry(shm + "/r").get("k")


def run_as(uid: int, code: str, *args: str) -> str:
    full = "import os,sys\nos.setgid(%d);os.setuid(%d)\nimport onecopy\n%s" % (uid, uid, code)
    p = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {SRC!r})\n" + full, *args],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert p.returncode == 0, p.stderr
    return p.stdout


@root_only
def test_readers_of_another_uid(shm: str, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    parents = [*pathlib.Path(os.path.realpath(sys.executable)).parents, *pathlib.Path(SRC).parents]
    if not all(p.stat().st_mode & 0o001 for p in parents):
        pytest.skip("the interpreter lies where another user cannot read it")
    os.chmod(shm, 0o755)
    r = onecopy.Registry(shm + "/r", mode=0o755)
    m = r.open("k", model)
    out = run_as(65533, "r=onecopy.Registry(sys.argv[1])\nprint(bytes(r.get('k')['sub/b.txt']))", shm + "/r")
    assert out == "b'hello'\n"
    m.close()


@root_only
def test_a_reader_makes_no_registry_in_the_place_of_a_deleted_one(shm: str) -> None:
    from onecopy import _arena, _load, _model, _remove  # noqa: F401  # the other user may not read them

    def be(uid: int) -> None:
        os.seteuid(0)
        os.seteuid(uid)

    os.chmod(shm, 0o1777)
    be(65533)
    try:
        owner = onecopy.Registry(shm + "/r", mode=0o755)
        owner.get_or_load("k", lambda: [1])
        be(65532)
        reader = onecopy.Registry(shm + "/r", trust_owner=65533)
        assert reader.get_or_load("k", list) == [1]
        be(65533)
        shutil.rmtree(shm + "/r")
        be(65532)
        reader.release("k")
        for _ in range(2):
            with pytest.raises(onecopy.NoRegistry):
                reader.get_or_load("k", lambda: [2])
        be(65533)
        owner.release("k")
        assert owner.get_or_load("k", lambda: [3]) == [3]
        be(65532)
        assert reader.get_or_load("k", lambda: [4]) == [3]
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    "option", [{"slots": -5}, {"slots": 7}, {"slots": 1 << 20}, {"budget": -1}, {"budget": 1 << 70}]
)
def test_options_out_of_range(shm: str, option: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="want"):
        onecopy.Registry(shm + "/r", **option)  # type: ignore[arg-type]


def test_a_relative_directory_stays_where_it_is(shm: str, model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shm)
    r = onecopy.Registry("rel")
    r.open("k", model, fallback="raise").close()
    monkeypatch.chdir("/")
    shutil.rmtree(shm + "/rel")
    r.open("k", model, fallback="raise").close()
    assert r.dir == shm + "/rel" and os.path.isdir(r.dir)


def test_refuses_what_is_no_tmpfs(tmp_path: pathlib.Path) -> None:
    if os.stat(tmp_path).st_dev == os.stat("/dev/shm").st_dev:
        pytest.skip("the temporary folder is a tmpfs")
    with pytest.raises(onecopy.Unsupported, match="not on a tmpfs"):
        onecopy.Registry(tmp_path / "r").get("k")


def test_versions_and_damage(shm: str) -> None:
    golden = ROOT / "testdata" / "layout" / "v1"
    for name, kind in [("version-2", onecopy.VersionMismatch), ("byte-order", onecopy.VersionMismatch),
                       ("bad-magic", onecopy.Corrupt), ("bad-short", onecopy.Corrupt)]:  # fmt: skip
        d = pathlib.Path(shm) / name
        (d / "v1").mkdir(parents=True)
        d.chmod(0o700)
        shutil.copy(golden / f"{name}.bin", d / "v1" / "registry")
        (d / "v1" / "registry").chmod(0o644)
        with pytest.raises(kind):
            onecopy.Registry(d).get("k")
        with pytest.raises(kind):
            onecopy.Registry(d).open("k", __file__, fallback="auto")


def test_own_directory_that_shuts_us_out_is_repaired(shm: str, model: pathlib.Path) -> None:
    r = onecopy.Registry(shm + "/r")
    r.open("k", model).close()
    os.chmod(shm + "/r/v1/m", 0o500)
    shutil.rmtree(shm + "/r/v1/w")
    again = onecopy.Registry(shm + "/r")
    with again.open("k2", model):
        assert os.stat(shm + "/r/v1/m").st_mode & 0o777 == 0o700


def test_missing_lock_folder_under_a_running_process(shm: str, model: pathlib.Path) -> None:
    r = onecopy.Registry(shm + "/r")
    r.open("k", model).close()
    shutil.rmtree(shm + "/r/v1/w")
    with r.open("k2", model) as m:
        assert m.loaded
    assert r.check() == []


def test_many_open_at_once(shm: str) -> None:
    barrier, seen = threading.Barrier(12), []

    def work() -> None:
        r = onecopy.Registry(shm + "/r")
        barrier.wait()
        r.entries() if False else r._here()
        seen.append(r._here().ident)

    threads = [threading.Thread(target=work) for _ in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(seen) == 12 and len(set(seen)) == 1


@pytest.mark.parametrize("what", ["files", "object"])
def test_deleted_while_it_is_opened(shm: str, model: pathlib.Path, what: str) -> None:
    """At each call of a function on the way, and soon again: it is made, or loaded, once more."""
    modules = {m.__file__ for m in (_attach, _dir, _load, _locks, _place, _remove, _segment)}
    left = at = 0

    def delete(frame: Any, event: str, arg: object) -> None:
        nonlocal left
        if event == "call" and frame.f_code.co_filename in modules:
            left -= 1
            if left in (0, -7):
                sys.setprofile(None)
                shutil.rmtree(shm + "/r", ignore_errors=True)
                sys.setprofile(delete)

    while left <= 0:
        at = left = at + 1
        r = onecopy.Registry(shm + "/r", slots=8)
        sys.setprofile(delete)
        try:
            if what == "files":
                r.open("k", model, fallback="raise").close()
            else:
                assert r.get_or_load("k", lambda: [1], fallback="raise") == [1]
        finally:
            sys.setprofile(None)
        shutil.rmtree(shm + "/r", ignore_errors=True)


def test_lock_file_that_is_none(shm: str, model: pathlib.Path) -> None:
    r = onecopy.Registry(shm + "/r")
    r.open("k", model).close()
    os.unlink(shm + "/r/v1/w/table")
    os.mkfifo(shm + "/r/v1/w/table", 0o600)
    with pytest.raises(onecopy.Untrusted, match="not a regular file"):
        r.gc()
    os.unlink(shm + "/r/v1/w/table")
    os.symlink("/etc/passwd", shm + "/r/v1/w/table")
    with pytest.raises(onecopy.Untrusted, match="not a regular file"):
        r.gc()


def test_probe_finds_locks_that_lie(shm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for answers, text in [([True], "does not last"), ([False, False], "outlives")]:
        _place._probed.clear()
        left = list(answers)
        monkeypatch.setattr(_locks, "try_exclusive", lambda fd: left.pop(0))
        r = onecopy.Registry(shm + "/r")
        with pytest.raises(onecopy.Unsupported, match=text):
            r.open("k", __file__, fallback="raise")
    _place._probed.clear()


def test_default_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECOPY_DIR", "/dev/shm/x")
    assert onecopy.Registry().dir == "/dev/shm/x"
    monkeypatch.delenv("ONECOPY_DIR")
    assert onecopy.Registry().dir == f"/dev/shm/onecopy-{ME}"
    assert "onecopy-" in repr(onecopy.Registry())


def test_a_copy_is_the_path(reg: onecopy.Registry, model: pathlib.Path) -> None:
    """transformers calls str() on the path that it is given, and copies and pickles what it keeps of it."""
    import copy
    import pickle

    with reg.open("k", model) as m:
        path = os.fspath(m)
        assert str(m) == f"{m}" == path and os.path.isdir(str(m)) and repr(m) != path
        for copied in (copy.copy(m), copy.deepcopy({"name": m})["name"], pickle.loads(pickle.dumps(m))):
            assert copied == path and type(copied) is str


@pytest.mark.skipif(not shutil.which("systemd-tmpfiles"), reason="needs systemd-tmpfiles")
def test_systemd_tmpfiles(shm: str, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with onecopy.Registry(shm) as reg:
        reg.open("k", model).close()
        before = sorted(pathlib.Path(shm).rglob("*"))
        rule = tmp_path / "rule.conf"
        rule.write_text(f"e {shm} - - - 0\n")
        subprocess.run(["systemd-tmpfiles", "--clean", rule], check=True)
        assert sorted(pathlib.Path(shm).rglob("*")) == before


@pytest.mark.parametrize("limit", [0, 100, 100_000, 2 << 20])
@pytest.mark.parametrize("there", [True, False])
def test_what_is_written_in_part_gets_no_name(
    reg: onecopy.Registry, start: Any, tmp_path: pathlib.Path, limit: int, there: bool
) -> None:
    """ulimit -f cuts a write short before it refuses the rest, as a tmpfs does that is nearly full."""
    (tmp_path / "w.bin").write_bytes(os.urandom(3 << 20))
    if there:
        reg.stats()
        reg.entries()
    child = start(
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, -1))\n"
        "try: onecopy.open('k', sys.argv[1], fallback='raise')\n"
        "except onecopy.Limit as e: print(e)\n",
        str(tmp_path / "w.bin"), PYTHONDONTWRITEBYTECODE="1",
    )  # fmt: skip
    assert "ulimit -f" in child.line()
    with reg.open("k", tmp_path / "w.bin") as m:
        assert m.loaded
        m.verify()


def test_read_only_mount(reg: onecopy.Registry, start: Any, shm: str, tmp_path: pathlib.Path) -> None:
    """As a container has it that is only to read."""
    (tmp_path / "w.bin").write_bytes(b"weights")
    view = tmp_path / "view"
    view.mkdir()
    reg.open("k", tmp_path / "w.bin").close()
    if os.geteuid() or subprocess.run(["mount", "--bind", shm, view]).returncode:
        pytest.skip("needs to mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", view], check=True)
        ro = onecopy.Registry(view / "r")
        with ro.open("k", tmp_path / "w.bin") as m:
            assert not m.loaded and m["w.bin"] == b"weights"
            with pytest.raises(onecopy.InUse):
                reg.remove("k")
        for call in (
            lambda: ro.open("new", tmp_path / "w.bin", fallback="raise"), lambda: ro.remove("k"), ro.gc, lambda: ro.pin("k"),
        ):  # fmt: skip
            with pytest.raises(onecopy.ReadOnly, match="is mounted so: read-only file system"):
                call()
        assert ro.check(data=True) == []
        del m
        gc.collect()
        ro.close()
        child = start(
            "def slow():\n    print('begun')\n    sys.stdin.readline()\n    return 7\n"
            "onecopy.get_or_load('slow', slow, fallback='raise')\n"
        )
        child.line()
        with onecopy.Registry(view / "r") as ro:
            with pytest.raises(onecopy.Timeout):
                ro.get_or_load("slow", lambda: 8, fallback="raise", timeout=0.05)
            child.go()
            assert ro.get_or_load("slow", lambda: 8, fallback="raise") == 7
    finally:
        subprocess.run(["umount", "-l", view], check=True)


def test_closed_standard_streams(reg: onecopy.Registry, start: Any, tmp_path: pathlib.Path) -> None:
    """A daemon has closed them, and a library in it writes there all the same."""
    data = os.urandom((5 << 20) + 7)
    (tmp_path / "w.bin").write_bytes(data)
    child = start(
        "import threading\n"
        "onecopy.gc()\n"  # opens the registry, whose folders would take the numbers
        "for fd in range(3): os.close(fd)\n"
        "def noise():\n"
        "    while True:\n"
        "        for fd in range(3):\n"
        "            try: os.write(fd, b'noise' * 100)\n"
        "            except OSError: pass\n"
        "threading.Thread(target=noise, daemon=True).start()\n"
        "for n in range(10):\n"
        "    onecopy.open(f'k{n}', sys.argv[1], fallback='raise').close()\n"
        "os._exit(7)\n",
        str(tmp_path / "w.bin"),
    )
    assert child.wait() == 7
    assert reg.check(data=True) == []
    for n in range(10):
        with reg.get(f"k{n}") as m:
            assert m["w.bin"] == data
    del m
    gc.collect()
