"""Softmax attention over listed tiles only: what a sparse layout hides is never multiplied.

A `Plan` names, for each tile of queries, the keys that it visits. On the CPU the keys of a tile are gathered into one
contiguous buffer, so that a tile is a small dense attention; what a query sees in several tiles is joined by its
log-sum-exp. The backward recomputes weights from the saved log-sum-exp. On CUDA, `flex.py` hands a layout to
FlexAttention instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_KEYS_AT_ONCE = 8192  # keys gathered at once: 2 MiB of each of k and v at width 64, about a second-level cache
_ROWS_AT_ONCE = 128  # of a tile in the backward, which holds their weights


@dataclass(frozen=True, eq=False)
class Group:
    """Tiles of one size, each of r runs of queries that share c runs of keys.

    Attributes:
        layouts: [tile], the layout that each tile belongs to.
        queries: [tile, r] indices of runs of queries; no run is in two tiles of a layout, save one for padding.
        keys: [tile, c] indices of runs of keys.
        mask: bool [1, query, key] that all tiles share, or a function from a slice of tiles to [tile, query, key]; None
            where every query of a tile sees every key.
        joins: runs of queries may be in tiles of groups before this one too, with other keys.
    """

    layouts: Tensor
    queries: Tensor
    keys: Tensor
    mask: Tensor | Callable[[slice], Tensor] | None = None
    joins: bool = False


@dataclass(frozen=True, eq=False)
class Plan:
    """Which keys each tile of queries visits.

    Attributes:
        n_layouts: as in `Layout`; divides the number of kv heads.
        run: neighbouring tokens that one index stands for.
        query_runs, key_runs: number of runs, with those that are padding.
        front: rows of padding before the first query, where runs do not start at query 0.
    """

    n_layouts: int
    run: int
    query_runs: int
    key_runs: int
    groups: tuple[Group, ...]
    front: int = 0


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention over the tiles of a plan, differentiable once in q, k and v.

    Args:
        q: [batch, head, query, d]; k: [batch, kv head, key, d]; v: [batch, kv head, key, width].
        scale: factor on q kᵀ; 1/√d if None.

    Returns:
        The output [batch, head, query, width] in the dtype of q, and the natural log of the softmax denominator
        [batch, head, query] in float32 (float64 for float64). A query that sees no key gives zeros and -inf.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out: tuple[Tensor, Tensor] = _Attend.apply(q, k, v, plan, scale)
    return out


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint sets of keys: Σ softmax(lse)ₛ · outₛ.

    Args:
        outs: each [batch, head, query, width]; lses: each [batch, head, query], natural log.

    >>> out, lse = merge([torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)], [torch.zeros(1, 1, 1)] * 2)
    >>> out.flatten().tolist(), round(float(lse), 4)
    ([0.5, 0.5], 0.6931)
    """
    stacked = torch.stack(list(lses))
    lse = stacked.logsumexp(0)
    share = (stacked - torch.where(lse.isneginf(), 0.0, lse)).exp()
    return (share[..., None] * torch.stack(list(outs))).sum(0), lse


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
        sums = torch.float64 if q.dtype == torch.float64 else torch.float32
        b, h, n_q, _ = q.shape
        queries, keys, values = _in_runs(q, k, v, plan)
        held = sums if any(group.joins for group in plan.groups) else q.dtype
        out = q.new_zeros(b * h * plan.query_runs, plan.run * v.shape[-1], dtype=held)
        lse = q.new_full((len(out), plan.run), -torch.inf, dtype=sums)
        for group in plan.groups:
            for at, to, size, mask in _chunks(plan, group, b, h, k.shape[1], q.device):
                tile_q = queries.index_select(0, at).view(*size, -1, q.shape[-1])
                tile_k = keys.index_select(0, to).view(*size, -1, k.shape[-1])
                tile_v = values.index_select(0, to).view(*size, -1, v.shape[-1])
                tile_out, tile_lse = _tile(tile_q, tile_k, tile_v, mask, scale)
                tile_out, tile_lse = tile_out.reshape(len(at), -1).to(held), tile_lse.reshape(len(at), -1)
                if group.joins:
                    tile_out, tile_lse = _joined(out, lse, at, tile_out, tile_lse)
                out.index_copy_(0, at, tile_out)
                lse.index_copy_(0, at, tile_lse)
        rows = slice(plan.front, plan.front + n_q)
        padded = plan.query_runs * plan.run  # tokens; said, since there may be no examples
        out = out.view(b, h, padded, v.shape[-1])[:, :, rows].to(q.dtype)
        lse = lse.view(b, h, padded)[:, :, rows]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        """P = exp(S − lse); dV = Pᵀ dO; dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O) + dlse); dQ = scale dS K; dK = scale dSᵀ Q."""
        q, k, v, out, lse = ctx.saved_tensors
        plan, sums = ctx.plan, lse.dtype
        b, h, n_q, d = q.shape
        less = (d_out.to(sums) * out.to(sums)).sum(-1) - d_lse
        queries, keys, values = _in_runs(q, k, v, plan)
        d_outs = _runs(d_out, plan.run, plan.query_runs, plan.front)
        lses, lesses = (
            _runs(x[..., None], plan.run, plan.query_runs, plan.front)
            for x in (torch.where(lse.isneginf(), 0.0, lse), less)
        )
        d_q, d_k, d_v = (torch.zeros(x.shape, dtype=sums, device=x.device) for x in (queries, keys, values))
        for group in plan.groups:
            for at, to, size, mask in _chunks(plan, group, b, h, k.shape[1], q.device):
                tile_q, tile_d = (
                    x.index_select(0, at).view(*size, -1, width).to(sums)
                    for x, width in ((queries, d), (d_outs, v.shape[-1]))
                )
                tile_k, tile_v = (
                    x.index_select(0, to).view(*size, -1, width).to(sums)
                    for x, width in ((keys, d), (values, v.shape[-1]))
                )
                tile_lse, tile_less = (x.index_select(0, at).view(*size, -1, 1) for x in (lses, lesses))
                tile_dq, tile_dk, tile_dv = (torch.zeros_like(x) for x in (tile_q, tile_k, tile_v))
                for start in range(0, tile_q.shape[2], _ROWS_AT_ONCE):
                    rows = (..., slice(start, start + _ROWS_AT_ONCE), slice(None))
                    p = (tile_q[rows] @ tile_k.mT).mul_(ctx.scale).sub_(tile_lse[rows]).exp_()
                    if mask is not None:
                        p = p.masked_fill_(~mask[rows], 0.0)
                    tile_dv += p.mT @ tile_d[rows]
                    d_s = (tile_d[rows] @ tile_v.mT).sub_(tile_less[rows]).mul_(p).mul_(ctx.scale)
                    tile_dq[rows] = d_s @ tile_k
                    tile_dk += d_s.mT @ tile_q[rows]
                d_v.index_add_(0, to, tile_dv.reshape(len(to), -1))
                d_q.index_add_(0, at, tile_dq.reshape(len(at), -1))
                d_k.index_add_(0, to, tile_dk.reshape(len(to), -1))
        d_q = d_q.view(b, h, plan.query_runs * plan.run, d)[:, :, plan.front : plan.front + n_q]
        n_keys = plan.key_runs * plan.run
        d_k, d_v = (
            x.view(b, k.shape[1], n_keys, like.shape[-1])[:, :, : k.shape[2]] for x, like in ((d_k, k), (d_v, v))
        )
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None


def _runs(x: Tensor, run: int, n_runs: int, front: int = 0) -> Tensor:
    """[batch, head, token, d] -> [batch · head · run, tokens of a run · d], padded with zeros to `n_runs` per head."""
    padding = n_runs * run - front - x.shape[2]
    if front or padding:
        x = F.pad(x, (0, 0, front, padding))
    return x.reshape(-1, run * x.shape[-1])


def _in_runs(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    queries = _runs(q, plan.run, plan.query_runs, plan.front)
    return queries, _runs(k, plan.run, plan.key_runs), _runs(v, plan.run, plan.key_runs)


def _joined(out: Tensor, lse: Tensor, at: Tensor, new: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    """`merge` of what these runs of queries, [run, …], have so far and of their new parts, of which none need see."""
    old_lse = lse.index_select(0, at)
    whole = torch.logaddexp(old_lse, new_lse)
    known = whole.clamp(min=torch.finfo(whole.dtype).min)  # −inf less −inf is no number
    old, shape = out.index_select(0, at), (*whole.shape, -1)
    old.view(shape).mul_((old_lse - known).exp_()[..., None])
    return old.view(shape).addcmul_(new.view(shape), (new_lse - known).exp_()[..., None]).view_as(old), whole


def _chunks(
    plan: Plan, group: Group, n_batch: int, n_heads: int, n_kv_heads: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, tuple[int, int], Tensor | None]]:
    """(query runs, key runs, (tiles, kv heads), mask) of so many tiles of a group that their keys stay in the cache.

    The rows of a tile are those of all query heads that share a kv head, one head after the other: the mask is
    [tile or 1, 1, query head · query, key].
    """
    shared = n_heads // n_kv_heads
    per_layout = n_kv_heads // plan.n_layouts
    batch, kv = torch.arange(n_batch, device=device), torch.arange(per_layout, device=device)
    first_heads = (batch[:, None] * n_kv_heads + kv).flatten()
    if not len(first_heads):  # no examples
        return
    inner = torch.arange(shared, device=device)[:, None]
    queries, keys, layouts = group.queries.to(device), group.keys.to(device), group.layouts.to(device)
    width = keys.shape[1] * plan.run
    heads_at_once = min(len(first_heads), max(1, _KEYS_AT_ONCE // width))
    tiles_at_once = max(1, _KEYS_AT_ONCE // (width * heads_at_once))
    always = None if callable(group.mask) or group.mask is None else _for_heads(group.mask.to(device), shared)
    for start in range(0, len(layouts), tiles_at_once):
        part = slice(start, min(start + tiles_at_once, len(layouts)))
        mask = _for_heads(group.mask(part).to(device), shared) if callable(group.mask) else always
        for heads in first_heads.split(heads_at_once):
            kv_heads = layouts[part, None] * per_layout + heads  # [tile, kv head], counted through the batch
            to = kv_heads[..., None] * plan.key_runs + keys[part, None]
            at = (kv_heads[..., None, None] * shared + inner) * plan.query_runs + queries[part, None, None]
            yield at.flatten(), to.flatten(), (part.stop - part.start, len(heads)), mask


def _for_heads(mask: Tensor, shared: int) -> Tensor:
    return mask.repeat(1, shared, 1)[:, None]


def _tile(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention of [tile, head, row, d] rows, with lse [tile, head, row]."""
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        bias = None if mask is None else torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        # The operator behind SDPA on the CPU, called by name because SDPA does not give its log-sum-exp.
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
        if mask is not None:
            lse = lse.masked_fill(~mask.any(-1), -torch.inf)
        return out, lse
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.to(sums) @ k.to(sums).mT).mul_(scale)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    p = scores.sub_(torch.where(lse.isneginf(), 0.0, lse)[..., None]).exp_()
    return (p @ v.to(sums)).to(q.dtype), lse
