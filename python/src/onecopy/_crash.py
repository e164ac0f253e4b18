"""Named steps at which a process may be killed in a test.

Inert unless the environment names a step when the package is imported:
ONECOPY_CRASH_AT (with ONECOPY_CRASH_SKIP) kills the process there by SIGKILL, so
that nothing can be cleaned up; ONECOPY_STOP_AT stops it there once, after it has
created ONECOPY_STOP_FILE. The names are those of the Go package.
"""

from __future__ import annotations

import os


def _nothing(name: str) -> None:
    pass


def _armed(crash_at: str | None, skip: int, stop_at: str | None, stop_file: str | None) -> object:
    import signal
    import threading

    left = [skip]
    stopped = [False]

    def hit(name: str) -> None:
        if name == stop_at and not stopped[0]:
            stopped[0] = True
            if stop_file:
                with open(stop_file, "w", encoding="ascii") as f:
                    f.write(name + "\n")
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        if name == crash_at:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
                while True:
                    signal.pause()

    return hit


hit = _nothing
if "ONECOPY_CRASH_AT" in os.environ or "ONECOPY_STOP_AT" in os.environ:
    hit = _armed(  # type: ignore[assignment]
        os.environ.get("ONECOPY_CRASH_AT"),
        int(os.environ.get("ONECOPY_CRASH_SKIP", "0")),
        os.environ.get("ONECOPY_STOP_AT"),
        os.environ.get("ONECOPY_STOP_FILE"),
    )
