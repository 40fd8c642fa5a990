"""How much of what operators make is there at once: a measure of memory that no allocator and no load changes."""

from __future__ import annotations

from typing import Any

from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.hooks.nested import tensors


class Held(TorchDispatchMode):
    """While entered, counts the bytes of storages that operators have made and that somebody still holds.

    Attributes:
        most: of them at any time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._held: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self._held = [(ref, size) for ref, size in self._held if not ref.expired()]
        known = {ref.cdata for ref, _ in self._held}
        for tensor in tensors(made):
            storage = tensor.untyped_storage()
            ref = StorageWeakRef(storage)
            if ref.cdata not in known:
                known.add(ref.cdata)
                self._held.append((ref, storage.nbytes()))
        self.most = max(self.most, sum(size for _, size in self._held))
        return made
