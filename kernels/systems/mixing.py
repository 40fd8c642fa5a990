"""Long-sequence layers as one template: a mixing operator over positions times values (after arXiv 2302.06218).

Each function gives the operator, [batch, head, query, key], as a pattern: a softmax has rows that sum to one, others
need not, and may have either sign. Where the channels of a layer are mixed differently, they are its heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import DensePattern
from workbench.kernels.recurrent import FilterPattern


class SignedPattern(DensePattern):
    """A map that is held whole, whose entries may have either sign: statistics are those of |A| normalised per row."""

    signed = True

    def __init__(self, weights: Tensor, mask: Mask | None = None, normalised: bool = False) -> None:
        super().__init__(weights, mask, normalised)

    @property
    def by_magnitude(self) -> bool:
        """True."""
        return True


def linformer(q: Tensor, k: Tensor, keys: Tensor, values: Tensor) -> SignedPattern:
    """softmax(q (E k)ᵀ / √d) F: keys and values are projected along the sequence to r of each (arXiv 2006.04768).

    Args:
        q, k: [batch, head, position, d]. keys, values: E and F, [r, position].
    """
    slots = (q @ (keys @ k).mT / math.sqrt(q.shape[-1])).softmax(-1)
    return SignedPattern(slots @ values)


def nystrom(q: Tensor, k: Tensor, n_landmarks: int) -> SignedPattern:
    """softmax(q k̃ᵀ) softmax(q̃ k̃ᵀ)⁺ softmax(q̃ kᵀ) of r landmarks q̃ and k̃ (arXiv 2102.03902).

    Landmarks are means of neighbouring queries and keys; the inverse is the exact one that the paper's iteration nears.

    Args:
        q, k: [batch, head, position, d]; the landmarks divide the positions.
    """
    n = q.shape[2]
    if not 0 < n_landmarks <= n or n % n_landmarks:
        raise CaptureError(f"{n_landmarks} landmarks do not divide {n} positions", shape=q.shape)
    scale = math.sqrt(q.shape[-1])
    q_marks, k_marks = (t.unflatten(2, (n_landmarks, -1)).mean(3) for t in (q, k))
    left, middle, right = (
        (a @ b.mT / scale).softmax(-1) for a, b in ((q, k_marks), (q_marks, k_marks), (q_marks, k))
    )  # fmt: skip
    return SignedPattern(left @ torch.linalg.pinv(middle) @ right)


def fnet(n: int, dtype: torch.dtype = torch.float64) -> SignedPattern:
    """FNet's Re(F_n X F_d) as two heads that add up (arXiv 2105.03824): Re F_n on X·Re F_d, and −Im F_n on X·Im F_d.

    >>> fnet(2).dense()[0, 0].tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    """
    whole = torch.fft.fft(torch.eye(n, dtype=dtype))
    return SignedPattern(torch.stack((whole.real, -whole.imag))[None])


def fnet_values(x: Tensor) -> Tensor:
    """The values of `fnet`'s heads, [batch, 2, position, d], of an input [batch, position, d]."""
    whole = torch.fft.fft(torch.eye(x.shape[-1], dtype=x.dtype))
    return torch.stack((x @ whole.real, x @ whole.imag), dim=1)


def mlp_mixer(first: Tensor, second: Tensor, gates: Tensor) -> SignedPattern:
    """W₂ diag(g) W₁: an MLP over positions with its activation held fixed as gates (arXiv 2105.01601).

    For GELU and SiLU g is φ(x)/x of each hidden number; channels have gates of their own, and so are the heads.

    Args:
        first: W₁ [hidden, position]. second: W₂ [position, hidden]. gates: [batch, channel, hidden].
    """
    return SignedPattern((second * gates[:, :, None]) @ first)


def long_convolution(kernel: Tensor, n_batch: int = 1) -> FilterPattern:
    """A causal convolution as long as the sequence, as of S4 or Hyena: Toeplitz, K[i − j] for each channel.

    Args:
        kernel: [channel, position], K[0] that of the position itself.
    """
    return FilterPattern(kernel.flip(-1), n_batch, kernel.shape[-1])


def aft(k: Tensor, bias: Tensor, *, causal: bool = True) -> DensePattern:
    """exp(k_j + w_ij) normalised per row: an attention-free transformer (arXiv 2105.14103); the channels are the heads.

    Args:
        k: [batch, channel, position]. bias: w, [query, key].
    """
    scores = k[:, :, None] + bias
    n = k.shape[-1]
    if causal:
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=k.device).triu(1), -torch.inf)
    return DensePattern(scores.softmax(-1), Mask(n, n, causal=causal))
