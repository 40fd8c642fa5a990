"""Models that find an element on a screen: by the weights of a pointer, as V2P does, or by writing down its box."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.analysis.grounding.clicks import FACTOR, click, click_labels, click_losses
from workbench.errors import WorkbenchError
from workbench.mechanisms.screens.drawing import COLOURS, KINDS, PATCH, ROWS, SIDE, Screens, draw_screens

WIDTH, HEADS = 48, 4
STEPS, BATCH, RATE = 200, 16, 3e-3
EVEN = 1e-4  # a factor by which labels are even over the box
ARMS = {
    "v2p": "Gaussian labels, and weight off the target is a loss",
    "without suppression": "Gaussian labels alone",
    "uniform": "labels even over the target, and weight off it is a loss",
    "boxes": "the box is written down instead, and learnt by its edges, in three times the steps",
}
CELLS = torch.cartesian_prod(torch.arange(ROWS), torch.arange(ROWS))
PATCHES = torch.cat([CELLS.flip(-1), CELLS.flip(-1) + 1], 1).float() * PATCH
"""[patch, 4] their boxes."""


class _Trunk(nn.Module):
    """Patches with what they show and where they are; each for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * PATCH**2, WIDTH)
        self.position = nn.Parameter(0.1 * torch.randn(ROWS**2, WIDTH))
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        """[screen, patch, width] of [screen, 3, row, column]."""
        cut = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        x = self.embed(cut) + self.position
        found: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return found


class Pointer(nn.Module):
    """V2P's head on patches: one self-attention, a key and a query by two MLPs, α = softmax(q kᵀ/√d) over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.ask = _Trunk(), nn.Embedding(len(KINDS) * len(COLOURS), WIDTH)
        self.attend, self.norm = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), nn.LayerNorm(WIDTH)
        self.key, self.query = _mlp(), _mlp()

    def forward(self, pixels: Tensor, asked: Tensor) -> Tensor:
        """α, [screen, patch]."""
        x = self.trunk(pixels)
        x = self.norm(x + self.attend(x, x, x, need_weights=False)[0])
        scores = self.key(x) @ self.query(self.ask(asked))[..., None]
        return (scores[..., 0] / WIDTH**0.5).softmax(-1)


class Boxes(nn.Module):
    """The same patches, and a box written down: the mean of the patches' boxes by a query's weights, and an offset.

    Weights are taught through the box alone. A box that is made of what a query reads, without the places, is not
    learnt in 1,200 steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.ask = _Trunk(), nn.Embedding(len(KINDS) * len(COLOURS), WIDTH)
        self.attend, self.norm = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), nn.LayerNorm(WIDTH)
        self.key, self.query, self.between, self.offset = _mlp(), _mlp(), _mlp(), nn.Linear(WIDTH, 4)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, pixels: Tensor, asked: Tensor) -> Tensor:
        """[screen, 4] of shares of the screen."""
        x = self.trunk(pixels)
        x = self.norm(x + self.attend(x, x, x, need_weights=False)[0])
        scores = self.key(x) @ self.query(self.ask(asked))[..., None]
        weights = (scores[..., 0] / WIDTH**0.5).softmax(-1)
        found: Tensor = weights @ PATCHES / SIDE + self.offset(self.between((weights[:, None] @ x)[:, 0]))
        return found


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


def train(arm: str, seed: int = 0, steps: int | None = None) -> Any:
    """A model of an arm, trained on screens that are drawn anew at every step.

    Args:
        steps: by default 200, and 600 of boxes, which are slower to learn.

    Raises:
        WorkbenchError: there is no such arm.
    """
    if arm not in ARMS:
        raise WorkbenchError(f"there is no arm {arm!r}", hint=f"one of {', '.join(ARMS)}")
    steps = STEPS * (3 if arm == "boxes" else 1) if steps is None else steps
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Boxes() if arm == "boxes" else Pointer()
    optimiser = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.01)
    plan = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: min((s + 1) / 40, 1, (1 - s / steps) / 0.4))
    for _ in range(steps):
        drawn = draw_screens(BATCH, random)
        loss = _loss(model, arm, drawn)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        plan.step()
    return model.eval()


def _loss(model: nn.Module, arm: str, drawn: Screens) -> Tensor:
    found, boxes = model(drawn.pixels, drawn.asked), drawn.boxes[:, 0]
    if arm == "boxes":
        return F.l1_loss(found, boxes / SIDE) * 4
    labels = torch.stack([click_labels(box, PATCHES, EVEN if arm == "uniform" else FACTOR) for box in boxes])
    fits, off = click_losses(found, labels.float())
    return fits if arm == "without suppression" else fits + off


@torch.no_grad()
def clicks(model: Any, drawn: Screens) -> tuple[Tensor, Tensor | None]:
    """[screen, 2] where a model clicks, and [screen, patch] its weights; None of one that writes boxes."""
    found = model(drawn.pixels, drawn.asked)
    if found.shape[-1] == 4:
        return (found[:, :2] + found[:, 2:]) * SIDE / 2, None
    return torch.tensor([click(one, PATCHES, CELLS) for one in found]), found
