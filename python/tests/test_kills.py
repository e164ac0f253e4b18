"""kill -9 at every named step: whatever is left, another process finds or makes what it wants.

ONECOPY_TEST_KILLS is the number of kills at each step (1), ONECOPY_TEST_SHARD=2/3 takes the
second third of the steps, and ONECOPY_TEST_REPORT=PATH keeps PATH.json and PATH.md. The
process that is killed is forked from one that has imported everything and used nothing,
because starting Python takes longer than all that it then does.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import gc
import json
import os
import pathlib
import platform
import re
import shutil
import time
from collections.abc import Iterator

import numpy as np
import pytest

import onecopy
from conftest import SRC, Proc
from onecopy import _table as T

KILLS = int(os.environ.get("ONECOPY_TEST_KILLS", "1"))
SHARD = os.environ.get("ONECOPY_TEST_SHARD", "1/1")
REPORT = os.environ.get("ONECOPY_TEST_REPORT")

# A line of input is "STEP SKIP DIRECTORY PATH": a child does everything that has a named
# step, and is killed when it comes to STEP for the SKIP+1st time. The answer is how it ended.
SERVER = """
import gc, signal, traceback
import numpy as np
from onecopy import _arena, _attach, _check, _crash, _inspect, _load, _model, _objects, _place, _remove
from onecopy import _table as T
from onecopy._names import gen_name

def fails(fn, kind=onecopy.Error):
    try:
        fn()
    except kind:
        gc.collect()
        return
    raise AssertionError("no error")

def work(directory, path):
    onecopy.Registry(directory + "-new", threads=1, slots=64).open("file", path).close()
    r = onecopy.Registry(directory, threads=1)
    r.open("file", path).close()
    r.pin("file")
    r.unpin("file")
    assert r.get_or_load("k", lambda: np.arange(1 << 16))[3] == 3
    r.get_or_load("w", lambda w: w.empty(1 << 18), on_change="replace")
    r.release("w")
    gc.collect()
    r.remove("w")
    with r.open("file", path):
        r.open("file", path, replace=True).close()
    gc.collect()
    r.open("file", path, replace=True).close()
    fails(lambda: r.get_or_load("bad", lambda: 1 / 0), onecopy.LoadFailed)

    def evicted(w):
        onecopy.Registry(directory).remove("w")
        return [2]
    r.get_or_load("w", lambda: [1], on_change="replace")
    r.release("w")
    gc.collect()
    assert r.get_or_load("w", evicted, version="2", on_change="replace") == [2]
    r.release("w")
    gc.collect()

    # Two kinds of damage that a third party can do: a manifest vanishes, and the name of
    # a folder is taken while the generation is made.
    p = r._here()
    word = p.find("w").word
    p.m.unlink(gen_name(p.ident.epoch, T.gen_of(word)) + ".manifest")
    r.gc()
    r.check()

    def blocked():
        os.mkdir(p.m.join(gen_name(p.ident.epoch, p.snapshot().generation)))
        return [1]
    fails(lambda: r.get_or_load("blocked", blocked))

gc.freeze()  # what was imported is no garbage
print("ready", flush=True)
for line in sys.stdin:
    said, says = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            step, skip, *paths = line.split()
            _crash.hit = _crash._armed(step, int(skip), None, None)
            work(*paths)
            os.write(says, b"done")
        except BaseException:
            os.write(says, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(0)
    os.close(says)
    with open(said) as f:
        text = f.read()
    killed = os.waitpid(pid, 0)[1] == signal.SIGKILL
    print(repr("killed" if killed else text), flush=True)
"""
KILLED, DONE = "'killed'", "'done'"


def steps() -> list[str]:
    """Every name that the package passes to the hook."""
    names = set()
    for path in pathlib.Path(SRC, "onecopy").glob("_*.py"):
        text = path.read_text()
        names |= set(re.findall(r'_crash\.hit\("([^"]+)"\)', text))
        names |= set(re.findall(r'\.table\("([^"]+)"', text))
        for prefix in re.findall(r'Removal\([^)]*, "([a-z]+)"\)', text):
            names |= {prefix + ".unlink-payload", prefix + ".rmdir"}
    return sorted(names)


# What another process must have died of, for a step to be reached.
AFTER = {
    "reclaim.unlink-dead-load": "load.link-manifest 1",  # of "w": the new registry has the first
    **dict.fromkeys(
        [
            "reclaim." + s
            for s in ["lock-manifest", "try-shared", "undo", "unlink-manifest", "free", "unlink-payload", "rmdir"]
        ],
        "evict.mark 0",
    ),
    **dict.fromkeys(
        ["collect." + s for s in ["lock-manifest", "unlink-manifest", "unlink-payload", "rmdir"]],
        "publish.unlock-key 2",  # of a replacement, while the old generation is leased
    ),
}
LEASED = ("reclaim.try-shared", "reclaim.undo")  # by somebody who had opened it before


def of_this_shard() -> list[str]:
    number, _, of = SHARD.partition("/")
    return steps()[int(number) - 1 :: int(of)]


TEXT = """# Python processes killed at every named step

Kept by `make python-kills`, which ran on {machine}: each row is of its own date.

A process forks from one that has imported the package; the child opens a new registry, loads, replaces, pins, removes,
fails, evicts and repairs, and kills itself with SIGKILL at the named step, at the first, second or third time that it
comes there. After each kill another process opens the file's model and reads it, digests it again, gets the object,
collects, and checks everything with data; nothing may be lost, left over or damaged.

{total} kills at {count} steps; {bad}.

| step | kills | sound afterwards | Python | date |
| --- | ---: | ---: | --- | --- |
"""


def report(step: str, kills: int, ok: bool) -> None:
    """Adds a step to the report; shards may run at the same time."""
    if not REPORT:
        return
    with open(REPORT + ".json", "a+", encoding="utf-8") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.seek(0)
        text = f.read()
        rows = json.loads(text)["steps"] if text else {}
        rows[step] = {
            "kills": kills, "sound": kills if ok else kills - 1, "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        rows = {s: rows[s] for s in sorted(rows) if s in steps()}
        f.truncate(0)
        machine = f"{os.cpu_count()} processors, Linux {platform.release()} {platform.machine()}"
        json.dump({"machine": machine, "steps": rows}, f, indent=1)
        f.write("\n")
        total, sound = (sum(r[k] for r in rows.values()) for k in ("kills", "sound"))
        bad = (
            "after each of them everything was sound" if total == sound else f"after {total - sound} not all was sound"
        )
        with open(REPORT + ".md", "w", encoding="utf-8") as md:
            md.write(TEXT.format(machine=machine, total=total, count=len(rows), bad=bad))
            for s, r in rows.items():
                md.write(f"| {s} | {r['kills']} | {r['sound']} | {r['python']} | {r['date']} |\n")


def test_steps_are_found() -> None:
    assert len(steps()) > 40 and "load.link-manifest" in steps() and "evict.rmdir" in steps()


@pytest.fixture(scope="module")
def server() -> Iterator[Proc]:
    p = Proc(SERVER, "/nowhere")
    assert p.line() == "ready"
    gc.freeze()
    yield p
    gc.unfreeze()
    p.kill()


@contextlib.contextmanager
def leases(directory: str) -> Iterator[None]:
    fds = []
    for m in pathlib.Path(directory, "v1", "m").glob("*.manifest"):
        fds.append(os.open(m, os.O_RDONLY))
        fcntl.flock(fds[-1], fcntl.LOCK_SH | fcntl.LOCK_NB)
    try:
        yield
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize("step", of_this_shard())
def test_kill_at_every_step(shm: str, server: Proc, model: pathlib.Path, step: str) -> None:
    reg = onecopy.Registry(shm + "/r", threads=1, slots=64)
    reg.open("file", model).close()
    sound(reg.dir, model)

    def run(step: str, skip: int) -> str:
        with reg._here().table("x") as t:  # no back-off after so many deaths
            for slot in range(t.slots):
                t.set_hint(slot, T.DEATHS, 0)
                t.set_hint(slot, T.RETRY_AFTER, 0)
        server.go(f"{step} {skip} {reg.dir} {model}")
        return server.line()

    kills, times = 0, 1 if step in AFTER else 3  # that it comes to the step
    try:
        while kills < KILLS:
            skip = kills % times
            if step in AFTER:
                first, n = AFTER[step].split()
                assert run(first, int(n)) == KILLED
            with leases(reg.dir) if step in LEASED else contextlib.nullcontext():
                code = run(step, skip)
            assert code in (KILLED, DONE), ast.literal_eval(code)
            assert code == KILLED or skip, "the step was not reached"
            kills += code == KILLED
            sound(reg.dir, model)
            if code == DONE:
                times = skip
    except Exception:
        report(step, kills, False)
        raise
    except KeyboardInterrupt:
        report(step, max(kills - 1, 0), True)  # as far as it came
        raise
    report(step, kills, True)


def sound(directory: str, model: pathlib.Path) -> None:
    """Nothing is lost, nothing is left over."""
    fresh = onecopy.Registry(directory, threads=1)
    with fresh.open("file", model) as m:
        assert m["a.bin"] == (model / "a.bin").read_bytes()
        m.verify()
    del m
    assert fresh.get_or_load("k", lambda: np.arange(1 << 16)).sum() == sum(range(1 << 16))
    fresh.release("k")
    gc.collect()
    fresh.gc()
    assert fresh.check(data=True) == []
    names = os.listdir(directory + "/v1/m")
    assert len(names) == 3 * len(list(fresh._here().snapshot().in_use())), names
    fresh.close()
    new = directory + "-new"
    if os.path.exists(new):
        with onecopy.Registry(new, threads=1, slots=64) as r:
            r.open("file", model).close()
            assert r.check() == []
        shutil.rmtree(new)
