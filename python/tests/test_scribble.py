"""A process of the same user writes random bytes over a live registry: denial, never wrong bytes.

registry/scribble_linux_test.go does it to the library in Go. make hostile runs this one: ONECOPY_TEST_SCRIBBLES says
how often it writes.
"""

from __future__ import annotations

import os
import pathlib
import random
import subprocess
import time
from typing import Any

import pytest

import onecopy
from onecopy import _layout as L

SLOTS = 16
IDENTITY_END = 128
KEYS = ["a", "org/b", "c"]

# Gets, loads, looks, collects and checks until stdin ends, and says how often it got a model.
WORKER = """
import faulthandler, pathlib, random, select
folder, seed = pathlib.Path(sys.argv[1]), int(sys.argv[2])
rng = random.Random(seed)
want = {k: (folder / k.replace("/", "-") / "w.bin").read_bytes() for k in %r}
r = onecopy.Registry(slots=%d)
got = refused = 0
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    key = rng.choice(list(want))
    faulthandler.dump_traceback_later(120, exit=True)  # a call that hangs
    try:
        what = rng.randrange(12)
        if what < 4:
            m = r.get(key)
        elif what < 8:
            m = r.open(key, folder / key.replace("/", "-"), timeout=5, fallback="raise", replace=rng.randrange(3) == 0,
                       on_change="ignore")
        else:
            m = None
            [r.entries, r.stats, r.gc, lambda: r.check(data=True)][what - 8]()
        if m is not None:
            with m:
                if m["w.bin"].tobytes() != want[key]:
                    print("wrong bytes under", key, flush=True)
                    os._exit(4)
            got += 1
    except onecopy.Error:
        refused += 1
    if rng.randrange(50) == 0:
        r.close()
        r = onecopy.Registry(slots=%d)
print(got, refused, flush=True)
""" % (KEYS, SLOTS, SLOTS)


def scribble(top: pathlib.Path, rng: random.Random) -> None:
    """One write: into the table, a manifest or a digests file. Rarely one is cut off."""
    table = top / L.FOLDER / L.TABLE_FILE
    models = top / L.FOLDER / L.MODELS_DIR
    what = rng.randrange(10)
    try:
        if what < 7:
            path, lo = table, IDENTITY_END
        else:
            path, lo = rng.choice(sorted(models.glob("*" + (L.MANIFEST_EXT if what < 9 else L.DIGESTS_EXT)))), 0
            path.chmod(0o644)
        size = path.stat().st_size
        with open(path, "r+b") as f:
            if what >= 7 and rng.randrange(20) == 0:
                f.truncate(rng.randrange(size))
                return
            f.seek(rng.randrange(lo, size))
            f.write(rng.randbytes(rng.choice([1, 8, rng.randint(1, 64)]))[: size - f.tell()])
    except (OSError, IndexError, ValueError):
        return  # removed meanwhile, or none there


@pytest.mark.skipif("ONECOPY_TEST_SCRIBBLES" not in os.environ, reason="ONECOPY_TEST_SCRIBBLES is not set")
def test_scribbler(shm: str, tmp_path: pathlib.Path, start: Any, shmctl: str) -> None:
    seed = int(os.environ.get("ONECOPY_SEED", random.randrange(1 << 62)))
    rng = random.Random(seed)
    for key in KEYS:
        d = tmp_path / key.replace("/", "-")
        d.mkdir()
        (d / "w.bin").write_bytes(rng.randbytes(rng.randint(5000, 50_000)))
    top = pathlib.Path(shm, "r")
    with onecopy.Registry(str(top), slots=SLOTS) as r:
        r.stats()
    workers = [start(WORKER, str(tmp_path), str(rng.randrange(1 << 62))) for _ in range(3)]
    assert [p.line() for p in workers] == ["ready"] * len(workers)
    mend = [shmctl, "--dir", str(top), "gc"]  # in Go, which repairs more
    for i in range(int(os.environ["ONECOPY_TEST_SCRIBBLES"])):
        scribble(top, rng)
        if i % 50 == 0:
            subprocess.run(mend, check=False, capture_output=True)
        if rng.randrange(5) == 0:  # they come to do something
            time.sleep(rng.random() * 0.003)
    got = 0
    for p in workers:
        p.go()
        line = p.line()
        assert p.wait() == 0, (seed, line, p.err)
        assert "Traceback" not in p.err, (seed, p.err)
        got += int(line.split()[0])
    assert got > 0, seed
    subprocess.run(mend, check=True, capture_output=True)
    with onecopy.Registry(str(top), slots=SLOTS) as r:
        for key in KEYS:
            folder = tmp_path / key.replace("/", "-")
            try:
                m = r.open(key, folder, replace=True, fallback="raise")
            except onecopy.LoadFailed as e:  # somebody wrote that its loaders died
                assert e.deaths >= 3 and 0 < e.retry_after <= 300, (seed, e)
                continue
            with m:
                assert m["w.bin"].tobytes() == (folder / "w.bin").read_bytes(), seed
