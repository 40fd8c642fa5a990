"""Scan attention on a GPU: the recurrence that it is, by the kernels of linear ones.

With Z_t the log-sum-exp of the scores up to t, o_t = exp(Z_{t−1} − Z_t) o_{t−1} + exp(s_t − Z_t) v_t: a state of one
number for each of the width, which fades by exp(Z_{t−1} − Z_t) ≤ 1. The gradients are the same sum against time.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import pad


def takes(values: Tensor) -> bool:
    """Whether values lie where the kernels run, in a dtype that they take."""
    return values.is_cuda and values.dtype != torch.float64 and find_spec("triton") is not None


def forward(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of all prefixes, [batch, head, position, width] float32, and Z [batch, head, position] float64.

    Args:
        scores: [batch, head, position] float32. values: [batch, head, position, width].
    """
    from workbench.kernels.recurrent.triton.by_head import Sums

    sizes = scores.double().logcumsumexp(-1)
    own = (scores - sizes).float().exp()[..., None]  # A[t, t]
    out, _ = Sums(_fades(sizes), torch.float32)(torch.ones_like(own), own, values)
    return out, sizes


def backward(scores: Tensor, values: Tensor, sizes: Tensor, out: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of scores and values, float32, from those of the outputs; see `PrefixAttention`."""
    from workbench.kernels.recurrent.triton.by_head import Sums

    grad_out = grad_out.float()
    terms = torch.cat([grad_out, (grad_out * out).sum(-1, keepdim=True)], dim=-1)
    ones = terms.new_ones(*scores.shape, 1)
    later, _ = Sums(_fades(sizes), torch.float32)(ones, ones, terms, reverse=True)
    later *= (scores - sizes).float().exp()[..., None]
    d_values, less = later[..., :-1], later[..., -1]
    return (values * d_values).sum(-1) - less, d_values


def _fades(sizes: Tensor) -> Tensor:
    """[batch, head, position] float64: Z_{t−1} − Z_t, in which large scores have cancelled; 0 at the first."""
    return pad(sizes[..., :-1] - sizes[..., 1:], (1, 0)).clamp(max=0)
