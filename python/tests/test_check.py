"""What check and gc make of damage that only a stranger does: the same as Go's (registry/repair_linux_test.go)."""

from __future__ import annotations

import gc
import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

import onecopy
from onecopy import _layout as L
from onecopy import _table as T

FILES = {"one": os.urandom(1000), "sub/two": os.urandom(1000)}


class Scene(NamedTuple):
    """A registry with the idle models "a" and "b"."""

    reg: onecopy.Registry
    a: onecopy.Entry
    b: onecopy.Entry

    @property
    def v1(self) -> pathlib.Path:
        return pathlib.Path(self.reg.dir, L.FOLDER)

    def gen(self, e: onecopy.Entry, ext: str = "") -> pathlib.Path:
        return pathlib.Path(os.path.dirname(e.path) + ext)

    def lock(self, key: str) -> pathlib.Path:
        return self.v1 / L.LOCKS_DIR / (L.STRIPE_LOCK % T.stripe(key))

    def word(self, key: str, state: int, gen: int) -> None:
        """Stores a slot's word as no writer of ours would."""
        place = self.reg._here()
        f = place.find(key)
        assert f is not None
        with open(self.v1 / L.TABLE_FILE, "r+b", buffering=0) as table:
            os.pwrite(table.fileno(), T.make_word(state, gen).to_bytes(8, "little"), place.word_offset(f.slot))


def state_nobody_knows(s: Scene) -> None:
    s.word("a", 99, s.a.generation)


def generation_never_given_out(s: Scene) -> None:
    s.word("a", L.READY, 1 << 40)


def counter_used_up(s: Scene) -> None:
    with s.reg._here().table("x") as t:
        t.q[L.HEADER_GENERATION // 8] = L.MAX_GEN


def counter_put_back(s: Scene) -> None:
    with s.reg._here().table("x") as t:
        t.q[L.HEADER_GENERATION // 8] = 0


def two_slots_of_one_key(s: Scene) -> None:
    with s.reg._here().table("x") as t:
        f = t.find("b")
        assert f is not None
        t.set_key(f.slot, "a")


def two_slots_of_one_generation(s: Scene) -> None:
    s.word("b", L.READY, s.a.generation)


def key_not_in_the_index(s: Scene) -> None:
    with s.reg._here().table("x") as t:
        f = t.find("a")
        assert f is not None
        t.index_delete(f.slot, "a")


def entry_too_many_in_the_index(s: Scene) -> None:
    with s.reg._here().table("x") as t:
        t.index_insert(7, "nobody")


def another_version(s: Scene) -> None:
    os.mkdir(s.v1.parent / "v7")


def name_beside_the_versions(s: Scene) -> None:
    (s.v1.parent / "notes.txt").touch()


def dead_loader_of_a_replacement(s: Scene) -> None:
    with s.reg._here().table("x") as t:
        f = t.find("a")
        assert f is not None
        t.set_hint(f.slot, T.LOAD_START, 1)


def dead_remover(s: Scene) -> None:
    s.word("a", L.EVICTING, s.a.generation)


def no_manifest(s: Scene) -> None:
    os.unlink(s.gen(s.a, L.MANIFEST_EXT))


def garbage_as_manifest(s: Scene) -> None:
    swap(s.gen(s.a, L.MANIFEST_EXT), b'{"schema": 1}')


def manifest_of_another_key(s: Scene) -> None:
    swap(s.gen(s.a, L.MANIFEST_EXT), s.gen(s.b, L.MANIFEST_EXT).read_bytes())


def fifo_as_manifest(s: Scene) -> None:
    os.unlink(s.gen(s.a, L.MANIFEST_EXT))
    os.mkfifo(s.gen(s.a, L.MANIFEST_EXT), 0o444)


def no_digests(s: Scene) -> None:
    os.unlink(s.gen(s.a, L.DIGESTS_EXT))


def no_file(s: Scene) -> None:
    os.unlink(s.a.path + "/one")


def file_in_a_folders_place(s: Scene) -> None:
    shutil.rmtree(s.a.path)
    pathlib.Path(s.a.path).touch(0o444)


def link_in_a_files_place(s: Scene) -> None:
    os.unlink(s.a.path + "/one")
    os.symlink("/etc/passwd", s.a.path + "/one")


def shorter_file(s: Scene) -> None:
    os.truncate(s.a.path + "/one", 10)


def writable_file(s: Scene) -> None:
    os.chmod(s.a.path + "/one", 0o644)


def files_too_many(s: Scene) -> None:
    pathlib.Path(s.a.path, "more").touch()
    pathlib.Path(s.a.path, "sub", "more").touch()


def changed_byte(s: Scene) -> None:
    swap(pathlib.Path(s.a.path, "one"), FILES["one"][:500] + bytes([FILES["one"][500] ^ 1]) + FILES["one"][501:])


def generation_nobody_names(s: Scene) -> None:
    s.word("a", L.FREE, s.a.generation)


def manifest_that_cannot_be_opened(s: Scene) -> None:
    stem = s.gen(s.a).name.rpartition("-")[0]
    os.symlink("/etc/passwd", s.v1 / L.MODELS_DIR / f"{stem}-999{L.MANIFEST_EXT}")


def name_that_means_nothing(s: Scene) -> None:
    (s.v1 / L.MODELS_DIR / "notes.txt").touch()


def link_in_a_lock_files_place(s: Scene) -> None:
    os.unlink(s.lock("a"))
    os.symlink("/etc/passwd", s.lock("a"))


def somebody_elses_lock_file(s: Scene) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(s.lock("a"), 12345, -1)


def swap(path: pathlib.Path, data: bytes) -> None:
    os.unlink(path)
    path.write_bytes(data)
    path.chmod(0o444)


DAMAGES: list[Callable[[Scene], None]] = [
    state_nobody_knows, generation_never_given_out, counter_used_up, counter_put_back, two_slots_of_one_key,
    two_slots_of_one_generation, key_not_in_the_index, entry_too_many_in_the_index, another_version,
    name_beside_the_versions, dead_loader_of_a_replacement, dead_remover, no_manifest, garbage_as_manifest,
    manifest_of_another_key, fifo_as_manifest, no_digests, no_file, file_in_a_folders_place, link_in_a_files_place,
    shorter_file, writable_file, files_too_many, changed_byte, generation_nobody_names,
    manifest_that_cannot_be_opened, name_that_means_nothing, link_in_a_lock_files_place, somebody_elses_lock_file,
]  # fmt: skip


def follow(s: Scene, p: onecopy.Problem) -> None:
    """Does what a problem's repair says, with Python's own calls."""
    if p.repair == "shmctl gc":
        s.reg.gc()
    elif p.repair.startswith("shmctl rm "):
        try:
            s.reg.remove(p.key)
        except onecopy.NotFound:
            pass  # by the repair of another problem
    elif p.repair.startswith("chmod"):
        os.chmod(p.path, 0o444)
    else:
        assert "remove " in p.repair, p
        if os.path.lexists(p.path):
            os.unlink(p.path)
        if p.repair.endswith("gc"):
            s.reg.gc()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damage(reg: onecopy.Registry, shmctl: str, tmp_path: pathlib.Path, damage: Callable[[Scene], None]) -> None:
    for name, data in FILES.items():
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_bytes(data)
    for key in ("a", "b"):
        reg.open(key, tmp_path / "m").close()
    gc.collect()
    s = Scene(reg, *reg.entries())
    damage(s)
    problems = reg.check(data=True)
    out = subprocess.run(
        [shmctl, "--dir", reg.dir, "check", "--data", "-o", "json"], capture_output=True, text=True, timeout=60
    )
    theirs = json.loads(out.stdout)["problems"]
    assert problems and sorted(problems) == sorted(
        onecopy.Problem(p["kind"], p["key"] or "", p["path"] or "", p["text"], p["repair"] or "", p["note"])
        for p in theirs
    )
    for by_gc in (True, False):  # what gc repairs first: the rest may be gone with it
        for p in problems:
            if not p.note and by_gc == (p.repair == "shmctl gc"):
                follow(s, p)
        problems = reg.check(data=True)
    assert [p for p in problems if not p.note] == []
    for key in ("a", "b"):
        with reg.open(key, tmp_path / "m") as m:
            assert {name: bytes(m[name]) for name in m} == FILES
            m.verify()
    shutil.rmtree(s.v1.parent / "v7", ignore_errors=True)
    del m
    gc.collect()


@pytest.mark.parametrize("counter", [0, 1, L.MAX_GEN])
def test_load_mends_the_counter(reg: onecopy.Registry, tmp_path: pathlib.Path, counter: int) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    for key in ("a", "b"):
        reg.open(key, tmp_path / "weights").close()
    with reg._here().table("x") as t:
        t.set_generation(counter)
    with reg.open("c", tmp_path / "weights") as m:
        assert m.loaded and m.generation == 3
    assert [e.generation for e in reg.entries()] == [1, 2, 3] and reg.check(data=True) == []


def test_damaged_header_under_an_open_registry(reg: onecopy.Registry, tmp_path: pathlib.Path) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    reg.open("a", tmp_path / "weights").close()
    table = pathlib.Path(reg.dir, L.FOLDER, L.TABLE_FILE)
    with open(table, "r+b", buffering=0) as f:
        good = os.pread(f.fileno(), 8, L.HEADER_EPOCH)
        os.pwrite(f.fileno(), bytes(8), L.HEADER_EPOCH)
        (problem,) = reg.check("a")
        os.pwrite(f.fileno(), good, L.HEADER_EPOCH)
    assert problem.kind == "table" and problem.path == str(table) and "checksum" in problem.text
    assert "remove the directory" in problem.repair
    gc.collect()


def test_manifest_that_stays_locked(reg: onecopy.Registry, start: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    for key in ("a", "b"):
        reg.open(key, tmp_path / "weights").close()
    gc.collect()
    manifest = os.path.dirname(reg.entries()[0].path) + L.MANIFEST_EXT
    holder = start(
        "import fcntl, sys\n"
        f"f = open({manifest!r})\n"
        "fcntl.flock(f, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    assert holder.line() == "locked"
    (problem,) = reg.check(data=True)
    assert problem[:3] == ("lock", "a", manifest) and "nobody can get the model" in problem.text
    assert reg.check("b") == []
    holder.kill()
    assert reg.check(data=True) == []
