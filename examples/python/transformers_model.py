"""transformers: from_pretrained on the shared folder, and a finished module by get_or_load.

    python transformers_model.py FOLDER

from_pretrained maps the safetensors file, so the weights are shared as long as nothing
casts them. get_or_load shares whatever the loader returns: cast, fused or quantised
modules too, and skips building the module's weights in every process but one.
"""

from __future__ import annotations

import sys
import time

from measure import Added

import onecopy


def main() -> None:
    import torch
    from transformers import AutoModel

    path = sys.argv[1]

    def load() -> torch.nn.Module:
        return AutoModel.from_pretrained(path, torch_dtype=torch.bfloat16).eval()

    with onecopy.open("example/transformers", path) as model:
        with Added() as added:
            encoder = AutoModel.from_pretrained(model).eval()
        print(f"from_pretrained(model): {added.share(model.nbytes)}")
    begun = time.perf_counter()
    with Added() as added:
        half = onecopy.get_or_load("example/transformers-bf16", load, version=path)
    nbytes = sum(p.nbytes for p in half.parameters())
    print(f"get_or_load, bf16: {time.perf_counter() - begun:.3f} s, {added.share(nbytes)}")
    ids = torch.arange(8).reshape(1, 8)
    with torch.no_grad():
        print(float(encoder(ids).last_hidden_state.sum()), float(half(ids).last_hidden_state.float().sum()))


if __name__ == "__main__":
    main()
