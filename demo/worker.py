"""A worker of the demo as anybody would write it: it knows a folder and nothing of onecopy.

    shmctl exec demo/minilm -- python3 worker.py {}

It maps every file of the folder, reads the list of tensors of the safetensors files and then every byte.
For each line on its standard input it reads all of it again.
"""

import json
import mmap
import os
import struct
import sys
import time
import zlib

CHUNK = 1 << 20


def now():
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def map_folder(folder):
    """Return {relative path: read-only mapping}. An empty file cannot be mapped and has nothing to read."""
    views = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            with open(path, "rb") as f:
                if os.fstat(f.fileno()).st_size > 0:
                    views[os.path.relpath(path, folder)] = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
    return views


def tensors(view):
    """Count the tensors of a safetensors file: eight bytes of length, JSON, then the data."""
    (length,) = struct.unpack_from("<Q", view)
    header = json.loads(bytes(view[8 : 8 + length]))
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != len(view):
        raise ValueError("the safetensors header does not fit the file")
    return len(header)


def checksum(views):
    """Read every byte of every file, in the order of their names."""
    crc = 0
    for name in sorted(views, key=os.fsencode):
        view = views[name]
        for at in range(0, len(view), CHUNK):
            crc = zlib.crc32(view[at : at + CHUNK], crc)
    return crc


def main():
    views = map_folder(sys.argv[1])
    first = sum(view[0] for view in views.values())  # one byte of each file is read here
    usable = now()
    count = sum(tensors(view) for name, view in views.items() if name.endswith(".safetensors"))
    size = sum(len(view) for view in views.values())
    crc = checksum(views)
    print(json.dumps({"usable": usable, "read": now(), "bytes": size, "crc": crc, "tensors": count, "first": first}), flush=True)
    for _ in sys.stdin:
        crc = checksum(views)
        print(json.dumps({"read": now(), "bytes": size, "crc": crc}), flush=True)


try:
    main()
except KeyboardInterrupt:
    sys.exit(130)
