"""transformers: from_pretrained on the shared folder, and a finished module by get_or_load.

    python transformers_model.py FOLDER

from_pretrained maps the safetensors file, so the weights are shared as long as nothing
casts them. get_or_load shares whatever the loader returns: cast, fused or quantised
modules too, and skips building the module's weights in every process but one.
"""

from __future__ import annotations

import sys
import tempfile
import time

from measure import Added

import onecopy

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}


def main() -> None:
    import torch
    from transformers import AutoConfig, AutoModel

    path = sys.argv[1]

    def load() -> torch.nn.Module:
        return AutoModel.from_pretrained(path, dtype=torch.bfloat16).eval()

    # The first load of a process imports the architecture and what the library needs to
    # load, some 90 MiB that are code and no weights: a tiny model does that first.
    tiny = AutoConfig.from_pretrained(path, **TINY)
    with tempfile.TemporaryDirectory() as folder:
        AutoModel.from_config(tiny).save_pretrained(folder)
        AutoModel.from_pretrained(folder)

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
