"""Recognises attention that a model writes out itself: a softmax over the last axis, then a product with values.

The weights are followed from the softmax through what models do with them on the way (dropout, casts, reshaping,
slicing, masking) to the product. Dropout is not followed: the weights are those before it. What each axis means is not
asked here; only which axes weights, values and product share.
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
_BY_OTHERS = {
    Tensor.div, torch.div, Tensor.__truediv__, Tensor.div_, Tensor.__itruediv__, Tensor.true_divide, torch.true_divide,
    Tensor.add, torch.add, Tensor.__add__, Tensor.add_, Tensor.__iadd__, Tensor.sub, torch.sub, Tensor.__sub__,
    Tensor.sub_, Tensor.__isub__, F.normalize, Tensor.tril, torch.tril, Tensor.triu, torch.triu,
}  # fmt: skip
"""Normalised again, or with others added to them: the first argument is what goes on."""
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_EINSUM = {torch.einsum}
_FOLLOWED = _SOFTMAX | _DROPOUT | _RESHAPING | _EDITING | _BY_OTHERS | _PRODUCTS | _EINSUM


@dataclass(frozen=True)
class WrittenOut:
    """One attention that a model wrote out.

    Attributes:
        weights: [..., key], before dropout. values, output: with any axes.
        letters: of the axes of the three, as in einsum: what weights and values share and the output lacks is the key,
            what only values and output have is the width.
        dropout: probability with which weights were dropped.
    """

    weights: Tensor
    values: Tensor
    output: Tensor
    letters: tuple[str, str, str]
    dropout: float

    @property
    def mixed(self) -> tuple[int, ...]:
        """The axes of the output that the values do not have: queries, and heads that share their values."""
        weights, values, output = self.letters
        return tuple(i for i, letter in enumerate(output) if letter in weights and letter not in values)

    @property
    def values_like_output(self) -> Tensor | None:
        """The values with the axes of the output, keys in the place of queries; None if they have other axes."""
        of_weights, of_values, of_output = self.letters
        if len(self.mixed) != 1:
            return None
        wanted = [of_weights[-1] if i in self.mixed else letter for i, letter in enumerate(of_output)]
        if sorted(wanted) != sorted(of_values):
            return None
        return self.values.permute([of_values.index(letter) for letter in wanted])

    @property
    def width(self) -> int:
        """The axis of the output that only the values have."""
        weights, _, output = self.letters
        return next(i for i, letter in enumerate(output) if letter not in weights)


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
            elif func in _EDITING or result.shape == args[0].shape:
                self._weights[result] = None, dropout
        elif func in _EDITING and len(args) > 1:  # torch.where(mask, weights, 0), number * weights
            for other in args[1:]:
                if isinstance(other, Tensor) and other in self._weights and other.shape == result.shape:
                    self._weights[result] = None, self._weights[other][1]
        return result

    def weights_of(self, tensor: Tensor) -> tuple[Tensor, float] | None:
        """The weights before dropout that a tensor is made of, and the dropout; None if it is made of none."""
        return self._of(tensor) if tensor in self._weights else None

    def _of(self, tensor: Tensor) -> tuple[Tensor, float]:
        weights, dropout = self._weights[tensor]
        return tensor if weights is None else weights, dropout

    def _softmax(self, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if result.dim() >= 3 and dim in (-1, result.dim() - 1):
            self._weights[result] = None, 0.0

    def _product(self, weights: Tensor, dropout: float, values: Any, result: Tensor) -> Any:
        found = of_product(weights, dropout, values, result) if isinstance(values, Tensor) else None
        return result if found is None else self._report(found)

    def _einsum(self, args: Sequence[Any], result: Tensor) -> Any:
        if len(args) == 2 and isinstance(args[1], (list, tuple)):
            args = (args[0], *args[1])
        if len(args) != 3 or not isinstance(args[0], str) or not all(isinstance(t, Tensor) for t in args[1:]):
            return result
        first = args[1] in self._weights
        given, values = args[1:] if first else args[:0:-1]
        if given not in self._weights:
            return result
        found = of_einsum(args[0], *self._of(given), values, result, weights_first=first)
        return result if found is None else self._report(found)

    def _report(self, found: WrittenOut) -> Tensor:
        replaced = self._on_attention(found)
        return found.output if replaced is None else replaced


def of_product(weights: Tensor, dropout: float, values: Tensor, result: Tensor) -> WrittenOut | None:
    """weights [..., query, key] @ values [..., key, width], where axes of one index stand for all; None for others."""
    if not 3 <= values.dim() <= weights.dim() == result.dim() or values.shape[-2] != weights.shape[-1]:
        return None
    lead = "abcefghij"[: result.dim() - 2]
    own = lead[len(lead) - values.dim() + 2 :]
    values_letters = "".join(x for x, n in zip(own, values.shape, strict=False) if n > 1 or _one(result, lead, x))
    kept = [n for x, n in zip(own, values.shape, strict=False) if x in values_letters]
    values = values.reshape(*kept, *values.shape[-2:])
    if any(n not in (1, m) for n, m in zip(weights.shape[:-2], result.shape[:-2], strict=True)):
        return None
    weights = weights.expand(*result.shape[:-2], *weights.shape[-2:])
    return WrittenOut(weights, values, result, (f"{lead}qk", f"{values_letters}kd", f"{lead}qd"), dropout)


def of_einsum(
    equation: str, weights: Tensor, dropout: float, values: Tensor, result: Tensor, *, weights_first: bool
) -> WrittenOut | None:
    """einsum("bhqk,bkhd->bqhd", weights, values) and its like, in any letters and either order; None for others."""
    terms, _, out = equation.replace(" ", "").partition("->")
    left, _, right = terms.partition(",")
    dims = (weights.dim(), values.dim()) if weights_first else (values.dim(), weights.dim())
    left, right, out = _spelled_out(left, right, out, *dims)
    w, v = (left, right) if weights_first else (right, left)
    if any(len(set(x)) != len(x) or "." in x for x in (w, v, out)):
        return None
    summed, width = [x for x in w if x not in out], [x for x in v if x not in w]
    if len(w) < 3 or summed != [w[-1]] or w[-1] not in v or len(width) != 1 or width[0] not in out:
        return None
    if set(out) - {*w, *v} or set(w[:-1]) - set(out):
        return None
    return WrittenOut(weights, values, result, (w, v, out), dropout)


def _spelled_out(left: str, right: str, out: str, n_left: int, n_right: int) -> tuple[str, str, str]:
    """The terms of an einsum with "..." written as letters, which the terms share from the end."""
    lead = [n - len(term.replace("...", "")) if "..." in term else 0 for term, n in ((left, n_left), (right, n_right))]
    own = [x for x in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if x not in left + right + out][: max(*lead, 0)]
    terms = zip((left, right, out), (*lead, len(own)), strict=True)
    left, right, out = (term.replace("...", "".join(own[len(own) - n :])) for term, n in terms)
    return left, right, out


def _one(result: Tensor, lead: str, letter: str) -> bool:
    """Whether the product too has a single index along an axis."""
    return result.shape[lead.index(letter)] == 1


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
