"""The prompts of a task beside their twins, as a model sees them, and the metric that tells one from the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import CaptureError, InterventionError, TaskError, expect
from workbench.inputs import decoder_start, own_columns
from workbench.metrics import Metric, TaskBatch, as_metric, last_places
from workbench.tasks.base import Task

Where = str | int | Sequence[str | int] | None
SCORED = "scored"
"""The name of all tokens from which one of an answer is predicted; mostly the same as "end"."""


def measure_last(metric: Metric, logits: Tensor, pair: Pair, clean: Tensor, times: int = 1) -> Tensor:
    """[times, batch] of a metric from logits at the places that a task is measured by, mostly the last token.

    The metric sees them as `output.logits` [times · batch, n, vocab], with a task's batch of n tokens each.

    Args:
        logits: [times · batch, n, vocab], or [times · batch, vocab] of one place. clean: those of the unedited model,
            [batch, n, vocab].

    Raises:
        TaskError: it does not give one number for each example.
    """
    n, scored = pair.scored.shape[1], pair.clean.scored
    rows = logits.shape[0]
    ids = {"input_ids": pair.clean["input_ids"][:, :1].repeat(times, n)} if "input_ids" in pair.clean else {}
    batch = TaskBatch(
        ids, answers=list(pair.clean.answers) * times, wrong=list(pair.clean.wrong) * times, start=pair.clean.start,
        scored=None if scored is None else scored.repeated(times),
    )  # fmt: skip
    several = (logits.view(rows, n, -1), clean.view(-1, n, clean.shape[-1]).repeat(times, 1, 1))
    output, unedited = (SimpleNamespace(logits=given) for given in several)
    return metric.examples(output, batch, logits.shape[0], unedited).view(times, -1)


def metric_of_logits(given: Any) -> Metric:
    """A metric from its name or a function, that reads logits alone.

    Raises:
        TaskError: an unknown name, no function, or one that needs more than logits.
    """
    metric = as_metric(given)
    if not metric.from_logits:
        raise TaskError(
            f'circuits are measured from logits, and "{metric.name}" reads more than these',
            hint="such as logit_diff, or kl_divergence for how far the model moves",
        )
    return metric


@dataclass(frozen=True)
class Pair:
    """A batch of prompts and the batch of their twins; both with the prompts' answers.

    Attributes:
        ends: for each residual stream [batch] the index of its last token; None where it has no tokens but frames or
            patches. The last one is that whose logits are read. Tokens of an answer are not counted.
        start: index in the task of the first example.
    """

    clean: TaskBatch
    twin: TaskBatch
    ends: tuple[Tensor | None, ...]

    @property
    def last(self) -> Tensor:
        """[batch] index of the last token of a prompt, or of what a decoder has written, before the answer."""
        assert self.ends[-1] is not None
        return self.ends[-1]

    @property
    def scored(self) -> Tensor:
        """[batch, n] indices of the tokens whose logits are read: the last one, mostly."""
        return self.last[:, None] if self.clean.scored is None else self.clean.scored.places

    @property
    def decisive(self) -> Tensor:
        """[batch] index of the token from which what right and wrong answers differ in is predicted: mostly the last.

        It is another one where answers begin alike, or are measured at another position.
        """
        return self.last if self.clean.scored is None else self.clean.scored.apart

    @property
    def size(self) -> int:
        """How many examples."""
        return self.last.shape[0]

    def mask(self, stream: int, length: int) -> Tensor:
        """[batch, position] 1 where a stream of that length holds no padding."""
        names = ("attention_mask",) if len(self.ends) == 1 else ("attention_mask", "decoder_attention_mask")
        mask = self.clean.get(names[stream])
        if mask is None or mask.shape != (self.size, length):
            return torch.ones(self.size, length, dtype=torch.long, device=self.last.device)
        return mask

    @property
    def start(self) -> int:
        """Index in the task of the first example."""
        return self.clean.start


def make_pairs(task: Task, model: nn.Module, tokenizer: Any, size: int, device: torch.device) -> list[Pair]:
    """The prompts and twins of a task, in batches.

    The encoder of an encoder-decoder reads the prompt; the answer is the next token of the decoder.

    Raises:
        TaskError: no task or tokenizer; answers that `Task.batches` refuses; a twin of another length than its prompt,
            or one that does not differ.
    """
    expect(Task, task=task)
    if tokenizer is None and task.of_text:
        raise TaskError("a task needs a tokenizer", hint="workbench.attach(model, tokenizer)")
    if len(task) == 0:
        raise TaskError(f"task {task.name} has no examples", hint="make it with n >= 1")
    pairs = []
    start = decoder_start(model)
    clean_batches = task.batches(tokenizer, size, device=device, start_token=start)
    twin_batches = task.batches(tokenizer, size, twins=True, device=device, start_token=start)
    for clean, twin in zip(clean_batches, twin_batches, strict=True):
        several = [_ends(batch, start is not None) for batch in (clean, twin)]
        for lengths, others in zip(*several, strict=True):
            if lengths is None or others is None:
                continue
            for i in (lengths != others).nonzero()[:, 0].tolist():
                example = task[clean.start + i]
                raise TaskError(
                    f"example {clean.start + i} has {int(lengths[i]) + 1} tokens, its twin {int(others[i]) + 1}: "
                    f"{example.prompt!r} and {example.twin!r}",
                    hint="a twin must have as many tokens as its prompt, so that positions correspond",
                )
        same = torch.ones(len(clean.answers), dtype=torch.bool, device=device)
        for name, value in clean.items():
            if value.shape != twin[name].shape:
                raise TaskError(f"{name} of the twins has another shape: {list(twin[name].shape)}", shape=value.shape)
            same &= (value == twin[name]).flatten(1).all(1)
        if bool(same.any()):
            i = clean.start + int(same.nonzero()[0])
            raise TaskError(
                f"the twin of example {i} does not differ from its prompt {task[i].prompt!r} for this model",
                hint="a twin changes at least one token",
            )
        ends = several[0] if clean.scored is None else (*several[0][:-1], clean.scored.ends)
        pairs.append(Pair(clean, twin, ends))
    return pairs


def _ends(batch: TaskBatch, decodes: bool) -> tuple[Tensor | None, ...]:
    """[batch] index of the last token of each stream."""
    n = len(batch.answers)
    read = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    last = last_places(read).expand(n) if "input_ids" in read else None
    return (last, last_places(batch).to(batch["decoder_input_ids"].device).expand(n)) if decodes else (last,)


def find_positions(task: Task, tokenizer: Any, pair: Pair, where: Where, stream: int, length: int) -> Tensor | None:
    """[batch, n] positions in a residual stream of named ("end", "S2") or numbered places; None for all.

    "end" is the last token of every stream's prompt, and "scored" all tokens from which one of an answer is predicted
    (where logits are read; elsewhere the last one). Other names count in the prompt, which the first stream reads.
    Numbers count an example's own tokens, from 0, or from −1 at its end.

    Args:
        stream: index of the stream. length: its positions, padding included.

    Raises:
        TaskError: no position of that name. InterventionError: no such number.
    """
    if where is None:
        return None
    end = pair.ends[stream]
    device = pair.last.device
    end = torch.full((pair.size,), length - 1, device=device) if end is None else end
    several = [where] if isinstance(where, (str, int)) else list(where)
    rows = task[pair.start : pair.start + pair.size]
    found = []
    for one in several:
        if one in ("end", -1) or (one == SCORED and stream + 1 < len(pair.ends)):
            found.append(end[:, None])
        elif one == SCORED:
            found.append(pair.scored)
        elif isinstance(one, str):
            if stream > 0:
                raise TaskError(
                    f"{one!r} is a place in the prompt, which the encoder reads, and not in what the decoder wrote",
                    hint='in the decoder there are "end" and numbers',
                )
            found.append(torch.tensor(rows.positions(one, tokenizer), device=device)[:, None])
        else:
            found.append(_column(pair, one, stream, length).to(device)[:, None])
    return torch.cat(found, dim=1)


def _column(pair: Pair, number: int, stream: int, length: int) -> Tensor:
    """[batch] column of a token of each prompt; see `workbench.inputs.own_columns`."""
    real, end = pair.mask(stream, length).bool(), pair.ends[stream]
    if number < 0 and end is not None:  # from the end of the prompt, not of an answer behind it
        real = real & (torch.arange(length, device=real.device) <= end.to(real.device)[:, None])
    try:
        return own_columns(real, number)
    except CaptureError as error:
        raise InterventionError(error.message, hint=error.hint) from None


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
