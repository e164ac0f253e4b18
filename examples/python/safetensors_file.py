"""safetensors: the library opens the shared path, or onecopy hands out views.

python safetensors_file.py FILE.safetensors
"""

from __future__ import annotations

import os
import sys

import numpy as np
from measure import Added

import onecopy


def main() -> None:
    path = sys.argv[1]
    with onecopy.open("example/safetensors", path) as model:
        name = os.path.basename(path)
        with Added() as views:
            tensors = model.tensors()
            total = sum(float(np.max(t)) for t in tensors.values())
        print(f"model.tensors(): {len(tensors)} tensors, {views.share(model.nbytes)}")
        from safetensors import safe_open

        with Added() as copies, safe_open(model / name, framework="np") as f:
            kept = [f.get_tensor(k) for k in f.keys()]  # noqa: SIM118
        print(f"safe_open, numpy: {len(kept)} tensors, {copies.share(model.nbytes)} (it copies)")
        print(f"checksum {total}")


if __name__ == "__main__":
    main()
