"""A Mamba-2 layer as MaTVLM shapes it: as many groups as heads, so that each head has queries and keys of its own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.kernels.recurrent import gated_linear_attention


class Mamba2(nn.Module):
    """Mamba-2 with d_state = width = d_head and a group for each head (arXiv 2405.21060, 2503.13440).

    One projection gives [z | x | B | C | Δ]. x, B and C pass a short causal convolution and SiLU; then, for each head,

        h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_tᵀ,   y_t = C_t·h_t + D x_t

    and y·silu(z) is normalised in each head before it is projected. C stands where queries do, B where keys, x where
    values: the map M[i, j] = (C_i·B_j) exp(A Σ_{t=j+1..i} Δ_t) Δ_j is what captures show.

    Args:
        n_kv_heads: of x and B, repeated for the heads; as many as heads if None.
        conv: positions of the convolution; 0 for neither convolution nor SiLU.
        gated: whether there are z and the norm.
        bias: whether the projections have one.
        generator: of the random parts.

    Raises:
        WorkbenchError: kv heads that do not divide the heads.

    >>> Mamba2(32, n_heads=4, d_head=8)(torch.zeros(1, 10, 32)).shape
    torch.Size([1, 10, 32])
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_head: int,
        n_kv_heads: int | None = None,
        *,
        conv: int = 4,
        gated: bool = True,
        bias: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if min(d_model, n_heads, d_head, n_kv_heads) < 1 or conv < 0 or n_heads % n_kv_heads:
            raise WorkbenchError(
                f"d_model={d_model}, n_heads={n_heads}, d_head={d_head}, n_kv_heads={n_kv_heads}, conv={conv}",
                hint="sizes are at least 1, a convolution at least 0, and kv heads divide the heads",
            )
        self.n_heads, self.n_kv_heads, self.d_head = n_heads, n_kv_heads, d_head
        wide, narrow = n_heads * d_head, n_kv_heads * d_head
        self.widths = (wide if gated else 0, narrow, narrow, wide, n_heads)
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=bias)
        self.out_proj = nn.Linear(wide, d_model, bias=bias)
        mixed = 2 * narrow + wide
        self.conv1d = nn.Conv1d(mixed, mixed, conv, groups=mixed, padding=conv - 1) if conv else None
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.dt_bias = nn.Parameter(torch.empty(n_heads))
        self.D = nn.Parameter(torch.ones(n_heads))
        self.norm = nn.Parameter(torch.ones(wide)) if gated else None
        self._draw(generator)

    def _draw(self, generator: torch.Generator | None) -> None:
        """Log rates from [1, 16], step sizes from [0.001, 0.1] on a scale of logs, weights as PyTorch's layers have."""
        with torch.no_grad():
            for layer in (self.in_proj, self.out_proj, self.conv1d):
                if layer is not None:
                    bound = 1 / math.sqrt(layer.weight[0].numel())
                    for parameter in layer.parameters():
                        parameter.uniform_(-bound, bound, generator=generator)
            self.A_log.uniform_(1, 16, generator=generator).log_()
            steps = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
            self.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus⁻¹

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """z [batch, position, head · width]; x, B and C [batch, head, position, width]; Δ [batch, head, position]."""
        z, v, B, C, steps = self.in_proj(x).split(self.widths, dim=-1)
        if self.conv1d is not None:
            mixed = torch.cat((v, B, C), dim=-1).transpose(1, 2)
            mixed = F.silu(self.conv1d(mixed)[..., : x.shape[1]]).transpose(1, 2)
            v, B, C = mixed.split(self.widths[1:4], dim=-1)
        v, B, C = (t.unflatten(-1, (-1, self.d_head)).transpose(1, 2) for t in (v, B, C))
        group = self.n_heads // self.n_kv_heads
        v, B = (t.repeat_interleave(group, dim=1) for t in (v, B))
        return z, v, B, C, F.softplus(steps + self.dt_bias).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, position, d_model] to the same shape."""
        z, v, B, C, delta = self.split(x)
        exact = torch.promote_types(delta.dtype, torch.float32)
        log_decay = -self.A_log.to(exact).exp()[:, None] * delta.to(exact)
        y = gated_linear_attention(C, B * delta[..., None], v, log_decay)
        assert isinstance(y, Tensor)  # no state was asked for
        y = y + v * self.D[:, None, None]
        if self.norm is None:
            out: Tensor = self.out_proj(y.transpose(1, 2).flatten(2))
            return out
        gated = y.transpose(1, 2) * F.silu(z).unflatten(-1, (self.n_heads, -1))
        out = self.out_proj(F.rms_norm(gated, (self.d_head,), eps=1e-5).flatten(2) * self.norm)
        return out
