"""Sites whose rows come from several calls: each call is a block of the map, from one query and key to another.

Models do so to save memory (blocks of queries), or because a query sees its own chunk only. Where every block lies is
shown by value: its rows are looked up in what enters the projection, its keys in what a linear function gave the
values. The blocks then make one call, with positions as they are in the whole sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.hooks.proofs.axes import Bound
from workbench.hooks.proofs.rows import Account, account
from workbench.hooks.tap import AttentionCall, Block
from workbench.kernels.masks import Mask


@dataclass(frozen=True)
class Blocks:
    """The blocks of a site, in the order of its calls. `bounds`: the axes of what its kernel gave in each."""

    blocks: tuple[Block, ...]
    bounds: tuple[Bound, ...]

    def of(self, ordinal: int, shape: Sequence[int]) -> tuple[Block, Bound] | None:
        """The block that a call of that number is; None if its sizes are others than they were."""
        block, known = self.blocks[ordinal % len(self.blocks)], self.bounds[ordinal % len(self.blocks)]
        bound = known.axes.bind(shape)
        return (block, bound) if bound is not None and bound.sizes == known.sizes else None


def find_blocks(
    calls: Sequence[AttentionCall],
    bounds: Sequence[Bound],
    widths: Sequence[int],
    found: Account,
    made: Iterable[Tensor],
) -> Blocks | None:
    """Where calls lie in the map of their site; None where that cannot be shown.

    Args:
        calls: made under the bounds. widths: the axis of each output that is its width.
        found: their rows, in the input of the projection.
        made: what linear functions gave before them.
    """
    queries = [
        _span(found, i, call.heads_of(_numbered(call.output, width)), call.output.numel())
        for i, (call, width) in enumerate(zip(calls, widths, strict=True))
    ]
    keys: list[slice | None]
    if all(_equal(call.v, calls[0].v) and _equal(call.k, calls[0].k) for call in calls):
        keys = [slice(0, calls[0].v.shape[-2])] * len(calls)
    else:
        keys = next((spans for one in made if (spans := _keys_in(one, calls)) is not None), [None])
    if None in queries or None in keys:
        return None
    n_keys = max(span.stop for span in keys if span is not None)
    return Blocks(
        tuple(
            Block(i, len(calls), q, k, n_keys)
            for i, (q, k) in enumerate(zip(queries, keys, strict=True))
            if q is not None and k is not None
        ),
        tuple(bounds),
    )


def gather(waiting: dict[str, list[AttentionCall]], call: AttentionCall, block: Block) -> AttentionCall | None:
    """All blocks of a site as one call, once this is the last of them; until then they wait, by site.

    Raises:
        CaptureError: the blocks are of different kinds.
    """
    if block.number == 0:
        waiting[call.site] = []
    several = waiting.setdefault(call.site, [])
    several.append(call)
    if len(several) < block.of:
        return None
    joined = join(waiting.pop(call.site))
    if joined is None:
        raise CaptureError(f"the {block.of} calls that make its map are of different kinds", site=call.site)
    return joined


def join(calls: Sequence[AttentionCall]) -> AttentionCall | None:
    """One call with the rows, keys and values of all blocks; None where they are of different kinds.

    What a query does not see in its own block is hidden.
    """
    blocks = [call.block for call in calls if call.block is not None]
    order = sorted(range(len(calls)), key=lambda i: blocks[i].queries.start)
    first, n_keys = calls[0], blocks[0].n_keys
    n_queries = sum(block.queries.stop - block.queries.start for block in blocks)
    alike = {(call.scale, call.softcap, call.dropout, call.weights is None, call.build is None) for call in calls}
    ends = [0, *(blocks[i].queries.stop for i in order)]
    if len(alike) > 1 or first.build is not None or any(call.sinks is not None for call in calls):
        return None
    if [blocks[i].queries.start for i in order] != ends[:-1]:
        return None
    whole = all(block.keys == slice(0, n_keys) for block in blocks)
    plain = replace(
        first,
        v=first.v if whole else _by_key(calls, blocks, [call.v for call in calls], n_keys),
        output=torch.cat([calls[i].z() for i in order], dim=2),
        layout="bhqd",
        axes=None,
        block=None,
        joined=len(calls),
        is_causal=False,
        offset=None,
        window=None,
        bias=None,
    )
    if first.weights is not None:
        weights = first.weights.new_zeros(*first.weights.shape[:2], n_queries, n_keys)
        for call, block in zip(calls, blocks, strict=True):
            if call.weights is not None:
                weights[:, :, block.queries, block.keys] = call.weights.detach()
        return replace(plain, weights=weights)
    lse = [calls[i].lse for i in order]
    return replace(
        plain,
        q=torch.cat([q for i in order if (q := calls[i].q) is not None], dim=2),
        k=first.k if whole else _by_key(calls, blocks, [k for call in calls if (k := call.k) is not None], n_keys),
        mask=_mask(calls, blocks, n_queries, n_keys, whole),
        offset=0,
        lse=None if any(one is None for one in lse) else torch.cat([one for one in lse if one is not None], dim=2),
    )


def _mask(
    calls: Sequence[AttentionCall], blocks: Sequence[Block], n_queries: int, n_keys: int, whole: bool
) -> Tensor | None:
    """[batch or 1, head or 1, query, key]: True where a query may see a key, or what is added to its score."""
    parts: list[tuple[Mask, Tensor | None, Tensor | None]] = []
    for call in calls:
        mask = call.pattern().mask
        every = slice(0, mask.n_queries), slice(0, mask.n_keys), slice(None), slice(None)
        parts.append((mask, mask.cut(*every), mask.visible(*every)))
    if whole and all(seen is None for _, _, seen in parts) and not any(mask.additive for mask, _, _ in parts):
        return None
    given = [t for _, part, seen in parts for t in (part, seen) if t is not None and t.dim() == 4]
    lead = [max([t.shape[axis] for t in given], default=1) for axis in (0, 1)]
    adds = next((mask.tensor for mask, _, _ in parts if mask.additive), None)
    device = calls[0].v.device
    if adds is None:
        whole_mask = torch.zeros(*lead, n_queries, n_keys, dtype=torch.bool, device=device)
    else:
        whole_mask = torch.full((*lead, n_queries, n_keys), -torch.inf, dtype=adds.dtype, device=device)
    for (mask, part, seen), block in zip(parts, blocks, strict=True):
        shown = torch.ones((), dtype=torch.bool, device=device) if seen is None else seen.to(device)
        if adds is not None:
            bias = part if mask.additive and part is not None else adds.new_zeros(())
            shown = torch.where(shown, bias, -torch.inf)
        whole_mask[:, :, block.queries, block.keys] = shown
    return whole_mask


def _by_key(calls: Sequence[AttentionCall], blocks: Sequence[Block], parts: Sequence[Tensor], n_keys: int) -> Tensor:
    """Keys or values [batch, head, key, width] of the whole sequence, from those of each block."""
    whole = parts[0].new_zeros(*parts[0].shape[:2], n_keys, parts[0].shape[-1])
    for block, part in zip(blocks, parts, strict=True):
        whole[:, :, block.keys] = part.detach()
    return whole


def _keys_in(made: Tensor, calls: Sequence[AttentionCall]) -> list[slice | None] | None:
    """Which positions the keys of each call are, by where its values lie in what a linear function gave."""
    spans: list[slice | None] = []
    for call in calls:
        v = call.v
        if v.dim() != 4 or made.dim() < 2 or made.numel() < v.numel() or (found := account(made, [v])) is None:
            return None
        span = _span(found, 0, _numbered(v), v.numel(), in_order=False)
        if span is None:
            return None
        spans.append(span)
    return spans


def _numbered(t: Tensor, width: int = -1) -> Tensor:
    """A tensor of that shape that holds the number of each row, counted through all axes but one."""
    t = t.movedim(width, -1)
    rows = torch.arange(t.numel() // t.shape[-1], device=t.device)
    return rows.view(t.shape[:-1])[..., None].expand(t.shape).movedim(-1, width)


def _span(found: Account, which: int, numbers: Tensor, size: int, *, in_order: bool = True) -> slice | None:
    """The positions that a call's rows have; None if they do not follow each other, alike in all heads and examples.

    Args:
        numbers: [batch, head, row, width] the number of each row in the call.
        in_order: its heads must be the slices of the row, in their order.
    """
    width = numbers.shape[-1]
    at = (found.owner == which).nonzero()
    where = torch.full((size // width,), -1, dtype=torch.long, device=numbers.device)
    where[found.row[at[:, 0], at[:, 1]]] = at[:, 0] * found.owner.shape[1] + at[:, 1]
    placed = where[numbers[..., 0]]  # [batch, head, row]
    if bool((placed < 0).any()):
        return None
    row, head = placed // found.owner.shape[1], placed % found.owner.shape[1]
    batch, _, n = row.shape
    if not torch.equal(head, head[:1, :, :1].expand_as(head)) or not torch.equal(row, row[:, :1].expand_as(row)):
        return None
    if in_order and head[0, :, 0].tolist() != list(range(found.owner.shape[1])):
        return None
    start = int(row.min())
    example, position = torch.arange(batch, device=row.device)[:, None], torch.arange(n, device=row.device)
    n_rows = found.n_rows // batch
    for first, wanted in (
        (start, example * n_rows + start + position),  # [batch, position, ...]
        (start // batch, (start // batch + position) * batch + example),  # positions first
    ):
        if torch.equal(row[:, 0], wanted):
            return slice(first, first + n)
    return None


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.shape == b.shape and torch.equal(a, b))
