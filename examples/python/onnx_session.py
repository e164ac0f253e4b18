"""ONNX Runtime: an .onnx file shares nothing by itself, an ORT-format file does.

    python onnx_session.py MODEL.onnx

The graph is converted once into ORT format, beside the source. Every process makes its
session from the shared file with three options: map it, keep the initialisers where they
are, and do not pre-pack them, which would copy them. The price is the speed of pre-packed
kernels: measure both. (With bytes instead of a path the Python binding copies.)
"""

from __future__ import annotations

import os
import sys

from measure import Added

import onecopy

SHARING = ("use_memory_mapped_ort_model", "use_ort_model_bytes_for_initializers", "disable_prepacking")


def main() -> None:
    import onnxruntime as ort

    ort.set_default_logger_severity(3)
    source = sys.argv[1]
    converted = os.path.splitext(source)[0] + ".ort"
    if not os.path.exists(converted):
        options = ort.SessionOptions()
        options.optimized_model_filepath = f"{converted}.{os.getpid()}"
        options.add_session_config_entry("session.save_model_format", "ORT")
        ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        os.replace(options.optimized_model_filepath, converted)
    with onecopy.open("example/onnx", converted) as model:
        with Added() as copied:
            plain = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
        print(f"InferenceSession(MODEL.onnx): {copied.share(model.nbytes)}")
        options = ort.SessionOptions()
        for name in SHARING:
            options.add_session_config_entry("session." + name, "1")
        with Added() as added:
            shared = ort.InferenceSession(model / os.path.basename(converted), options)
        print(f"ORT format with the three options: {added.share(model.nbytes)}")
        del plain, shared  # the session maps the file by itself


if __name__ == "__main__":
    main()
