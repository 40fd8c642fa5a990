"""The layers that DSF compares, each as a dynamical system made of what its projections give (arXiv 2405.15731).

Inputs are [batch, head, position, ...]; where each channel has a recurrence of its own, the channels are the heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.kernels.systems.system import DynamicalSystem

FeatureMap = Callable[[Tensor], Tensor]


def elu_plus_one(x: Tensor) -> Tensor:
    """The feature map of linear attention (arXiv 2006.16236)."""
    return F.elu(x) + 1


def separable_attention(phi: Tensor, psi: Tensor, eta: Tensor) -> DynamicalSystem:
    """Any attention whose weights are φ(q_i)·ψ(k_j) / η_i: Λ_i = η_{i−1}/η_i, B_i = ψ(k_i)/η_i, C_i = φ(q_i).

    The products of Λ telescope: Λ_i … Λ_{j+1} = η_j / η_i.

    Args:
        phi, psi: features of queries and keys, [batch, head, position, n].
        eta: [batch, head, position], nowhere zero.
    """
    before = torch.cat((eta[..., :1], eta[..., :-1]), dim=-1)
    return DynamicalSystem((before / eta)[..., None], psi / eta[..., None], phi)


def linear_attention(q: Tensor, k: Tensor, features: FeatureMap = elu_plus_one) -> DynamicalSystem:
    """η_i = φ(q_i)·Σ_{j ≤ i} φ(k_j), so that rows sum to one; without a scale, as in arXiv 2006.16236."""
    phi, psi = features(q), features(k)
    return separable_attention(phi, psi, (phi * psi.cumsum(2)).sum(-1))


def normalised_attention(q: Tensor, k: Tensor, log_eta: Tensor) -> DynamicalSystem:
    """Scores q_i·k_j divided by exp(w·u_i + b), a number that neither queries nor keys enter; they may be negative.

    Args:
        log_eta: [batch, head, position], w·u_i + b.
    """
    return separable_attention(q, k, log_eta.exp())


def s6(delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> DynamicalSystem:
    """Mamba: Λ_i = exp(Δ_i A), diagonal, and B_i = Δ_i b_i; the channels are the heads.

    Args:
        delta: [batch, channel, position]. A: [channel, n], at most zero. B, C: [batch, position, n].
    """
    shape = (*delta.shape, A.shape[-1])
    decay = (delta[..., None] * A[:, None]).exp()
    return DynamicalSystem(decay, delta[..., None] * B[:, None], C[:, None].expand(shape))


def ssd(delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> DynamicalSystem:
    """Mamba-2: as `s6` with one number as Λ for each head.

    Args:
        delta: [batch, head, position]. A: [head], at most zero. B, C: [batch, head, position, n].
    """
    return DynamicalSystem((delta * A[:, None]).exp()[..., None], delta[..., None] * B, C)


def reversed_sigmoid(x: Tensor, a: Tensor | float = 1.0) -> Tensor:
    """σ(−x)^a = exp(−a softplus(x)): what S6's decay is as a gate."""
    return torch.sigmoid(-x) ** a


def qlstm(f: Tensor, g: Tensor, o: Tensor, alpha: Tensor | float | None = None) -> DynamicalSystem:
    """A quasi-LSTM, whose gates see the input only: h = σ(f) h + σ(g) x and y = σ(o) h; the channels are the heads.

    Args:
        f, g, o: gates before their sigmoid, [batch, channel, position].
        alpha: with it, Λ is the reversed sigmoid σ(−f)^max(α, 0) that the paper takes from S6.
    """
    decay = torch.sigmoid(f) if alpha is None else reversed_sigmoid(f, torch.as_tensor(alpha).to(f).relu())
    return DynamicalSystem(decay[..., None], torch.sigmoid(g)[..., None], torch.sigmoid(o)[..., None])


def rg_lru(recurrence: Tensor, write: Tensor, rate: Tensor, sharpness: float = 8.0) -> DynamicalSystem:
    """Griffin's gated unit: Λ = exp(−c softplus(A) σ(r)), B = √(1 − Λ²) σ(w), C = 1; the channels are the heads.

    Args:
        recurrence, write: gates before their sigmoid, [batch, channel, position]. rate: A, [channel].
    """
    log_decay = -sharpness * F.softplus(rate)[:, None] * torch.sigmoid(recurrence)
    written = torch.sqrt(-torch.expm1(2 * log_decay)) * torch.sigmoid(write)
    return DynamicalSystem(log_decay.exp()[..., None], written[..., None], torch.ones_like(written)[..., None])
