"""Memory of a capture's own, in which its large tensors lie one after another."""

from __future__ import annotations

import math
import mmap
import threading
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

_LARGE = 1 << 16  # bytes from which a kept tensor lies in the arena
_FIRST, _MOST = 1 << 22, 1 << 28  # bytes of the first block, and of later ones at most
_ALIGNED = 64  # bytes, so that no tensor's numbers share a cache line with another's


@dataclass
class Arena:
    """Copies of tensors, the large ones of the CPU in few blocks outside the heap.

    Kept tensors would lie scattered between the model's temporary ones, and the heap could not give back or use again
    what is free between them: at 2048 tokens that took more memory than what was kept. A map for each tensor would do,
    but a process may only have some 65,000. Blocks grow with what is kept, and what of them was never written takes no
    memory, but for the rest of a large page. A block is given back when the last tensor in it is gone.
    """

    _block: mmap.mmap | None = None
    _free: int = 0  # where the room begins in the block
    _size: int = _FIRST
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy that shares no memory with anything."""
        size = tensor.numel() * tensor.element_size()
        if tensor.device.type != "cpu" or size < _LARGE:
            return tensor.clone(memory_format=torch.contiguous_format)
        block, start = self._room(size)
        flat = torch.frombuffer(block, dtype=tensor.dtype, count=tensor.numel(), offset=start)
        return flat.view(tensor.shape).copy_(tensor)

    def _room(self, size: int) -> tuple[mmap.mmap, int]:
        with self._lock:
            if self._block is None or self._free + size > len(self._block):
                self._block, self._free = _map(max(self._size, size)), 0
                self._size = min(2 * self._size, _MOST)
            start = self._free
            self._free += math.ceil(size / _ALIGNED) * _ALIGNED
            return self._block, start


def _map(size: int) -> mmap.mmap:
    """Memory of this process alone; a child gets a copy of it, as of all else."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # the first write to each page of 4 KiB takes longer than all its numbers
        with suppress(OSError):  # a kernel without them
            block.madvise(mmap.MADV_HUGEPAGE)
    return block
