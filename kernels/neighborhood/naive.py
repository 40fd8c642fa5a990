"""Neighborhood attention written out from its definition (arXiv 2504.16922): one query, one window, token by token."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def window_of(x: int, n: int, w: int, t: int, d: int, causal: bool) -> list[int]:
    """Positions that position x of n sees, with window w, stride t and dilation d."""
    own, at = list(range(x % d, n, d)), x // d
    lead = min(at // t * t + (t - 1 if causal else t // 2), len(own) - 1)
    if causal:
        return own[max(lead - w + 1, 0) : at + 1]
    first = min(max(lead - w // 2, 0), len(own) - w)
    return own[first : first + w]


def neighborhood_naive(
    q: Tensor, k: Tensor, v: Tensor, *, shape: Sequence[int], window: Sequence[int], stride: Sequence[int],
    dilation: Sequence[int], causal: Sequence[bool], scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, weights [b, h, query, key] and lse; arguments as in `neighborhood_attention`, one value a dimension."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    seen = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
    seen[:, math.prod(shape) :] = True
    for i, place in enumerate(itertools.product(*map(range, shape))):
        windows = [window_of(*each) for each in zip(place, shape, window, stride, dilation, causal, strict=True)]
        for other in itertools.product(*windows):
            seen[i, sum(y * math.prod(shape[axis + 1 :]) for axis, y in enumerate(other))] = True
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen, -math.inf)
    weights = scores.softmax(-1)
    return weights @ v, weights, scores.logsumexp(-1)
