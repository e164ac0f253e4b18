"""Open, verified directories of a registry, and the files in them.

Everything is reached through directory descriptors and never through a link, and
is checked to be what the directory's owner made: see hazard H30 in the design.
"""

from __future__ import annotations

import errno
import os
import stat

from . import _sys
from .errors import Error, Unsupported, Untrusted, from_os

_DIR_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
FILE_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def _open(name: str, flags: int, mode: int = 0o600, dir_fd: int | None = None) -> int:
    """os.open, but never the number of a standard stream. A program that has closed those may hold a
    library that writes there all the same: not into a table or a model. Or it opens them again."""
    held = []
    try:
        if flags & (os.O_RDWR | os.O_WRONLY):
            for fd in range(3):  # not for a moment either: another thread may write in between
                try:
                    os.get_inheritable(fd)
                except OSError:
                    held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        fd = os.open(name, flags, mode, dir_fd=dir_fd)
    finally:
        for null in held:
            os.close(null)
    if fd > 2:
        return fd
    import fcntl

    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


class Dir:
    """An open directory. ``owner`` is the only uid that may write in it."""

    __slots__ = ("__weakref__", "dev", "fd", "owner", "path", "perm", "readonly")

    def __init__(self, fd: int, path: str) -> None:
        self.fd, self.path = fd, path
        self.owner = self.perm = self.dev = 0
        self.readonly = False

    def close(self) -> None:
        """Closes the descriptor; the files stay."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def join(self, name: str) -> str:
        """The path of name, for messages and for people."""
        return f"{self.path}/{name}"

    def sub(self, name: str, perm: int, create: bool) -> Dir:
        """Opens (with create: makes) a directory within; one of our own with a wrong mode is repaired."""
        s = _open_dir(self.fd, name, self.join(name), perm, create, self.owner)
        try:
            if s.owner != self.owner:
                raise _untrusted(s.path, f"owned by {_user(s.owner)}, its parent by {_user(self.owner)}")
            if s.perm != perm and s.owner == os.geteuid() and create:
                os.fchmod(s.fd, perm)
                s.perm = perm
        except BaseException:
            s.close()
            raise
        return s

    def open(self, name: str, flags: int = os.O_RDONLY) -> tuple[int, os.stat_result]:
        """Opens a regular file, checked to be the owner's own and writable by nobody else.

        OSError keeps its errno, so that callers can tell a missing file.
        """
        try:
            fd = _open(name, flags | FILE_FLAGS, dir_fd=self.fd)
        except OSError as e:
            if e.errno == errno.ELOOP:
                raise _untrusted(self.join(name), "is a symbolic link") from None
            raise
        try:
            st = os.fstat(fd)
            why = ""
            if not stat.S_ISREG(st.st_mode):
                why = "is a " + kind(st.st_mode)
            elif st.st_uid != self.owner:
                why = f"owned by {_user(st.st_uid)}, the directory by {_user(self.owner)}"
            elif st.st_mode & 0o022:
                why = f"mode {st.st_mode & 0o777:#o} lets others write".replace("0o", "0")
            elif st.st_nlink > 1:
                why = "has a second name (hard link)"
            if why:
                raise _untrusted(self.join(name), why)
        except BaseException:
            os.close(fd)
            raise
        return fd, st

    def stat(self, name: str) -> os.stat_result:
        """Describes a name without following links."""
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False)

    def mkdir(self, name: str, perm: int) -> None:
        """Makes a directory whose mode does not depend on the umask."""
        os.mkdir(name, perm, dir_fd=self.fd)
        os.chmod(name, perm, dir_fd=self.fd)

    def unlink(self, name: str) -> None:
        """Removes a file's name; one that is gone already is fine."""
        try:
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            pass

    def remove_tree(self, name: str) -> None:
        """Removes a directory with all below it, or a file; idempotent."""
        try:
            fd = os.open(name, _DIR_FLAGS, dir_fd=self.fd)
        except FileNotFoundError:
            return
        except OSError as e:
            if e.errno in (errno.ENOTDIR, errno.ELOOP):
                self.unlink(name)
                return
            raise
        sub = Dir(fd, self.join(name))
        try:
            for n in sub.names():
                sub.remove_tree(n)
        finally:
            sub.close()
        try:
            os.rmdir(name, dir_fd=self.fd)
        except FileNotFoundError:
            pass

    def names(self) -> list[str]:
        """Lists the directory, in no order."""
        # A second description: reading a directory moves its offset.
        fd = os.open(".", _DIR_FLAGS, dir_fd=self.fd)
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def usage(self, name: str) -> int:
        """Memory in bytes that the files below name take."""
        try:
            fd = os.open(name, _DIR_FLAGS, dir_fd=self.fd)
        except OSError:
            try:
                return self.stat(name).st_blocks * 512
            except OSError:
                return 0
        sub, total = Dir(fd, name), 0
        try:
            for n in sub.names():
                try:
                    st = sub.stat(n)
                except OSError:
                    continue
                total += sub.usage(n) if stat.S_ISDIR(st.st_mode) else st.st_blocks * 512
        finally:
            sub.close()
        return total

    def free(self) -> tuple[int, int]:
        """Free bytes and size of the tmpfs."""
        st = os.fstatvfs(self.fd)
        return st.f_bavail * st.f_bsize, st.f_blocks * st.f_bsize

    def same(self, name: str, st: os.stat_result) -> bool:
        """Whether name leads to the very file that st describes."""
        try:
            now = self.stat(name)
        except OSError:
            return False
        return now.st_ino == st.st_ino and now.st_dev == st.st_dev

    def anonymous(self, name: str) -> int:
        """A file of this tmpfs that no name leads to, open for reading and writing."""
        try:
            return _open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self.fd)
        except OSError as e:
            dead = e.errno == errno.ENOENT and os.fstat(self.fd).st_nlink == 0
            if e.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT) and not dead:
                raise Unsupported(
                    f"create {self.join(name)}: unsupported: no anonymous files (O_TMPFILE) here:"
                    f" models can be read but not loaded: {os.strerror(e.errno).lower()}"
                ) from e
            raise

    def create(self, name: str, data: bytes, perm: int) -> None:
        """Makes a small file under its name in one step; FileExistsError leaves the other alone."""
        fd = self.anonymous(name)
        try:
            done = 0
            while done < len(data):  # a tmpfs that is nearly full takes a part
                done += os.pwrite(fd, data[done:], done)
            os.fchmod(fd, perm)
            _sys.linkat(fd, self.fd, name)
        finally:
            os.close(fd)

    def hold(self) -> None:
        """A shared lock on the directory keeps systemd-tmpfiles from ageing what is below it."""
        import fcntl

        try:
            fcntl.flock(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            pass  # a cleaner may hold it for a moment


def open_top(path: str, perm: int, create: bool, trust: int | None) -> Dir:
    """Opens the registry's directory, which must be trusted and lie on a tmpfs."""
    path = os.path.abspath(path)
    d = _open_dir(None, path, path, perm, create, trust)
    try:
        magic = _sys.fs_type(d.fd)
        if magic != _sys.TMPFS_MAGIC:
            raise Unsupported(
                f"open {path}: unsupported operation: not on a tmpfs (file system type {magic:#x}):"
                " shared memory needs one, such as /dev/shm"
            )
        d.readonly = bool(os.fstatvfs(d.fd).f_flag & os.ST_RDONLY)
    except BaseException:
        d.close()
        raise
    return d


def _open_dir(at: int | None, name: str, path: str, perm: int, create: bool, trust: int | None) -> Dir:
    created = False
    try:
        if create:
            try:
                os.mkdir(name, perm, dir_fd=at)
                created = True
            except FileExistsError:
                pass
        try:
            fd = _open(name, _DIR_FLAGS, dir_fd=at)
        except PermissionError:
            # Our own directory with a mode that shuts us out: made under a hostile
            # umask by a process that died before it could set the mode.
            st = os.stat(name, dir_fd=at, follow_symlinks=False)
            if not (create and st.st_uid == os.geteuid() and stat.S_ISDIR(st.st_mode)):
                raise
            os.chmod(name, perm, dir_fd=at)
            fd = _open(name, _DIR_FLAGS, dir_fd=at)
    except FileNotFoundError:
        raise
    except OSError as e:
        if e.errno in (errno.ENOTDIR, errno.ELOOP):
            try:
                st = os.stat(name, dir_fd=at, follow_symlinks=False)
            except OSError:
                raise from_os(e, "open", path) from e
            raise _untrusted(
                path,
                f"is a {kind(st.st_mode)} owned by {_user(st.st_uid)}, not a directory;"
                " remove it or use another directory",
            ) from None
        raise from_os(e, "open", path) from e
    d = Dir(fd, path)
    try:
        if created:
            os.fchmod(fd, perm)
        _verify(d, trust)
    except BaseException:
        d.close()
        raise
    return d


def _verify(d: Dir, trust: int | None) -> None:
    st = os.fstat(d.fd)
    d.owner, d.perm, d.dev = st.st_uid, stat.S_IMODE(st.st_mode), st.st_dev
    euid = os.geteuid()
    if st.st_uid not in (euid, 0, trust) and euid != 0:
        raise _untrusted(
            d.path,
            f"owned by {_user(st.st_uid)}, and this process is {_user(euid)}:"
            " use a directory of your own, or name that owner as trusted",
        )
    if st.st_uid != euid and st.st_uid == _overflow_uid():
        raise _untrusted(d.path, "its owner is not visible in this user namespace")
    if st.st_mode & 0o022:
        raise _untrusted(
            d.path,
            f"mode 0{st.st_mode & 0o777:o} lets others than its owner ({_user(st.st_uid)}) write:"
            " chmod go-w it if you know who made it",
        )


def _untrusted(path: str, why: str) -> Error:
    return Untrusted(f"open {path}: not trusted: {why}")


def _user(uid: int) -> str:
    return f"uid {uid} (this process)" if uid == os.geteuid() else f"uid {uid}"


def _overflow_uid() -> int:
    try:
        with open("/proc/sys/kernel/overflowuid", "rb") as f:
            return int(f.read())
    except (OSError, ValueError):
        return 65534


def kind(mode: int) -> str:
    """What a file mode describes, in words."""
    for test, name in (
        (stat.S_ISDIR, "directory"), (stat.S_ISLNK, "symbolic link"), (stat.S_ISFIFO, "FIFO"),
        (stat.S_ISSOCK, "socket"), (stat.S_ISREG, "file"), (stat.S_ISBLK, "device"), (stat.S_ISCHR, "device"),
    ):  # fmt: skip
        if test(mode):
            return name
    return "special file"
