"""Which rows of a projection's input the calls of a site account for.

A call whose output is no rearrangement of what enters the projection may be a part of it: one block of queries, or
half of the heads. Every head-wide slice of every row is looked up among the rows of the calls by a hash of its bits,
and what was found is compared by value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Account:
    """What the rows of a projection's input are.

    Attributes:
        owner: [row, slice] the call that gave it, the last that fits; −1: none.
        row: [row, slice] which row of that call, counted through all its axes but the last; −1: none.
        empty: [row, slice] it is zero, as padding is; nothing tells such slices apart.
    """

    owner: Tensor
    row: Tensor
    empty: Tensor

    @property
    def n_rows(self) -> int:
        """How many rows there are."""
        return self.owner.shape[0]

    @property
    def explained(self) -> int:
        """How many rows the calls account for, whole; rows of zeros count as explained if any other row is."""
        known = (self.owner >= 0) | self.empty
        return int(known.all(-1).sum()) if bool((self.owner >= 0).any()) else 0

    @property
    def touched(self) -> int:
        """How many rows the calls account for, at least in part."""
        return int((self.owner >= 0).any(-1).sum())

    @property
    def slices(self) -> tuple[int, int]:
        """How many slices of each row are accounted for in every row that is touched, of how many."""
        known = (self.owner >= 0) | self.empty
        rows = known[(self.owner >= 0).any(-1)]
        return (int(rows.all(0).sum()) if len(rows) else 0), self.owner.shape[1]

    def rows_of(self, call: int) -> Tensor:
        """Numbers of the rows that a call accounts for, at least in part."""
        return (self.owner == call).any(-1).nonzero().flatten()

    def __str__(self) -> str:
        some, of = self.slices
        if self.explained < self.n_rows and self.touched == self.n_rows and some < of:
            return f"{some} of {of} heads"
        return f"{self.explained} of {self.n_rows} rows"


def account(p: Tensor, calls: Sequence[Tensor]) -> Account | None:
    """Look up the head-wide slices of `p` among the rows of several calls.

    Args:
        p: [..., feature], the input of a projection.
        calls: what kernels gave, each [..., width] with its width last; of one width.

    Returns:
        None if p cannot be cut into slices of that width.

    >>> z = torch.arange(1., 25.).view(2, 3, 4)  # [head, query, width]
    >>> p = z.transpose(0, 1).reshape(3, 8)
    >>> print(account(p, [z[:, :1], z[:, 1:2]]))
    2 of 3 rows
    """
    width = calls[0].shape[-1]
    if p.shape[-1] % width or any(call.shape[-1] != width for call in calls) or p.numel() == 0:
        return None
    pieces = p.detach().reshape(-1, p.shape[-1] // width, width)
    rows = [call.detach().to(p.device, p.dtype).reshape(-1, width) for call in calls]
    factors = torch.randint(-(2**62), 2**62, (width,), generator=torch.Generator().manual_seed(0)) | 1
    factors = factors.to(p.device)

    def hashed(t: Tensor) -> Tensor:
        bits = (t + 0.0).contiguous().view(_BITS[t.element_size()])  # + 0.0: −0 and 0 are one number
        return (bits.long() * factors).sum(-1)

    keys, order = torch.cat([hashed(one) for one in rows]).sort(stable=True)
    of_call = torch.cat([torch.full((len(one),), i, device=p.device) for i, one in enumerate(rows)])[order]
    of_row = torch.cat([torch.arange(len(one), device=p.device) for one in rows])[order]
    wanted = hashed(pieces)
    last = (torch.searchsorted(keys, wanted, right=True) - 1).clamp(min=0)
    empty = (pieces == 0).all(-1)
    hit = (keys[last] == wanted) & ~empty
    owner, row = (torch.where(hit, one[last], -1) for one in (of_call, of_row))
    for i, one in enumerate(rows):  # the hashes are the search, this is the proof
        mine = owner == i
        wrong = (pieces[mine] != one[row[mine]]).any(-1)
        if bool(wrong.any()):
            at = mine.nonzero()[wrong]
            owner[at[:, 0], at[:, 1]] = row[at[:, 0], at[:, 1]] = -1
    return Account(owner, row, empty)


def own_features(p: Tensor, output: Tensor, axis: int) -> Tensor:
    """The features of p [..., feature] that a call fills in every row: all, or those of its own heads among others.

    Args:
        output: what the kernel gave; axis: its width.
    """
    numel, rows = output.numel(), p.numel() // p.shape[-1]
    if numel == p.numel() or numel % rows:
        return p
    wide = numel // rows
    found = account(p, [output.movedim(axis, -1)])
    if found is None or found.touched < found.n_rows:
        return p
    width = p.shape[-1] // found.owner.shape[1]
    filled = ((found.owner >= 0) | found.empty).all(0).nonzero().flatten().tolist()
    if len(filled) * width != wide:
        return p
    return p.unflatten(-1, (-1, width))[..., filled, :].flatten(-2)
