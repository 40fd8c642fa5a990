"""How keys lie in their space: effective dimensions, the spectrum of their interference, distance from random keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DIMENSIONS = ("raw", "centred", "whitened", "no sink")
"""What the keys' effective dimension is taken of; the names of its columns."""
_RANK = 1e-6  # share of the largest eigenvalue below which a direction is not there


class Geometry(NamedTuple):
    """Of the keys of each head, in float64.

    Attributes:
        dimension: [head, 4], effective dimensions by `DIMENSIONS`.
        spectrum: [head, d], eigenvalues of the keys' second moment, falling, of sum 1 (0 for keys of length 0).
        overlap: [head], mean squared product of two different keys over the squared mean length: 1/d_k if random.
    """

    dimension: Tensor
    spectrum: Tensor
    overlap: Tensor


def geometry(keys: Tensor, sink: Tensor) -> Geometry:
    """Measure the keys [head, token, d] of each head; `sink` [token] marks those that "no sink" leaves out.

    A whitened dimension is the number of directions in which the centred keys vary at all: what is left when
    everything but the rank is evened out.
    """
    k = keys.double()
    centred = k - k.mean(-2, keepdim=True)
    spread = torch.linalg.eigvalsh(centred.transpose(-1, -2) @ centred)
    # Centring leaves rounding behind, which is measured by the keys themselves.
    floor = torch.maximum(spread[..., -1:] * _RANK, 1e-12 * (k * k).sum((-1, -2))[:, None])
    whitened = (spread > floor).sum(-1).double()
    dimension = [effective_dimension(k), effective_dimension(centred), whitened, effective_dimension(k[:, ~sink])]
    moments = torch.linalg.eigvalsh(k.transpose(-1, -2) @ k).flip(-1).clamp(min=0)
    total = moments.sum(-1, keepdim=True)
    spectrum = torch.where(total > 0, moments / total.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return Geometry(torch.stack(dimension, dim=-1), spectrum, mean_overlap(k))


def mean_overlap(keys: Tensor) -> Tensor:
    """[head]: mean over pairs i ≠ j of (kᵢ·kⱼ)², over the squared mean of ‖k‖²; 0 for fewer than two keys.

    Times n − 1 it is the interference power in Hebb's memory of n such keys, whatever their distribution.

    >>> mean_overlap(torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]]))
    tensor([0., 1.])
    """
    n = keys.shape[-2]
    power = (keys * keys).sum(-1)  # [head, token]
    if n < 2:
        return power.new_zeros(power.shape[0])
    gram = keys.transpose(-1, -2) @ keys
    crossed = ((gram * gram).sum((-1, -2)) - (power * power).sum(-1)).clamp(min=0) / (n * (n - 1))
    scale = power.mean(-1) ** 2
    return torch.where(scale > 0, crossed / scale.clamp(min=torch.finfo(keys.dtype).tiny), 0.0)


def effective_dimension(keys: Tensor) -> Tensor:
    """[head]: the participation ratio (Σλ)² / Σλ² of the keys' second moment, corrected for the number of keys.

    The plain ratio counts each key's product with itself and stays below the number of keys; here only products of
    different keys count, so that a few random keys show the dimension they come from. From 1 (all keys on one line) to
    d (also where no two of the keys overlap); 0 for keys of length 0 and where there is no key.

    >>> effective_dimension(torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]]))
    tensor([2., 1.])
    """
    d = keys.shape[-1]
    if keys.shape[-2] == 0:
        return keys.new_zeros(keys.shape[0])
    overlap = mean_overlap(keys)
    there = (keys * keys).sum((-1, -2)) > torch.finfo(keys.dtype).tiny
    if keys.shape[-2] == 1:
        overlap = torch.ones_like(overlap)
    found = torch.where(overlap * d > 1, 1 / overlap.clamp(min=1 / d), float(d)).clamp(min=1.0)
    return torch.where(there, found, 0.0)
