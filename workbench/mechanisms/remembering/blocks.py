"""Put the block back: a small task of manipulation that needs memory, after SAM2Act's MemoryBench.

A table is seen from above, with sixteen pads. A block lies on one of them; it is taken away, a button is pressed, and
the block has to go back to where it was, which the last picture does not show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.mechanisms.remembering.bank import MemoryBank
from workbench.mechanisms.remembering.heatmaps import ConvexUp

SIDE, PADS, FRAMES = 32, 4, 3
COARSE = SIDE // 2
WIDTH, STEPS, BATCH, RATE = 32, 200, 16, 3e-3
_ZOOM = 8  # pixels along an edge of what the fine stage looks at
_NEAR = 1.5  # pixels: how near to the middle is a hit
_GRID = (8, 8)
ARMS = {
    "memory": "a bank of past frames",
    "no memory": "the frame alone",
    "no skips": "a bank, and heat maps that are made finer without the picture",
}


@dataclass(frozen=True)
class Episodes:
    """Episodes of three key frames.

    Attributes:
        frames: [episode, frame, 3, row, column]. goals: [episode, frame, 2] (x, y) to go to: the block, the button, and
            the pad on which the block was.
    """

    frames: Tensor
    goals: Tensor

    def __len__(self) -> int:
        return len(self.frames)


def draw_episodes(n: int, seed: int | torch.Generator = 0) -> Episodes:
    """Draw episodes; pads are at places of their own in each.

    >>> draw_episodes(2, seed=0).goals.shape
    torch.Size([2, 3, 2])
    """
    random = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")

    def near(at: Tensor, by: float) -> Tensor:
        """[episode, row, column] pixels at most so far from points [episode, 2]."""
        return ((x + 0.5 - at[:, 0, None, None]).abs() <= by) & ((y + 0.5 - at[:, 1, None, None]).abs() <= by)

    step = 6
    base = torch.cartesian_prod(torch.arange(PADS), torch.arange(PADS)).flip(-1) * step + 6
    pads = base + torch.randint(-1, 2, (n, PADS**2, 2), generator=random).float()
    goal = pads[torch.arange(n), torch.randint(PADS**2, (n,), generator=random)]
    button = torch.stack([4 + 24 * torch.rand(n, generator=random), torch.full((n,), 29.0)], 1)
    aside = torch.stack([torch.full((n,), 29.0), 3 + 20 * torch.rand(n, generator=random)], 1)
    table = torch.zeros(n, SIDE, SIDE)
    for k in range(PADS**2):
        table[near(pads[:, k], 1.0)] = 1.0
    frames = torch.zeros(n, FRAMES, 3, SIDE, SIDE)
    frames[:, :, 0] = table[:, None]
    for t, place in enumerate((goal, aside, aside)):
        frames[:, t, 1] = near(place, 2.0).float()
        frames[:, t, 2] = near(button, 1.5).float() * (0.5 if t < 2 else 1.0)
    frames += 0.1 * torch.randn(frames.shape, generator=random)
    return Episodes(frames, torch.stack([goal, button, goal], 1))


class Mover(nn.Module):
    """Where to go next: a coarse heat map over the table, made finer, then a fine one around its brightest place.

    Args:
        arm: of `ARMS`.

    Raises:
        WorkbenchError: there is no such arm.
    """

    def __init__(self, arm: str) -> None:
        super().__init__()
        if arm not in ARMS:
            raise WorkbenchError(f"there is no arm {arm!r}", hint=f"one of {', '.join(ARMS)}")
        self.arm = arm
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.patch = nn.Conv2d(16, WIDTH, 2, stride=2)
        self.place = nn.Parameter(0.1 * torch.randn(_GRID[0] * _GRID[1], WIDTH))
        self.when = nn.Embedding(FRAMES, WIDTH)
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.bank = MemoryBank(WIDTH, _GRID, layers=1)
        self.finer, self.heat = ConvexUp(WIDTH, 16), nn.Conv2d(16, 1, 3, padding=1)
        self.zoom = nn.Sequential(
            nn.Conv2d(3 + FRAMES, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 16, 3, padding=1), nn.GELU(),
            nn.Conv2d(16, 1, 1),
        )  # fmt: skip

    def step(self, frame: Tensor, t: int, memory: list[Tensor]) -> Tensor:
        """Logits [episode, row, column] of the coarse map; what is to be remembered goes into `memory`."""
        skip = F.gelu(self.stem(frame))
        x = self.patch(skip).flatten(2).transpose(1, 2) + self.place + self.when.weight[t]
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        recalled = x if self.arm == "no memory" else self.bank(x, memory)
        coarse = self.finer(recalled.transpose(1, 2).unflatten(2, _GRID))
        coarse = F.gelu(coarse if self.arm == "no skips" else coarse + skip)
        logits: Tensor = self.heat(coarse)[:, 0]
        memory.append(self.bank.written(x, logits.detach()))
        return logits

    def fine(self, frame: Tensor, t: int, at: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [episode, row, column] of the pixels around points [episode, 2], and the corner (x, y) of those."""
        corner = (at.round().long() - _ZOOM // 2).clamp(0, SIDE - _ZOOM)
        rows = corner[:, 1, None] + torch.arange(_ZOOM)
        columns = corner[:, 0, None] + torch.arange(_ZOOM)
        crop = frame[torch.arange(len(frame))[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
        when = F.one_hot(torch.tensor(t), FRAMES).float()[:, None, None].expand(len(crop), -1, _ZOOM, _ZOOM)
        return self.zoom(torch.cat([crop, when], 1))[:, 0], corner

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """[episode, frame, 2] (x, y) where it goes, of [episode, frame, 3, row, column]."""
        memory, found = list[Tensor](), []
        for t in range(frames.shape[1]):
            at = _brightest(self.step(frames[:, t], t, memory)) * 2 + 1.0
            near, corner = self.fine(frames[:, t], t, at)
            found.append(corner + _brightest(near) + 0.5)
        return torch.stack(found, 1)


def _brightest(logits: Tensor) -> Tensor:
    """[episode, 2] (x, y) of the largest."""
    best = logits.flatten(1).argmax(1)
    return torch.stack([best % logits.shape[2], best // logits.shape[2]], 1).float()


def train(arm: str, seed: int = 0, steps: int = STEPS) -> Mover:
    """A model of an arm, trained on episodes that are drawn anew; the memory begins empty in each."""
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Mover(arm)
    optimiser = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.01)
    plan = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: min((s + 1) / 40, 1, (1 - s / steps) / 0.4))
    for _ in range(steps):
        loss = _loss(model, draw_episodes(BATCH, random), random)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        plan.step()
    return model.eval()


def _loss(model: Mover, drawn: Episodes, random: torch.Generator) -> Tensor:
    """Cross-entropy of the pixel to go to, on the coarse map and on a fine one around a place near it."""
    memory, loss = list[Tensor](), torch.zeros(())
    for t in range(FRAMES):
        goal = drawn.goals[:, t]
        logits = model.step(drawn.frames[:, t], t, memory)
        cell = (goal / 2).long().clamp(0, COARSE - 1)
        loss = loss + F.cross_entropy(logits.flatten(1), cell[:, 1] * COARSE + cell[:, 0])
        shifted = goal + torch.randint(-1, 2, goal.shape, generator=random)
        near, corner = model.fine(drawn.frames[:, t], t, shifted)
        pixel = (goal - 0.5 - corner).round().long().clamp(0, _ZOOM - 1)
        loss = loss + F.cross_entropy(near.flatten(1), pixel[:, 1] * _ZOOM + pixel[:, 0])
    return loss


def solved(model: Any, drawn: Episodes) -> dict[str, float]:
    """Share of episodes in which each goal is hit, and all three."""
    off = (model(drawn.frames) - drawn.goals).abs().amax(-1) <= _NEAR
    names = ("block", "button", "put back")
    return {name: float(off[:, t].float().mean()) for t, name in enumerate(names)} | {
        "all": float(off.all(1).float().mean())
    }
