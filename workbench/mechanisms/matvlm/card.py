"""MaTVLM's layer as a mechanism: Mamba-2 with queries and keys of each head's own, drawn rather than seeded."""

from __future__ import annotations

from typing import Any

from workbench.mechanisms.frame import Card, Claim, Mechanism, Place, register
from workbench.mechanisms.matvlm.layer import Mamba2


def _in_place(place: Place, **options: Any) -> Mamba2:
    return Mamba2(place.d_model, place.n_heads, place.d_head, **options)


MATVLM = register(
    Mechanism(
        "matvlm",
        Card(
            title="MaTVLM: Mamba-2 in the place of attention",
            arxiv="2503.13440",
            equation="M[i, j] = (C_i·B_j) exp(A Σ_{j < t ≤ i} Δ_t) Δ_j for j ≤ i; y = norm((M x + D x) silu(z))",
            map="C stands where queries do, B where keys, x where values; steps are held fixed, signs are mixed.",
            kind="self",
            grade="frozen",
            cost="O(n) time; d_head² numbers a head token by token",
            causal="always",
            beside="The short convolution of x, B and C, which reaches back 3 tokens. The skip D x stays at its token.",
            code="hustvl/MaTVLM, Apache-2.0. `seed_mamba2` makes the layer of a trained attention layer's weights, "
            "`student` and `distil` the rest of the paper.",
            claims=(
                Claim("With a quarter of its layers replaced a model is nearly as good as before."),
                Claim("Layers that begin as the attention that they replace end nearer to it than layers drawn anew."),
                Claim("Models with such layers are faster than with attention alone, the more so on long inputs."),
            ),
        ),
        _in_place,
        variants={"plain": {"conv": 0, "gated": False}, "grouped": {"n_kv_heads": 2}},
    )
)
