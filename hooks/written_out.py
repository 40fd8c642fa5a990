"""Recognises attention that a model writes out itself: a softmax over the last axis, then a product with values.

The weights are followed from the softmax through what models do with them on the way (dropout, casts, reshaping,
slicing, masking) to the product. Dropout is not followed: the weights are those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax}
_DROPOUT = {F.dropout, torch.dropout, torch.nn.functional.alpha_dropout}
_RESHAPING = {
    Tensor.view, Tensor.reshape, torch.reshape, Tensor.unflatten, torch.unflatten, Tensor.flatten, torch.flatten,
    Tensor.unsqueeze, torch.unsqueeze, Tensor.squeeze, torch.squeeze, Tensor.expand, Tensor.contiguous, Tensor.to,
    Tensor.type, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.clone, torch.clone,
    Tensor.__getitem__,
}  # fmt: skip
_EDITING = {
    Tensor.mul, torch.mul, Tensor.__mul__, Tensor.masked_fill, torch.masked_fill, torch.where, Tensor.nan_to_num,
    torch.nan_to_num, Tensor.mul_, Tensor.masked_fill_, Tensor.__rmul__, Tensor.nan_to_num_,
}  # fmt: skip
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_EINSUM = {torch.einsum}
_FOLLOWED = _SOFTMAX | _DROPOUT | _RESHAPING | _EDITING | _PRODUCTS | _EINSUM


@dataclass(frozen=True)
class WrittenOut:
    """One attention that a model wrote out.

    Attributes:
        weights: [batch, head, query, key], or [batch · head, query, key], before dropout.
        values: [batch, head, key, width], or [batch · head, key, width].
        output: the product, its axes as `layout` says.
        layout: as in `AttentionCall`.
        dropout: probability with which weights were dropped.
    """

    weights: Tensor
    values: Tensor
    output: Tensor
    layout: str
    dropout: float


class Follower:
    """Follows weights from softmax to product; one per thread.

    Args:
        on_attention: takes each attention; what it gives, if not None, takes the place of the product.
    """

    def __init__(self, on_attention: Callable[[WrittenOut], Tensor | None]) -> None:
        self._on_attention = on_attention
        # tensor -> (weights, or None if they are the tensor itself, which would otherwise live for ever; dropout)
        self._weights: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def saw(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Any:
        """A function has run; gives its result, or what takes its place."""
        if func not in _FOLLOWED or not isinstance(result, Tensor):
            return result
        if func in _SOFTMAX:
            self._softmax(args, kwargs, result)
        elif func in _EINSUM:
            return self._einsum(args, result)
        elif args and isinstance(args[0], Tensor) and args[0] in self._weights:
            weights, dropout = self._of(args[0])
            if func in _PRODUCTS:
                return self._product(
                    weights, dropout, args[1] if len(args) > 1 else next(iter(kwargs.values())), result
                )
            if func in _DROPOUT:
                p, training = _dropout(func, args, kwargs)
                self._weights[result] = None if result is weights else weights, max(dropout, p if training else 0.0)
            elif func in _RESHAPING:
                if result is not args[0]:
                    same = weights is args[0]
                    self._weights[result] = None if same else func(weights, *args[1:], **kwargs), dropout
            else:
                self._weights[result] = None, dropout
        elif func in _EDITING and len(args) > 1:  # torch.where(mask, weights, 0), number * weights
            for other in args[1:]:
                if isinstance(other, Tensor) and other in self._weights and other.shape == result.shape:
                    self._weights[result] = None, self._weights[other][1]
        return result

    def _of(self, tensor: Tensor) -> tuple[Tensor, float]:
        weights, dropout = self._weights[tensor]
        return tensor if weights is None else weights, dropout

    def _softmax(self, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if result.dim() >= 3 and dim in (-1, result.dim() - 1):
            self._weights[result] = None, 0.0

    def _product(self, weights: Tensor, dropout: float, values: Any, result: Tensor) -> Any:
        fits = isinstance(values, Tensor) and values.dim() == weights.dim() == result.dim()
        if not fits or weights.dim() not in (3, 4) or values.shape[-2] != weights.shape[-1]:
            return result
        layout = "bhqd" if weights.dim() == 4 else "nqd"
        return self._report(WrittenOut(weights, values, result, layout, dropout))

    def _einsum(self, args: Sequence[Any], result: Tensor) -> Any:
        """einsum("bhqk,bkhd->bqhd", weights, values) and its like."""
        if len(args) == 2 and isinstance(args[1], (list, tuple)):
            args = (args[0], *args[1])
        if len(args) != 3 or not isinstance(args[0], str) or args[1] not in self._weights:
            return result
        weights, dropout = self._of(args[1])
        terms, _, out = args[0].replace(" ", "").partition("->")
        left, _, right = terms.partition(",")
        if len(left) != 4 or len(set(left)) != 4 or sorted(out) != sorted({*left[:3], *out}) or len(out) != 4:
            return result
        b, h, q, k = (left[i] for i in range(4))
        width = next((letter for letter in out if letter not in left), None)
        if width is None or set(right) != {b, h, k, width} or len(right) != 4:
            return result
        values = args[2].permute([right.index(letter) for letter in (b, h, k, width)])
        layout = "".join("bhqd"[(b, h, q, width).index(letter)] for letter in out)
        return self._report(WrittenOut(weights, values, result, layout, dropout))

    def _report(self, found: WrittenOut) -> Tensor:
        replaced = self._on_attention(found)
        return found.output if replaced is None else replaced


def _dropout(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[float, bool]:
    named = dict(zip(("p", "training"), args[1:], strict=False)) | dict(kwargs)
    return float(named.get("p", 0.5)), bool(named.get("training", named.get("train", True)))


def ungrouped(values: Tensor, n_kv_heads: int | None) -> Tensor:
    """[batch, kv head, key, width] of values [batch, head, key, width] that a model repeated for its groups of heads.

    Args:
        n_kv_heads: how many the module says it has; the values stay as they are if that is not what they show.
    """
    heads = values.shape[1]
    if n_kv_heads is None or not 0 < n_kv_heads < heads or heads % n_kv_heads:
        return values
    groups = values.detach().unflatten(1, (n_kv_heads, -1))
    same = torch.equal(groups, groups[:, :, :1].expand_as(groups))
    return values[:, :: heads // n_kv_heads] if same else values
