"""`load_capture`: a capture from a file, or from a store."""

from __future__ import annotations

from pathlib import Path

from workbench.capture.capture import Capture
from workbench.capture.reading import read_file
from workbench.capture.store.reading import read_store
from workbench.storage.disk import readable


def load_capture(path: str | Path) -> Capture:
    """Read a capture: a file that `Capture.save` wrote, or a store that `capture(store=path)` writes or has written.

    Of a store nothing but its list of forwards is read here: every tensor is read when something computes with it, and
    where single heads are asked for, `cap.calls[i][site].entropy[:, head]`, only these. A store that is being written
    gives the forwards that were finished when it was opened; load it again for more.

    Raises:
        FormatError: no such file or store, truncated, of another version, or changed after it was written. Of a store
            a damaged chunk is an error when it is read, which names it; all else can be read.
    """
    where = readable(path)
    return read_store(where) if where.is_dir() else read_file(where)
