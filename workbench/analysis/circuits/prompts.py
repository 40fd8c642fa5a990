"""The prompts of a task beside their twins, as a model sees them, and the metric that tells one from the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from workbench.errors import TaskError, nearest
from workbench.hooks.positions import Positions
from workbench.tasks.base import Task
from workbench.tasks.metrics import TaskBatch, correct, kl_divergence, logit_diff, probability

METRICS: dict[str, Callable[..., Tensor]] = {
    "logit_diff": logit_diff, "probability": probability, "kl_divergence": kl_divergence, "accuracy": correct,
}  # fmt: skip
Where = str | int | Sequence[str | int] | None


@dataclass(frozen=True)
class Metric:
    """One number per example, from the logits at the last token.

    Attributes:
        name: for results.
        function: `metric(output, batch)` with `output.logits` [batch, 1, vocab] and the task's batch; where
            `against_clean`, `metric(output, batch, clean_output)`.
        smooth: whether it has a gradient.
    """

    name: str
    function: Callable[..., Tensor]
    against_clean: bool = False
    smooth: bool = True

    def __call__(self, logits: Tensor, pair: Pair, clean: Tensor, times: int = 1) -> Tensor:
        """[times, batch] from logits [times · batch, vocab]; `clean` are those of the unedited model [batch, vocab]."""
        batch = TaskBatch(
            {"input_ids": pair.clean["input_ids"][:, :1].repeat(times, 1)},
            answers=list(pair.clean.answers) * times, wrong=list(pair.clean.wrong) * times, start=pair.clean.start,
        )  # fmt: skip
        output = SimpleNamespace(logits=logits[:, None])
        extra = [SimpleNamespace(logits=clean.repeat(times, 1)[:, None])] if self.against_clean else []
        value = self.function(output, batch, *extra)
        if not isinstance(value, Tensor) or value.shape != (logits.shape[0],):
            shape = value.shape if isinstance(value, Tensor) else None
            raise TaskError(
                f'the metric "{self.name}" gave {type(value).__name__}, expected one number for each example',
                shape=shape,
            )
        return value.view(times, -1)


def as_metric(given: Any) -> Metric:
    """A metric from its name or a function.

    Raises:
        TaskError: an unknown name, or no function.
    """
    if isinstance(given, Metric):
        return given
    if isinstance(given, str):
        if given not in METRICS:
            raise TaskError(f"there is no metric {given!r}", hint=nearest(given, list(METRICS), "metric"))
        function = METRICS[given]
    elif callable(given):
        function = given
    else:
        raise TaskError(f"a metric is a name or a function of output and batch, not {type(given).__name__}")
    name = given if isinstance(given, str) else getattr(given, "__name__", type(given).__name__)
    return Metric(name, function, bool(getattr(function, "against_clean", False)), function is not correct)


@dataclass(frozen=True)
class Pair:
    """A batch of prompts and the batch of their twins; both with the prompts' answers.

    Attributes:
        last: [batch] index of each prompt's last token.
        start: index in the task of the first example.
    """

    clean: TaskBatch
    twin: TaskBatch
    last: Tensor

    @property
    def size(self) -> int:
        """How many examples."""
        return self.last.shape[0]

    @property
    def length(self) -> int:
        """Tokens, padding included."""
        return self.clean["input_ids"].shape[1]

    @property
    def start(self) -> int:
        """Index in the task of the first example."""
        return self.clean.start


def make_pairs(task: Task, tokenizer: Any, size: int, device: torch.device) -> list[Pair]:
    """The prompts and twins of a task, in batches.

    Raises:
        TaskError: no task or tokenizer; an answer that is not one token; a twin of another length than its prompt, or
            one that does not differ.
    """
    if not isinstance(task, Task):
        raise TaskError(
            f"expected a Task, not {type(task).__name__}", hint="make one with workbench.tasks.from_prompts"
        )
    if tokenizer is None:
        raise TaskError("a task needs a tokenizer", hint="workbench.attach(model, tokenizer)")
    if len(task) == 0:
        raise TaskError(f"task {task.name} has no examples", hint="make it with n >= 1")
    pairs = []
    clean_batches = task.batches(tokenizer, size, device=device)
    twin_batches = task.batches(tokenizer, size, twins=True, device=device)
    for clean, twin in zip(clean_batches, twin_batches, strict=True):
        lengths, others = (batch["attention_mask"].sum(1) for batch in (clean, twin))
        for i in (lengths != others).nonzero()[:, 0].tolist():
            example = task[clean.start + i]
            raise TaskError(
                f"example {clean.start + i} has {int(lengths[i])} tokens, its twin {int(others[i])}: "
                f"{example.prompt!r} and {example.twin!r}",
                hint="a twin must have as many tokens as its prompt, so that positions correspond",
            )
        same = (clean["input_ids"] == twin["input_ids"]).all(1)
        if bool(same.any()):
            i = clean.start + int(same.nonzero()[0])
            raise TaskError(
                f"the twin of example {i} does not differ from its prompt {task[i].prompt!r} for this tokenizer",
                hint="a twin changes at least one token",
            )
        pairs.append(Pair(clean, twin, lengths - 1))
    return pairs


def find_positions(task: Task, tokenizer: Any, pair: Pair, where: Where) -> Tensor | None:
    """[batch, n] token positions of named ("end", "S2") or numbered places; None for all.

    Names count in the prompt. "end" is the last token of every task.

    Raises:
        TaskError: no position of that name. InterventionError: no such number.
    """
    if where is None:
        return None
    several = [where] if isinstance(where, (str, int)) else list(where)
    rows = task[pair.start : pair.start + pair.size]
    found = []
    for one in several:
        if one in ("end", -1):
            found.append(pair.last)
        elif isinstance(one, str):
            found.append(torch.tensor(rows.positions(one, tokenizer), device=pair.last.device))
        else:
            index = Positions(one).index(pair.size, pair.length, device=pair.last.device)
            found.append(index.expand(pair.size, 1)[:, 0])
    return torch.stack(found, dim=1)


def check_metric(name: str, clean: Tensor, corrupted: Tensor) -> None:
    """Refuse a metric that is the same on prompts and twins.

    Args:
        clean, corrupted: [example].

    Raises:
        TaskError: their means differ by less than 1e-6 of their size, or by less than a hundredth of their spread.
    """
    a, b = float(clean.mean()), float(corrupted.mean())
    spread = float(torch.cat((clean, corrupted)).std()) if len(clean) > 1 else 0.0
    if not abs(a - b) > max(1e-6 * max(abs(a), abs(b)), 1e-2 * spread, 1e-12):
        raise TaskError(
            f'the metric "{name}" cannot tell clean from corrupted: it is {a:.6g} on the prompts and {b:.6g} on the '
            "twins, in the mean",
            hint="does the model do the task? look at task.accuracy(model, tokenizer), or choose another metric",
        )
