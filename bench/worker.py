"""A Python worker of the benchmark, Python 3.9 or later.

    worker.py WAY SOURCE [REGISTRY]
    worker.py load SOURCE REGISTRY         one load, measured as the task "load" of the Go workers

The ways "onecopy" and "onecopy-empty" need the package onecopy, "peer:NAME" what peers.py says; the others need
only the standard library.

It speaks the protocol of worker.go: a line of JSON when the model was read once, one more for each "read"
on its standard input, and it ends at the end of its input.
"""

import time

START = time.clock_gettime_ns(time.CLOCK_MONOTONIC)

import json  # noqa: E402  (the stamp comes first)
import mmap  # noqa: E402
import os  # noqa: E402
import struct  # noqa: E402
import sys  # noqa: E402

CHUNK = 1 << 20


def monotonic():
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


KEY = "bench/model"  # that of worker.go


def shared(way, source, registry):
    """The package as a program uses it: one line for the model, one for its bytes."""
    import onecopy

    registry = onecopy.Registry(registry)
    model = registry.open(KEY, source) if way == "onecopy-empty" else registry.get(KEY)
    return model[next(iter(model))], model


def load(source, registry):
    import onecopy

    cpu, begin = time.process_time_ns(), monotonic()
    model = onecopy.Registry(registry).open(KEY, source)
    wall, cpu = monotonic() - begin, time.process_time_ns() - cpu
    with open(os.path.dirname(model.path) + ".manifest") as f:
        fill = json.load(f)["fill"]
    answer(
        wall_ms=wall / 1e6,
        cpu_ms=cpu / 1e6,
        huge_percent=100 * fill["collapsed"] / max(model.nbytes, 1),
        direct_bytes=fill["direct"],
        fallbacks=fill["fallbacks"],
    )
    model.close()


def attach(way, source, *registry):
    if way in ("onecopy", "onecopy-empty"):
        return shared(way, source, *registry)
    way, _, peer = way.partition(":")
    if way == "idle":
        if peer == "onecopy":
            import onecopy  # noqa: F401
        elif peer:
            import peers

            peers.load_modules(peer)
        return b"", None
    if way == "peer":
        import peers

        return peers.attach(peer, source)
    with open(source, "rb") as f:
        if way == "private":
            return f.read(), None
        # mmap maps the disk file; onecopy-path maps a path in the registry: for Python both are a file.
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ), None


def scan(view, buf):
    """Read every byte by copying it through a buffer that stays in the processor's cache."""
    check = 0
    out = memoryview(buf)
    for at in range(0, len(view), CHUNK):
        part = view[at : at + CHUNK]
        out[: len(part)] = part
        if len(part) >= 8:
            check += struct.unpack_from("<Q", buf)[0]
    return check % (1 << 64)


def answer(**fields):
    print(json.dumps(fields), flush=True)


def main():
    if sys.argv[1] == "load":
        load(*sys.argv[2:])
        return
    buf = bytearray(CHUNK)
    data, keep = attach(*sys.argv[1:])  # what is kept must not be collected
    view = memoryview(data)
    first = view[0] if len(view) else 0  # the first byte is read here
    usable = monotonic()
    check = scan(view, buf)
    answer(start=START, usable=usable, full=monotonic(), check=check, first=first)
    for line in sys.stdin:
        if line.strip() == "read":
            start = monotonic()
            check = scan(view, buf)
            answer(start=start, full=monotonic(), check=check)


main()
