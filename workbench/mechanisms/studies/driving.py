"""Control-aided attention on a toy of driving: a grid seen from above, a slot to drive to, and what lies in the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.capture.capture import Capture
from workbench.mechanisms.control_aided import ControlAidedAttention, control_loss
from workbench.mechanisms.frame import Place
from workbench.mechanisms.studies.exhibit import Exhibit, Heat
from workbench.mechanisms.studies.shipped import add
from workbench.mechanisms.studies.study import Phase, Study

SIDE, KINDS, WIDTH, STEPS = 6, 4, 24, 3
FRAMES = 3
_NOISE = 0.3
_TEST, _SEED = 512, 99
PLACE = Place(WIDTH, 2, SIDE * SIDE, causal=False, grid=(SIDE, SIDE))


class Drives(NamedTuple):
    """Scenes over a few frames, and what a driver decides in each.

    Attributes:
        frames: [scene, frame, cell, kind] of a slot, obstacles, things beside the way, and nothing, with noise anew in
            each frame. decisions: [scene, frame, step] classes of 3: steer, speed, and how much is in the way.
        matters: [scene, frame, cell] bool: the slot, and obstacles in its column.
    """

    frames: Tensor
    decisions: Tensor
    matters: Tensor


def drives(n: int, random: torch.Generator) -> Drives:
    """Scenes: the car stands below the middle of a 6 × 6 grid, and all comes nearer by a row in each frame.

    Steer left, straight or right by the column of the slot; drive fast, slowly or hardly by its row; and tell whether
    no, one or two obstacles stand in its column. Things beside the way have nothing to do with it.

    >>> found = drives(4, torch.Generator().manual_seed(0))
    >>> found.frames.shape, found.decisions.shape, int(found.matters.sum(-1).min())
    (torch.Size([4, 3, 36, 4]), torch.Size([4, 3, 3]), 1)
    """
    rows = SIDE - FRAMES + 1  # in the first frame, so that what is there in it is there in the last
    place = torch.rand(n, rows * SIDE, generator=random).argsort(1)[:, :8]
    row, column = place // SIDE, place % SIDE
    # Of eight things the first is the slot; two are obstacles, often in its column, and three stand beside the way.
    near = torch.rand(n, 2, generator=random) < 0.4
    free = (row[:, :1] + 1 + torch.arange(2)) % rows
    row[:, 1:3], column[:, 1:3] = torch.where(near, free, row[:, 1:3]), torch.where(near, column[:, :1], column[:, 1:3])
    cells = torch.zeros(n, FRAMES, SIDE, SIDE, KINDS)
    matters = torch.zeros(n, FRAMES, SIDE, SIDE, dtype=torch.bool)
    scene, decisions = torch.arange(n), torch.zeros(n, FRAMES, STEPS, dtype=torch.long)
    for t in range(FRAMES):
        for thing in range(6):
            cells[scene, t, row[:, thing] + t, column[:, thing], min((thing + 1) // 2, 2) if thing else 0] = 1.0
        matters[scene, t, row[:, 0] + t, column[:, 0]] = True
        blocked = torch.zeros(n, SIDE, SIDE)
        for thing in (1, 2):
            inside = column[:, thing] == column[:, 0]
            blocked[scene[inside], row[inside, thing] + t, column[inside, thing]] = 1.0
        matters[:, t] |= blocked.bool()
        decisions[:, t, 0] = column[:, 0] // 2
        decisions[:, t, 1] = (row[:, 0] + t) // 2
        decisions[:, t, 2] = blocked.sum((1, 2)).long()
    frames = cells + _NOISE * torch.randn(cells.shape, generator=random)
    return Drives(frames.flatten(2, 3), decisions, matters.flatten(2))


class Driver(nn.Module):
    """Decisions [scene, step, class] of features [scene, cell, kind]: an encoder, the gate, and queries that look.

    Args:
        arm: "control", a gate that also learns the decisions' gradient; "task", one that learns from them alone;
            "none", no gate.
    """

    def __init__(self, arm: str) -> None:
        super().__init__()
        self.arm, self.embed = arm, nn.Linear(KINDS, WIDTH)
        self.position = nn.Parameter(0.5 * torch.randn(PLACE.length, WIDTH))
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.gate = None if arm == "none" else ControlAidedAttention(PLACE)
        self.asks = nn.Parameter(0.5 * torch.randn(STEPS, WIDTH))
        self.look, self.say = nn.MultiheadAttention(WIDTH, 2, batch_first=True), nn.Linear(2 * WIDTH, 3)

    def encoded(self, cells: Tensor) -> Tensor:
        """F, [scene, cell, d_model]."""
        x = self.embed(cells) + self.position
        x = x + self.down(F.gelu(self.up(x)))
        given = self.norm(x)
        mixed: Tensor = x + self.mix(given, given, given, need_weights=False)[0]
        return mixed

    def decide(self, features: Tensor) -> Tensor:
        """Logits [scene, step, class] of features."""
        asks = self.asks.expand(len(features), -1, -1)
        seen = self.look(asks, features, features, need_weights=False)[0]
        logits: Tensor = self.say(torch.cat((F.gelu(seen), asks), dim=-1))
        return logits

    def forward(self, cells: Tensor) -> Tensor:
        """Logits [scene, step, class]."""
        features = self.encoded(cells)
        return self.decide(features if self.gate is None else self.gate(features))

    def looks(self, cells: Tensor) -> Tensor:
        """[scene, cell]: what the queries give to each cell, a mean over them and their heads; raw attention."""
        features = self.encoded(cells)
        features = features if self.gate is None else self.gate(features)
        weights: Tensor = self.look(self.asks.expand(len(features), -1, -1), features, features)[1]
        return weights.mean(1)

    def weighs(self, cells: Tensor) -> Tensor:
        """[scene, cell]: length of the gate's factors at each cell, as a share of all; raw attention without a gate."""
        if self.gate is None:
            return self.looks(cells)
        size = self.gate.factor(self.encoded(cells)).norm(dim=-1)
        return size / size.sum(1, keepdim=True)


def _loss(model: Driver, random: torch.Generator) -> Tensor:
    found = drives(16, random)
    cells, decisions = found.frames.flatten(0, 1), found.decisions.flatten(0, 1)
    task = F.cross_entropy(model(cells).flatten(0, 1), decisions.flatten())
    if model.arm != "control" or model.gate is None:
        return task
    return task + control_loss(model.gate, model.encoded(cells), model.decide)


def steadiness(maps: Tensor) -> float:
    """Correlation of maps [scene, frame, cell] with those of the next frame, a row further down; a mean of all.

    >>> steadiness(torch.rand(1, 1, 36).expand(1, 2, 36).clone()) < 1
    True
    """
    grid = maps.unflatten(2, (SIDE, SIDE))
    before, after = grid[:, :-1, :-1].flatten(2), grid[:, 1:, 1:].flatten(2)
    before, after = (each - each.mean(-1, keepdim=True) for each in (before, after))
    return float(F.cosine_similarity(before, after, dim=-1).mean())


@torch.no_grad()
def _score(model: Driver) -> dict[str, float]:
    found = drives(_TEST, torch.Generator().manual_seed(_SEED))
    cells, lengths = found.frames.flatten(0, 1), (len(found.frames), FRAMES)
    right = model(cells).argmax(-1) == found.decisions.flatten(0, 1)
    maps = {"gate": model.weighs(cells).unflatten(0, lengths), "attention": model.looks(cells).unflatten(0, lengths)}
    scores = {"decisions": float(right.float().mean()), "scenes": float(right.all(-1).float().mean())}
    for name, each in maps.items():
        scores[f"{name} steady"] = steadiness(each)
        scores[f"{name} on what matters"] = float((each * found.matters).sum(-1).mean())
    return scores


def _shown() -> Drives:
    return drives(2, torch.Generator().manual_seed(5))


@torch.no_grad()
def _exhibits(model: Driver, capture: Capture) -> Sequence[Exhibit]:
    shown = _shown()
    found = []
    for i in range(len(shown.frames)):
        panels = []
        for name, of in (("gate", model.weighs), ("attention", model.looks)):
            for t in range(FRAMES):
                boxes = [(int(c) // SIDE, int(c) % SIDE, 1, 1) for c in shown.matters[i, t].nonzero().flatten()]
                panels.append(
                    Heat(f"{name}, frame {t + 1}", of(shown.frames[i, t][None])[0].view(SIDE, SIDE), boxes=boxes)
                )
        found.append(
            Exhibit(
                f"What the gate weighs, scene {i + 1}",
                "The length of the gate's factors at each cell, and what the policy's queries look at, as shares of a "
                "frame. What the decisions depend on is outlined, and comes nearer by a row in each frame.",
                tuple(panels),
            )
        )
    return found


DRIVING = add(
    Study(
        "control_aided",
        "driving",
        f"a grid of {SIDE} × {SIDE} cells seen from above, noisy and over {FRAMES} frames: steer to a slot, slow down "
        "near it, count what stands in its column; a block of attention, the gate, and three queries that look",
        {
            "control": "a gate that learns the gradient of the decisions",
            "task": "the same gate, which learns from the task alone",
            "none": "no gate",
        },
        Driver,
        lambda arm: [Phase(450, _loss, 6e-3)],
        _score,
        lambda: {"cells": _shown().frames.flatten(0, 1)},
        _exhibits,
        (SIDE, SIDE),
    )
)
