"""What is measured of some models beside the scores that all have."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
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
        were trained in groups. Of reduced models, and of other seeds of plain attention: "alike", how like plain
        attention's their heads are, "costs", what the loss gains without each of them, and "needed", how far they are
        needed for the same scenes as plain attention's.
    """
    kind, model = name.partition(":")[0], found.model
    if found.facts["work"] == "text":
        assert isinstance(model, ByteLM)
        if kind == "moh":
            return {"heads": routed_heads(model)}
        if kind in GROUPED:
            return {"scores": found.scores | {"text, all seen": all_seen(model)}}
    elif isinstance(model, PatchModel) and (kind == "reduced" or name == PLAIN) and file_of(PLAIN, "images").is_file():
        plain = load(file_of(PLAIN, "images")).model
        assert isinstance(plain, PatchModel)
        drawn = scenes(ROWS, torch.Generator().manual_seed(SEED), 3)
        ours, theirs = (list(without_each(each, drawn.images, drawn.classes)) for each in (model, plain))
        return {
            "alike": alike(model, plain, drawn.images),
            "costs": [[layer, head, float(cost.mean())] for layer, head, cost, _ in ours],
            "needed": needed(ours, theirs),
        }
    return {}


Without = tuple[int, int, Tensor, Tensor | None]


@torch.no_grad()
def without_each(model: ByteLM | PatchModel, inputs: Tensor, labels: Tensor) -> Iterator[Without]:
    """Every head in turn: layer, head, what the loss of each example gains without it, gates of the layer's heads."""

    def loss() -> Tensor:
        logits = model(inputs)
        nats = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        return nats.view(len(inputs), -1).mean(1)

    with workbench.attach(model) as wb:
        with wb.capture([]) as cap:
            whole = loss()
        for site in cap.sites:
            gates = getattr(cap[site.name].pattern, "gates", None)
            for head in range(site.n_heads):
                with wb.ablate((site.name, head), how="zero"):
                    cost = loss() - whole
                yield site.layer, head, cost, gates


def needed(ours: Sequence[Without], theirs: Sequence[Without]) -> list[list[float]]:
    """Of each layer and head: the largest rank correlation, over examples, of what the loss gains without it with what
    it gains without a head of the other's layer; 0 for a head without which no example's loss changes.
    """
    found: dict[int, list[float]] = {}
    for layer, _, cost, _ in ours:
        others = [its for at, _, its, _ in theirs if at == layer]
        found.setdefault(layer, []).append(max(ranked_alike(cost, its) for its in others))
    return [found[layer] for layer in sorted(found)]


def ranked_alike(x: Tensor, y: Tensor) -> float:
    """Spearman's ρ of [example] and [example]; 0 where one of them is constant."""
    if x.unique().numel() < 2 or y.unique().numel() < 2:
        return 0.0
    return float(spearmanr(x.double().numpy(), y.double().numpy()).statistic)


def routed_heads(model: ByteLM) -> list[dict[str, float]]:
    """Of each head that a router chooses: its mean gate, and what the loss gains when it is switched off."""
    inputs, labels = text_batch(corpus("held out"), ROWS, model.place.length, torch.Generator().manual_seed(SEED))
    found = []
    for layer, head, cost, gates in without_each(model, inputs, labels):
        assert gates is not None
        if head >= model.stack.blocks[layer].mixer.shared:
            gate = float(gates[:, head].mean())
            found.append({"layer": layer, "head": head, "gate": gate, "cost": float(cost.mean())})
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
