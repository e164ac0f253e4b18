"""Forks Python workers for the torture command: see worker.go, which does the same."""

import ctypes
import fcntl
import json
import mmap
import os
import pathlib
import random
import re
import shutil
import struct
import sys
import time

import onecopy
from onecopy import _crash
from onecopy._place import Place
from onecopy._table import stripe

P = json.loads(sys.argv[1])
KEYS, VERSIONS = P["keys"], P["versions"]
PATIENCE = 40
LATE = 100_000_000
# The words of a line of the board: board.go.
DOING, OPS, LOADS, REPLACES, BIG, MODELS, BYTES, WAITS, LATER, SLOWEST, BEGAN = range(11)
LINE = 16
DEATHS = 4096

awaited = None  # the wait of the load that this worker began last

FINE = (
    onecopy.NotFound, onecopy.InUse, onecopy.NoSpace, onecopy.TableFull, onecopy.LoadFailed,
    onecopy.Timeout, onecopy.Busy, onecopy.SourceChanged,
)  # fmt: skip
DOOMED_FINE = (*FINE, onecopy.Gone, onecopy.NoRegistry, onecopy.Corrupt, FileNotFoundError)


def known_steps() -> set[str]:
    """The steps that the client passes, as its tests find them."""
    names = set()
    for path in pathlib.Path(onecopy.__file__).parent.glob("_*.py"):
        text = path.read_text()
        names |= set(re.findall(r'_crash\.hit\("([^"]+)"\)', text))
        names |= set(re.findall(r'\.table\("([^"]+)"', text))
        for prefix in re.findall(r'Removal\([^)]*, "([a-z]+)"\)', text):
            names |= {prefix + ".unlink-payload", prefix + ".rmdir"}
    return names


# Steps that this worker's operations pass. The others need an undo, a pin or a
# stranger's file, which the Go workers have.
WAYS = {
    "acquire.": ["get"],
    "use.": ["get"],
    "load.extend": [],
    "load.": ["replace", "load"],
    "publish.claim-evicted": [],
    "publish.": ["replace"],
    "retire.": ["replace"],
    "evict.": ["remove", "load"],
    "collect.lock-table": ["gc"],
    "collect.unlock-table": ["gc"],
    "check.": ["check"],
}


def way(step):
    for prefix, ops in WAYS.items():
        if step.startswith(prefix):
            return ops
    return []


class Wait:
    """For a load lock: see worker.go."""

    def __init__(self, key):
        self.owner = 8 * (P["slots"] * LINE + 1 + 2 * DEATHS + stripe(key))
        self.begun = self.before = self.owned = 0

    def begins(self):
        # Not earlier: until it asks for the lock, this client needs longer than that in Go.
        self.begun = self.begun or time.monotonic_ns()

    def owns(self):
        before = struct.unpack_from("<Q", BOARD, self.owner)[0]
        struct.pack_into("<Q", BOARD, self.owner, os.getpid())
        if before != os.getpid():
            self.before, self.owned = before, time.monotonic_ns()

    def over(self):
        if struct.unpack_from("<Q", BOARD, self.owner)[0] == os.getpid():
            struct.pack_into("<Q", BOARD, self.owner, 0)


class Worker:
    def __init__(self, slot, seed, step):
        self.slot, self.step = slot, step
        self.rng = random.Random(seed)
        self.dir = P["steady"] if step or self.rng.randrange(8) else P["doomed"]
        self.fine = FINE if self.dir == P["steady"] else DOOMED_FINE
        self.r = None
        self.held = []

    def word(self, i, add=0, value=None):
        at = 8 * (self.slot * LINE + i)
        old = struct.unpack_from("<Q", BOARD, at)[0]
        if add or value is not None:
            struct.pack_into("<Q", BOARD, at, old + add if value is None else value)
        return old

    def work(self):
        wanted = way(self.step)
        begun = 0
        while begun < PATIENCE or not self.step:
            self.op(self.open)
            for _ in range(self.rng.randint(5, 25)):
                begun += 1
                ops = wanted
                if not ops or self.rng.randrange(5) == 0:
                    ops = ["get", "get", "load", "load", "load", "replace", "replace", "remove", "gc", "check", "destroy"]
                if self.r is not None:
                    m = self.op(getattr(self, self.rng.choice(ops)))
                    if m is not None:
                        self.keep(m)
            while self.held:
                self.drop()
            if self.r is not None:
                self.op(self.r.close)

    def op(self, fn):
        self.word(OPS, 1)
        self.word(DOING, value=1)
        try:
            return fn()
        except self.fine:
            return None
        finally:
            self.word(DOING, value=0)

    def keep(self, m):
        self.verify(m)
        self.held.append(m)
        if len(self.held) > 2:
            self.drop()

    def drop(self):
        m = self.held.pop(0)
        self.verify(m)
        self.op(m.close)

    def verify(self, m):
        source = m.info.source if hasattr(m, "info") else None
        try:
            name = m["sub/config.json"].tobytes().decode()
            if name.partition("@")[0] != m.key:
                raise AssertionError(f"{m.key}, generation {m.generation}: belongs to {name} ({source})")
            want = pathlib.Path(source_dir(name), "weights.bin").read_bytes() if not name.startswith("own") else None
            if want is not None and m["weights.bin"].tobytes() != want:
                raise AssertionError(f"{m.key}, generation {m.generation}: wrong bytes in weights.bin of {name}")
            if len(m["sub/empty"]) != 0 or len(m.files) != 3:
                raise AssertionError(f"{m.key}, generation {m.generation}: files {m.files}")
        except self.fine:
            return
        self.word(MODELS, 1)
        self.word(BYTES, len(m["weights.bin"]))

    def open(self):
        self.r = None
        self.r = onecopy.Registry(self.dir)
        self.r.stats()  # opens it: a Registry is lazy

    def get(self):
        return self.r.get(self.rng.choice(KEYS))

    def remove(self):
        self.r.remove(self.rng.choice(KEYS), timeout=10)

    def gc(self):
        self.r.gc()

    def check(self):
        self.r.check()

    def destroy(self):
        if self.dir == P["doomed"]:
            shutil.rmtree(self.dir, ignore_errors=True)

    def load(self):
        return self.open_model(False)

    def replace(self):
        return self.open_model(True)

    def open_model(self, replace):
        global awaited
        key = self.rng.choice(KEYS)
        name = f"{key}@{self.rng.randrange(VERSIONS)}"
        steady = self.dir == P["steady"]
        awaited = wait = Wait(key) if steady else None
        alone = []

        def progress(done, total):
            if not alone:
                self.word(LOADS, 1)
                self.word(REPLACES, 1 if replace else 0)
                self.word(BIG, 1 if ord(key[-1]) % 2 == 0 else 0)
                alone.append(self.alone(key, wait) if steady else -1)
            if done == total and alone[0] >= 0:
                os.pwrite(alone[0], b"%-31s\n" % b"0 done", 0)
                os.close(alone[0])
                alone[0] = -1

        try:
            return self.r.open(
                key, source_dir(name), timeout=10, fallback="raise", replace=replace,
                on_change=self.rng.choice(["error", "replace", "ignore"]), progress=progress,
            )  # fmt: skip
        finally:
            awaited = None
            if steady:
                wait.over()
            if alone and alone[0] >= 0:
                os.close(alone[0])

    def alone(self, key, wait):
        """The lock that whoever loads must find free."""
        fd = os.open(f"{P['base']}/witness/{key.replace('/', '-')}", os.O_RDWR | os.O_CREAT, 0o600)
        for tries in range(1 << 30):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                taken = True
            except BlockingIOError:
                taken = False
            pid, kind = (os.pread(fd, 32, 0).decode().split() + ["0", ""])[:2]
            if taken:
                break
            if running(int(pid)) and (kind == "function" or tries > 500):
                raise AssertionError(f"process {pid} is loading {key} too, from a {kind}")
            time.sleep(0.0001)
        died = death_of(wait.before)
        if died > wait.begun:
            late = max(0, wait.owned - died)
            self.word(WAITS, 1)
            self.word(LATER, 1 if late > LATE else 0)
            self.word(SLOWEST, value=max(self.word(SLOWEST), late))
            self.word(BEGAN, value=max(self.word(BEGAN), time.monotonic_ns() - died))
        os.pwrite(fd, b"%-31s\n" % f"{os.getpid()} path".encode(), 0)
        return fd


def running(pid):
    """A process exists and is not about to end."""
    try:
        rest = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return rest[0] not in "ZX" and not int(rest[6]) & 4


def death_of(pid):
    ring = 8 * P["slots"] * LINE + 8
    for i in range(DEATHS):
        if pid and struct.unpack_from("<Q", BOARD, ring + 16 * i)[0] == pid:
            return struct.unpack_from("<Q", BOARD, ring + 16 * i + 8)[0]
    return 0


def source_dir(name):
    return f"{P['base']}/sources/{name.replace('/', '-')}"


def child(slot, seed, step, skip):
    err = os.open(f"{P['base']}/python-{slot}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(err, 2)
    LIBC.prctl(1, 9)  # PR_SET_PDEATHSIG
    hit = _crash._armed(step, skip, None, None) if step else _crash.hit

    def passing(name):
        if name == "load.lock-key" and awaited is not None:
            awaited.owns()
        hit(name)

    def asks(*args, ask=Place.lock_key):
        if awaited is not None:
            awaited.begins()
        return ask(*args)

    _crash.hit = passing
    Place.lock_key = asks
    code = 3
    try:
        Worker(slot, seed, step).work()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


LIBC = ctypes.CDLL(None)
with open(f"{P['base']}/board", "r+b") as f:
    BOARD = mmap.mmap(f.fileno(), 0)
print(*(s for s in sorted(known_steps()) if way(s)), flush=True)
for line in sys.stdin:
    order = line.split()
    if order[0] == "start":
        pid = os.fork()
        if pid == 0:
            child(int(order[1]), int(order[2]), "" if order[3] == "-" else order[3], int(order[4]))
        print(pid, flush=True)
    else:
        print(os.waitpid(int(order[1]), 0)[1], flush=True)
