"""Memory of a capture's own, in which its large tensors lie one after another."""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor

_LARGE = 1 << 16  # bytes from which a kept tensor lies in the arena
_FIRST, _MOST = 1 << 22, 1 << 28  # bytes of the first block, and of later ones at most
_SPARE = 1 << 28  # bytes of all blocks that wait for another capture, at most
_ALIGNED = 64  # bytes, so that no tensor's numbers share a cache line with another's


@dataclass
class Arena:
    """Copies of tensors, the large ones of the CPU in few blocks outside the heap.

    Kept tensors would lie scattered between the model's temporary ones, and the heap could not give back or use again
    what is free between them: at 2048 tokens that took more memory than what was kept. A map for each tensor would do,
    but a process may only have some 65,000. Blocks grow with what is kept, and what of them was never written takes no
    memory, but for the rest of a large page. When the last tensor in a block is gone, it is filled again from its start
    as where a store has taken a forward: fresh pages take longer than the copies. So it is by the next capture, unless
    the system has taken its memory meanwhile; of such blocks, what exceeds 256 MiB is given back.
    """

    _block: memoryview | None = None
    _free: int = 0  # where the room begins in the block
    _size: int = _FIRST
    _here: deque[weakref.ref[memoryview]] = field(default_factory=deque)  # of the tensors in the block, oldest first
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy that shares no memory with anything."""
        size = tensor.numel() * tensor.element_size()
        if tensor.device.type != "cpu" or size < _LARGE:
            return tensor.clone(memory_format=torch.contiguous_format)
        return torch.frombuffer(self._room(size), dtype=tensor.dtype).view(tensor.shape).copy_(tensor)

    def _room(self, size: int) -> memoryview:
        """So many bytes, for the tensor that holds on to them."""
        with self._lock:
            while self._here and self._here[0]() is None:
                self._here.popleft()
            if not self._here:
                self._free = 0
            if self._block is None or self._free + size > len(self._block):
                self._block, self._free = _taken(max(self._size, size)), 0
                self._size = min(2 * self._size, _MOST)
                self._here.clear()
            room = memoryview(self._block)[self._free : self._free + size]
            self._free += math.ceil(size / _ALIGNED) * _ALIGNED
            self._here.append(weakref.ref(room))
            return room


_spare: list[mmap.mmap] = []  # the oldest first
_spare_lock = threading.RLock()  # a block may come back whenever something is collected


def _taken(size: int) -> memoryview:
    """A block of at least this many bytes: a spare one, whose pages need not be cleared again, or a new one.

    It is spare again when nothing refers to the view or a part of it any more.
    """
    with _spare_lock:
        block = min((one for one in reversed(_spare) if size <= len(one) <= 2 * size), key=len, default=None)
        if block is not None:
            _spare.remove(block)
    block = _map(size) if block is None else block
    held = numpy.frombuffer(block, dtype=numpy.uint8)  # every part of the view holds on to it
    weakref.finalize(held, _put_back, block).atexit = False
    return held.data


def _put_back(block: mmap.mmap) -> None:
    """Keep a block for another capture, where the system can take its memory until then."""
    if not hasattr(mmap, "MADV_FREE") or len(block) > _SPARE:
        return
    with suppress(OSError), _spare_lock:
        block.madvise(mmap.MADV_FREE)
        _spare.append(block)
        while sum(map(len, _spare)) > _SPARE:
            _spare.pop(0)


def give_back() -> None:
    """Give all spare blocks back to the system: what is held is then what is kept, as measures of memory want it."""
    with _spare_lock:
        _spare.clear()


def _map(size: int) -> mmap.mmap:
    """Memory of this process alone; a child gets a copy of it, as of all else."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # the first write to each page of 4 KiB takes longer than all its numbers
        with suppress(OSError):  # a kernel without them
            block.madvise(mmap.MADV_HUGEPAGE)
    return block
