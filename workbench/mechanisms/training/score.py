"""The same questions to every model of a work: code that nobody trained on, recall and copying; digits among others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.mechanisms.training.images import scenes
from workbench.mechanisms.training.models import ByteLM, PatchModel
from workbench.mechanisms.training.text import (
    IGNORE,
    Corpus,
    copying,
    induction_batch,
    mqar_batch,
    needle,
    recall,
    repeated,
    text_batch,
)

SEED = 99
DEPTHS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""Where needles lie, as a share of the way to the end."""


@torch.no_grad()
def score_text(model: ByteLM, held: Corpus, n: int = 256) -> dict[str, float]:
    """Losses in nats a byte, and shares of right answers.

    Args:
        n: rows of code; a quarter as many of each other kind.

    Returns:
        "text" on all bytes, "repeats" on those whose last four bytes came before; "copy", "recall 8", "recall 26",
        "needle" and "needle far": shares of bytes that count and are the likeliest. Needles lie at `DEPTHS`, those that
        are far in the first half.
    """
    random, length = torch.Generator().manual_seed(SEED), model.place.length
    inputs, labels = text_batch(held, n, length, random)
    nats = F.cross_entropy(_logits(model, inputs).transpose(1, 2), labels, reduction="none")
    few = max(1, n // 4)
    found = {
        "text": nats.mean(),
        "repeats": nats[repeated(inputs)].mean(),
        "copy": _right(model, *copying(few, length, random)),
    }
    for n_keys in (8, 26):
        found[f"recall {n_keys}"] = _right(model, *recall(few, length, random, n_keys))
    at = torch.stack([_right(model, *needle(few, length, random, depth)) for depth in DEPTHS])
    found |= {"needle": at.mean(), "needle far": at[torch.tensor(DEPTHS) < 0.5].mean()}
    return {name: float(value) for name, value in found.items()}


@torch.no_grad()
def score_mqar(model: ByteLM, n: int = 128) -> dict[str, float]:
    """Shares of right answers in multi-query associative recall.

    Args:
        n: rows of each score.

    Returns:
        "4 pairs", "8 pairs", "16 pairs", with as many in a row; "far": of 8 pairs, asked for in the last quarter.
    """
    random, length = torch.Generator().manual_seed(SEED), model.place.length
    found = {f"{k} pairs": _right(model, *mqar_batch(n, length, random, (k,))) for k in (4, 8, 16)}
    inputs, labels = mqar_batch(n, length, random, (8,), power=1.0)
    labels[:, : 3 * length // 4] = IGNORE
    found["far"] = _right(model, inputs, labels)
    return {name: float(value) for name, value in found.items()}


@torch.no_grad()
def score_induction(model: ByteLM, n: int = 128) -> dict[str, float]:
    """Shares of right answers where strings come again.

    Args:
        n: rows.

    Returns:
        "copy": of all, "copy far": of strings that are longer than a quarter of the row.
    """
    random, length = torch.Generator().manual_seed(SEED), model.place.length
    inputs, labels = induction_batch(n, length, random)
    far = (labels != IGNORE).sum(1) < length - length // 4
    return {"copy": float(_right(model, inputs, labels)), "copy far": float(_right(model, inputs[far], labels[far]))}


@torch.no_grad()
def score_images(model: PatchModel, n: int = 1024) -> dict[str, float]:
    """Shares of right answers on scenes with one digit and with three, where to choose is needed: chance is a third."""
    random = torch.Generator().manual_seed(SEED)
    names = {1: "1 digit", 3: "3 digits"}
    return {name: float(_right(model, *scenes(n, random, digits)[:2])) for digits, name in names.items()}


def _right(model: ByteLM | PatchModel, inputs: Tensor, labels: Tensor) -> Tensor:
    return (_logits(model, inputs).argmax(-1) == labels)[labels >= 0].float().mean()


def _logits(model: ByteLM | PatchModel, inputs: Tensor) -> Tensor:
    return torch.cat([model(part) for part in inputs.split(32)])
