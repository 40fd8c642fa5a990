"""The training loop of the demonstration models: a curriculum of stages, checkpoints, and resuming from them."""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from workbench.errors import WorkbenchError
from workbench.models.training.formats import FORMATS, IGNORE, held_out, to_tensors
from workbench.storage.checkpoint import write_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum: a mixture of formats, and when to move on.

    Attributes:
        name: for the log.
        mixture: rows of each format in one step. Every format weighs the same in the loss, whatever its rows.
        steps: the most steps the stage takes.
        goal: name of a training format ("train/...", mean of the last ten steps) or of a held-out task, and the
            accuracy at which the stage ends early.
        shifted: formats of which half the rows start at a random position instead of at 0, so that what is learnt
            early in the context also holds late in it.
        decay: let the learning rate fall to zero, along a cosine, over the second half of the stage.
    """

    name: str
    mixture: Mapping[str, int]
    steps: int
    goal: tuple[str, float] | None = None
    shifted: tuple[str, ...] = ()
    decay: bool = False


@dataclass
class Progress:
    """How far a run has come; written beside the weights at every checkpoint."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Trains a causal language model through a curriculum.

    Muon updates the matrices inside the blocks and AdamW everything else (embeddings, norms, biases).

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its word-level tokenizer.
        curriculum: the stages, in order.
        folder: where checkpoints go, or None to keep none.
        seed: of the data. Every step draws from a generator of its own, so a resumed run sees the same data.
        matrix_rate: learning rate of Muon.
        other_rate: learning rate of AdamW.
        warmup: steps over which the rates rise at the start of the run.
        every: steps between evaluations and checkpoints.
        n_eval: held-out examples of each task in those evaluations.

    Raises:
        WorkbenchError: this torch has no Muon (it came with 2.9).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        curriculum: Sequence[Stage],
        folder: Path | None,
        *,
        seed: int = 0,
        matrix_rate: float = 2e-2,
        other_rate: float = 2e-3,
        warmup: int = 50,
        every: int = 50,
        n_eval: int = 200,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise WorkbenchError(
                f"training needs torch.optim.Muon, which torch {torch.__version__} lacks",
                hint="train with torch 2.9 or later; loading a trained model works with any",
            )
        self.model, self.tokenizer, self.curriculum, self.folder, self.seed = model, tokenizer, curriculum, folder, seed
        self.warmup, self.every = warmup, every
        self.ids: dict[str, int] = tokenizer.get_vocab()
        special = set(tokenizer.all_special_tokens)
        self.words = sorted(word for word in self.ids if word not in special)
        self.tasks = held_out(n_eval, seed=10_000 + seed)
        self.progress = Progress()
        matrices = [p for name, p in model.named_parameters() if ".h." in name and p.ndim == 2]
        inside = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in inside]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=matrix_rate, momentum=0.95, weight_decay=0.01),
            torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.98), weight_decay=0.01),
        ]
        self.rates = (matrix_rate, other_rate)

    def run(self) -> Progress:
        """Train to the end of the curriculum, from wherever `progress` stands."""
        p = self.progress
        while p.stage < len(self.curriculum):
            stage = self.curriculum[p.stage]
            bar = tqdm(total=stage.steps, initial=p.stage_step, desc=stage.name, mininterval=5.0)
            recent: deque[dict[str, float]] = deque(maxlen=10)
            done = p.stage_step >= stage.steps
            while not done:
                started = time.perf_counter()
                recent.append(self._step(stage))
                p.step, p.stage_step, p.seconds = (
                    p.step + 1,
                    p.stage_step + 1,
                    p.seconds + time.perf_counter() - started,
                )
                bar.update()
                bar.set_postfix({"loss": f"{recent[-1]['loss']:.3f}"}, refresh=False)
                if p.stage_step % self.every == 0 or p.stage_step == stage.steps:
                    started = time.perf_counter()
                    measured = {name: fmean(one[name] for one in recent) for name in recent[0]} | self.evaluate()
                    p.seconds += time.perf_counter() - started
                    p.history.append(
                        {"step": p.step, "stage": stage.name, **{k: round(v, 4) for k, v in measured.items()}}
                    )
                    log.info("%s", json.dumps(p.history[-1]))
                    self.save()
                    done = stage.goal is not None and measured[stage.goal[0]] >= stage.goal[1]
                done = done or p.stage_step == stage.steps
            bar.close()
            p.stage, p.stage_step = p.stage + 1, 0
            self.save()
        return p

    def evaluate(self) -> dict[str, float]:
        """Held-out accuracy of every task."""
        self.model.eval()
        scores = {name: task.accuracy(self.model, self.tokenizer, size=100) for name, task in self.tasks.items()}
        self.model.train()
        return scores

    def save(self) -> None:
        """Write a checkpoint, replacing the one before only once it is whole."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
        state |= {"progress": json.dumps(vars(self.progress)), "seed": self.seed}
        write_checkpoint(self.folder / "checkpoint.pt", state)

    def resume(self) -> None:
        """Go on from the folder's checkpoint.

        Raises:
            WorkbenchError: there is none, or it was made with another seed.
        """
        path = None if self.folder is None else self.folder / "checkpoint.pt"
        if path is None or not path.is_file():
            raise WorkbenchError(
                f"there is no checkpoint to resume from in {self.folder}", hint="start without --resume"
            )
        state = torch.load(path, weights_only=True)
        if state["seed"] != self.seed:
            raise WorkbenchError(f"the checkpoint was made with seed {state['seed']}, not {self.seed}")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**json.loads(state["progress"]))

    def _step(self, stage: Stage) -> dict[str, float]:
        factor = self._factor(stage)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        measured, total = {}, 0.0
        for name, rows in stage.mixture.items():
            rng = random.Random(f"{self.seed}/{self.progress.step}/{name}")
            inputs, labels = to_tensors(FORMATS[name](rows, rng, self.words), self.ids)
            places = torch.arange(inputs.shape[1]).expand_as(inputs)
            if name in stage.shifted:
                room = self.model.config.n_positions - inputs.shape[1]
                starts = [rng.randint(0, room) if rng.random() < 0.5 else 0 for _ in range(len(inputs))]
                places = places + torch.tensor(starts)[:, None]
            hidden = self.model.transformer(inputs, position_ids=places).last_hidden_state
            learn = labels != IGNORE
            logits, targets = self.model.lm_head(hidden[learn]), labels[learn]
            loss = F.cross_entropy(logits, targets)
            # One format at a time: no padding of short formats to the longest, and a smaller peak of memory.
            (loss / len(stage.mixture)).backward()
            total += loss.item() / len(stage.mixture)
            measured[f"train/{name}"] = (logits.argmax(-1) == targets).float().mean().item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return {"loss": total, **measured}

    def _factor(self, stage: Stage) -> float:
        warm = min(1.0, (self.progress.step + 1) / self.warmup)
        if not stage.decay:
            return warm
        half = stage.steps / 2
        over = max(0.0, (self.progress.stage_step - half) / half)
        return warm * 0.5 * (1 + math.cos(math.pi * over))
