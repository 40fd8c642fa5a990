"""Attention with one of its principles taken away: the exponential, a score of its own for each pair, or the input."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.kernels.scan import scan_attention
from workbench.kernels.taylor import taylor_attention
from workbench.mechanisms.frame import Card, Claim, Mechanism, Mixer, Place, register

Form = Literal["taylor", "keys", "random"]


class DeconstructedAttention(Mixer):
    """Attention of as many parameters as the plain one, without one of its principles.

    Args:
        place: a causal sequence.
        form: "taylor": 1 + x + x²/2 in the place of eˣ (Approximate). "keys": a key has one score for all queries,
            SiLU(W_q h)·W_k h, as in a recurrence (Non-approximate). "random": queries and keys are made of fixed random
            embeddings of the positions, so that the map is the same for every input (RndEmbQK).

    Raises:
        WorkbenchError: no such form.
    """

    def __init__(self, place: Place, form: Form = "taylor") -> None:
        super().__init__(place)
        if form not in ("taylor", "keys", "random"):
            raise WorkbenchError(f'form="{form}" is not known', hint='"taylor", "keys" or "random"')
        self.form = form
        if form == "random":
            self.register_buffer("fixed", torch.randn(1, place.length, place.d_model))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; of "keys", one query of ones and the keys' scores in their place."""
        if self.form == "random":
            fixed, v = self.get_buffer("fixed")[:, : x.shape[1]], self.split(self.v(x))
            q, k = (self.turned(self.split(each(fixed))).expand(len(x), -1, -1, -1) for each in (self.q, self.k))
            return q, k, v
        q, k, v = super().heads(x)
        if self.form == "taylor":
            return q, k, v
        scores = (F.silu(self.split(self.q(x))) * self.split(self.k(x))).sum(-1, keepdim=True) * self.d_head**-0.5
        return x.new_ones(1, self.n_heads, 1, 1), scores, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """The form's own weights."""
        if self.form == "taylor":
            return taylor_attention(q, k, v)
        if self.form == "keys":
            return scan_attention(q, k, v, 1.0)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


DECONSTRUCTED = register(
    Mechanism(
        "deconstructed",
        Card(
            title="Deconstructing Attention: weaker forms",
            arxiv="2510.11602",
            equation="A ∝ 1 + x + x²/2 with x = q·k/√d; or A[i, j] ∝ exp s_j; or q and k of fixed random embeddings",
            map="The form's own causal weights, whose rows sum to one.",
            kind="self",
            grade="exact",
            cost="O(n·d²) a head for “taylor”, O(n) for “keys”, O(n²) for “random”",
            causal="always",
            code="Announced code was not read. Random embeddings do not pass the layers below, as in the paper's first "
            "layer; its forms on a fixed text, on token embeddings and without mixing are not here.",
            claims=(
                Claim("Mixing tokens is indispensable, while each other principle can be given up in some layers."),
                Claim("Hybrids with plain attention in every other layer recover its loss."),
            ),
        ),
        DeconstructedAttention,
        variants={form: {"form": form} for form in ("taylor", "keys", "random")},
    )
)
