"""Softmax attention over listed tiles only: what a sparse layout hides is never multiplied.

A `Plan` names, for each tile of queries, the keys that it visits. On the CPU the keys of a tile are gathered into one
contiguous buffer, so that a tile is a small dense attention; what a query sees in several tiles is joined by its
log-sum-exp. The backward recomputes weights from the saved log-sum-exp. Fresh memory costs as much as the products of a
sparse layout: the tensors are read where they lie, and tiles that slide along the sequence are not gathered at all. On
CUDA, `flex.py` hands a layout to FlexAttention instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from workbench.kernels.native.blocks import BlockLists, attend_blocks
from workbench.kernels.runs import Runs

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
        sliding: every layout has a tile for each run of queries from run c − 1 on, whose keys are the c runs that end
            at its own. Only for the first group of a plan.
    """

    layouts: Tensor
    queries: Tensor
    keys: Tensor
    mask: Tensor | Callable[[slice], Tensor] | None = None
    joins: bool = False
    sliding: bool = False


@dataclass(frozen=True, eq=False)
class Plan:
    """Which keys each tile of queries visits.

    Attributes:
        n_layouts: as in `Layout`; divides the number of kv heads.
        run: neighbouring tokens that one index stands for.
        query_runs, key_runs: number of runs, with those that are padding.
        front: rows of padding before the first query, where runs do not start at query 0.
        lists: the same as lists of blocks, where that can be said; the C++ library then does the forward in float32.
    """

    n_layouts: int
    run: int
    query_runs: int
    key_runs: int
    groups: tuple[Group, ...]
    front: int = 0
    lists: BlockLists | None = None


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
        made = None if plan.lists is None else attend_blocks(q, k, v, plan.lists, scale)
        out, lse = _over_tiles(q, k, v, plan, scale) if made is None else made
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
            for at_runs, to_runs, size, mask in _chunks(plan, group, b, h, k.shape[1], q.device):
                at, to = _flat(at_runs, h, plan.query_runs), _flat(to_runs, k.shape[1], plan.key_runs)
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


def _over_tiles(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """Output and lse, group by group."""
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    b, h, n_q, _ = q.shape
    held = sums if any(group.joins for group in plan.groups) else q.dtype
    slides = bool(plan.groups) and _has_strides(plan, q, k, v)
    out, lse = _slid(q, k, v, plan, scale, held) if slides else _empty(q, v, plan, held)
    queries, outs, lses = (Runs.of(x, plan.run, plan.query_runs, front) for x, front in (
        (q, plan.front), (out, 0), (lse[..., None], 0)))  # fmt: skip
    keys, values = (Runs.of(x, plan.run, plan.key_runs) for x in (k, v))
    for group in plan.groups[slides:]:
        for at, to, size, mask in _chunks(plan, group, b, h, k.shape[1], q.device):
            tile_q = queries.table.index_select(0, queries.rows(*at)).view(*size, -1, q.shape[-1])
            tile_k = keys.table.index_select(0, keys.rows(*to)).view(*size, -1, k.shape[-1])
            tile_v = values.table.index_select(0, values.rows(*to)).view(*size, -1, v.shape[-1])
            tile_out, tile_lse = _tile(tile_q, tile_k, tile_v, mask, scale)
            out_at, lse_at = outs.rows(*at), lses.rows(*at)
            tile_out, tile_lse = tile_out.reshape(len(out_at), -1).to(held), tile_lse.reshape(len(lse_at), -1)
            if group.joins:
                tile_out, tile_lse = _joined(outs.table, lses.table, out_at, lse_at, tile_out, tile_lse)
            outs.table.index_copy_(0, out_at, tile_out)
            lses.table.index_copy_(0, lse_at, tile_lse)
    rows = slice(plan.front, plan.front + n_q)
    out, lse = out[:, :, rows].to(q.dtype), lse[:, :, rows]
    return out, lse


def _runs(x: Tensor, run: int, n_runs: int, front: int = 0) -> Tensor:
    """[batch, head, token, d] -> [batch · head · run, tokens of a run · d], padded with zeros to `n_runs` per head."""
    padding = n_runs * run - front - x.shape[2]
    if front or padding:
        x = F.pad(x, (0, 0, front, padding))
    return x.reshape(-1, run * x.shape[-1])


def _in_runs(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    queries = _runs(q, plan.run, plan.query_runs, plan.front)
    return queries, _runs(k, plan.run, plan.key_runs), _runs(v, plan.run, plan.key_runs)


def _empty(q: Tensor, v: Tensor, plan: Plan, held: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and lse of queries that have seen nothing yet; as those of SDPA, the heads of a token lie side by side."""
    b, h, tokens = q.shape[0], q.shape[1], plan.query_runs * plan.run
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(b, tokens, h, v.shape[-1], dtype=held).transpose(1, 2)
    return out, q.new_full((b, h, tokens), -torch.inf, dtype=sums)


def _has_strides(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the first group slides, and the tiles of these tensors can be told by strides."""
    group, tokens = plan.groups[0], plan.query_runs * plan.run
    alike = q.shape[2] == k.shape[2] == tokens and not plan.front and q.shape[-1] == v.shape[-1]
    few = q.shape[0] == 1 or (q.shape[0] and group.keys.shape[1] == 1)  # else strides cannot tell example and run
    return group.sliding and alike and bool(few) and q.device.type == "cpu"


def _slid(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, held: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and lse of the tiles of the first group, which are read where they lie."""
    group, run = plan.groups[0], plan.run
    assert isinstance(group.mask, Tensor | None)
    (b, _h, tokens, width), shared, c = q.shape, q.shape[1] // k.shape[1], group.keys.shape[1]
    first, mask = (c - 1) * run, None if group.mask is None else group.mask[:, None]
    tile_k, tile_v = (x.unfold(2, c * run, run).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (k, v))
    outs, lses = [], []
    for inner in range(shared):
        tile_q = q[:, inner::shared, first:].unfold(2, run, run).permute(0, 2, 1, 4, 3).flatten(0, 1)
        tile_out, tile_lse = _tile(tile_q, tile_k, tile_v, mask, scale)  # [run, kv head, row, …]
        outs.append(tile_out.transpose(1, 2).reshape(b, tokens - first, -1, width))
        lses.append(tile_lse.transpose(1, 2).reshape(b, tokens - first, -1).transpose(1, 2))
    if shared == 1 and not first and outs[0].dtype == held:
        return outs[0].transpose(1, 2), lses[0].contiguous()
    out, lse = _empty(q, v, plan, held)
    for inner, (tile_out, tile_lse) in enumerate(zip(outs, lses, strict=True)):
        out[:, inner::shared, first:] = tile_out.transpose(1, 2)
        lse[:, inner::shared, first:] = tile_lse
    return out, lse


def _joined(
    out: Tensor, lse: Tensor, out_at: Tensor, lse_at: Tensor, new: Tensor, new_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """`merge` of what these runs of queries, rows of both tables, have so far and of their new parts, of which none
    need see.
    """
    old_lse = lse.index_select(0, lse_at)
    whole = torch.logaddexp(old_lse, new_lse)
    known = whole.clamp(min=torch.finfo(whole.dtype).min)  # −inf less −inf is no number
    old, shape = out.index_select(0, out_at), (*whole.shape, -1)
    old.view(shape).mul_((old_lse - known).exp_()[..., None])
    return old.view(shape).addcmul_(new.view(shape), (new_lse - known).exp_()[..., None]).view_as(old), whole


_Runs = tuple[Tensor, Tensor, Tensor]  # example, head and run, which broadcast


def _chunks(
    plan: Plan, group: Group, n_batch: int, n_heads: int, n_kv_heads: int, device: torch.device
) -> Iterator[tuple[_Runs, _Runs, tuple[int, int], Tensor | None]]:
    """(runs of queries, of keys, (tiles, kv heads), mask) of so many tiles of a group that their keys stay in the
    cache.

    The rows of a tile are those of all query heads that share a kv head, one head after the other: the mask is
    [tile or 1, 1, query head · query, key].
    """
    shared = n_heads // n_kv_heads
    per_layout = n_kv_heads // plan.n_layouts
    pairs = torch.arange(n_batch * per_layout, device=device)  # an example, and a kv head of a layout
    if not len(pairs):  # no examples
        return
    inner = torch.arange(shared, device=device)[:, None]
    queries, keys, layouts = group.queries.to(device), group.keys.to(device), group.layouts.to(device)
    width = keys.shape[1] * plan.run
    heads_at_once = min(len(pairs), max(1, _KEYS_AT_ONCE // width))
    tiles_at_once = max(1, _KEYS_AT_ONCE // (width * heads_at_once))
    always = None if callable(group.mask) or group.mask is None else _for_heads(group.mask.to(device), shared)
    for start in range(0, len(layouts), tiles_at_once):
        part = slice(start, min(start + tiles_at_once, len(layouts)))
        mask = _for_heads(group.mask(part).to(device), shared) if callable(group.mask) else always
        for some in pairs.split(heads_at_once):
            batch, kv_heads = some // per_layout, layouts[part, None] * per_layout + some % per_layout
            at = (batch[:, None, None], kv_heads[..., None, None] * shared + inner, queries[part, None, None])
            to = (batch[:, None], kv_heads[..., None], keys[part, None])
            yield at, to, (part.stop - part.start, len(some)), mask


def _flat(runs: _Runs, n_heads: int, n_runs: int) -> Tensor:
    """The numbers of runs among all, [batch · head · run]."""
    batch, head, run = runs
    return ((batch * n_heads + head) * n_runs + run).flatten()


def _for_heads(mask: Tensor, shared: int) -> Tensor:
    return mask.repeat(1, shared, 1)[:, None]


def _tile(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention of [tile, head, row, d] rows, with lse [tile, head, row]."""
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        bias = (
            None
            if mask is None
            else torch.zeros(mask.shape, dtype=q.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        )
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
