"""A Python worker of the benchmark: only the standard library, Python 3.9 or later.

    worker.py WAY SOURCE

Only the ways "peer:NAME" need more; they are those of peers.py.

It speaks the protocol of worker.go: a line of JSON when the model was read once, one more for each "read"
on its standard input, and it ends at the end of its input.
"""

import time

START = time.clock_gettime_ns(time.CLOCK_MONOTONIC)

import json  # noqa: E402  (the stamp comes first)
import mmap  # noqa: E402
import struct  # noqa: E402
import sys  # noqa: E402

CHUNK = 1 << 20


def monotonic():
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def attach(way, source):
    way, _, peer = way.partition(":")
    if way == "idle":
        if peer:
            import peers

            peers.load_modules(peer)
        return b"", None
    if way == "peer":
        import peers

        return peers.attach(peer, source)
    with open(source, "rb") as f:
        if way == "private":
            return f.read(), None
        # mmap maps the disk file; onecopy maps a path in the registry: for Python both are a file.
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
    way, source = sys.argv[1:3]
    buf = bytearray(CHUNK)
    data, keep = attach(way, source)  # what is kept must not be collected
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
