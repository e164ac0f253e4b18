"""A worker of the demo, in two forms.

    worker.py demo/minilm /models/minilm             with the package onecopy: one line
    shmctl exec demo/minilm -- python3 worker.py {}  as anybody would write it: it knows a folder and nothing of onecopy

It gets every file of the model, counts the tensors of the safetensors files and then reads every byte.
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


def open_shared(key, folder):
    """Return {relative path: read-only memory that all processes share}, and whether this process had to load it."""
    import onecopy

    model = onecopy.open(key, folder)  # the one line that an existing worker changes
    try:
        return {name: model[name] for name in model if len(model[name]) > 0}, model.loaded
    finally:
        model.close()  # the views keep the mapping, and with it the lease


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
    views, loaded = open_shared(*sys.argv[1:]) if len(sys.argv) > 2 else (map_folder(sys.argv[1]), False)
    first = sum(view[0] for view in views.values())  # one byte of each file is read here
    usable = now()
    count = sum(tensors(view) for name, view in views.items() if name.endswith(".safetensors"))
    size = sum(len(view) for view in views.values())
    crc = checksum(views)
    answer = {"usable": usable, "read": now(), "bytes": size, "crc": crc, "tensors": count, "first": first, "loaded": loaded}
    print(json.dumps(answer), flush=True)
    for _ in sys.stdin:
        crc = checksum(views)
        print(json.dumps({"read": now(), "bytes": size, "crc": crc}), flush=True)


try:
    main()
except KeyboardInterrupt:
    sys.exit(130)
