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
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}  # a reference keeps an address from being used again
        self._bytes = 0  # with those that have gone since they were last looked through

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tensors(made):
            storage = tensor.untyped_storage()
            ref = StorageWeakRef(storage)
            if ref.cdata not in self._held:
                self._held[ref.cdata] = ref, storage.nbytes()
                self._bytes += storage.nbytes()
        if self._bytes > self.most:
            self._held = {at: (ref, size) for at, (ref, size) in self._held.items() if not ref.expired()}
            self._bytes = sum(size for _, size in self._held.values())
            self.most = max(self.most, self._bytes)
        return made
