"""The program of TestPythonFaults: one scenario of the Python client, in which system calls fail.

python faults.py SCENARIO DIR SOURCE; prints what faultAnswer in fault_scenarios_linux_test.go has.
"""

import ctypes
import gc
import importlib
import json
import os
import pathlib
import pkgutil
import sys
import traceback

import onecopy

SCENARIO, DIR, SOURCE = sys.argv[1:]
if SCENARIO in ("object", "writer"):
    import numpy
steps, wrong = [], []


def begin():
    """faultinject.Begin: a filter that stops these calls at the tracer."""

    class Filter(ctypes.Structure):
        _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]

    class Program(ctypes.Structure):
        _fields_ = [("len", ctypes.c_uint16), ("filter", ctypes.POINTER(Filter))]

    load, equal, ret, trace, allow = 0x20, 0x15, 0x06, 0x7FF00000, 0x7FFF0000
    filters = [Filter(load, 0, 0, 0)]
    for nr in os.environ["ONECOPY_FAULTINJECT"].split(","):
        filters += [Filter(equal, 0, 1, int(nr)), Filter(ret, 0, 0, trace)]
    filters.append(Filter(ret, 0, 0, allow))
    program = Program(len(filters), (Filter * len(filters))(*filters))
    no_new_privileges, seccomp, filter_mode = 38, 22, 2
    if LIBC.prctl(no_new_privileges, 1, 0, 0, 0) or LIBC.prctl(seccomp, filter_mode, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")
    LIBC.close(-0x6F6E65)


def end():
    LIBC.close(-0x636F70)


def did(call, fn, *args, **kw):
    """What fn returns; None if it raised."""
    try:
        return fn(*args, **kw)
    except onecopy.Error as e:
        steps.append({"Call": call, "Err": {"Is": [type(e).__name__], "Text": str(e)}, "Typed": True})
    except Exception:
        steps.append({"Call": call, "Err": {"Is": [], "Text": traceback.format_exc()}, "Typed": False})
    return None


def use(m):
    for name, data in WANT.items():
        b = did("file", m.__getitem__, name)
        if b is not None and b != data:
            wrong.append(f"{name}: other bytes than were loaded")


def load(r, **kw):
    m = did("open", r.open, "k", SOURCE, fallback="raise", **kw)
    if m is not None:
        use(m)
        did("verify", m.verify)
        did("close", m.close)


def take_over(r):
    load(r, on_change="replace")


def replace(r):
    old = did("get", r.get, "k")
    load(r, replace=True)
    if old is not None:
        use(old)
        did("close", old.close)


def get(r):
    m = did("get", r.get, "k")
    if m is not None:
        use(m)
        fd = did("lease", m.lease)
        if fd is not None:
            os.close(fd)
        did("verify", m.verify)
        did("close", m.close)


def made():
    return {"weights": numpy.arange(1 << 18), "small": b"s"}


def into(w):
    a = w.empty((1 << 18,), "<u8")
    a[:] = numpy.arange(1 << 18)
    return {"weights": a, "small": b"s"}


def get_or_load(loader):
    def act(r):
        x = did("get_or_load", r.get_or_load, "object", loader, version="1", fallback="raise")
        if x is not None and not (x["small"] == b"s" and (x["weights"] == numpy.arange(1 << 18)).all()):
            wrong.append("another object than was made")
        r.release("object")

    return act


def remove(r):
    n = len(steps)
    did("remove", r.remove, "k")
    if len(steps) == n:
        m = did("get", r.get, "k")
        if m is not None:
            wrong.append("after its removal it is there")
            m.close()
        elif steps[-1]["Err"]["Is"] == ["NotFound"]:
            steps.pop()


def look(r):
    did("entries", r.entries)
    did("status", r.status, "k")
    did("stats", r.stats)


def policy(r):
    did("pin", r.pin, "k")
    did("unpin", r.unpin, "k")
    did("set_ttl", r.set_ttl, "k", 3600)
    did("set_ttl", r.set_ttl, "k", None)


ACTS = {
    "open": lambda r: did("gc", r.gc), "open-untidy": lambda r: did("entries", r.entries), "get": get,
    "load-warm": load, "load-cold": load, "load-folder": load, "load-wait": load, "take-over": take_over, "evict": load,
    "replace": replace, "object": get_or_load(made), "writer": get_or_load(into), "remove": remove,
    "gc": lambda r: did("gc", r.gc), "check": lambda r: did("check", r.check, data=True), "look": look, "policy": policy,
}  # fmt: skip


def still_open():
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            to = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if "/reg-" in to:
            found.append(f"fd {fd} -> {to}")
    return found + [x.strip() for x in pathlib.Path("/proc/self/maps").read_text().splitlines() if "/reg-" in x]


LIBC = ctypes.CDLL(None, use_errno=True)
WANT = {str(p.relative_to(SOURCE)): p.read_bytes() for p in pathlib.Path(SOURCE).rglob("*") if p.is_file()}
# What the package imports when it is first used is nothing that it does itself.
for module in pkgutil.iter_modules(onecopy.__path__):
    importlib.import_module(f"onecopy.{module.name}")
sys.unraisablehook = lambda u: wrong.append(f"not raised: {u.exc_value!r} in {u.object!r}")
r = onecopy.Registry(DIR)
if not SCENARIO.startswith("open"):
    r.entries()
begin()
ACTS[SCENARIO](r)
did("close", r.close)
del r
end()
gc.collect()
json.dump({"Steps": steps, "Wrong": wrong, "Open": still_open()}, sys.stdout)
