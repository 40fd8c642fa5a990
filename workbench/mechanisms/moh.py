"""Mixture of heads: a router chooses at every token which heads speak, and how loud."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.kernels.composed import RowGatedPattern, gated_attention
from workbench.kernels.patterns import Pattern
from workbench.mechanisms.frame import Card, Claim, Mechanism, Mixer, Place, Signature, at_places, register

Scaling = Literal["paper", "code", "norms"]


class Routing(NamedTuple):
    """What a router gives.

    Attributes:
        gates: [batch, head, token], zero where a head is skipped.
        balance: Σ P·f over the routed heads, of the mean probability and the share of tokens that choose each; smallest
            where all are chosen as often.
    """

    gates: Tensor
    balance: Tensor


class MixtureOfHeads(Mixer):
    """g_h(t) · softmax(q kᵀ/√d) v: some heads speak always, of the others those that the router likes best.

    Args:
        place: where it stands.
        shared: the share of the heads that speak at every token. active: the share that speaks at any one token, these
            among them. Both are rounded to whole heads.
        scaling: of the gates. "paper": softmax of the router's scores, and of two numbers that weigh shared against
            routed. "code": as released, where equal scores give gates of one. "norms": without parameters, gates of one
            for the heads whose queries are longest, as of continued training; its gradient passes the softmax's.

    Raises:
        WorkbenchError: shares that are none, that choose no head, or fewer than are shared.
    """

    def __init__(self, place: Place, shared: float = 0.25, active: float = 0.75, scaling: Scaling = "code") -> None:
        super().__init__(place)
        for name, share in (("shared", shared), ("active", active)):
            if not math.isfinite(share):
                raise WorkbenchError(f"{name}={share} is no share of the {self.n_heads} heads", hint="from 0 to 1")
        self.shared, speaking = round(self.n_heads * shared), round(self.n_heads * active)
        if not 0 <= self.shared <= speaking <= self.n_heads or not speaking:
            raise WorkbenchError(
                f"shared={shared} and active={active} are {self.shared} and {speaking} of {self.n_heads} heads",
                hint=f"1 to {self.n_heads} heads speak at a token, and those that always do are among them",
            )
        if scaling not in ("paper", "code", "norms"):
            raise WorkbenchError(f'scaling="{scaling}" is not known', hint='"paper", "code" or "norms"')
        self.chosen, self.scaling = speaking - self.shared, scaling
        routed, learned = self.n_heads - self.shared, scaling != "norms"
        self.to_shared = nn.Linear(place.d_model, self.shared, bias=False) if learned and self.shared else None
        self.to_routed = nn.Linear(place.d_model, routed, bias=False) if learned and routed else None
        both = learned and self.shared and routed
        self.to_sides = nn.Linear(place.d_model, 2, bias=False) if both else None

    def route(self, x: Tensor, q: Tensor) -> Routing:
        """The gates of x [batch, token, d_model], whose queries are q [batch, head, token, d]."""
        b, n, _ = x.shape
        shared, routed = self.shared, self.n_heads - self.shared
        if self.scaling == "norms":
            size = q[:, shared:].norm(dim=-1).transpose(1, 2)
            scores = size / size.std(-1, keepdim=True).clamp(min=1e-6) if routed > 1 else size
        else:
            scores = x.new_zeros(b, n, 0) if self.to_routed is None else self.to_routed(x)
        likes = scores.softmax(-1)
        chosen = torch.zeros_like(likes, dtype=torch.bool)
        if self.chosen:
            best = scores.topk(self.chosen, dim=-1).indices
            chosen.scatter_(-1, best, True)
        balance = (likes.mean((0, 1)) * chosen.to(likes.dtype).mean((0, 1))).sum()
        gates = torch.cat([self._shared_gates(x), self._routed_gates(likes, chosen)], dim=-1)
        if self.to_sides is not None:
            sides = self.to_sides(x).softmax(-1) * (2 if self.scaling == "code" else 1)
            gates = gates * sides.repeat_interleave(torch.tensor([shared, routed], device=x.device), dim=-1)
        return Routing(gates.transpose(1, 2), balance)

    def _shared_gates(self, x: Tensor) -> Tensor:
        if self.scaling == "norms" or self.to_shared is None:
            return x.new_ones(*x.shape[:2], self.shared)
        gates: Tensor = self.to_shared(x).softmax(-1)
        return gates * self.shared if self.scaling == "code" else gates

    def _routed_gates(self, likes: Tensor, chosen: Tensor) -> Tensor:
        kept = likes * chosen
        if self.scaling == "paper":
            return kept
        if self.scaling == "code":
            return kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).eps) * self.chosen
        return (chosen.to(likes.dtype) - kept).detach() + kept

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Attention of all heads, each times its gate."""
        routing = self.route(x, q)
        self.keep_loss(0.01 * routing.balance)
        return gated_attention(q, k, v, routing.gates, causal=self.place.causal)


def _gates(module: nn.Module, pattern: Pattern) -> dict[str, Tensor]:
    assert isinstance(module, MixtureOfHeads)
    assert isinstance(pattern, RowGatedPattern)
    return {"gate": at_places(module.place, pattern.gates[0])}


MOH = register(
    Mechanism(
        "moh",
        Card(
            title="MoH: Mixture-of-Head Attention",
            arxiv="2410.11842",
            equation="Ã_h = g_h(t) · softmax(q kᵀ/√d); g: shared heads always, of the routed the K that score best",
            map="The gated map; without its gates it is the factor “attention”. Rows of skipped heads are zero.",
            kind="self",
            grade="exact",
            cost="O(n²·heads) here; the share of active heads where skipped rows are not computed",
            causal="either",
            code='SkyworkAI/MoH, Apache-2.0; its scaling of the gates is that of scaling="code". The attention of its '
            "MoH-DiT is read, with its gates, and agrees.",
            claims=(
                Claim("With 50 to 90 % of its heads active it is as good as attention with all heads."),
                Claim("Heads that the router likes are those whose ablation costs most."),
            ),
        ),
        MixtureOfHeads,
        variants={
            "half": {"active": 0.5},
            "most": {"active": 0.9},
            "paper": {"scaling": "paper"},
            "norms": {"scaling": "norms"},
        },
        signature=Signature(
            "Which heads speak at each token",
            "The gate of each head, token by token: zero where the router skips it. The first heads of a layer are "
            "shared, and speak always.",
            _gates,
            value="gate",
        ),
    )
)
