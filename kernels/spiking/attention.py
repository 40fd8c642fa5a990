"""Attention between spikes: products of zeros and ones, without a softmax."""

from __future__ import annotations

from torch import Tensor

from workbench.kernels.checks import check_attention
from workbench.kernels.functions import attention_function
from workbench.kernels.linear import LinearPattern


def _pattern(q: Tensor, k: Tensor, *, scale: float = 0.125) -> LinearPattern:
    return LinearPattern(q * scale, k)


@attention_function(_pattern)
def spiking_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float = 0.125) -> Tensor:
    """s · Q Kᵀ V of spikes (Spikformer, arXiv 2209.15425): a weight counts the features in which both fire, times s.

    Either product may come first: of zeros and ones both give the same numbers, and the cheaper one is taken.

    Args:
        q, k: [batch, head, token, d]; v: [batch, head, token, width]; a batch entry is one step of one example.
        scale: s.

    Returns:
        [batch, head, token, width].

    Raises:
        CaptureError: tensors that do not fit.

    >>> import torch
    >>> spiking_attention(*torch.ones(3, 1, 1, 5, 4))[0, 0, 0].tolist()  # s · d · tokens
    [2.5, 2.5, 2.5, 2.5]
    """
    check_attention(q, k, v)
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) if group > 1 else t for t in (k, v))
    z = (q @ k.mT) @ v if k.shape[2] < q.shape[3] else q @ (k.mT @ v)
    return z * scale
