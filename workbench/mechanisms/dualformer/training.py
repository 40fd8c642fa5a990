"""Trains maze transformers: `python -m workbench.mechanisms.dualformer.training --kind dual --folder .cache/maze`."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from workbench.errors import TaskError, WorkbenchError, nearest
from workbench.mechanisms.dualformer.dropping import MIXTURES, Mixture, drop
from workbench.mechanisms.dualformer.mazes import Maze, draw, search
from workbench.mechanisms.dualformer.model import WORDS, build, save
from workbench.mechanisms.dualformer.tokens import BOS, EOS
from workbench.storage import disk
from workbench.storage.checkpoint import write_checkpoint

if TYPE_CHECKING:
    from transformers import T5ForConditionalGeneration

_HELD_OUT = 16  # one maze of so many, by its hash, is never trained on
_IN_VAIN = 5_000  # mazes one after another of which none is a new one that is held out
_AHEAD = 8  # batches that are drawn together, and put into batches by their length
_IGNORE = -100
_WARMUP, _STEADY = 100, 0.6  # steps over which rates rise, and the share of all steps after which they fall


def is_held_out(maze: Maze) -> bool:
    """Whether a maze is one that no training sees."""
    text = " ".join(WORDS.prompt(maze)).encode()
    return hashlib.sha256(text).digest()[0] % _HELD_OUT == 0


def held_out(n: int, seed: int = 0, n_walls: int | None = None) -> list[Maze]:
    """Random mazes that no training has seen, all different.

    Args:
        n_walls: how many walls each has; by default from 30 to 50 % of the cells.

    Raises:
        TaskError: there are not so many, as far as can be found.
    """
    source, found, in_vain = random.Random(f"held out {seed}"), dict[Maze, None](), 0
    while len(found) < n:
        maze = draw(source, WORDS.width, WORDS.height, n_walls=n_walls)
        in_vain = 0 if is_held_out(maze) and maze not in found else in_vain + 1
        if in_vain > _IN_VAIN:
            raise TaskError(f"{len(found)} such mazes were found, and not {n}", hint="ask for fewer, or other n_walls")
        if in_vain == 0:
            found[maze] = None
    return list(found)


def batches(mixture: Mixture, size: int, seed: int) -> list[dict[str, Tensor]]:
    """Several batches of inputs and labels for training, [example, token] each; what is alike in length is together.

    The level of each example is drawn anew, as the paper does it for mazes.
    """
    source, rows = random.Random(seed), list[tuple[list[int], list[int]]]()
    while len(rows) < size * _AHEAD:
        maze = draw(source, WORDS.width, WORDS.height)
        if is_held_out(maze):
            continue
        trace, plan = search(maze)
        answer = drop(WORDS, trace, plan, mixture.draw(source), source)
        rows.append((WORDS.encode(WORDS.prompt(maze)), WORDS.encode([BOS, *answer, EOS])))
    rows.sort(key=lambda row: len(row[1]))
    several = [_batch(rows[start : start + size]) for start in range(0, len(rows), size)]
    source.shuffle(several)
    return several


def _batch(rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    read, mask = _padded([row[0] for row in rows])
    written, real = _padded([row[1] for row in rows])
    labels = written[:, 1:].masked_fill(real[:, 1:] == 0, _IGNORE)
    return {"input_ids": read, "attention_mask": mask, "decoder_input_ids": written[:, :-1], "labels": labels}


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    return ids, mask


def train(
    kind: str, folder: Path, *, steps: int = 1500, size: int = 64, seed: int = 0, rate: float = 3e-3, every: int = 50
) -> T5ForConditionalGeneration:
    """Train a maze transformer, or go on with one; the trained weights are in `folder/kind.safetensors`.

    AdamW, whose rate rises over the first 100 steps, stays, and falls to zero over the last 40 %. A checkpoint is
    written every so many steps, and a run that was stopped goes on from it to the same weights; also to more or fewer
    steps than it was begun with, as long as its rate has not begun to fall.

    Args:
        kind: "dual", "full" or "solution", as in `dropping.MIXTURES`. folder: an existing one.
        steps, size: of batches of so many mazes. rate: of learning.

    Raises:
        WorkbenchError: an unknown kind; no folder; a checkpoint of other settings.
    """
    if not folder.is_dir():
        raise WorkbenchError(f"there is no folder {folder}", hint="make it first")
    if kind not in MIXTURES:
        raise WorkbenchError(f"there is no training {kind!r}", hint=nearest(kind, list(MIXTURES), "training"))
    torch.manual_seed(seed)
    model = build().train()
    optimiser = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01)
    plan = LambdaLR(optimiser, lambda step: min((step + 1) / _WARMUP, 1.0, (1 - step / steps) / (1 - _STEADY)))
    kept: list[Any] = [optimiser, plan]
    settings = {"kind": kind, "steps": steps, "size": size, "seed": seed, "rate": rate}
    done: dict[str, Any] = {"settings": settings, "step": 0, "losses": [], "seconds": 0.0}
    checkpoint = folder / f"{kind}.checkpoint.pt"
    if checkpoint.is_file():
        held = torch.load(checkpoint, weights_only=True)
        began_with, at = held["done"]["settings"], held["done"]["step"]
        steady = at <= _STEADY * min(steps, began_with["steps"])
        if began_with != settings and not (steady and began_with | {"steps": steps} == settings):
            raise WorkbenchError(f"{checkpoint} is of other settings", hint="give another folder, or remove it")
        done = held["done"] | {"settings": settings}
        model.load_state_dict(held["model"])
        for each, state in zip(kept, held["optimisers"], strict=True):
            each.load_state_dict(state)
    several: list[dict[str, Tensor]] = []
    losses, began = list[float](), time.process_time() - done["seconds"]
    while done["step"] < steps:
        ahead, at = divmod(done["step"], _AHEAD)
        if at == 0 or not several:
            several = batches(MIXTURES[kind], size, (seed << 32) + ahead)
        batch = several[at]
        labels = batch["labels"]
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        plan.step()
        model.zero_grad()
        losses.append(float(loss.detach()))
        done["step"] += 1
        if done["step"] % every == 0 or done["step"] == steps:
            done["losses"].append([done["step"], sum(losses) / len(losses)])
            losses.clear()
            done["seconds"] = time.process_time() - began
            state = [each.state_dict() for each in kept]
            write_checkpoint(checkpoint, {"model": model.state_dict(), "optimisers": state, "done": done})
            disk.write(folder / f"{kind}.json", json.dumps(done, indent=1))
    save(model.eval(), folder / f"{kind}.safetensors", done)
    return model


def main() -> None:
    """Train one of the models from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=list(MIXTURES), default="dual")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--size", type=int, default=64)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    train(given.kind, given.folder, steps=given.steps, size=given.size)


if __name__ == "__main__":
    main()
