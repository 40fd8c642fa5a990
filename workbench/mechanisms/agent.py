"""Agent attention: a few agents, pooled from the queries, read the image, and every patch reads the agents."""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.kernels.composed import agent_attention
from workbench.kernels.patterns import Pattern
from workbench.mechanisms.frame import Card, Claim, Mechanism, Mixer, Place, Signature, at_places, register

_TABLE = 7  # edge of the learned position tables, which are stretched to the grid
_SHOWN = 3  # agents of a head in its signature


class AgentAttention(Mixer):
    """softmax(q aᵀ + B₂) softmax(a kᵀ + B₁) v + DWC(v), with agents a pooled from the queries over the grid.

    Args:
        place: a grid.
        n_agents: a square number, at most as many as patches; the largest up to 49 that the grid's sides allow if None.
        kernel: edge of the depth-wise convolution of the values, odd; 0 for none.

    Raises:
        WorkbenchError: a number of agents that is no square, or larger than the grid takes, or an even kernel.
    """

    def __init__(self, place: Place, n_agents: int | None = None, kernel: int = 3) -> None:
        super().__init__(place)
        assert place.grid is not None
        rows, columns = place.grid
        n_agents = min(7, rows, columns) ** 2 if n_agents is None else n_agents
        self.edge = isqrt(max(n_agents, 0))
        if n_agents < 1 or self.edge**2 != n_agents or self.edge > min(rows, columns):
            raise WorkbenchError(
                f"n_agents={n_agents} is no square of at most {min(rows, columns)} × {min(rows, columns)}",
                hint="agents are pooled from squares of the grid: 1, 4, 9, … as many as its shorter side allows",
            )
        if kernel < 0 or (kernel and not kernel % 2):
            raise WorkbenchError(f"kernel={kernel} has no middle", hint="an odd kernel, or 0 for none")
        h, width = self.n_heads, self.n_heads * self.d_head
        shapes = {"spread": (h, n_agents, _TABLE, _TABLE), "gather": (h, n_agents, _TABLE, _TABLE)}
        for name in ("spread", "gather"):
            shapes |= {f"{name}_row": (h, n_agents, rows, 1), f"{name}_column": (h, n_agents, 1, columns)}
        self.biases = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()})
        for each in self.biases.values():
            nn.init.trunc_normal_(each, std=0.02)
        self.local = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width) if kernel else None

    def bias(self, name: str) -> Tensor:
        """[1, head, agent, token]: learned scores of an agent at each patch, "gather" (B₁) or "spread" (B₂ᵀ)."""
        table = F.interpolate(self.biases[name], self.place.grid, mode="bilinear")
        return (table + self.biases[f"{name}_row"] + self.biases[f"{name}_column"]).flatten(2)[None]

    def agents(self, q: Tensor) -> Tensor:
        """[batch, head, agent, d]: means of the queries over squares of the grid."""
        image = q.transpose(2, 3).flatten(0, 1).unflatten(2, self.place.grid)
        return F.adaptive_avg_pool2d(image, self.edge).flatten(2).transpose(1, 2).unflatten(0, q.shape[:2])

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Both softmaxes, without the convolution."""
        spread = self.bias("spread").transpose(2, 3)
        return agent_attention(q, k, v, self.agents(q), aggregate_bias=self.bias("gather"), broadcast_bias=spread)

    def nearby(self, v: Tensor) -> Tensor:
        """[batch, head, token, width]: the depth-wise convolution of the values, which no map of tokens shows."""
        if self.local is None:
            return torch.zeros_like(v)
        image = v.transpose(2, 3).flatten(1, 2).unflatten(2, self.place.grid)
        made: Tensor = self.local(image)
        return made.flatten(2).unflatten(1, (self.n_heads, -1)).transpose(2, 3)

    def nearby_share(self, x: Tensor) -> Tensor:
        """[batch, head, token], from 0 to 1: ‖DWC(v)‖ / (‖A·v‖ + ‖DWC(v)‖), how much the map leaves out."""
        q, k, v = self.heads(x)
        read, near = self.mix(q, k, v, x).norm(dim=-1), self.nearby(v).norm(dim=-1)
        return near / (read + near).clamp(min=torch.finfo(near.dtype).tiny)

    def finish(self, z: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """The convolution is added before the projection."""
        return super().finish(z + self.nearby(v), v, x)


def _busiest(module: nn.Module, pattern: Pattern) -> dict[str, Tensor]:
    """What each head's agents of most weight gather, and where it goes."""
    assert isinstance(module, AgentAttention)
    spread, gather = (pattern.factors[name].dense()[0] for name in ("broadcast", "aggregate"))
    found: dict[str, Tensor] = {}
    for rank in range(min(_SHOWN, gather.shape[1])):
        at = spread.sum(1).argsort(dim=-1, descending=True, stable=True)[:, rank, None, None]
        read = gather.gather(1, at.expand(-1, 1, gather.shape[2]))[:, 0]
        goes = spread.gather(2, at.expand(-1, spread.shape[1], 1))[..., 0]
        found[f"agent {rank + 1} reads"] = at_places(module.place, read)
        found[f"agent {rank + 1} is read by"] = at_places(module.place, goes)
    return found


AGENT = register(
    Mechanism(
        "agent",
        Card(
            title="Agent Attention",
            arxiv="2312.08874",
            equation="A = softmax(q aᵀ/√d + B₂) · softmax(a kᵀ/√d + B₁), y = A v + DWC(v), a = pooled q",
            map="The product of two softmaxes, which are its factors “broadcast” and “aggregate”.",
            kind="self",
            grade="exact",
            cost="O(n·agents) time and memory",
            causal="never",
            grid=True,
            beside="The depth-wise convolution of the values, which `nearby_share` weighs against the map.",
            code="Official code has no licence at its top: unused. agent-attention-pytorch (MIT) is read, and agrees.",
            claims=(
                Claim("It is as good as softmax attention on images."),
                Claim("Its cost grows linearly with the number of patches."),
            ),
        ),
        AgentAttention,
        variants={"few": {"n_agents": 4}, "without convolution": {"kernel": 0}},
        signature=Signature(
            "What the agents carry",
            f"Of each head the {_SHOWN} agents that are read most: the patches that an agent reads, and those that "
            "read it. The map is the sum of such pairs over all agents.",
            _busiest,
        ),
    )
)
