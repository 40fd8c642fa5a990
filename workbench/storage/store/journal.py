"""A file of JSON lines to which whole lines are added: what a killed process left of a line is none."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from workbench.errors import FormatError
from workbench.storage import disk
from workbench.storage.parts import Part, parse

_CLOSED = -1  # a number that no open file has


class Journal:
    """The file, open to be added to.

    Raises:
        FileError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, _CLOSED
        try:
            self._file = disk.plain(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            whole = _whole(disk.content(path))
            os.ftruncate(self._file, len(whole))
        except OSError as error:
            self.close()
            raise disk.failed(path, error) from error
        self._end = len(whole)

    def add(self, said: Mapping[str, Any]) -> None:
        """Add a line; it is there whole, or not at all.

        Raises:
            FileError: the disk is full, or the file cannot be written.
        """
        line = json.dumps(said, ensure_ascii=True, separators=(",", ":")).encode("ascii") + b"\n"
        try:
            done = 0
            while done < len(line):
                done += os.write(self._file, line[done:])
            self._end += len(line)
        except BaseException as error:  # an interrupt too
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            if isinstance(error, OSError):
                raise disk.failed(self._path, error) from error
            raise

    def close(self) -> None:
        """No more lines; it may be called twice."""
        file, self._file = self._file, _CLOSED
        if file != _CLOSED:
            os.close(file)


def lines(path: Path) -> list[Part]:
    """The lines that are whole.

    Raises:
        FormatError: there is no such file, or a line is no JSON.
    """
    try:
        raw = disk.content(path)
    except OSError as error:
        raise FormatError(f"{path.name} cannot be read: {error.strerror}") from None
    return [parse(line, f"{path.name}, line {i + 1}") for i, line in enumerate(_whole(raw).split(b"\n")[:-1])]


def _whole(raw: bytes) -> bytes:
    return raw[: raw.rfind(b"\n") + 1]
