"""One run of an unmodified llama.cpp: the weights are a path and nothing else.

    tokens.py LIBRARIES MODEL THREADS TOKENS

LIBRARIES is the folder with libllama and its CPU back ends. It loads the model, says so in a line of JSON,
waits for a line on its standard input (so that several workers start together), generates TOKENS tokens
greedily after a few that are not counted, and reports the stamps of CLOCK_MONOTONIC.
"""

import ctypes
import glob
import json
import os
import sys
import time
import zlib

WARM_UP = 8
PROMPT = b"The three laws of thermodynamics are"


# The parameter structures grow with each release. They are passed in memory, last, so that a copy of the
# defaults that is larger than the structure is as good as the structure.
class Parameters(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 1024)]


class Batch(ctypes.Structure):
    _fields_ = [("tokens", ctypes.c_int32)] + [(name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq", "seq", "logits")]


def library(folder, name):
    found = sorted(glob.glob(os.path.join(folder, name + ".so*")) + glob.glob(os.path.join(folder, name + ".v*.so")))
    if not found:
        raise SystemExit(f"no {name} in {folder}")
    return ctypes.CDLL(found[0], mode=ctypes.RTLD_GLOBAL)


LOGGER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
quiet = LOGGER(lambda level, text, data: None)


def answer(**fields):
    print(json.dumps(fields), flush=True)


def main():
    start = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    folder, path, threads, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    ggml, llama = library(folder, "libggml"), library(folder, "libllama")
    pointer = ctypes.c_void_p
    llama.llama_log_set.argtypes = [LOGGER, pointer]
    llama.llama_log_set(quiet, None)
    ggml.ggml_backend_load_all_from_path(folder.encode())
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(llama, name).restype = Parameters
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab", "llama_sampler_init_greedy"):
        getattr(llama, name).restype = pointer
    llama.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Parameters]
    llama.llama_init_from_model.argtypes = [pointer, Parameters]
    llama.llama_model_get_vocab.argtypes = [pointer]
    llama.llama_set_n_threads.argtypes = [pointer, ctypes.c_int32, ctypes.c_int32]
    llama.llama_tokenize.argtypes = [pointer, ctypes.c_char_p, ctypes.c_int32, pointer, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool]
    llama.llama_batch_get_one.restype = Batch
    llama.llama_batch_get_one.argtypes = [pointer, ctypes.c_int32]
    llama.llama_decode.argtypes = [pointer, Batch]
    llama.llama_sampler_sample.argtypes = [pointer, pointer, ctypes.c_int32]

    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    context = llama.llama_init_from_model(model, llama.llama_context_default_params())
    if not context:
        raise SystemExit("llama.cpp cannot make a context")
    llama.llama_set_n_threads(context, threads, threads)
    vocabulary, sampler = llama.llama_model_get_vocab(model), llama.llama_sampler_init_greedy()
    tokens = (ctypes.c_int32 * 64)()
    n = llama.llama_tokenize(vocabulary, PROMPT, len(PROMPT), tokens, len(tokens), True, False)

    def step(batch):
        if llama.llama_decode(context, batch) != 0:
            raise SystemExit("llama.cpp cannot decode")
        return llama.llama_sampler_sample(sampler, context, -1)

    one, text = (ctypes.c_int32 * 1)(), []
    one[0] = step(llama.llama_batch_get_one(tokens, n))
    for _ in range(WARM_UP):
        one[0] = step(llama.llama_batch_get_one(one, 1))
    answer(start=start, usable=time.clock_gettime_ns(time.CLOCK_MONOTONIC))
    sys.stdin.readline()
    begin = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    cpu = time.process_time_ns()
    for _ in range(count):
        one[0] = step(llama.llama_batch_get_one(one, 1))
        text.append(one[0])
    cpu = time.process_time_ns() - cpu
    end = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    # What was generated shows that every way ran the same model.
    answer(start=begin, full=end, cpu=cpu, check=zlib.crc32(repr(text).encode()))


main()
