"""A small language model for each attention kernel of `workbench.kernels`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.kernels.lightning import lightning_attention
from workbench.kernels.neighborhood import neighborhood_attention
from workbench.kernels.recurrent import gated_delta_rule, gated_linear_attention
from workbench.kernels.s2 import s2_attention
from workbench.kernels.scan import scan_attention

HEADS, WIDTH, LENGTH = 4, 32, 64


class _Mixer(nn.Module):
    """Projections around one call of a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def joined(self, z: Tensor) -> Tensor:
        return self.out(z.transpose(1, 2).flatten(-2))


class S2(_Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return self.joined(s2_attention(*self.heads(x), block=16, local_blocks=1, vert_stride=4))


class Neighborhood(_Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return self.joined(neighborhood_attention(*self.heads(x), shape=(8, 8), window=(3, 5)))


class Lightning(_Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return self.joined(lightning_attention(*self.heads(x), chunk=16))


class Scan(_Mixer):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, HEADS, 1, WIDTH // HEADS))

    def forward(self, x: Tensor) -> Tensor:
        _, k, v = self.heads(x)
        return self.joined(scan_attention(self.query, k, v))


class _Gated(_Mixer):
    """Heads that fade by what the input says."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(WIDTH, 2 * HEADS)

    def fading(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log decays and steps, [batch, head, position]."""
        g, steps = self.gates(x).unflatten(-1, (2, HEADS)).permute(2, 0, 3, 1)
        return nn.functional.logsigmoid(g + 2), steps.sigmoid()


class GatedLinear(_Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.joined(gated_linear_attention(*self.heads(x), self.fading(x)[0]))


class GatedDelta(_Gated):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.joined(gated_delta_rule(q, nn.functional.normalize(k, dim=-1), v, *self.fading(x)))


KERNELS = {
    "s2": S2,
    "neighborhood": Neighborhood,
    "lightning": Lightning,
    "scan": Scan,
    "gated_linear": GatedLinear,
    "gated_delta_rule": GatedDelta,
}


class KernelModel(nn.Module):
    """Two layers of one kernel, or one layer of each of several, on token ids [batch, LENGTH]."""

    def __init__(self, *kernels: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(KERNELS[name]() for name in kernels)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(nn.functional.layer_norm(x, (WIDTH,)))
        return x


def kernel_model(*kernels: str) -> tuple[KernelModel, Tensor]:
    """A model and ids for it, both random."""
    torch.manual_seed(0)
    return KernelModel(*kernels).eval(), torch.randint(0, 11, (2, LENGTH))
