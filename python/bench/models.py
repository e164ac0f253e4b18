"""Models of the size of real ones, with random weights: only names, shapes and bytes matter here."""

from __future__ import annotations

from typing import Any


def whisper_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of Whisper base: 74 million parameters."""
    d, ff, vocab = 512, 2048, 51865
    out: dict[str, tuple[int, ...]] = {
        "encoder.conv1.weight": (d, 80, 3), "encoder.conv1.bias": (d,),
        "encoder.conv2.weight": (d, d, 3), "encoder.conv2.bias": (d,),
        "encoder.positions": (1500, d), "decoder.tokens": (vocab, d), "decoder.positions": (448, d),
    }  # fmt: skip
    for part, blocks in (("encoder", ("self",)), ("decoder", ("self", "cross"))):
        out[f"{part}.norm.weight"] = out[f"{part}.norm.bias"] = (d,)
        for layer in range(6):
            at = f"{part}.layers.{layer}"
            for block in blocks:
                for name in "qkvo":
                    out[f"{at}.{block}.{name}.weight"] = (d, d)
                    if name != "k":
                        out[f"{at}.{block}.{name}.bias"] = (d,)
                out[f"{at}.{block}.norm.weight"] = out[f"{at}.{block}.norm.bias"] = (d,)
            out[f"{at}.up.weight"], out[f"{at}.up.bias"] = (ff, d), (ff,)
            out[f"{at}.down.weight"], out[f"{at}.down.bias"] = (d, ff), (d,)
            out[f"{at}.norm.weight"] = out[f"{at}.norm.bias"] = (d,)
    return out


def plain_shapes(nbytes: int) -> dict[str, tuple[int, ...]]:
    """24 float32 tensors of together about nbytes."""
    return {f"layer.{i}": (max(1, nbytes // 24 // 4096), 1024) for i in range(24)}


def fill(writer: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """A loader's work: float32 arrays that lie in shared memory from the start."""
    import numpy as np

    random = np.random.default_rng(1)
    out = {}
    for name, shape in shapes.items():
        out[name] = writer.empty(shape, "float32")
        random.random(dtype="float32", out=out[name])
    return out


def bert(layers: int = 12, d: int = 768) -> Any:
    """A torch module of the size and structure of BERT base: 110 million parameters in 199 tensors."""
    from torch import nn

    def layer() -> Any:
        return nn.ModuleDict({
            "q": nn.Linear(d, d), "k": nn.Linear(d, d), "v": nn.Linear(d, d), "o": nn.Linear(d, d),
            "norm1": nn.LayerNorm(d), "up": nn.Linear(d, 4 * d), "down": nn.Linear(4 * d, d), "norm2": nn.LayerNorm(d),
        })  # fmt: skip

    return nn.ModuleDict({
        "words": nn.Embedding(30522, d), "positions": nn.Embedding(512, d), "types": nn.Embedding(2, d),
        "norm": nn.LayerNorm(d), "layers": nn.ModuleList([layer() for _ in range(layers)]), "pool": nn.Linear(d, d),
    })  # fmt: skip
