"""Long work that keeps what is done when it is stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from workbench.storage import disk

T = TypeVar("T")


def file_of(resume: str | Path | None) -> Path | None:
    """The file that `resume=` names, tried before hours go into what it is to keep; None for None.

    Raises:
        FileError: no file can be written there.
    """
    return None if resume is None else disk.tried(resume)


@contextmanager
def kept_when_stopped(
    path: Path | None, save: Callable[[], T], interrupted: Callable[[T, Path | None], BaseException]
) -> Iterator[None]:
    """Save what the work inside has done when an error or Ctrl-C stops it.

    Args:
        path: the file, which an error then names; None: there is none.
        save: writes what is done, if there is a file, and gives it.
        interrupted: makes of it, and the file, what is raised in place of KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise interrupted(save(), path) from None
    except Exception as error:
        save()
        if path is not None:
            error.add_note(f"What was done is in {path}; resume= goes on from it.")
        raise
