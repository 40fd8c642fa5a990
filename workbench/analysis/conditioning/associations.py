"""Writing many pairs into an associative memory at once: the block form of Hebb, decay, delta and gated delta.

All four are S_i = γ S_{i−1} + α kᵢᵀ uᵢ. Hebb and decay write the value itself, uᵢ = vᵢ. The delta rules write what is
new about it, uᵢ = vᵢ − γ kᵢ S_{i−1}, which for a whole block is one triangular system: with G = K Kᵀ,

    (I + α · strictly-lower(γ^(i−j) G_ij)) U = V − diag(γ^i) K S₀.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels.lightning.decay import powers

BLOCK = 64
"""Pairs in one triangular system; longer sequences go block by block."""


def write_block(state: Tensor, k: Tensor, v: Tensor, rate: float, decay: float, *, erase: bool) -> Tensor:
    """The state after a block of writes, the same as after one write at a time but for rounding.

    Args:
        state: [..., d_k, d_v]. k: [..., n, d_k]. v: [..., n, d_v].
        rate: α. decay: γ.
        erase: whether what the key retrieves is taken out first (the delta rules).
    """
    for start in range(0, k.shape[-2], BLOCK):
        keys, values = k[..., start : start + BLOCK, :], v[..., start : start + BLOCK, :]
        n, forgets = keys.shape[-2], decay != 1
        since, until = (_fades(decay, torch.arange(f, n + f), keys) if forgets else None for f in (1, 0))
        if erase:
            system = (keys @ keys.transpose(-1, -2)).mul_(rate)  # the solver reads below the diagonal only
            if forgets:
                away = torch.arange(n)[:, None] - torch.arange(n)[None, :]
                system *= _fades(decay, away.clamp(min=0), keys)
            known = keys @ state
            values = values - (known if since is None else since[:, None] * known)
            values = torch.linalg.solve_triangular(system, values, upper=False, unitriangular=True)
        faded_keys = keys if until is None else keys * until.flip(0)[:, None]
        if rate != 1:
            values = rate * values
        state = state if since is None else since[-1] * state
        lead = state.shape[:-2].numel()
        update = torch.baddbmm(
            state.reshape(lead, *state.shape[-2:]),
            faded_keys.transpose(-1, -2).reshape(lead, -1, n),
            values.reshape(lead, n, -1),
        )
        state = update.view(state.shape)
    return state


def _fades(decay: float, exponents: Tensor, like: Tensor) -> Tensor:
    return powers(torch.tensor([decay], dtype=torch.float64), exponents, like)[0]
