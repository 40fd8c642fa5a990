"""Long-sequence layers as one template: a mixing operator over positions times values (after arXiv 2302.06218).

Each function gives the operator, [batch, head, query, key], as a pattern: a softmax has rows that sum to one, others
need not, and may have either sign. Where the channels of a layer are mixed differently, they are its heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_finite
from workbench.kernels.history import own
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import DensePattern, Pattern, SignedPattern
from workbench.kernels.recurrent import FilterPattern


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


class TokenMlpPattern(Pattern):
    """W₂ diag(g) W₁ of each channel: an MLP over positions with its activation held fixed as gates (arXiv 2105.01601).

    For GELU and SiLU g is φ(x)/x of each hidden number; channels have gates of their own, and so are the heads.

    Args:
        first: W₁ [hidden, position]. second: W₂ [position, hidden]. slopes: g, [batch, channel, hidden].
        values: [batch, channel, position, width], kept where they are given.

    Raises:
        CaptureError: sizes that do not fit.
    """

    grade = "frozen"
    signed = True
    normalised = False

    def __init__(self, first: Tensor, second: Tensor, slopes: Tensor, values: Tensor | None = None) -> None:
        if (
            {first.dim(), second.dim()} != {2}
            or slopes.dim() != 3
            or not slopes.shape[2] == len(first) == len(second.T)
        ):
            raise CaptureError(
                f"W₁ {list(first.shape)}, W₂ {list(second.shape)} and gates [batch, channel, hidden] do not fit",
                shape=slopes.shape,
            )
        dtype = torch.float64 if slopes.dtype == torch.float64 else torch.float32
        n_queries, n_keys = len(second), first.shape[1]
        super().__init__((*slopes.shape[:2], n_queries, n_keys), Mask(n_queries, n_keys), dtype, slopes.device)
        self.first, self.second, self.slopes = own(first), own(second), own(slopes)
        self.values = None if values is None else own(values)

    def check(self) -> None:
        """Weights and gates are finite."""
        for name, tensor in {"W₁": self.first, "W₂": self.second, "gates": self.slopes}.items():
            check_finite(name, tensor)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """No facts; the weights and gates, and the values where they are kept."""
        held = {} if self.values is None else {"values": self.values}
        return {}, {"first": self.first, "second": self.second, "slopes": self.slopes} | held

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> TokenMlpPattern:
        """The pattern from its `state`."""
        return cls(tensors["first"], tensors["second"], tensors["slopes"], tensors.get("values"))

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, channel, q, k] of W₂ diag(g) W₁."""
        which = range(self.n_heads) if heads is None else self._checked(heads)
        return self.tile_of(slice(None), queries, keys, which)

    def tile_of(self, batch: slice, queries: slice, keys: slice, heads: Sequence[int]) -> Tensor:
        """[b, c, q, k] for these batch entries."""
        slopes = self.slopes[batch][:, list(heads), None].to(self.dtype)
        return (self.second[queries].to(self.dtype) * slopes) @ self.first[:, keys].to(self.dtype)

    def apply(self, values: Tensor) -> Tensor:
        """A·V, [batch, channel, query, width], without the map."""
        v = self._checked_values(values)
        hidden = self.first.to(v) @ v * self.slopes[..., None].to(v)
        return self.second.to(v) @ hidden


def mlp_mixer(first: Tensor, second: Tensor, gates: Tensor) -> TokenMlpPattern:
    """An MLP over positions with its activation held fixed: see `TokenMlpPattern`."""
    return TokenMlpPattern(first, second, gates)


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
