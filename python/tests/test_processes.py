"""Real processes: one load for all, kill -9 at every step, takeover, fork, signals."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

import onecopy
from conftest import SRC
from onecopy import _load

LOAD = """
import numpy as np
def load():
    with open(sys.argv[1], "a") as f:
        f.write("x")
    return {"a": np.arange(1 << 16), "b": np.ones(9)}
v = onecopy.get_or_load("k", load, version="1")
print(int(v["a"].sum()), flush=True)
"""
SUM = str(sum(range(1 << 16)))


def test_one_load_with_many_processes(reg: onecopy.Registry, start: Any, tmp_path: pathlib.Path) -> None:
    n = int(os.environ.get("ONECOPY_TEST_PROCESSES", "16"))
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    code = "open(sys.argv[2]).read()\n" + LOAD
    procs = [start(code, str(tmp_path / "calls"), str(gate)) for _ in range(n)]
    fd = os.open(gate, os.O_WRONLY)  # returns when the first reader is there
    waiting = n
    while waiting:  # all of them: a FIFO lets go when the last writer closes
        waiting = sum(not _blocked(p.pid) for p in procs)
    os.close(fd)
    assert [p.line() for p in procs] == [SUM] * n
    assert (tmp_path / "calls").read_text() == "x"


def _blocked(pid: int) -> bool:
    with open(f"/proc/{pid}/wchan") as f, open(f"/proc/{pid}/stat") as s:
        return s.read().rpartition(")")[2].split()[0] == "S" and f.read() in (
            "pipe_read",
            "anon_pipe_read",
            "fifo_open",
            "0",
        )


def test_a_waiter_takes_over(reg: onecopy.Registry, start: Any, tmp_path: pathlib.Path) -> None:
    calls = tmp_path / "calls"
    code = LOAD.replace(
        'f.write("x")', 'f.write("x")\n    print("in", flush=True)\n    if len(sys.argv) > 2: time.sleep(600)'
    )
    first = start(code, str(calls), "sleep")
    assert first.line() == "in"
    waiters = [start(code, str(calls)) for _ in range(4)]
    first.kill()
    lines = [[p.line() for _ in range(1)][0] for p in waiters]
    assert lines.count("in") == 1 and lines.count(SUM) == 3
    assert waiters[lines.index("in")].line() == SUM
    assert calls.read_text() == "xx"
    assert reg.entries()[0].deaths == 0


def test_waits_are_counted(reg: onecopy.Registry, start: Any) -> None:
    """A wait for a load of another process is one, like that for another thread."""
    loader = start("onecopy.get_or_load('k', lambda: (print('in', flush=True), time.sleep(600)))")
    assert loader.line() == "in"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        mine = pool.submit(reg.get_or_load, "k", lambda: [1])
        while not reg.stats().waits:
            time.sleep(0.001)
        loader.kill()
        assert mine.result() == [1]
    s = reg.stats()
    assert (s.waits, s.takeovers, s.loads) == (1, 1, 1)


def test_no_death_march(reg: onecopy.Registry, start: Any) -> None:
    for i in range(3):
        p = start("onecopy.get_or_load('k', lambda: os.kill(os.getpid(), 9))")
        assert p.wait() == -9
        assert reg.status("k").attempts in (i, i + 1)  # opening cleans up
    with pytest.raises(onecopy.LoadFailed, match="loaders keep dying: 3 were killed in a row") as e:
        reg.get_or_load("k", lambda: [1])
    assert e.value.deaths == 3 and 0 < e.value.retry_after <= 10 and "dmesg" in e.value.hint
    s = reg.status("k")
    assert s.attempts == 3 and 0 < s.retry_after <= 10
    from onecopy import _table as T

    with reg._here().table("x") as t:
        f = t.find("k")
        assert f is not None
        t.set_hint(f.slot, T.RETRY_AFTER, 1)
    assert reg.get_or_load("k", lambda: [1]) == [1]
    assert reg.status("k").attempts == 0


def test_interrupt_in_a_load(reg: onecopy.Registry, start: Any, tmp_path: pathlib.Path) -> None:
    code = """
def load():
    print("in", flush=True)
    time.sleep(600)
try:
    onecopy.get_or_load("k", load)
except KeyboardInterrupt:
    print("interrupted", onecopy.entries(), flush=True)
"""
    p = start(code)
    assert p.line() == "in"
    waiter = start(LOAD, str(tmp_path / "calls"))
    impatient = start("try:\n    onecopy.get_or_load('k', list)\nexcept KeyboardInterrupt: print('stopped')")
    while not any("flock" in _wchans(q.pid) for q in (impatient,)):
        pass
    impatient.p.send_signal(signal.SIGINT)
    assert impatient.line() == "stopped"
    p.p.send_signal(signal.SIGINT)
    assert p.line().startswith("interrupted")
    assert waiter.line() == SUM


def _wchans(pid: int) -> str:
    out = ""
    for t in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{t}/wchan") as f, open(f"/proc/{pid}/task/{t}/syscall") as s:
                out += f.read() + (" flock" if s.read().startswith("73 ") else "")
        except OSError:
            pass
    return out


def test_signals_spoil_no_load(reg: onecopy.Registry, model: pathlib.Path) -> None:
    """Those of a timer, as a profiler has one, with a handler that returns."""
    ticks: list[int] = []
    old = signal.signal(signal.SIGALRM, lambda number, frame: ticks.append(number))
    signal.setitimer(signal.ITIMER_REAL, 1e-3, 2e-4)
    try:
        rounds = 0
        while rounds < 10 or not ticks:
            rounds += 1
            value = reg.get_or_load(f"object-{rounds}", lambda: [bytes([rounds]) * (3 << 20)])
            assert value == [bytes([rounds]) * (3 << 20)]
            with reg.open("files", model, replace=True) as m:
                assert m["a.bin"] == (model / "a.bin").read_bytes()
                m.verify()
            reg.gc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert reg.check() == []


def test_fork(reg: onecopy.Registry, start: Any, model: pathlib.Path) -> None:
    """A child has the parent's models and objects, but none of its locks."""
    code = """
import gc, signal
m = onecopy.open("k", sys.argv[1])
v = onecopy.get_or_load("o", lambda: bytearray(100_000))
pid = os.fork()
if pid == 0:
    assert bytes(m["a.bin"][:2]) == b"\\0\\1" and onecopy.get_or_load("o", list) is v
    with onecopy.open("k", sys.argv[1]) as again:
        assert not again.loaded
    m.close(); del m, again; gc.collect()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert m["a.bin"][1] == 1
pid = os.fork()
if pid == 0:
    m._a.place  # the lease is the child's too
    os.write(1, b"child\\n")  # at once: two processes write here
    sys.stdin.read()
os.write(1, b"%d\\n" % pid)
os.kill(os.getpid(), 9)
"""
    p = start(code, str(model))
    lines = {p.line(), p.line()}
    child = int((lines - {"child"}).pop())
    p.p.wait()
    try:
        with pytest.raises(onecopy.InUse):
            reg.remove("k")
    finally:
        os.kill(child, 9)
    while _alive(child):
        pass
    reg.remove("k")


def _alive(pid: int) -> bool:
    try:
        return "Z" not in pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except OSError:
        return False


@pytest.mark.parametrize("source", ["object", "writer"])
def test_fork_within_a_loader(reg: onecopy.Registry, start: Any, source: str) -> None:
    """A sleeping child keeps no lock, and no file from being sealed, when its parent dies or not."""
    code = """
import numpy as np, signal
def load(%s):
    pid = os.fork()
    if pid == 0:
        signal.pause()
    print(pid, flush=True)
    sys.stdin.readline()
    return np.ones(1000)
print(onecopy.get_or_load("k", load).sum(), flush=True)
""" % ("w" if source == "writer" else "")  # fmt: skip
    children = []
    try:
        p = start(code)
        children.append(int(p.line()))
        p.p.kill()
        p.p.wait()  # the child has the pipes
        p = start(code)
        children.append(int(p.line()))
        p.go()
        assert p.line() == "1000.0"
    finally:
        for c in children:
            os.kill(c, 9)


def test_children_of_a_loader_fill_its_arrays(reg: onecopy.Registry, start: Any) -> None:
    """They write into the segment itself; one that is still there when the loader returns could go on."""
    code = """
import signal
import numpy as np
children = []
def load(w):
    a = w.empty((4, 100_000), "f8")
    for row in range(4):
        pid = os.fork()
        if pid == 0:
            a[row] = row
            if sys.argv[1] == "stay" and row == 3:
                signal.pause()
            os._exit(0)
        children.append(pid)
    for pid in children[: 3 if sys.argv[1] == "stay" else 4]:
        assert os.waitpid(pid, 0)[1] == 0
    return a
try:
    v = onecopy.get_or_load(sys.argv[1], load)
    print(v.sum(axis=1).tolist(), flush=True)
except onecopy.Error as e:
    os.kill(children[3], 9)  # before the test can end, and this process with it
    print(isinstance(e, onecopy.LoadFailed), e, "/", e.hint, flush=True)
"""
    assert start(code, "end").line() == str([100_000.0 * i for i in range(4)])
    said = start(code, "stay").line()
    assert said.startswith("True ") and "a writer is left" in said and "a child that the loader forked" in said


@pytest.mark.parametrize("how", ["returns", "raises"])
def test_a_writer_after_its_load(start: Any, how: str) -> None:
    code = """
kept = []
def load(w):
    kept.append(w)
    a = w.empty(5)
    return a if sys.argv[1] == "returns" else 1 / 0
try:
    onecopy.get_or_load("k", load)
except onecopy.LoadFailed:
    pass
try:
    kept[0].empty(5)[0] = 1  # was a signal
except onecopy.Closed as e:
    print(e, flush=True)
"""
    assert start(code, how).line() == "closed: a Writer is good for its own load only"


def test_a_child_does_not_undo_its_parents_load(reg: onecopy.Registry, start: Any) -> None:
    code = """
def load():
    pid = os.fork()
    if pid == 0:
        raise SystemExit(3)
    assert os.waitpid(pid, 0)[1] == 3 << 8
    return [1, 2]
print(onecopy.get_or_load("k", load), flush=True)
"""
    p = start(code)
    assert p.line() == "[1, 2]"
    p = start(code.replace("raise SystemExit(3)", "return [3]").replace('"k"', '"k2"').replace("== 3 << 8", "!= 0"))
    assert p.line() == "[1, 2]"


def test_somebody_closes_every_descriptor(start: Any, model: pathlib.Path) -> None:
    """Daemon libraries do. What has the numbers then is the application's, or another place's."""
    code = """
import gc
r, s = onecopy.Registry(threads=1), onecopy.Registry(threads=1)
m = r.open("k", sys.argv[1])
assert m["a.bin"][1] == 1  # mapped now
s.open("k", sys.argv[1]).close()
os.closerange(3, 100)
mine = [open(sys.argv[1] + "/a.bin") if i % 2 else os.fdopen(os.pipe()[0]) for i in range(12)]
assert m.stale and m["a.bin"][1] == 1
r.get("k").close()
s.open("k", sys.argv[1], replace=True, fallback="raise").close()
m.close()
del m
gc.collect()
for f in mine:
    os.fstat(f.fileno())
os.closerange(3, 100)  # and now the same numbers for the same files
r.get("k").close()
gc.collect()
s.get("k").close()
gc.collect()
for x in (r, s):
    place = x._here()
    x.get("k").close()
    assert x._here() is place
os._exit(0)
"""
    p = start(code, str(model))
    assert p.wait() == 0, p.err


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(reg: onecopy.Registry, tmp_path: pathlib.Path, method: str) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        "import multiprocessing, os, sys\nimport numpy as np\nimport onecopy\n"
        "def load():\n    open(sys.argv[1], 'a').write('x')\n    return np.arange(1000)\n"
        "def work(i):\n    return int(onecopy.get_or_load('k', load).sum())\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context(sys.argv[2]).Pool(3) as p:\n        print(p.map(work, range(6)))\n"
        "    print(work(0))\n"
    )
    out = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path / "calls"), method], check=True, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": SRC, "ONECOPY_DIR": reg.dir}, timeout=120,
    ).stdout  # fmt: skip
    assert out == f"{[499500] * 6}\n499500\n" and (tmp_path / "calls").read_text() == "x"


def test_exit_with_views_and_threads(start: Any, model: pathlib.Path) -> None:
    code = """
import threading
class Late:
    def __del__(self):
        assert bytes(view[:2]) == b"\\0\\1"
m = onecopy.open("k", sys.argv[1])
view = m["a.bin"]
def read():
    while True:
        sum(view[:100])
threading.Thread(target=read, daemon=True).start()
late = Late()
late.view = view
print("ok", flush=True)
"""
    p = start(code, str(model))
    assert p.line() == "ok" and p.wait() == 0, p.err


def test_stopped_holder_of_the_table_lock(
    reg: onecopy.Registry, start: Any, model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    reg.open("k", model).close()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    p = start(
        "onecopy.open('other', sys.argv[1])", str(model), ONECOPY_STOP_AT="load.claim", ONECOPY_STOP_FILE=str(fifo)
    )
    assert fifo.read_text() == "load.claim\n"
    with reg.get("k") as m:  # readers of what is there are not affected
        assert m["a.bin"][1] == 1
    with pytest.raises(onecopy.Timeout):
        reg.remove("k", timeout=0.05)
    with pytest.raises(onecopy.Timeout, match="table lock") as e:
        reg.open("new", model, timeout=0.05)
    assert "shmctl check names" in e.value.hint
    with pytest.raises(onecopy.Timeout, match="is loading it, or hangs|holds this key's lock") as e:
        reg.open("other", model, timeout=0.05)
    assert "another process is loading" in e.value.hint
    assert "for a second" in reg.check()[0].text
    p.p.send_signal(signal.SIGCONT)
    p.wait()


def test_a_timeout_is_kept_while_the_table_is_locked_at_the_end_of_a_load(
    reg: onecopy.Registry, model: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = onecopy.Registry(reg.dir)._here().table("x")

    def abort(job: _load.Loader, real: Any = _load.Loader._abort) -> None:
        other.__exit__(None, None, None)
        real(job)

    def progress(done: int, total: int) -> None:
        if done == total:
            other.__enter__()

    monkeypatch.setattr(_load.Loader, "_abort", abort)
    with pytest.raises(onecopy.Timeout, match="table lock"):
        reg.open("k", model, timeout=1, progress=progress)
    assert reg.entries() == []


def test_subinterpreters_are_refused() -> None:
    code = (
        "import sys\ntry:\n    import _interpreters as i\nexcept ImportError:\n    import _xxsubinterpreters as i\n"
        "id = i.create()\nfn = getattr(i, 'run_string')\n"
        "src = 'import sys; sys.path[:] = ' + repr(sys.path) + '''\\n"
        'try:\\n    import onecopy\\n    print("imported")\\nexcept ImportError as e:\\n    print("refused")\\n\'\'\'\n'
        "fn(id, src)\n"
    )
    p = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": SRC}, timeout=60
    )
    assert p.stdout == "refused\n", p.stderr


def test_import_is_light() -> None:
    code = "import sys, onecopy; print([m for m in ('numpy', 'torch', 'ctypes', 'inspect', 'asyncio', 'json') if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": SRC}
    )
    assert "numpy" not in out.stdout and "torch" not in out.stdout and "asyncio" not in out.stdout


def test_leases_outside_of_a_pid_namespace(reg: onecopy.Registry, tmp_path: pathlib.Path) -> None:
    """In a container /proc/locks does not list the locks of the processes outside."""
    unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no PID namespace for us: needs unshare, and root")
    look = "import onecopy, sys; print([e.leased for e in onecopy.Registry(sys.argv[1]).entries()])"
    code = [*unshare, sys.executable, "-c", look, reg.dir]
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    (tmp_path / "f").write_bytes(b"x" * 5000)
    m = reg.open("k", tmp_path / "f")
    assert subprocess.run(code, env=env, check=True, capture_output=True, text=True).stdout == "[True]\n"
    m.close()
    reg.release("k")
    assert subprocess.run(code, env=env, check=True, capture_output=True, text=True).stdout == "[False]\n"
