"""From sums per repeat to curves, their intervals, and the number of pairs at which a criterion is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.analysis.statistics.intervals import jackknife_t
from workbench.errors import WorkbenchError, nearest

MEASURES = ("cosine", "relative_error", "top1", "snr_db")
"""Cosine of retrieval and target; RMS error over RMS target; share of targets identified; SNR in decibel."""
CEILING_DB = 120.0
"""SNRs are told within ± this: beyond it there is only rounding."""
_ENDS = ((-1.0, 1.0), (0.0, None), (0.0, 1.0), (-CEILING_DB, CEILING_DB))  # of each measure


class Knees(NamedTuple):
    """Curves and n*; `low` and `high` are the bounds of 95 % intervals over repeats, NaN of one repeat.

    Attributes:
        curves, low, high: [measure, ..., n].
        n_star, n_low, n_high: [...]. censored: [...] bool, the criterion still held at the largest n.
    """

    curves: Tensor
    low: Tensor
    high: Tensor
    n_star: Tensor
    n_low: Tensor
    n_high: Tensor
    censored: Tensor


def measures(sums: Tensor) -> Tensor:
    """[measure, ...] from sums [sum, ...] over queries.

    The signal is the part of the retrieval that one gain g = Σr·v / Σ‖v‖² explains, the noise the rest: a memory that
    retrieves everything at half its size has no noise, but a relative error of a half. Where there is no signal (keys
    or values of length 0) cosine and top-1 are 0, the relative error is that of the retrieval (1 for none), and the
    SNR is −`CEILING_DB`.
    """
    product, power, target, cosine, hits, count = sums
    tiny = torch.finfo(torch.float64).tiny
    signal = torch.where(target > 0, product * product / target.clamp(min=tiny), 0.0)
    noise = (power - signal).clamp(min=0)
    floor = 10 ** (-CEILING_DB / 10)
    snr = torch.where(signal > 0, signal / torch.maximum(noise, floor * signal).clamp(min=tiny), floor).clamp(min=floor)
    error = (power - 2 * product + target).clamp(min=0)
    relative = torch.where(target > 0, (error / target.clamp(min=tiny)).sqrt(), 1.0)
    many = count.clamp(min=1)
    return torch.stack([cosine / many, relative, hits / many, 10 * snr.log10()])


def quality(curves: Tensor, measure: str, threshold: float) -> tuple[Tensor, float]:
    """A curve [..., n] that falls with n, and the level at which it is no longer good enough.

    For the SNR it is −1/SNR, which the theory says is a straight line; for the error −error.
    """
    found = curves[MEASURES.index(measure)]
    if measure == "snr_db":
        return -(10 ** (-found / 10)), -(10 ** (-threshold / 10))
    return (-found, -threshold) if measure == "relative_error" else (found, threshold)


def crossing(values: Tensor, sizes: Sequence[int], level: float) -> tuple[Tensor, Tensor]:
    """n at which falling values [..., n] first drop below a level, and whether they never do.

    Between two sizes the curve is a straight line. Where even the smallest size is below, n is 0; where none is, it is
    the largest size and the second answer True.

    >>> crossing(torch.tensor([[0.0, -1.0, -3.0]]), [1, 3, 5], -2.0)
    (tensor([4.], dtype=torch.float64), tensor([False]))
    """
    values = values.double()
    n = torch.tensor(list(sizes), dtype=torch.float64)
    failed = values < level
    never = ~failed.any(-1)
    first = failed.to(torch.uint8).argmax(-1)
    after = first.clamp(min=1) if len(sizes) > 1 else first
    before = (after - 1).clamp(min=0)
    high, low = (values.gather(-1, at[..., None])[..., 0] for at in (before, after))
    fall = (high - low).clamp(min=torch.finfo(torch.float64).tiny)
    share = ((high - level) / fall).clamp(0, 1)
    found = n[before] + share * (n[after] - n[before])
    found = torch.where(first == 0, 0.0, found)
    return torch.where(never, n[-1], found), never


def check_criterion(measure: str, threshold: float) -> None:
    """Refuse a measure that is not among `MEASURES`, and a threshold that is no number."""
    if measure not in MEASURES:
        raise WorkbenchError(f'there is no measure "{measure}"', hint=nearest(measure, MEASURES))
    if not abs(threshold) < float("inf"):
        raise WorkbenchError(f"the threshold is {threshold}; it must be a finite number")


def knees(sums: Tensor, sizes: Sequence[int], measure: str, threshold: float) -> Knees:
    """Curves and n* from sums [sum, head, ..., n, repeat]; intervals leave out each repeat in turn."""
    whole = sums.sum(-1)
    curves = measures(whole)
    n_star, censored = crossing(*_ordered(curves, sizes, measure, threshold))
    bounds, n_bounds = [], []
    for head in range(sums.shape[1]):  # one at a time: all repeats of all heads at once would be large
        without = measures(whole[:, head, ..., None] - sums[:, head])  # [measure, ..., n, repeat]
        bounds.append(jackknife_t(curves[:, head], without))
        n, _ = crossing(*_ordered(without.movedim(-1, 1), sizes, measure, threshold))
        n_bounds.append(jackknife_t(n_star[head], n.movedim(0, -1)).clamp(0, sizes[-1]))
    ends = torch.stack(bounds, 1)
    for each, (least, most) in zip(ends, _ENDS, strict=True):
        each.clamp_(least, most)
    of_n = torch.stack(n_bounds)
    return Knees(curves, ends[..., 0], ends[..., 1], n_star, of_n[..., 0], of_n[..., 1], censored)


def _ordered(
    curves: Tensor, sizes: Sequence[int], measure: str, threshold: float
) -> tuple[Tensor, Sequence[int], float]:
    values, level = quality(curves, measure, threshold)
    return values, sizes, level
