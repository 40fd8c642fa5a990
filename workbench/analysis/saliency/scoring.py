"""How a mask is scored: what it does to the probabilities of each output token."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.analysis.saliency.explained_input import ExplainedInput
from workbench.errors import WorkbenchError

SCORES = ("kl", "probability", "log_probability")


def check_score(score: str) -> str:
    """The name, or an error that lists those there are."""
    if score not in SCORES:
        raise WorkbenchError(f"score is one of {', '.join(SCORES)}, not {score!r}")
    return score


def score_for(score: str | None, contrasted: bool) -> str:
    """The name that was given or that suits: divergences tell nothing of one output against another.

    Raises:
        WorkbenchError: no such score, or "kl" with a contrast.
    """
    if score is None:
        return "log_probability" if contrasted else "kl"
    if contrasted and check_score(score) == "kl":
        raise WorkbenchError(
            "a KL divergence is of all outputs, not of one rather than another", hint='pass score="log_probability"'
        )
    return check_score(score)


def scored(score: str, subject: ExplainedInput, perturbed: Tensor) -> Tensor:
    """[batch, output token] the score of each perturbed run.

    "kl" is Σ_v P(v) (ln P(v) − ln P_m(v)), original against perturbed, in nats, at least 0; "probability" the drop
    P(y) − P_m(y) of the output token y; "log_probability" the drop of its logarithm. With a contrast y' they are drops
    of P(y) − P(y') and of ln P(y) − ln P(y').

    Args:
        perturbed: [batch, output token, vocabulary] ln P_m.
    """
    reference = subject.reference
    if score == "kl":
        off = torch.where(reference.isneginf(), 0.0, reference - perturbed)
        return torch.einsum("kv,bkv->bk", reference.exp(), off).clamp(min=0)
    probability = score == "probability"
    return subject.score_of(reference[None], probability=probability) - subject.score_of(
        perturbed, probability=probability
    )
