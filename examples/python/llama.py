"""llama.cpp maps the shared GGUF file.

python llama.py MODEL.gguf

Its CPU back end copies weights of some types into an order that suits the processor. That
is faster, and a private copy in each worker, so it is off where sharing is the point:
measure both.
"""

from __future__ import annotations

import os
import sys

from measure import Added

import onecopy


def main() -> None:
    from llama_cpp import Llama, llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def no_repacking() -> object:  # Llama() has no argument for it
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_model_default_params = no_repacking
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
