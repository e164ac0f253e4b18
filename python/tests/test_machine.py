"""A hypothesis state machine: Python against the Go implementation, through shmctl."""

from __future__ import annotations

import gc
import json
import os
import pathlib
import shutil
import subprocess
import tempfile

import pytest

import onecopy

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test  # noqa: E402

KEYS = st.sampled_from(["a", "org/a", "b", "ü", "x" * 255, "c d"])
WHO = st.sampled_from(["go", "python"])


class Machine(RuleBasedStateMachine):
    shmctl = ""

    def __init__(self) -> None:
        super().__init__()
        self.top = tempfile.mkdtemp(prefix="onecopy-test-", dir="/dev/shm")
        self.dir = self.top + "/r"
        self.src = pathlib.Path(self.top) / "src"
        self.src.mkdir()
        (self.src / "f").write_bytes(b"0" * 5000)
        self.reg = onecopy.Registry(self.dir, slots=8)
        self.reg._here()
        self.loaded: dict[str, bytes] = {}
        self.held: dict[str, list[onecopy.Model]] = {}
        self.version = 0

    def ctl(self, *args: str) -> tuple[int, str]:
        p = subprocess.run([self.shmctl, "--dir", self.dir, *args], capture_output=True, text=True)
        return p.returncode, p.stdout

    @rule(key=KEYS, who=WHO)
    def load(self, key: str, who: str) -> None:
        now = (self.src / "f").read_bytes()
        want = self.loaded.get(key, now)
        if who == "go":
            code, _ = self.ctl("load", key, str(self.src))
            assert code == (0 if want == now else 8)
        else:
            try:
                with onecopy.Registry(self.dir) as r, r.open(key, self.src) as m:
                    assert m["f"] == now
                assert want == now
            except onecopy.SourceChanged:
                assert want != now
        self.loaded.setdefault(key, now)

    @rule(key=KEYS, who=WHO)
    def replace(self, key: str, who: str) -> None:
        if who == "go":
            assert self.ctl("load", key, str(self.src), "--replace")[0] == 0
        else:
            self.reg.open(key, self.src, replace=True).close()
        self.loaded[key] = (self.src / "f").read_bytes()
        gc.collect()

    @rule(size=st.integers(1, 9000))
    def change(self, size: int) -> None:
        self.version += 1
        (self.src / "f").write_bytes(bytes([self.version % 256]) * size)
        os.utime(self.src / "f", ns=(self.version, self.version * 10**9))

    @rule(key=KEYS)
    def hold(self, key: str) -> None:
        try:
            m = self.reg.get(key)
        except onecopy.NotFound:
            assert key not in self.loaded
            return
        assert m["f"] == self.loaded[key]
        self.held.setdefault(key, []).append(m)

    @rule(key=KEYS)
    def close(self, key: str) -> None:
        for m in self.held.pop(key, []):
            m.close()
        gc.collect()

    @rule(key=KEYS, who=WHO)
    def remove(self, key: str, who: str) -> None:
        busy = any(not m.stale for m in self.held.get(key, []))
        if who == "go":
            code = self.ctl("rm", "--yes", key)[0]
        else:
            try:
                self.reg.remove(key)
                code = 0
            except onecopy.NotFound:
                code = 3
            except onecopy.InUse:
                code = 5
        assert code == (3 if key not in self.loaded else 5 if busy else 0)
        if code == 0:
            del self.loaded[key]

    @rule(who=WHO)
    def collect(self, who: str) -> None:
        if who == "go":
            assert self.ctl("gc")[0] == 0
        else:
            self.reg.gc()

    @invariant()
    def agree(self) -> None:
        mine = {e.key: e.nbytes for e in self.reg.entries()}
        assert mine == {k: len(v) for k, v in self.loaded.items()}
        rows = json.loads(self.ctl("ls", "-o", "json")[1])
        rows = next(v for v in rows.values() if isinstance(v, list)) if isinstance(rows, dict) else rows
        assert {r["key"] for r in rows} == set(mine)
        assert self.reg.check() == []

    def teardown(self) -> None:
        for key in list(self.held):
            self.close(key)
        self.reg.close()
        shutil.rmtree(self.top)


def test_machine(shmctl: str) -> None:
    Machine.shmctl = shmctl
    n = int(os.environ.get("ONECOPY_TEST_EXAMPLES", "5"))
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=n, stateful_step_count=25, deadline=None, derandomize=True)
    )
