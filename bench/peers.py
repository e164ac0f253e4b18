"""What people use today to give several processes the same weights, for worker.py and the benchmark.

    peers.py check                      one line of JSON for each way: whether it can be used here
    peers.py serve WAY SOURCE FOLDER SHM    makes what the workers of a way need; prints where it is, then
                                        keeps it until its standard input ends

The source is a file of bytes; every way gives its workers one array of them.
"""

import importlib
import json
import os
import secrets
import shutil
import sys

NAME = "weights"
NEEDS = {
    "numpy-memmap": ["numpy"],
    "safetensors-load": ["numpy", "safetensors.numpy"],
    "safetensors-open": ["numpy", "safetensors"],
    "torch-mmap": ["torch"],
    "joblib-mmap": ["numpy", "joblib"],
    "ray": ["numpy", "ray"],
    "shared-memory": ["multiprocessing.shared_memory"],
    "lmdb": ["lmdb"],
    "onecopy-object": ["numpy", "onecopy"],
}


def load_modules(way):
    return [importlib.import_module(name) for name in NEEDS[way]]


def ray_options(token):
    """The cluster belongs to this run: nobody else knows its token, and it listens on this machine only."""
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token, RAY_USAGE_STATS_ENABLED="0")
    return {"namespace": "onecopy-bench", "logging_level": "ERROR", "log_to_driver": False, "_node_ip_address": "127.0.0.1"}


def attach(way, place):
    """One worker's access: a buffer of all bytes, and what must stay alive with it."""
    if way == "ray":
        with open(place) as f:
            cluster = json.load(f)
        options = ray_options(cluster["token"])
        import ray

        ray.init(address=cluster["address"], **options)
        ref = ray.get(ray.get_actor(NAME).refs.remote())[0]
        return memoryview(ray.get(ref)), None
    load_modules(way)
    if way == "numpy-memmap":
        import numpy

        return memoryview(numpy.memmap(place, dtype=numpy.uint8, mode="r")), None
    if way == "safetensors-load":
        from safetensors.numpy import load_file

        return memoryview(load_file(place)[NAME]), None
    if way == "safetensors-open":
        from safetensors import safe_open

        opened = safe_open(place, framework="numpy")
        return memoryview(opened.__enter__().get_tensor(NAME)), opened
    if way == "torch-mmap":
        import torch

        return memoryview(torch.load(place, mmap=True, weights_only=True)[NAME].numpy()), None
    if way == "joblib-mmap":
        import joblib

        return memoryview(joblib.load(place, mmap_mode="r")), None
    if way == "onecopy-object":
        import onecopy

        return memoryview(onecopy.Registry(place).get_or_load(NAME, not_again)), None
    if way == "shared-memory":
        from multiprocessing import resource_tracker, shared_memory

        if sys.version_info >= (3, 13):
            segment = shared_memory.SharedMemory(place, track=False)
        else:
            # Or the segment would be deleted as soon as the first worker ends, for all others, too.
            segment = shared_memory.SharedMemory(place)
            resource_tracker.unregister(segment._name, "shared_memory")
        name, size = place.rsplit("_", 1)
        return segment.buf[: int(size)], segment
    if way == "lmdb":
        import lmdb

        env = lmdb.open(place, readonly=True, lock=False, readahead=True)
        txn = env.begin(buffers=True)
        return memoryview(txn.get(NAME.encode())), (env, txn)
    raise SystemExit(f"no way {way}")


def read(source):
    with open(source, "rb") as f:
        return f.read()


def not_again():
    raise RuntimeError("the object is loaded already")


def serve(way, source, folder, shm):
    """Returns the place that attach takes, the file that lies on the disk if there is one, and how to end."""
    path, done = os.path.join(folder, way), lambda: None
    size = os.path.getsize(source)
    if way == "numpy-memmap":
        return source, source, done
    if way.startswith("safetensors"):
        import numpy
        from safetensors.numpy import save_file

        save_file({NAME: numpy.fromfile(source, dtype=numpy.uint8)}, path)
        return path, path, done
    if way == "torch-mmap":
        import torch

        torch.save({NAME: torch.frombuffer(bytearray(read(source)), dtype=torch.uint8)}, path)
        return path, path, done
    if way == "joblib-mmap":
        import joblib
        import numpy

        joblib.dump(numpy.fromfile(source, dtype=numpy.uint8), path)
        return path, path, done
    if way == "onecopy-object":
        return serve_object(source, os.path.join(shm, "registry-objects"), size)
    if way == "ray":
        token = secrets.token_hex(32)
        options = ray_options(token)
        import numpy
        import ray

        context = ray.init(num_cpus=1, object_store_memory=int(size * 1.2) + (128 << 20), include_dashboard=False, **options)

        @ray.remote(num_cpus=0)
        class Keeper:
            def __init__(self, refs):
                self.kept = refs

            def refs(self):
                return self.kept

        # Detached, or it would end with the last handle in this process.
        keeper = Keeper.options(name=NAME, lifetime="detached").remote([ray.put(numpy.fromfile(source, dtype=numpy.uint8))])
        ray.get(keeper.refs.remote())
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as f:
            json.dump({"address": context.address_info["address"], "token": token}, f)
        return path, "", ray.shutdown
    if way == "shared-memory":
        from multiprocessing import shared_memory

        segment = shared_memory.SharedMemory(f"onecopy-bench-{os.getpid()}_{size}", create=True, size=size)
        with open(source, "rb") as f:
            f.readinto(segment.buf)
        place = segment.name
        # Only the workers' mappings are to be counted.
        segment.close()
        return place, "", segment.unlink
    if way == "lmdb":
        import lmdb

        with lmdb.open(path, map_size=size + (64 << 20)) as env, env.begin(write=True) as txn:
            txn.put(NAME.encode(), read(source))
        return path, os.path.join(path, "data.mdb"), done
    raise SystemExit(f"no way {way}")


class Place(str):
    """A place whose pages all lie in one file in memory."""

    data = ""


def serve_object(source, registry, size):
    import onecopy

    def load(writer):
        array = writer.empty((size,), "uint8")
        with open(source, "rb") as f:
            f.readinto(memoryview(array))
        return array

    objects = onecopy.Registry(registry)
    objects.get_or_load(NAME, load)
    objects.release(NAME)  # only the workers' mappings are to be counted
    place = Place(registry)
    with objects.get(NAME) as model:
        place.data = model / "data"
    return place, "", lambda: shutil.rmtree(registry)


def main(args):
    if args == ["check"]:
        for way in NEEDS:
            missing = ""
            try:
                load_modules(way)
            except ImportError as e:
                missing = e.name or str(e)
            print(json.dumps({"way": way, "missing": missing}))
        return
    place, file, done = serve(*args[1:])
    try:
        print(json.dumps({"place": place, "file": file, "data": getattr(place, "data", "")}), flush=True)
        sys.stdin.read()
    finally:
        done()


if __name__ == "__main__":
    main(sys.argv[1:])
