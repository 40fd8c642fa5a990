"""Sparse query attention: fewer query heads than the model's width would take; MHA, GQA and MQA are its limits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.kernels.patterns import Pattern
from workbench.mechanisms.frame import Card, Claim, Mechanism, Mixer, Place, Signature, register


class SparseQueryAttention(Mixer):
    """Softmax attention of n_heads query heads on n_kv_heads key heads, of the width that heads of the place have.

    Args:
        place: where it stands.
        heads: query heads as a share of the place's, rounded, at least one. kv_heads: likewise, of keys and values.

    Raises:
        WorkbenchError: shares outside of (0, 1], or kv heads that do not divide the query heads.
    """

    def __init__(self, place: Place, heads: float = 0.5, kv_heads: float = 0.25) -> None:
        for name, share in (("heads", heads), ("kv_heads", kv_heads)):
            if not 0 < share <= 1:
                raise WorkbenchError(f"{name}={share} is no share of the {place.n_heads} heads", hint="above 0, to 1")
        n_heads, n_kv_heads = (max(1, round(place.n_heads * share)) for share in (heads, kv_heads))
        if n_heads % n_kv_heads:
            fitting = [n for n in range(1, n_heads + 1) if n_heads % n == 0]
            raise WorkbenchError(
                f"kv_heads={kv_heads} of {place.n_heads} heads are {n_kv_heads}, "
                f"which do not divide {n_heads} query heads",
                hint=f"kv_heads={' or '.join(f'{n}/{place.n_heads}' for n in fitting)}",
            )
        super().__init__(place, n_heads, n_kv_heads)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Plain attention; neighbouring query heads share keys."""
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=self.place.causal, enable_gqa=self.n_heads != self.n_kv_heads
        )

    def cost_share(self) -> float:
        """Products of scores and values as a share of those that all heads of the place take: query heads / heads.

        >>> SparseQueryAttention(Place(32, 4, 8)).cost_share()
        0.5
        """
        return self.n_heads / self.place.n_heads


def _alike(module: nn.Module, pattern: Pattern) -> dict[str, Tensor]:
    """[head, 1, head]: the cosine of every two maps of a layer."""
    rows = F.normalize(pattern.dense()[0].flatten(1), dim=-1)
    return {"cosine": (rows @ rows.mT).clamp(min=0)[:, None]}


_ONE = 1e-9  # a share so small that it is one head

SQA = register(
    Mechanism(
        "sqa",
        Card(
            title="Sparse Query Attention",
            arxiv="2510.01817",
            equation="A_h = softmax(q_h k_gᵀ/√d) for fewer heads h than d_model / d, with g = h // (heads / kv heads)",
            map="Plain softmax attention, of as many heads as there are queries for.",
            kind="self",
            grade="exact",
            cost="O(n²·query heads): the share of MHA's that the query heads are",
            causal="either",
            code="RxNN (Apache-2.0); the rxlm package attaches as it is.",
            claims=(
                Claim("Scores and values cost query heads / heads of what multi-head attention takes."),
                Claim("At equal parameters the loss is a little above that of grouped-query attention."),
                Claim("Grouped-query and multi-query attention are no faster than multi-head attention over a prompt."),
            ),
        ),
        SparseQueryAttention,
        variants={
            "mha": {"heads": 1.0, "kv_heads": 1.0},
            "gqa": {"heads": 1.0, "kv_heads": 0.25},
            "mqa": {"heads": 1.0, "kv_heads": _ONE},
            "sqa": {"heads": 0.5, "kv_heads": 0.25},
            "ssqa": {"heads": 0.5, "kv_heads": 0.5},
            "xsqa": {"heads": 0.25, "kv_heads": 0.25},
            "xsmqa": {"heads": 0.25, "kv_heads": _ONE},
        },
        signature=Signature(
            "How alike the heads of a layer are",
            "The cosine of a head's map with that of every head of its layer; neighbours share keys where there are "
            "fewer of these.",
            _alike,
            columns="head of the layer",
            value="cosine",
        ),
    )
)
