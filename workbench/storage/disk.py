"""The one way by which files reach the disk: whole or not at all, and under the user's own file mode."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from workbench.errors import FileError, FormatError, WorkbenchError

try:
    import fcntl
except ImportError:  # not on Windows, where an open file cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

_UNFINISHED = re.compile(r"\.workbench-[0-9a-f]{16}\.part")
_HINTS = {
    errno.ENOSPC: "free some space, or write somewhere else",
    errno.EDQUOT: "free some space, or write somewhere else",
    errno.EFBIG: "write where larger files are allowed",
    errno.EROFS: "write to a folder that you may write to",
    errno.EACCES: "write to a folder that you may write to",
    errno.EPERM: "write to a folder that you may write to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "remove the link: what it leads to stays as it is",
}
# Of what is no file, opening it does not wait, as a pipe would have it.
_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def as_path(path: Any, error: type[WorkbenchError] = FileError) -> Path:
    """The path that was given, or an error of that class where it is none."""
    try:
        return Path(path)
    except TypeError:
        raise error(f"{path!r} is no path", hint="pass a str or a pathlib.Path") from None


def writable(path: str | Path) -> Path:
    """The path, if a file can stand there; of a symbolic link, where it leads.

    Raises:
        FileError: its folder does not exist or is closed to writing, it is a folder itself, or something else that is
            no file.
    """
    try:
        target = as_path(path)
        with suppress(FileNotFoundError, NotADirectoryError):
            target.lstat()  # names what is wrong with a path, which the questions below would only answer with no
        if target.is_symlink():
            target = Path(os.path.realpath(target))
        if not target.parent.is_dir():
            raise FileError(
                f"there is no folder {target.parent}", hint="make the folder first, or write somewhere else"
            )
        if target.is_dir():
            raise FileError(f"{target} is a folder", hint="add the name of a file")
        if target.exists() and not target.is_file():
            raise FileError(f"{target} is a device or a pipe, which a file would replace", hint="write to a file")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:  # too long, or with characters that no path may have
        raise failed(path, error) from None
    return target


def tried(path: str | Path) -> Path:
    """As `writable`, and shown by a file that is made beside it and removed: rights alone do not tell of every folder.

    Raises:
        FileError: as `writable`, or no file can be made there.
    """
    target = writable(path)
    try:
        name, descriptor = _unfinished(target.parent)
        os.close(descriptor)
        name.unlink()
    except OSError as error:
        raise failed(path, error) from None
    return target


def folder(path: str | Path) -> Path:
    """A folder to write files into, made if it is missing.

    Raises:
        FileError: it cannot be made, there is no folder to make it in, or no file can be made in it.
    """
    try:
        target = as_path(path)
        if not target.parent.is_dir():
            raise FileError(f"there is no folder {target.parent}", hint="make the folder first")
        target.mkdir(exist_ok=True)
    except (OSError, ValueError) as error:
        raise failed(path, error) from None
    tried(target / "file")
    return target


def readable(path: str | Path) -> Path:
    """The path of something to be read, which may not be there.

    Raises:
        FormatError: it is no path, or one that no file can have.
    """
    try:
        target = as_path(path, FormatError)
        if target.is_dir() and not os.access(target, os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:
        raise FormatError(
            f"{str(path)[:100]!r} cannot be read: {getattr(error, 'strerror', error)}", hint="check the path"
        ) from None
    return target


def plain(path: str | Path, flags: int) -> int:
    """An opener, for `open` and itself: of files alone, which pipes and devices are not; through no link to write.

    Folders may come from strangers: a pipe in one would wait for ever, a device never end, a link lead elsewhere.

    Raises:
        OSError: it cannot be opened so.
    """
    written = flags & (os.O_WRONLY | os.O_RDWR)
    descriptor = os.open(path, flags | _AT_ONCE | (_NO_LINK if written else 0), 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no file")
    return descriptor


def content(path: Path) -> bytes:
    """What a file holds.

    Raises:
        OSError: it cannot be read, or is no file.
    """
    with open(path, "rb", opener=plain) as file:
        return file.read()


def text(path: Path) -> str:
    """What a file of UTF-8 holds, each of its lines ended by a newline.

    Raises:
        OSError: as `content`. UnicodeDecodeError: it is no UTF-8.
    """
    with open(path, encoding="utf-8", opener=plain) as file:
        return file.read()


def inside(folder: Path, *names: str) -> Path:
    """A folder in a folder, and so on, each made where it is missing.

    Raises:
        OSError: one cannot be made, or is a link, which may lead elsewhere.
    """
    for name in names:
        folder /= name
        folder.mkdir(exist_ok=True)
        if folder.is_symlink():
            raise OSError(errno.ELOOP, f"{name} in it is a link")
    return folder


def write(path: str | Path, content: str | bytes | Iterable[bytes | memoryview]) -> Path:
    """Write a file in one step: an older one there stays whole until the new one is complete and on the disk.

    Of a new file the umask decides who may read it, an older one keeps its mode. What killed processes left unfinished
    in the same folder is removed.

    Args:
        content: text (written as UTF-8), bytes, or several pieces of bytes, which need not be in memory at once.

    Raises:
        FileError: the folder does not exist or cannot be written, the disk is full.
    """
    target = writable(path)
    pieces = (
        [content.encode("utf-8")] if isinstance(content, str) else [content] if isinstance(content, bytes) else content
    )
    try:
        _sweep(target.parent)
        name, descriptor = _unfinished(target.parent)
        held = fcntl is not None  # the lock, until the file has its name: without it another process would sweep it
        try:
            with open(descriptor, "wb", closefd=not held) as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                with suppress(FileNotFoundError):
                    os.chmod(name, stat.S_IMODE(target.stat().st_mode))
                os.fsync(file.fileno())  # a full disk may show only here, and the old file must not go before
            os.replace(name, target)
        finally:
            name.unlink(missing_ok=True)
            if held:
                os.close(descriptor)
    except OSError as error:
        raise failed(path, error) from error
    _flush_folder(target.parent)
    return target


def _unfinished(folder: Path) -> tuple[Path, int]:
    """A new file for this process alone, which holds a lock on it for as long as it is open."""
    while True:
        # Its length does not follow the target's, whose name may be as long as names can be.
        name = folder / f".workbench-{secrets.token_hex(8)}.part"
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if fcntl is None:
            return name, descriptor
        try:
            if locked(descriptor) and os.fstat(descriptor).st_nlink:
                return name, descriptor
        except BaseException:
            os.close(descriptor)
            name.unlink(missing_ok=True)
            raise
        os.close(descriptor)  # another process swept between our two steps


def _sweep(folder: Path) -> None:
    """Remove what nobody writes any more: a process that ends, in whatever way, loses its locks."""
    with suppress(OSError):  # a folder may be open to writing and closed to reading
        for name in filter(_UNFINISHED.fullmatch, os.listdir(folder)):
            with suppress(OSError):  # another one's, or gone
                _remove_if_left(folder / name)


def _remove_if_left(path: Path) -> None:
    if fcntl is None:
        path.unlink()
        return
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if locked(descriptor):
            path.unlink()
    finally:
        os.close(descriptor)


def locked(descriptor: int) -> bool:
    """Whether this process now holds the file's lock; also where the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        return error.errno in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS)
    return True


def _flush_folder(folder: Path) -> None:
    """Have the new name on the disk too; where folders cannot be opened, the system sees to it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def failed(path: str | Path, error: OSError | ValueError) -> FileError:
    """The error that says of a path why it cannot be written, and what to do."""
    why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    elsewhere = "write to another folder"
    hint = (
        _HINTS.get(error.errno or 0, elsewhere) if isinstance(error, OSError) else "choose a path of plain characters"
    )
    return FileError(f"{os.fspath(path)!r} cannot be written: {why}", hint=hint)
