"""The header parser against the published attacks, and against the format's own library."""

from __future__ import annotations

import json
import pathlib
import struct
from typing import Any

import pytest

import onecopy
from onecopy import _safetensors as S

np = pytest.importorskip("numpy")


def image(header: Any, data: bytes = b"", length: int | None = None) -> memoryview:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return memoryview(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def t(dtype: str, shape: Any, start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


F32 = t("F32", [2], 0, 8)

ATTACKS: dict[str, tuple[memoryview, str]] = {
    "too short": (memoryview(b"1234"), "too short"),
    "oversized header": (image({}, length=1 << 63), "at most"),
    "header beyond the file": (image({}, length=50), "but the file has"),
    "no object": (image(b"[]"), "no JSON object"),
    "leading space": (image(b" {}"), "no JSON object"),
    "no JSON": (image(b"{nonsense"), "cannot be parsed"),
    "no UTF-8": (image(b'{"\xff": 1}'), "cannot be parsed"),
    "deep": (image(b'{"a":' * 100_000), "cannot be parsed"),
    "duplicate": (image(b'{"a":%s,"a":%s}' % ((json.dumps(F32).encode(),) * 2), bytes(8)), "twice"),
    "NaN": (image(b'{"a": NaN}'), "NaN"),
    "overlap": (image({"a": F32, "b": t("F32", [2], 4, 12)}, bytes(12)), "overlap"),
    "same range": (image({"a": F32, "b": F32}, bytes(8)), "overlap"),
    "gap": (image({"a": F32, "b": t("F32", [2], 12, 20)}, bytes(20)), "gap"),
    "gap at the start": (image({"a": t("F32", [2], 8, 16)}, bytes(16)), "gap"),
    "short": (image({"a": F32}, bytes(7)), "the file at"),
    "long": (image({"a": F32}, bytes(9)), "the file at"),
    "overflow": (image({"a": t("F32", [1 << 62, 1 << 62], 0, 8)}, bytes(8)), "overflows"),
    "wrong size": (image({"a": t("F32", [3], 0, 8)}, bytes(8)), "data_offsets say"),
    "backwards": (image({"a": t("F32", [2], 8, 0)}, bytes(8)), "data_offsets say"),
    "negative": (image({"a": t("F32", [-2], 0, 8)}, bytes(8)), "shape"),
    "boolean shape": (image({"a": t("F32", [True, 2], 0, 8)}, bytes(8)), "shape"),
    "float offset": (image({"a": t("F32", [2], 0.0, 8)}, bytes(8)), "data_offsets"),
    "many dims": (image({"a": t("F32", [1] * 65, 0, 4)}, bytes(4)), "shape"),
    "unknown type": (image({"a": t("F31", [2], 0, 8)}, bytes(8)), "unknown"),
    "no tensor": (image({"a": 5}), "no description"),
    "half a byte": (image({"a": t("F4", [3], 0, 1)}, bytes(1)), "data_offsets say"),
    "metadata": (image({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata list": (image({"__metadata__": []}), "__metadata__"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name: str) -> None:
    data, text = ATTACKS[name]
    with pytest.raises(onecopy.Corrupt, match=text):
        S.parse(data, "f.safetensors")


def test_through_a_model(reg: onecopy.Registry, tmp_path: pathlib.Path) -> None:
    (tmp_path / "m").mkdir()
    header = {
        "__metadata__": {"format": "pt"}, "w": t("F32", [2, 3], 0, 24), "b": t("BF16", [4], 24, 32),
        "f8": t("F8_E4M3", [2, 2], 32, 36), "f4": t("F4", [4], 36, 38), "none": t("I64", [0, 5], 38, 38),
        "s": t("I16", [], 38, 40),
    }  # fmt: skip
    data = (
        np.arange(6, dtype="f4").tobytes()
        + struct.pack("<4H", 0x3F80, 0x4000, 0, 0xBF80)
        + b"\x38\x40\0\xb8"
        + b"\1\2"
        + b"\7\0"
    )
    (tmp_path / "m" / "model.safetensors").write_bytes(image(header, data))
    (tmp_path / "m" / "two.safetensors").write_bytes(image({"z": t("U8", [1], 0, 1)}, b"z"))
    with reg.open("k", tmp_path / "m") as m:
        ts = m.tensors()
        assert set(ts) == {"w", "b", "f8", "f4", "none", "s", "z"} and len(ts) == 7
        assert ts["w"].tolist() == [[0, 1, 2], [3, 4, 5]] and not ts["w"].flags.writeable
        assert np.shares_memory(ts["w"], np.frombuffer(m["model.safetensors"], "u1"))
        assert ts["b"].astype("f4").tolist() == [1, 2, 0, -1]
        assert ts["f8"].astype("f4").tolist() == [[1, 2], [0, -1]]
        assert ts["f4"].tolist() == [1, 2] and ts["none"].shape == (0, 5) and ts["s"] == 7
        assert ts.metadata == {"format": "pt"} and ts.info("w").shape == (2, 3)
        assert len(m.tensors(file="two.safetensors")) == 1
        with pytest.raises(KeyError):
            ts["absent"]
        with pytest.raises(onecopy.InvalidPath):
            m.tensors(file="x")
    (tmp_path / "m" / "two.safetensors").write_bytes(image({"w": t("U8", [1], 0, 1)}, b"z"))
    with reg.open("k2", tmp_path / "m") as m, pytest.raises(onecopy.Corrupt, match="also in another file"):
        m.tensors()


def test_dlpack(reg: onecopy.Registry, tmp_path: pathlib.Path) -> None:
    """Read-only arrays need DLPack 1.0, which numpy has since 2.1."""
    (tmp_path / "m.safetensors").write_bytes(image({"w": t("F32", [2], 0, 8)}, np.ones(2, "f4").tobytes()))
    with reg.open("k", tmp_path / "m.safetensors") as m:
        w = m.tensors()["w"]
        try:
            other = np.from_dlpack(w)
        except BufferError:
            assert np.lib.NumpyVersion(np.__version__) < "2.1.0"
            return
        assert np.shares_memory(other, w) and not other.flags.writeable and other.tolist() == [1, 1]


def test_without_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    ts = S.Tensors(["f"], [image({"b": t("BF16", [2], 0, 4)}, b"\1\0\2\0")], "np")
    assert ts["b"].dtype == "u2" and ts["b"].tolist() == [1, 2]


def test_agrees_with_the_library() -> None:
    lib = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(1)
    want = {
        f"t{i}": rng.integers(0, 100, size=(i, 3)).astype(d) for i, d in enumerate(["f4", "i8", "u1", "f8", "bool"])
    }
    ts = S.Tensors(["f"], [memoryview(lib.save(want))], "np")
    assert set(ts) == set(want)
    for k, v in want.items():
        assert ts[k].dtype == v.dtype and ts[k].tolist() == v.tolist()


def test_torch_views() -> None:
    torch = pytest.importorskip("torch")
    data = bytearray(image({"a": t("BF16", [2, 2], 0, 8), "n": t("F32", [0], 8, 8), "u": t("F4", [2], 8, 9)}, bytes(9)))
    ts = S.Tensors(["f"], [memoryview(data)], "pt")
    assert ts["a"].dtype == torch.bfloat16 and ts["a"].shape == (2, 2) and ts["n"].shape == (0,)
    assert ts["u"].dtype == torch.uint8
