"""Every recipe runs in a registry of its own."""

from __future__ import annotations

import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest

HERE = pathlib.Path(__file__).parent
SRC = HERE.parents[1] / "python" / "src"
sys.path.insert(0, str(SRC))


@pytest.fixture
def env() -> Iterator[dict[str, str]]:
    import os

    top = tempfile.mkdtemp(prefix="onecopy-test-", dir="/dev/shm")
    yield {**os.environ, "ONECOPY_DIR": top + "/r", "PYTHONPATH": f"{SRC}{os.pathsep}{HERE}", "PYTHONUNBUFFERED": "1"}
    shutil.rmtree(top, ignore_errors=True)
