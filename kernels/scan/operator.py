"""Softmax sums of sets of tokens, and the associative operator that joins them (arXiv 2405.13956, section 3.2).

A set is (m, u, w): the largest score m, u = Σ exp(s − m) and w = Σ exp(s − m)·v. Its attention output is w / u, its
log-sum-exp m + log u. No set is (−inf, 0, 0), which changes nothing that it is joined with.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Sums(NamedTuple):
    """Softmax sums: `top` (m) [...], `size` (u) [...] and `total` (w) [..., width], of any leading shape.

    >>> one, two = leaves(torch.tensor(0.0), torch.tensor([4.0])), leaves(torch.tensor(0.0), torch.tensor([2.0]))
    >>> combine(one, two).output.tolist()
    [3.0]
    """

    top: Tensor
    size: Tensor
    total: Tensor

    @property
    def output(self) -> Tensor:
        """[..., width]: the mean of the values under the softmax; NaN for no tokens."""
        return self.total / self.size[..., None]

    @property
    def lse(self) -> Tensor:
        """[...]: log of Σ exp(s); −inf for no tokens."""
        return self.top + self.size.log()


def leaves(scores: Tensor, values: Tensor) -> Sums:
    """Every token as a set of its own: scores [...], values [..., width]."""
    return Sums(scores, torch.ones_like(scores), values)


def identity_like(sums: Sums) -> Sums:
    """No tokens, in the shape of `sums`."""
    return Sums(torch.full_like(sums.top, -torch.inf), torch.zeros_like(sums.size), torch.zeros_like(sums.total))


def combine(a: Sums, b: Sums) -> Sums:
    """The sums of both sets together. Associative; shapes broadcast."""
    top = torch.maximum(a.top, b.top)
    finite = top.clamp(min=torch.finfo(top.dtype).min)  # two empty sets: −inf − (−inf) would be NaN
    of_a, of_b = (a.top - finite).exp(), (b.top - finite).exp()
    return Sums(top, a.size * of_a + b.size * of_b, a.total * of_a[..., None] + b.total * of_b[..., None])


def tree_scan(sums: Sums) -> Sums:
    """Inclusive scan over the last position axis by doubling steps (Hillis and Steele): log₂ N rounds.

    Args:
        sums: top and size [..., position], total [..., position, width].
    """
    n, step = sums.top.shape[-1], 1
    while step < n:
        before = Sums(
            pad(sums.top[..., :-step], (step, 0), value=-torch.inf),
            pad(sums.size[..., :-step], (step, 0)),
            pad(sums.total[..., :-step, :], (0, 0, step, 0)),
        )
        sums, step = combine(before, sums), 2 * step
    return sums


def exp_below(x: Tensor) -> Tensor:
    """exp(x) in place, with x held between 0 and the log of the smallest normal number.

    Hidden entries of a tile may be above 0 and would overflow. A CPU takes 10 to 100 times longer over subnormal
    numbers, and beside a weight of one they are nothing.
    """
    return x.clamp_(min=math.log(torch.finfo(x.dtype).tiny), max=0).exp_()


def extend(before: Sums, scores: Tensor, values: Tensor) -> Sums:
    """Inclusive scan over a block of tokens, each prefix joined with what came `before` the block.

    Within the block weights are a matrix exp(s_j − m_t), at most one since m_t is the largest score up to t.

    Args:
        before: top and size [..., 1], total [..., 1, width].
        scores: [..., position]. values: [..., position, width].
    """
    top = scores.cummax(-1).values
    weights = exp_below(scores[..., None, :] - top[..., :, None]).tril_()
    return combine(before, Sums(top, weights.sum(-1), weights @ values))
