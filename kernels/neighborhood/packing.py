"""Keys packed into blocks by which blocks of queries see them, where no grid of boxes fits."""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 512
"""Sets of keys that are packed in reasonable time: each two are compared."""
_ALONE = 0.25  # what a block of queries that sees one of two sets alone counts against joining them
_FILLED = 0.5  # what filling a block counts for it


def packed(seen: Tensor, block: int) -> Tensor | None:
    """[key] the block of each key; None where more than `MOST` sets of keys are left to be packed.

    Keys that the same blocks of queries see fill blocks of their own as far as they go. What is left of each such set
    is joined with others, always the two that have the most in common.

    Args:
        seen: [key, query block] bool. block: keys in a block.

    >>> packed(torch.tensor([[1, 0], [0, 1], [1, 0], [1, 1]]).bool(), 2).tolist()
    [0, 1, 0, 1]
    """
    kinds, kind, many = seen.unique(dim=0, return_inverse=True, return_counts=True)
    left = (many % block).nonzero()[:, 0]
    if len(left) > MOST:
        return None
    order = kind.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - (many.cumsum(0) - many)[kind[order]]
    whole = many // block  # full blocks of each kind
    joined = torch.empty_like(many)
    joined[left] = _joined(kinds[left].float(), (many % block)[left], block)
    of_rest = int(whole.sum()) + joined[kind]
    return torch.where(rank < (whole * block)[kind], (whole.cumsum(0) - whole)[kind] + rank // block, of_rest)


def _joined(rows: Tensor, sizes: Tensor, block: int) -> Tensor:
    """[set] the block of each set of keys, of those seen by `rows` [set, query block], 0 or 1."""
    rows, sizes, blocks = rows.clone(), sizes.float(), torch.arange(len(rows))

    def gains(at: Tensor) -> Tensor:
        """[at, set] what joining each two gains; −∞ where they do not fit, or have nothing in common."""
        common, many = rows[at] @ rows.mT, rows.sum(1)
        filled = sizes[at, None] + sizes
        alone = many[at, None] + many - 2 * common
        found = common * (1 + _FILLED * filled / block) - _ALONE * alone
        never = (filled > block) | (common == 0) | (at[:, None] == torch.arange(len(rows)))
        return found.masked_fill(never, -torch.inf)

    gain = gains(torch.arange(len(rows)))
    for _ in range(len(rows)):
        a, b = divmod(int(gain.argmax()), len(rows))
        if gain[a, b] == -torch.inf:
            break
        rows[a] = torch.maximum(rows[a], rows[b])
        sizes[a] += sizes[b]
        sizes[b] = torch.inf
        blocks[blocks == b] = a
        gain[b] = gain[:, b] = -torch.inf
        gain[a] = gain[:, a] = gains(torch.tensor([a]))[0]
    return blocks.unique(return_inverse=True)[1]
