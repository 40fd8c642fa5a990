"""Rows of the pattern of one attention call, with the autograd history of queries, keys and biases."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import InterventionError
from workbench.hooks.tap import AttentionCall
from workbench.hooks.truth import tolerance
from workbench.kernels.masks import as_four
from workbench.kernels.patterns import Pattern


def rows(call: AttentionCall, head: int, index: Tensor, *, cross: bool = False) -> Tensor:
    """[batch, n, key] of one head's weights, before dropout: float64 for float64 queries, else float32.

    A softmax is computed anew with autograd; weights that the model wrote out keep their history, and so do the maps of
    modules that have a reader. The rows of the kernels of `workbench.kernels` are constants. A row that sees no key is
    as the kernel has it: zero under a boolean mask, whatever an additive mask leaves of it.

    Args:
        index: [batch or 1, n] query rows.
        cross: queries and keys are positions of different sequences.

    Raises:
        InterventionError: the pattern is a surrogate, whose rows are not what the model multiplies with its values.
    """
    if call.weights is not None:
        weights = call.weights[:, head]
        return _pick(weights.to(_precise(weights.dtype)), index)
    pattern = call.pattern(cross=cross)
    if call.build is None:
        return _softmax_rows(call, pattern, head, index)
    if pattern.grade == "surrogate":
        raise InterventionError(
            f"the weights of {type(pattern).__name__} stand for the mechanism, the model does not apply them",
            site=call.site,
            hint="ablate or patch the head instead",
        )
    wanted = index.unique()
    if wanted.numel() == pattern.n_queries:
        found = pattern.tile(slice(0, pattern.n_queries), slice(0, pattern.n_keys), [head])[:, 0]
    else:
        found = pattern.rows(wanted.tolist(), heads=[head])[:, 0]
    return _pick(found, torch.searchsorted(wanted, index))


def head_values(call: AttentionCall, head: int, n_heads: int) -> Tensor:
    """[batch, key, width]: the values that a head reads."""
    v = call.v.unsqueeze(1) if call.v.dim() == 3 else call.v
    return v[:, head * v.shape[1] // n_heads]


def check_row(call: AttentionCall, head: int, index: Tensor, found: Tensor) -> None:
    """Compare the last of the rows [batch, n, key] found for `index`, times V, with what the kernel gave.

    Raises:
        InterventionError: they differ, so that the call does something that is not known here.
    """
    if call.finish is not None or call.dropout > 0:
        return
    with torch.no_grad():
        row = found[:, -1:].detach()
        z = call.z()[:, head]
        got = (row @ head_values(call, head, call.sizes[0]).to(row.dtype))[:, 0]
        want = z.gather(1, index[:, -1:, None].expand(z.shape[0], 1, z.shape[2]))[:, 0].to(got.dtype)
        alive = (row != row[..., :1]).any(-1)  # kernels differ in what they give for a row that sees no key
        error = torch.where(alive, (got - want).abs(), 0.0).max().item()
    if error > tolerance(call, want):
        raise InterventionError(
            f"the rows rebuilt for head {head} are not those of {call.backend or call.kernel}: "
            f"their output is {error:.1e} off",
            site=call.site,
            shape=tuple(found.shape),
            hint="look at wb.verify(**inputs).table; attention of this kind is not supported yet",
        )


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pick(part: Tensor, index: Tensor) -> Tensor:
    """Rows [batch, n, ...] of a part [batch or 1, query or 1, ...]; a single row stands for all."""
    if part.shape[1] == 1:
        return part
    if index.shape[0] == 1:
        return part[:, index[0]]
    return part.expand(index.shape[0], -1, -1).gather(1, index[..., None].expand(-1, -1, part.shape[-1]))


def _softmax_rows(call: AttentionCall, pattern: Pattern, head: int, index: Tensor) -> Tensor:
    """softmax(softcap(scale · q kᵀ) + bias + mask) as `SoftmaxPattern` defines it, with nothing detached."""
    assert call.q is not None
    assert call.k is not None
    q, k = (t.unsqueeze(1) if t.dim() == 3 else t for t in (call.q, call.k))
    dtype = _precise(q.dtype)
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    chosen = _pick(q[:, head], index).expand(-1, index.shape[1], -1)  # a single query is a row of its own
    keys = k[:, head * k.shape[1] // q.shape[1]]
    scores = chosen.to(dtype) @ keys.to(dtype).transpose(-1, -2) * scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.bias is not None:
        scores = scores + _pick(_of_head(call.bias, head), index).to(dtype)
    hiding = call.hiding
    if hiding is not None:
        three = hiding.dim() == 3 and call.q.dim() == 3
        part = _pick(_of_head(hiding.unsqueeze(1) if three else as_four(hiding), head), index)
        scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part.to(dtype)
    mask = pattern.mask
    i = index[..., None] + mask.offset
    j = torch.arange(k.shape[2], device=index.device)
    if mask.causal:
        scores = scores.masked_fill(j > i, -torch.inf)
    if mask.window is not None:
        scores = scores.masked_fill((i - j).abs() >= mask.window, -torch.inf)
    if call.sinks is not None:
        sink = call.sinks[head].to(dtype).expand(*scores.shape[:2], 1)
        return torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    # Filled before the softmax too: the gradient of a row of −inf is NaN even where nothing depends on it.
    return scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)


def _of_head(tensor: Tensor, head: int) -> Tensor:
    """[batch or 1, query or 1, key or 1] of a mask or bias."""
    return tensor[:, head if tensor.shape[1] > 1 else 0]
