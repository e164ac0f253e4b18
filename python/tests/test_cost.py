"""What importing, attaching and loading do, and do not do. No time is looked at."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import pathlib
import pickle
import subprocess
import sys
import weakref

import pytest
import xxhash

import onecopy
from conftest import SRC
from onecopy import _segment, _sys
from onecopy._dir import Dir
from onecopy._manifest import ManifestFile, chunk_count


class Buffer(bytearray):
    """Goes out of band by itself."""

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return bytearray, (pickle.PickleBuffer(self),)


BENCH = pathlib.Path(SRC).parent / "bench"


def test_an_attach_imports_nothing(reg: onecopy.Registry, model: pathlib.Path) -> None:
    """The first attach of a process is as fast as the next, and needs neither numpy nor what loads."""
    reg.open("k", model).close()
    code = f"""
import sys
sys.path[:0] = [{SRC!r}, {os.path.dirname(os.path.dirname(xxhash.__file__))!r}]
import onecopy
before = set(sys.modules)
assert not before & {{"numpy", "torch", "onecopy._load", "onecopy._remove", "onecopy._segment"}}, before
with onecopy.Registry({reg.dir!r}) as r, r.get("k") as m:
    assert m["sub/b.txt"] == b"hello"
assert set(sys.modules) - before <= {{"atexit"}}, set(sys.modules) - before
"""
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


def test_the_loader_keeps_no_copy(reg: onecopy.Registry) -> None:
    """Nor does it wait for the garbage collector with it: it would be a second copy on the machine."""
    np = pytest.importorskip("numpy")
    alive = []

    def load() -> dict[str, object]:
        out = {"array": np.ones(1 << 20), "bytes": Buffer(b"x" * (1 << 20))}
        alive.extend(weakref.ref(v) for v in out.values())
        return out

    gc.collect()
    gc.disable()
    try:
        got = reg.get_or_load("k", load)
        assert [r() for r in alive] == [None, None]
    finally:
        gc.enable()
    assert got["array"].sum() == 1 << 20 and bytes(got["bytes"]) == b"x" * (1 << 20)


def cached_pages(fd: int, size: int) -> int:
    """Without touching them: a probe by reading would start to read ahead."""
    addr, base, whole = _sys.map_file(fd, 0, size, _sys.PROT_READ, _sys.MAP_SHARED)
    pages = (ctypes.c_ubyte * (-(-size // 4096)))()
    try:
        assert _sys._libc.mincore(ctypes.c_void_p(addr), ctypes.c_size_t(size), pages) == 0
    finally:
        _sys.munmap(base, whole)
    return sum(p & 1 for p in pages)


def test_a_cold_source_is_read_past_the_page_cache(reg: onecopy.Registry, tmp_path: pathlib.Path) -> None:
    source = tmp_path / "big.bin"
    content = os.urandom(1 << 20) * 37 + b"a tail that fills no page"
    with open(source, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    with open(source, "rb", buffering=0) as f:
        direct = _segment._open_direct(f.fileno())
        if direct >= 0:
            os.close(direct)
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        cold = not cached_pages(f.fileno(), len(content))
    seen = []
    with reg.open("k", source, progress=lambda done, total: seen.append((done, total))) as m:
        assert m["big.bin"] == content
        m.verify()
    assert max(seen) == (len(content), len(content))
    if not cold:
        pytest.skip("this file system keeps what it was told to forget")
    with reg.get("k") as m:
        fill = m._attached.manifest.fill
    assert fill["direct"] % (4 << 20) == 0 and fill["direct"] <= fill["collapsed"] <= len(content)
    assert fill["direct"] or direct < 0 or not fill["collapsed"]


def test_a_direct_read_that_is_refused_goes_on_by_the_cache(shm: str, tmp_path: pathlib.Path) -> None:
    source = tmp_path / "f"
    content = os.urandom(64 << 10)
    source.write_bytes(content)
    fd, folder = os.open(source, os.O_RDONLY), os.open(shm, os.O_RDONLY)
    direct = _segment._open_direct(fd)
    if direct < 0:
        pytest.skip("no O_DIRECT here")
    pending = _segment.Pending(Dir(folder, shm), "f")
    try:
        fill = _segment.Fill(lambda n, again: None, lambda n: None, 1)
        job = _segment._Copy(pending, fd, str(source), bytearray(16), fill)
        job.direct = direct
        odd = memoryview(bytearray(len(content) + 1))[1:]  # no device takes such an address
        past = job.read(odd, 0, True)
        assert odd == content
        assert past or job.direct == -1
        job.direct = direct
        rest = bytearray(100)  # neither the offset nor the length fits
        assert not job.read(rest, 7, True) and rest == content[7:107] and job.direct == direct
    finally:
        pending.abort()
        for n in (direct, fd, folder):
            os.close(n)


def test_a_sparse_source(reg: onecopy.Registry, tmp_path: pathlib.Path) -> None:
    source = tmp_path / "sparse"
    with open(source, "wb") as f:
        f.truncate(24 << 20)
        f.seek(9 << 20)
        f.write(b"data")
    with reg.open("k", source) as m:
        view = m["sparse"]
        assert view[9 << 20 : (9 << 20) + 4] == b"data" and bytes(view).count(0) == (24 << 20) - 4
        m.verify()


def test_hole_of_something_that_cannot_tell() -> None:
    r, w = os.pipe()
    try:
        assert not _segment._hole(r, 0, 10)  # ESPIPE: no hole that anybody knows of
        with pytest.raises(OSError) as e:
            os.lseek(r, 0, os.SEEK_DATA)
        assert e.value.errno == errno.ESPIPE
    finally:
        os.close(r)
        os.close(w)


def test_named_tuples() -> None:
    f = ManifestFile("a", 1, "d", 2)
    assert f == ("a", 1, "d", 2) and f.path == "a" and repr(f).startswith("ManifestFile(path='a'")
    assert pickle.loads(pickle.dumps(f)) == f and type(f._replace(size=3)) is ManifestFile
    assert ManifestFile._fields == ("path", "size", "digest", "mtime_ns")
    from onecopy._manifest import Origin

    assert Origin("path").version == "" and chunk_count(0, 4096) == 0


@pytest.mark.parametrize(
    "args", [("original_idea.py", "--quick", "--processes", "3"), ("targets.py", "--quick", "attach", "scan", "cached")]
)
def test_benchmarks_run(shm: str, tmp_path: pathlib.Path, args: tuple[str, ...]) -> None:
    """No figure is judged but the two that do not depend on the machine: made once, and what is saved."""
    pytest.importorskip("numpy")
    extra = ("--work", str(tmp_path)) if args[0] == "targets.py" else ()
    p = subprocess.run(
        [sys.executable, str(BENCH / args[0]), *args[1:], "--dir", shm, *extra], capture_output=True, text=True
    )
    assert p.returncode == 0, p.stderr
    if args[0] == "original_idea.py":
        row = p.stdout.splitlines()[-1].split()
        assert row[:5] == ["12MB", "3", "M", "12", "1"] and "66.7 %" in p.stdout
    else:
        assert "≤ 300 µs" in p.stdout and "first full scan / second" in p.stdout
    assert os.listdir(shm) == []
