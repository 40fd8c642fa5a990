"""What heads look at from the last query of one call: of a softmax nothing else is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.hooks.tap import AttentionCall
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern
from workbench.kernels.softmax import SoftmaxPattern


def last_rows(call: AttentionCall, heads: Sequence[int], *, cross: bool = False) -> Tensor:
    """[batch, head, key] weights of the last query: float64 for float64 queries, else float32.

    Args:
        heads: by their numbers in the call.
        cross: queries and keys are positions of different sequences.

    Raises:
        CaptureError: there is no such head, or a denominator is no number.
    """
    return _of_pattern(call.pattern(cross=cross), heads)


def rows_over_all_keys(q: Tensor, k: Tensor, scale: float | None, heads: Sequence[int]) -> Tensor:
    """As `last_rows`, where the last query sees every key."""
    return _of_pattern(SoftmaxPattern(q, k, Mask(q.shape[2], k.shape[2]), scale=scale), heads)


@dataclass(frozen=True, eq=False, slots=True)
class Products:
    """The last query's products with all keys, of a plain softmax: what a forward's layers have is finished together.

    Attributes:
        site, heads: whose they are. products: [batch, head, key], to be scaled by `scale`.
        rows: what makes them in another way, which has errors for what is not finite.
    """

    site: str
    heads: Sequence[int]
    products: Tensor
    scale: float
    rows: Callable[[], Tensor]

    @classmethod
    def of(cls, call: AttentionCall, heads: Sequence[int], *, cross: bool = False) -> Products | None:
        """Those of a call where the last query sees every key and nothing but a scale is between products and weights,
        as at nearly every step of `generate()`; None for all others.
        """
        q, k = call.q, call.k
        if call.build is not None or call.weights is not None or call.bias is not None or call.sinks is not None:
            return None
        if call.mask is not None or call.window is not None or call.softcap or call.segments or q is None or k is None:
            return None
        if q.dim() != 4 or (call.is_causal and call.first_position(cross=cross) + q.shape[2] < k.shape[2]):
            return None
        return cls.of_all_keys(call.site, q, k, call.scale, heads, lambda: last_rows(call, heads, cross=cross))

    @classmethod
    def of_all_keys(
        cls,
        site: str,
        q: Tensor,
        k: Tensor,
        scale: float | None,
        heads: Sequence[int],
        rows: Callable[[], Tensor] | None = None,
    ) -> Products | None:
        """Those of q [batch, head, query, d] and k [batch, kv head, key, d], where the last query sees every key; None
        where they do not fit, which a pattern has an error for.
        """
        if k.dim() != 4 or 0 in q.shape or 0 in k.shape or len(q) != len(k):
            return None
        n_heads, n_kv_heads = q.shape[1], k.shape[1]
        if n_heads % n_kv_heads or min(heads) < 0 or max(heads) >= n_heads:
            return None
        queries = _heads(q, heads, slice(-1, None))
        keys = _heads(k, [head * n_kv_heads // n_heads for head in heads], slice(None))
        if q.dtype not in (torch.float32, torch.float64):
            queries, keys = queries.float(), keys.float()
        products = queries @ keys.mT if len(q) > 1 else torch.bmm(queries[0], keys[0].mT)[None]
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return cls(site, heads, products.squeeze(2), scale, rows or (lambda: rows_over_all_keys(q, k, scale, heads)))


def finished(several: Iterable[Products]) -> dict[Products, Tensor]:
    """The rows [batch, head, key] of each.

    Raises:
        CaptureError: a denominator is no number.
    """
    alike: dict[tuple[object, ...], list[Products]] = {}
    for one in several:
        key = one.products.shape, one.products.dtype, one.products.device, one.scale
        alike.setdefault(key, []).append(one)
    found: dict[Products, Tensor] = {}
    for group in alike.values():
        rows = torch.stack([one.products for one in group]).mul_(group[0].scale).softmax(-1)
        if rows.device.type == "cpu" and not math.isfinite(rows.sum().item()):
            for one in group:  # some way of making it may say more of where a number is not finite
                found[one] = one.rows()
                if not math.isfinite(found[one].sum().item()):
                    raise CaptureError(
                        "what its last query looks at is not finite",
                        site=one.site,
                        hint="a query, a key or the scale is not: does an earlier layer overflow?",
                    )
        else:
            found |= zip(group, rows.unbind(), strict=True)
    return found


def _heads(tensor: Tensor, heads: Sequence[int], positions: slice) -> Tensor:
    """[batch, head, position, d]; of one head a view."""
    if len(heads) == 1:
        return tensor[:, heads[0] : heads[0] + 1, positions]
    return tensor[:, list(heads), positions]


def _of_pattern(pattern: Pattern, heads: Sequence[int]) -> Tensor:
    if type(pattern) is not SoftmaxPattern or pattern.mask.layout is not None:
        return pattern.rows(-1, heads)[:, :, 0]
    pattern._checked(heads)
    which, mask, group = list(heads), pattern.mask, pattern.n_heads // pattern.n_kv_heads
    tensor = mask.tensor
    if tensor is not None:
        tensor = tensor[:, :, -1:] if tensor.shape[1] == 1 else tensor[:, which, -1:]
    known = pattern._kernel_lse
    last = SoftmaxPattern(
        pattern.q[:, which, -1:], pattern.k[:, [head // group for head in which]],
        Mask(1, mask.n_keys, causal=mask.causal, offset=mask.offset + mask.n_queries - 1, window=mask.window,
             tensor=tensor),
        scale=pattern.scale, softcap=pattern.softcap, lse=None if known is None else known[:, which, -1:],
        sinks=None if pattern.sinks is None else pattern.sinks[which],
        key_bias=None if pattern.key_bias is None else pattern.key_bias[:, which],
    )  # fmt: skip
    return last.tile(slice(0, 1), slice(0, pattern.n_keys))[:, :, 0]
