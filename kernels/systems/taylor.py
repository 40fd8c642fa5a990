"""Softmax as a system of growing size: exp(q·k) = Σ_p (q·k)^p / p!, and how far a finite sum is off."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workbench.errors import CaptureError


def n_features(d: int, order: int) -> int:
    """How many numbers `taylor_features` makes: Σ_{p ≤ order} d^p.

    >>> n_features(2, 3)
    15
    """
    return sum(d**p for p in range(order + 1))


def taylor_features(x: Tensor, order: int) -> Tensor:
    """φ(x) = [1, x, x ⊗ x / √2!, …], so that φ(q)·φ(k) is the sum of exp(q·k) up to the power `order`.

    Args:
        x: [..., d].

    Returns: [..., Σ_{p ≤ order} d^p].

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> round(float(taylor_features(one, 3) @ taylor_features(one, 3)), 4)  # 1 + 1 + 1/2 + 1/6
    2.6667
    """
    if order < 0:
        raise CaptureError(f"there is no sum up to the power {order}", hint="0 or more")
    power = torch.ones_like(x[..., :1])
    parts = [power]
    for p in range(1, order + 1):
        power = (power[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(p)
        parts.append(power)
    return torch.cat(parts, dim=-1)


def taylor_remainder(x: Tensor, order: int) -> Tensor:
    """|x|^(P+1) e^|x| / (P+1)!: at least how far the sum up to the power P is from exp(x).

    >>> x = torch.tensor(2.0, dtype=torch.float64)
    >>> bool((x.exp() - (1 + x)).abs() <= taylor_remainder(x, 1))
    True
    """
    size = x.abs()
    return torch.exp((order + 1) * size.log() + size - math.lgamma(order + 2))
