"""Locks between processes: flock(2) on fresh file descriptions.

flock, never lockf: the two kinds do not see each other, and a lockf lock is lost
when anybody in the process closes the file. A lock file is never removed. Only
the process that took a lock unlocks it; a child of fork closes its copy.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable

from ._dir import FILE_FLAGS, Dir
from .errors import Timeout, Untrusted

try:
    import fcntl
except ImportError:  # Windows, where nothing is shared and no lock taken
    pass

_FLAGS = os.O_RDONLY | FILE_FLAGS


class Gone(Exception):
    """The directory of the lock file was removed, and the registry with it."""


# Descriptors that a child of fork must not keep open: locks, and files that are
# being written, which F_SETLEASE would refuse to seal as long as it has them.
_private_fds: set[int] = set()


def private(fd: int) -> int:
    """Marks a descriptor as not for children of fork."""
    _private_fds.add(fd)
    return fd


def close(fd: int) -> None:
    """Closes a private descriptor; in a child of fork it is closed already."""
    if fd in _private_fds:
        try:
            _private_fds.discard(fd)
        finally:  # an interrupt may come in between
            os.close(fd)


def after_fork() -> None:
    """In the child: closes what belongs to the parent, without unlocking it."""
    for fd in _private_fds:
        try:
            os.close(fd)
        except OSError:
            pass
    _private_fds.clear()


class Held:
    """An open lock file, and the lock once it has been acquired."""

    __slots__ = ("_fd", "_pid")

    def __init__(self, fd: int) -> None:
        self._pid = os.getpid()
        self._fd = private(fd)

    def unlock(self) -> None:
        """Releases the lock; a second call does nothing, and so does one in a child.

        KeyboardInterrupt may come at any step: then a second call does the rest.
        """
        fd = self._fd
        if fd < 0 or self._pid != os.getpid():
            return
        # LOCK_UN before close: a child between fork and exec has a copy.
        fcntl.flock(fd, fcntl.LOCK_UN)
        self._fd = -1
        close(fd)

    def __del__(self) -> None:
        # The last resort, when an interrupt came just outside of somebody's try.
        if getattr(self, "_fd", -1) >= 0:
            self.unlock()


def acquire(d: Dir, name: str, create: bool, block: bool) -> Held | None:
    """Takes the lock exclusively. Without block: None if somebody else has it."""
    for _ in range(1000):
        try:
            fd = os.open(name, _FLAGS, dir_fd=d.fd)
        except FileNotFoundError:
            if not create:
                raise Gone from None
            _create(d, name)
            continue
        except OSError:
            if not stat.S_ISREG(d.stat(name).st_mode):
                raise Untrusted(f"lock {d.join(name)}: invalid argument: not a regular file") from None
            raise
        held = Held(fd)
        try:
            st = os.fstat(fd)
            if not stat.S_ISREG(st.st_mode):
                raise Untrusted(f"lock {d.join(name)}: invalid argument: not a regular file")
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if block else fcntl.LOCK_NB))
            except BlockingIOError:
                held.unlock()
                return None
            # Whoever waited on a removed file and whoever locked its successor
            # would both hold "the" lock.
            if d.same(name, st):
                return held
        except BaseException:
            held.unlock()
            raise
        held.unlock()
    raise Gone


def _create(d: Dir, name: str) -> None:
    try:
        d.create(name, b"", 0o600)
    except FileExistsError:
        pass  # theirs is as good
    except FileNotFoundError:
        raise Gone from None


def poll(d: Dir, name: str, create: bool, deadline: float | None) -> Held:
    """Waits for a short lock by asking again; Timeout at the deadline (time.monotonic)."""
    delay = 50e-6
    while True:
        held = acquire(d, name, create, False)
        if held is not None:
            return held
        if deadline is not None and time.monotonic() >= deadline:
            raise Timeout(f"timed out: {name} lock: context deadline exceeded")
        time.sleep(delay)
        delay = min(2 * delay, 5e-3)


def try_shared(fd: int) -> bool:
    """LOCK_SH on a description, for as long as a descriptor or mapping of it lives."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def try_exclusive(fd: int) -> bool:
    """LOCK_EX on a description of its own: a refused upgrade would also lose a shared lock."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


class _Waiter:
    __slots__ = ("error", "held", "left", "wake")

    def __init__(self) -> None:
        self.wake = threading.Lock()
        self.wake.acquire()
        self.held: Held | None = None
        self.error: BaseException | None = None
        self.left = False


class KeyQueue:
    """Hands one load lock to the threads of this process in turn.

    At most one thread of the process blocks on it in the kernel: a helper, because
    a thread in flock(LOCK_EX) can neither time out nor be interrupted. It is a
    daemon and ends when nobody waits.
    """

    __slots__ = ("_mu", "_running", "_waiting")

    def __init__(self) -> None:
        self._mu = threading.Lock()
        self._running = False
        self._waiting: deque[_Waiter] = deque()

    def wait(self, d: Dir, name: str, create: bool, deadline: float | None, waits: Callable[[], None]) -> Held:
        """Waits without using the processor; Timeout at the deadline, interruptible by signals.
        waits is called before, unless the lock is to be had at once."""
        held = acquire(d, name, create, False)
        if held is not None:
            return held
        waits()
        me = _Waiter()
        try:
            with self._mu:
                self._waiting.append(me)
                if not self._running:
                    # It asks for _mu only when it has the lock. Should an interrupt come
                    # between these two lines, there will be two of them, which does no harm.
                    threading.Thread(
                        target=self._serve, args=(d, name, create), name="onecopy-wait", daemon=True
                    ).start()
                    self._running = True
            left = -1.0 if deadline is None else max(0.0, deadline - time.monotonic())
            me.wake.acquire(timeout=min(left, threading.TIMEOUT_MAX))
            with self._mu:
                me.left = True
        except BaseException:  # KeyboardInterrupt: a grant of the same moment must be returned
            with self._mu:
                me.left = True
            if me.held is not None:
                me.held.unlock()
            raise
        if me.error is not None:
            raise me.error
        if me.held is None:
            raise Timeout()
        return me.held

    def _serve(self, d: Dir, name: str, create: bool) -> None:
        # Between two grants it must refer to no lock that it has given away: the one
        # who got it may lose it by an interrupt, and then Held.__del__ is to unlock it.
        while self._grant(d, name, create):
            pass

    def _grant(self, d: Dir, name: str, create: bool) -> bool:
        """Waits for the lock and gives it to the first who still wants it; says whether others wait."""
        held: Held | None = None
        error: BaseException | None = None
        try:
            held = acquire(d, name, create, True)
        except BaseException as e:  # goes to the waiter
            error = e
        with self._mu:
            taker: _Waiter | None = None
            while taker is None and self._waiting:
                w = self._waiting.popleft()
                if not w.left:
                    taker = w
            if taker is not None:
                taker.held, taker.error = held, error
                taker.wake.release()
            more = self._running = bool(self._waiting)
        if taker is None and held is not None:
            held.unlock()
        return more
