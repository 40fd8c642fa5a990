"""Writes the files of a row at once, in as many threads as PyTorch has: copies, checksums and writes need no GIL."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from torch import Tensor

from workbench.storage import disk
from workbench.storage.store.shards import Array, Scratch

_SMALL = 1 << 20  # bytes of a row, below which a thread would cost more than it saves
_NOT_HERE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV)  # a file system sets no room aside
Job = tuple[Array, Sequence[Tensor], Path]


class Writers:
    """Threads that write; those of one row are done, or have failed, before the next row is begun."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._pool: ThreadPoolExecutor | None = None
        self._at_work: list[Future[None]] = []

    def write(self, jobs: Iterable[Job]) -> None:
        """Write each array of a row to its file; all are written when this returns.

        Raises:
            OSError: one could not be written; none is being written any more.
        """
        todo = sorted(jobs, key=_size, reverse=True)  # the large ones first, so that none is left to wait for
        if torch.get_num_threads() == 1 or sum(map(_size, todo)) < _SMALL:
            for job in todo:
                self._one(*job)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="workbench-store")
        for job in todo:
            self._at_work.append(self._pool.submit(self._one, *job))
        failed = [error for each in self.wait() if (error := each.exception()) is not None]
        if failed:
            raise failed[0]

    def wait(self) -> list[Future[None]]:
        """Wait for what is being written; gives it."""
        wait(self._at_work)
        done, self._at_work = self._at_work, []
        return done

    def close(self) -> None:
        """Wait, and end the threads."""
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _one(self, array: Array, tensors: Sequence[Tensor], target: Path) -> None:
        if not hasattr(self._own, "scratch"):
            self._own.scratch = Scratch()
        with open(target, "wb", buffering=0, opener=disk.plain) as file:
            _reserve(file.fileno(), array.file_bytes)
            for piece in array.encode(tensors, self._own.scratch):
                left = piece
                while left:
                    left = left[file.write(left) :]


def _reserve(file: int, size: int) -> None:
    """Have the disk set room aside at once, which takes less than to find it write by write.

    Raises:
        OSError: there is no room.
    """
    if size < _SMALL or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise


def _size(job: Job) -> int:
    return job[0].file_bytes
