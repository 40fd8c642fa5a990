"""Does a rebuilt pattern give what the kernel gave?"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.hooks.tap import AttentionCall
from workbench.kernels.checks import check_finite
from workbench.kernels.patterns import Pattern

_NO_KEYS = 1e19  # beyond all denominators of rows that see keys
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


class Checked:
    """Of which calls a row was compared with what the kernel gave.

    It is due again where a site is called in another way than before, and where its keys have doubled: a row costs
    little, but a device has to be waited for; and a row of one key tells nothing.
    """

    def __init__(self) -> None:
        self._n_keys: dict[tuple[Hashable, ...], int] = {}
        self._backends: set[tuple[Hashable, str]] = set()

    def is_due(self, call: AttentionCall, of: Hashable) -> bool:
        """Whether a row is to be compared; `of` is what is checked, such as a site, or a head of it."""
        return call.lengths[1] >= 2 * self._n_keys.get(_way(call, of), 0)

    def add(self, call: AttentionCall, of: Hashable) -> None:
        """It was, and agreed."""
        self._n_keys[_way(call, of)] = n_keys = call.lengths[1]
        if n_keys > 1:
            self._backends.add((of, call.backend))

    def has(self, of: Hashable, backend: str) -> bool:
        """Whether some call by this backend was checked."""
        return (of, backend) in self._backends


def _way(call: AttentionCall, of: Hashable) -> tuple[Hashable, ...]:
    masked, made = call.mask is None, call.weights is None
    return of, call.tap, call.kernel, call.backend, masked, made, call.is_causal, call.v.dtype, call.module.training


def tolerance(call: AttentionCall, like: Tensor) -> float:
    """How far A·V may be from a kernel's output, by the coarsest dtype of the call and the size of `like`."""
    dtypes = [t.dtype for t in (call.q, call.k, call.v, call.output) if t is not None]
    dtype = max(dtypes, key=lambda each: _TOLERANCE.get(each, 1e-4))
    if call.kernel == "eager" and dtype == torch.float64:
        dtype = torch.float32  # many of Hugging Face's eager functions say that the softmax is float32
    return _TOLERANCE.get(dtype, 1e-4) * max(1.0, like.abs().max().item() if like.numel() else 1.0)


def check_last_row(call: AttentionCall, pattern: Pattern) -> None:
    """Compare A·V of the last query in the first and last head with what the kernel gave; of a reading, in all heads.

    A cheap proof that nothing was overlooked: scale, mask, biases and the order of heads all show in it.

    Raises:
        CaptureError: they differ, so that the call does something that the pattern does not know of.
    """
    if call.tap == "reader":
        _check_reading(call, pattern)
        return
    if call.finish is not None or call.dropout > 0 or 0 in pattern.shape:
        return
    both, last = slice(None, None, max(1, pattern.n_heads - 1)), pattern.n_queries - 1
    heads = list(range(pattern.n_heads))[both]
    rows = pattern.tile(slice(last, last + 1), slice(0, pattern.n_keys), heads)
    values = call.v.unsqueeze(1) if call.v.dim() == 3 else call.v
    first, final = (head * values.shape[1] // pattern.n_heads for head in (heads[0], heads[-1]))
    read = values[:, first : final + 1 : max(1, final - first)]  # a view of two heads, or of the one that both share
    got = (rows @ read.to(rows.dtype)).squeeze(2)  # [b, head, width]
    if pattern.before is not None:
        got += pattern.before[:, both, last].to(got)
    want = call.z()[:, both, last].to(got.dtype)
    off = (got - want).abs_()
    error, allowed = off.max().item(), tolerance(call, want)
    if not error <= allowed and call.lse is not None:
        allowed *= max(1.0, _roundings(call.lse[..., -1]) / _TOLERANCE[torch.float32])
    if not error <= allowed:  # kernels differ in what they give for a row that sees no key
        alive = (pattern.seen.keys_per_query[:, :, last] > 0).expand(pattern.shape[:2])[:, both]
        error = torch.where(alive[..., None], off, 0.0).max().item()
    if not error <= allowed:
        for name, tensor in (("q", call.q), ("k", call.k), ("v", call.v)):
            if tensor is not None:
                check_finite(name, tensor, call.site)
        raise CaptureError(
            f"the pattern rebuilt for the backend {call.backend or call.kernel} is not what it computes: "
            f"its last row gives an output that is {error:.1e} off",
            site=call.site,
            shape=pattern.shape,
            hint="look at wb.verify(**inputs).table; attention of this kind is not supported yet",
        )


def _roundings(lse: Tensor) -> float:
    """By how much of a weight two kernels may differ that round large scores differently: 2 % at most."""
    size = lse.detach().abs()
    largest = size.where(size < _NO_KEYS, 0.0).max().item() if size.numel() else 0.0
    return min(0.02, 8 * torch.finfo(torch.float32).eps * largest)


def _check_reading(call: AttentionCall, pattern: Pattern) -> None:
    """Compare `finish(A·V)` with what the module gave, for the last query where the module's output shows it.

    What follows the mixing usually acts on each position alone, so that a row of A·V is enough. If the row does not
    agree, all of them are compared.

    Raises:
        CaptureError: they differ.
    """
    if call.finish is None or 0 in pattern.shape:
        return
    want, last = call.output.detach(), pattern.n_queries - 1
    allowed = tolerance(call, want)
    if want.dim() == 3 and want.shape[1] == pattern.n_queries and pattern.n_queries > 1:
        row = pattern.tile(slice(last, last + 1), slice(0, pattern.n_keys))  # [b, h, 1, key]
        values = call.v.repeat_interleave(pattern.n_heads // call.v.shape[1], dim=1).to(row.dtype)
        read = row @ values if pattern.before is None else row @ values + pattern.before[:, :, last:].to(row)
        z = torch.cat((row.new_zeros(*row.shape[:2], last, values.shape[-1]), read), dim=2)
        given = call.finish(z)
        if given.shape == want.shape and _off(given[:, last], want[:, last]) <= allowed:
            return
    given = call.finish(pattern.outputs(call.v))
    error = _off(given, want) if given.shape == want.shape else float("inf")
    if not error <= allowed:
        raise CaptureError(
            f"what the reader of {type(call.module).__name__} gives is not what the module computes: "
            f"finish(A·V) is {error:.1e} off",
            site=call.site,
            shape=pattern.shape,
            hint="finish must map A·V [batch, head, query, width] to the module's output "
            f"{list(want.shape)}; is it another class of the same name, or an input that the reader leaves out?",
        )


def _off(got: Tensor, want: Tensor) -> float:
    return (got.to(want.dtype) - want).abs().max().item() if want.numel() else 0.0
