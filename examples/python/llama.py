"""llama.cpp: it maps the shared GGUF file. Weight repacking makes a private copy, so it is off.

python llama.py MODEL.gguf
"""

from __future__ import annotations

import os
import sys

from measure import Added

import onecopy


def main() -> None:
    from llama_cpp import Llama

    path = sys.argv[1]
    with onecopy.open("example/llama", path) as model:
        with Added() as added:
            llm = Llama(model_path=model / os.path.basename(path), n_ctx=256, use_mmap=True, verbose=False)
            out = llm("The capital of France is", max_tokens=8, temperature=0)
        print(out["choices"][0]["text"].strip())
        print(f"Llama(model / ...): {added.share(model.nbytes)} (context and buffers included)")
        llm.close()


if __name__ == "__main__":
    main()
