"""The compiled library on disk: only what nobody else can have written, and nothing has damaged, is ever loaded.

A library's name ends in the digest of its bytes. They are read once, from a file that belongs to this user and that
nobody else may write, in such a folder, and compared with the digest; what is loaded is a private copy of these bytes
where the system has such copies. So it does not matter who may write the folders above, or what happens in between.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_WORK = "building-"
_STALE = 24 * 3600.0  # seconds after which a folder that a killed process has left is removed


def find(folder: Path, name: str) -> Path | None:
    """The library of this name, if there is one that is whole; those that are damaged are removed.

    Raises:
        OSError: it belongs to somebody else, or others may write it.
    """
    for path in sorted(folder.glob(f"{name}-*.so")):
        try:
            _bytes(path)
        except _DamagedError:
            with suppress(FileNotFoundError):
                path.unlink()
        except FileNotFoundError:  # another process has removed it
            continue
        else:
            return path
    return None


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A folder to compile in, on the same file system; removed in the end, and by later ones if it is left."""
    for left in folder.glob(f"{_WORK}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE:
                for each in left.iterdir():
                    each.unlink()
                left.rmdir()
    with tempfile.TemporaryDirectory(dir=folder, prefix=_WORK) as work:
        yield Path(work)


def keep(made: Path, folder: Path, name: str) -> Path:
    """Move a library into the folder, whole or not at all, also if the machine stops meanwhile."""
    content = made.read_bytes()
    target = folder / f"{name}-{hashlib.sha256(content).hexdigest()}.so"
    made.chmod(0o700)
    _flush(made)
    os.replace(made, target)  # in one step: other processes see all of it or nothing
    _flush(folder)
    return target


def load(path: Path) -> ctypes.CDLL:
    """Load a library that `find` or `keep` gave.

    Raises:
        OSError: it is damaged, or not this user's alone.
    """
    content = _bytes(path)
    if not hasattr(os, "memfd_create"):
        return ctypes.CDLL(str(path))
    copy = os.memfd_create(path.name)
    try:
        with os.fdopen(os.dup(copy), "wb") as file:
            file.write(content)
        return ctypes.CDLL(f"/proc/self/fd/{copy}")
    finally:
        os.close(copy)


def check_owner(path: Path, found: os.stat_result) -> None:
    """Code is loaded only from files and folders that nobody else can have written.

    Raises:
        OSError: it belongs to neither this user nor the administrator, or others may write it.
    """
    if not hasattr(os, "getuid"):
        return
    if found.st_uid not in (os.getuid(), 0):
        raise OSError(f"{path} belongs to somebody else")
    for bit, who in ((stat.S_IWOTH, "everybody"), (stat.S_IWGRP, "its group")):
        if found.st_mode & bit:
            raise OSError(f"{path} can be written by {who}; remove it, or take that permission away")


class _DamagedError(OSError):
    """A library that is not what it was when it was kept."""


def _bytes(path: Path) -> bytes:
    """The bytes of a library, checked: owner, permissions, digest."""
    flags = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))  # a pipe would block
    handle = os.open(path, os.O_RDONLY | flags)
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        check_owner(path, found)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is no file")
        content = file.read()
    if hashlib.sha256(content).hexdigest() != path.stem.rpartition("-")[2]:
        raise _DamagedError(f"{path} is damaged")
    return content


def _flush(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
