"""What is measured of some models beside the scores that all have."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import workbench
from trained.plan import PLAIN
from trained.runs import GROUPED
from workbench.mechanisms.training import (
    ByteLM,
    PatchModel,
    TrainedModel,
    corpus,
    load,
    scenes,
    score_text,
    text_batch,
)
from workbench.mechanisms.training.score import SEED
from workbench.mechanisms.training.shipped import file_of

ROWS = 64


def beside(name: str, found: TrainedModel) -> dict[str, Any]:
    """More of a run's record.

    Returns:
        "heads" of a mixture of heads: gate and cost of each that is routed. The score "text, all seen" of models that
        were trained in groups. "alike" of reduced models, and of other seeds of plain attention: how like plain
        attention's their heads are, and "costs", what the loss gains without each of them.
    """
    kind, model = name.partition(":")[0], found.model
    if isinstance(model, ByteLM):
        if kind == "moh":
            return {"heads": routed_heads(model)}
        if kind in GROUPED:
            return {"scores": found.scores | {"text, all seen": all_seen(model)}}
    elif (kind == "reduced" or name == PLAIN) and file_of(PLAIN, "images").is_file():
        plain = load(file_of(PLAIN, "images")).model
        assert isinstance(plain, PatchModel)
        drawn = scenes(ROWS, torch.Generator().manual_seed(SEED), 3)
        costs = [[layer, head, cost] for layer, head, cost, _ in without_each(model, drawn.images, drawn.classes)]
        return {"alike": alike(model, plain, drawn.images), "costs": costs}
    return {}


@torch.no_grad()
def without_each(
    model: ByteLM | PatchModel, inputs: Tensor, labels: Tensor
) -> Iterator[tuple[int, int, float, Tensor | None]]:
    """(layer, head, what the loss gains when it is switched off, gates of the layer's heads or None) of every head."""

    def loss() -> float:
        return float(F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten()))

    with workbench.attach(model) as wb:
        with wb.capture([]) as cap:
            whole = loss()
        for site in cap.sites:
            gates = getattr(cap[site.name].pattern, "gates", None)
            for head in range(site.n_heads):
                with wb.ablate((site.name, head), how="zero"):
                    cost = loss() - whole
                yield site.layer, head, cost, gates


def routed_heads(model: ByteLM) -> list[dict[str, float]]:
    """Of each head that a router chooses: its mean gate, and what the loss gains when it is switched off."""
    inputs, labels = text_batch(corpus("held out"), ROWS, model.place.length, torch.Generator().manual_seed(SEED))
    found = []
    for layer, head, cost, gates in without_each(model, inputs, labels):
        assert gates is not None
        if head >= model.stack.blocks[layer].mixer.shared:
            found.append({"layer": layer, "head": head, "gate": float(gates[:, head].mean()), "cost": cost})
    return found


def all_seen(model: ByteLM) -> float:
    """Loss on text where every token sees all before it, of a model that was trained in groups."""
    whole = copy.deepcopy(model)
    for block in whole.stack.blocks:
        block.mixer.group, block.mixer.shifted, block.mixer.n_sinks = whole.place.length, (False,), 0
    return score_text(whole, corpus("held out"))["text"]


def alike(model: PatchModel, other: PatchModel, images: Tensor) -> list[list[float]]:
    """Of each layer and head: the largest CKA of what it gives with what a head of the other's layer gives."""
    pairs = zip(outputs(model, images), outputs(other, images), strict=True)
    return [[max(cka(one, its) for its in theirs) for one in ours] for ours, theirs in pairs]


@torch.no_grad()
def outputs(model: PatchModel, images: Tensor) -> list[Tensor]:
    """Of each layer [head, image and token, width]: what its heads give."""
    with workbench.attach(model) as wb, wb.capture([], z=True) as cap:
        model(images)
    return [cap[site.name].z.flatten(0, 1).transpose(0, 1) for site in cap.sites]


def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of [example, width] and [example, other width] (arXiv 1905.00414), 0 to 1.

    The same for what is turned, shifted or scaled as a whole.
    """
    x, y = (each.double() - each.double().mean(0) for each in (x, y))
    own = (x.mT @ x).norm() * (y.mT @ y).norm()
    return float((x.mT @ y).square().sum() / own)
