"""Torch tensors and modules; skipped without torch."""

from __future__ import annotations

import copy
import gc
import pathlib
import warnings
from typing import Any

import pytest

import onecopy

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")


class Net(torch.nn.Module):  # type: ignore[misc,name-defined]
    """An embedding whose weight is tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(1000, 64)
        self.norm = torch.nn.BatchNorm1d(64)
        self.out = torch.nn.Linear(64, 1000, bias=False)
        self.out.weight = self.emb.weight
        self.register_buffer("mask", torch.ones(64, 64).tril().bool())

    def forward(self, x: Any) -> Any:
        return self.out(self.norm(self.emb(x)))


def same(a: Any, b: Any) -> bool:
    return bool(
        a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        and a.requires_grad == b.requires_grad and torch.equal(a.float().nan_to_num(), b.float().nan_to_num())
    )  # fmt: skip


def test_module(reg: onecopy.Registry) -> None:
    net = Net().eval()
    x = torch.arange(10)
    want = net(x)
    got = reg.get_or_load("k", lambda: copy.deepcopy(net))
    assert type(got) is Net and not got.training and torch.equal(got(x), want)
    assert got.out.weight is got.emb.weight and got.emb.weight.requires_grad
    assert all(same(a, b) for a, b in zip(net.state_dict().values(), got.state_dict().values()))
    assert reg.status("k").mode == "c" and reg.status("k").private_bytes == 0
    assert reg.entries()[0].nbytes < 1000 * 64 * 4 * 1.3  # tied weights are stored once
    assert got.emb.weight.data_ptr() % 64 == 0
    with torch.no_grad():
        got.emb.weight[0, 0] = 123.0  # copy on write: nobody else sees it
    assert reg.status("k").private_bytes > 0
    other = onecopy.Registry(reg.dir).get_or_load("k", Net)
    assert other.emb.weight[0, 0] == net.emb.weight[0, 0]
    del other, got
    reg.release("k")
    gc.collect()
    reg.remove("k")


def test_state_dict_and_kinds_of_tensors(reg: onecopy.Registry) -> None:
    base = torch.randn(100, 100)
    p = torch.nn.Parameter(torch.randn(4))
    p.tag = "x"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        q = torch.quantize_per_tensor(torch.randn(30, 30), 0.1, 0, torch.qint8)
    want: dict[str, Any] = {
        "base": base, "t": base.t(), "strided": base[::3, 5:50:2], "row": base[7], "scalar": torch.tensor(3),
        "empty": torch.empty(0, 7), "bf16": torch.randn(300).bfloat16(), "f16": torch.randn(300).half(),
        "fp8": torch.randn(64).to(torch.float8_e4m3fn), "bool": base > 0, "complex": torch.randn(5, dtype=torch.cfloat),
        "expanded": torch.ones(1).expand(50, 50), "leaf": torch.ones(3, requires_grad=True), "param": p,
    }  # fmt: skip
    extra = {"storage": base.untyped_storage(), "numpy": base.numpy(), "sparse": torch.eye(4).to_sparse(), "q": q,
             "meta": torch.empty(3, device="meta"), "conj": torch.randn(3, dtype=torch.cfloat).conj()}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = reg.get_or_load("k", lambda: {**want, **extra})
    for name, v in want.items():
        if v.is_complex():
            assert torch.equal(got[name], v)
        else:
            assert same(got[name], v), name
    where = got["base"].untyped_storage().data_ptr()
    for name in ("t", "strided", "row"):
        assert got[name].untyped_storage().data_ptr() == where
    assert got["storage"].data_ptr() == where and got["numpy"].ctypes.data == where
    assert got["param"].tag == "x" and type(got["param"]) is torch.nn.Parameter
    assert torch.equal(got["sparse"].to_dense(), torch.eye(4)) and got["q"].q_scale() == pytest.approx(0.1)
    assert got["meta"].device.type == "meta" and got["conj"].is_conj()


def test_read_only_on_request(reg: onecopy.Registry) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t = reg.get_or_load("k", lambda: torch.ones(100_000), mode="r")
    assert t.sum() == 100_000
    assert reg.status("k").mode == "r"


def test_writer(reg: onecopy.Registry) -> None:
    def load(w: Any) -> Any:
        t = w.tensor((1000, 500), torch.bfloat16)
        with pytest.raises(ValueError, match="negative"):
            w.tensor((-1, -1))
        t.fill_(2)
        return {"t": t, "row": t[3], "none": w.tensor(0), "one": w.tensor(5)}

    got = reg.get_or_load("k", load)
    assert got["t"].dtype == torch.bfloat16 and got["t"].sum() == 1_000_000 and got["row"][0] == 2
    assert got["row"].untyped_storage().data_ptr() == got["t"].untyped_storage().data_ptr()


def test_tensors_of_files(reg: onecopy.Registry, tmp_path: pathlib.Path) -> None:
    """Copy on write, other frameworks see the same memory, and status counts what was written to."""
    save = pytest.importorskip("safetensors.torch").save_file
    save({"a": torch.ones(1 << 19), "b": torch.arange(6).bfloat16()}, tmp_path / "m.safetensors")
    with reg.open("k", tmp_path / "m.safetensors") as m:
        t, again = m.tensors("pt"), m.tensors("pt")["a"]
        assert t["b"].dtype == torch.bfloat16 and t["b"].tolist() == [0, 1, 2, 3, 4, 5]
        assert torch.from_dlpack(t["b"]).data_ptr() == t["b"].data_ptr() and np.from_dlpack(again).sum() == 1 << 19
        assert reg.status("k").private_bytes == 0
        again[7] = 5
        assert t["a"][7] == 5 and 0 < reg.status("k").private_bytes <= 2 << 20
        assert m.tensors()["a"][7] == 1  # read-only views are of the shared pages
        m.verify()
    with onecopy.Registry(reg.dir) as other, other.get("k") as m:
        assert m.tensors("pt")["a"][7] == 1 and other.status("k").private_bytes == 0


def test_gradients_stay_possible(reg: onecopy.Registry) -> None:
    net = reg.get_or_load("k", Net)
    net(torch.arange(10)).sum().backward()
    assert net.emb.weight.grad is not None
    with torch.no_grad():
        for p in net.parameters():
            p.sub_(0.1 * p.grad)
