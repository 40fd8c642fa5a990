"""What is measured of some models beside the scores that all have."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F

import workbench
from workbench.mechanisms.training import ByteLM, TrainedModel, corpus, score_text, text_batch
from workbench.mechanisms.training.score import SEED

ROWS = 64


def beside(name: str, found: TrainedModel) -> dict[str, Any]:
    """More of a run's record: "heads" of a mixture of heads; the score "text, all seen" of models trained in groups."""
    if not isinstance(found.model, ByteLM):
        return {}
    if name.partition(":")[0] == "moh":
        return {"heads": routed_heads(found.model)}
    if name.partition(":")[0] in ("long_lora", "sink_lora"):
        return {"scores": found.scores | {"text, all seen": all_seen(found.model)}}
    return {}


@torch.no_grad()
def routed_heads(model: ByteLM) -> list[dict[str, float]]:
    """Of each head that a router chooses: its mean gate, and what the loss gains when it is switched off."""
    inputs, labels = text_batch(corpus("held out"), ROWS, model.place.length, torch.Generator().manual_seed(SEED))

    def loss() -> float:
        return float(F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten()))

    found = []
    with workbench.attach(model) as wb:
        with wb.capture([]) as cap:
            whole = loss()
        for layer, site in enumerate(cap.sites):
            gates = cap[site.name].pattern.gates.mean((0, 2)).tolist()
            for head in range(model.stack.blocks[layer].mixer.shared, len(gates)):
                with wb.ablate((site.name, head), how="zero"):
                    cost = loss() - whole
                found.append({"layer": layer, "head": head, "gate": gates[head], "cost": cost})
    return found


def all_seen(model: ByteLM) -> float:
    """Loss on text where every token sees all before it, of a model that was trained in groups."""
    whole = copy.deepcopy(model)
    for block in whole.stack.blocks:
        block.mixer.group, block.mixer.shifted, block.mixer.n_sinks = whole.place.length, (False,), 0
    return score_text(whole, corpus("held out"))["text"]
