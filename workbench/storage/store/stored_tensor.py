"""A tensor that lies on the disk until it is used: its shape reads nothing, some of its heads read only these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Read = Callable[[Sequence[int] | None], Tensor]


class StoredTensor(Tensor):
    """A tensor whose numbers are read when something computes with them, and kept from then on.

    `stored[:, heads]` reads these heads alone where `head_axis` is 1. Everything else that PyTorch does with tensors
    it does with the numbers, and gives plain tensors.
    """

    _read: Read
    _head_axis: int | None
    _held: Tensor | None

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, read: Read, head_axis: int | None = None
    ) -> StoredTensor:
        """`read` gives the tensor, or only the heads that it is asked for."""
        made: StoredTensor = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype)
        made._read, made._head_axis, made._held = read, head_axis, None
        return made

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def numbers(self) -> Tensor:
        """The tensor itself, read if it was not yet."""
        if self._held is None:
            self._held = self._read(None)
        return self._held

    def _part(self, index: Any) -> Tensor:
        """`self[index]`, of which only the heads that it names are read."""
        axis = self._head_axis
        several = index if isinstance(index, tuple) else (index,)
        if self._held is not None or axis is None or len(several) <= axis or not all(map(_plain, several[: axis + 1])):
            return self.numbers()[_numbers(index)]
        if any(isinstance(one, list) for one in several[:axis]):
            return self.numbers()[_numbers(index)]
        asked, n = several[axis], self.shape[axis]
        if asked == slice(None):
            return self.numbers()[_numbers(index)]
        heads = list(range(n))[asked] if isinstance(asked, slice) else [asked] if isinstance(asked, int) else asked
        if not all(-n <= head < n for head in heads):
            return self.numbers()[_numbers(index)]  # PyTorch's own error
        part = self._read([head % n for head in heads])
        own: Any = 0 if isinstance(asked, int) else slice(None) if isinstance(asked, slice) else list(range(len(heads)))
        return part[_numbers((*several[:axis], own, *several[axis + 1 :]))]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **named)
        if func is Tensor.__getitem__ and isinstance(args[0], StoredTensor):
            return args[0]._part(args[1])
        if func is Tensor.detach:
            return args[0]  # it has no history
        return func(*tree_map(_numbers, tuple(args)), **tree_map(_numbers, named))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return func(*tree_map(_numbers, tuple(args)), **tree_map(_numbers, dict(kwargs or {})))


def _numbers(value: Any) -> Any:
    if isinstance(value, StoredTensor):
        return value.numbers()
    return tuple(map(_numbers, value)) if type(value) is tuple else value


def _plain(index: Any) -> bool:
    if isinstance(index, (bool, Tensor)):
        return False
    listed = isinstance(index, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in index)
    return isinstance(index, (int, slice)) or listed


_FACTS = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in (
            "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_meta", "is_sparse",
            "is_quantized", "is_nested", "is_leaf", "grad", "grad_fn", "_version", "nbytes", "itemsize", "is_cpu",
        )),
        Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.__len__,
        Tensor.untyped_storage,  # of which only the size means something
        Tensor.is_floating_point, Tensor.is_complex, Tensor.is_inference, Tensor.is_contiguous, Tensor.ndimension,
        torch.is_floating_point, torch.is_complex, torch.numel, torch.is_inference, torch.is_tensor, Tensor.is_conj,
        Tensor.is_neg,
    ]
)  # fmt: skip
