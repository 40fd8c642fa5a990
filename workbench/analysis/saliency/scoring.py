"""How a mask is scored: what it does to the probabilities of each output token."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import WorkbenchError

SCORES = ("kl", "probability", "log_probability")


def check_score(score: str) -> str:
    """The name, or an error that lists those there are."""
    if score not in SCORES:
        raise WorkbenchError(f"score is one of {', '.join(SCORES)}, not {score!r}")
    return score


def scored(score: str, reference: Tensor, perturbed: Tensor, targets: Tensor) -> Tensor:
    """[batch, output token] the score of each perturbed run.

    "kl" is Σ_v P(v) (ln P(v) − ln P_m(v)), original against perturbed, in nats, at least 0; "probability" the drop
    P(y) − P_m(y) of the output token y; "log_probability" the drop of its logarithm.

    Args:
        reference: [output token, vocabulary] ln P. perturbed: [batch, output token, vocabulary] ln P_m.
        targets: [output token] ids y.
    """
    if score == "kl":
        off = torch.where(reference.isneginf(), 0.0, reference - perturbed)
        return torch.einsum("kv,bkv->bk", reference.exp(), off).clamp(min=0)
    index = targets[None, :, None].expand(len(perturbed), -1, 1)
    own = perturbed.gather(2, index)[..., 0]
    clean = reference.gather(1, targets[:, None])[:, 0]
    return clean.exp() - own.exp() if score == "probability" else clean - own
