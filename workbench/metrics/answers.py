"""A task's batches, which know their answers, and the positions whose logits they are measured by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from workbench.errors import TaskError
from workbench.metrics.logits import logits_of, reads_in_place

Sets = Sequence[Sequence[int]]
"""For each place the ids of the tokens of which any is meant; none where nothing is."""


@dataclass(frozen=True)
class Scored:
    """The positions that a batch is measured by: those from which the tokens of its answers are predicted.

    The tokens of an answer, but for the last one, stand in the input, so that one forward gives all of them.

    Attributes:
        places: [batch, n] columns; an example that has fewer repeats its last one.
        ends: [batch] columns of the prompts' last tokens.
        right, wrong: for each example, for each of its places, token ids of which any is right, or what these are
            compared with. Nothing is compared where right and wrong answers are still the same, or have parted.
        whole: for each example, whether these are all tokens of its right answers; () where all are. Of several right
            answers that part from each other earlier than at their last token, only what they begin with is there.
    """

    places: Tensor
    ends: Tensor
    right: Sequence[Sets]
    wrong: Sequence[Sets]
    whole: Sequence[bool] = ()

    @property
    def apart(self) -> Tensor:
        """[batch] the column from which the first token is predicted that right and wrong answers do not share."""
        steps = [next((i for i, one in enumerate(sets) if len(one)), 0) for sets in self.wrong]
        return self.places.gather(1, torch.tensor(steps, device=self.places.device)[:, None])[:, 0]

    @property
    def counts(self) -> Tensor:
        """[batch, n] bool: which places an example has."""
        numbers = torch.tensor([len(one) for one in self.right], device=self.places.device)
        return torch.arange(self.places.shape[1], device=self.places.device) < numbers[:, None]

    def repeated(self, times: int) -> Scored:
        """Of a batch that is repeated, with its logits at the places alone."""
        n = self.places.shape[1]
        places = torch.arange(n, device=self.places.device).expand(times * len(self.right), n)
        return Scored(
            places, places[:, 0], list(self.right) * times, list(self.wrong) * times, list(self.whole) * times
        )


class TaskBatch(dict[str, Tensor]):
    """Model inputs as a dict, so that `model(**batch)` works, with the answers' token ids beside them.

    Attributes:
        answers: token ids of the right answers, one list per example; of answers of several tokens those where they
            part from the wrong ones.
        wrong: token ids of the wrong answers, one list per example.
        scored: where it is measured, if not at the last token of each prompt alone.
        start: index in the task of the first example.
        continued: whether the answers are what comes after the last token, as in tasks of text.
    """

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        *,
        answers: Sequence[Sequence[int]],
        wrong: Sequence[Sequence[int]],
        start: int = 0,
        continued: bool = False,
        scored: Scored | None = None,
    ) -> None:
        super().__init__(inputs)
        self.answers, self.wrong, self.start, self.continued = answers, wrong, start, continued
        self.scored = scored

    def to(self, device: str | torch.device) -> TaskBatch:
        """The same batch with its tensors on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.items()}
        scored = self.scored
        if scored is not None:
            scored = replace(scored, places=scored.places.to(device), ends=scored.ends.to(device))
        return TaskBatch(
            moved, answers=self.answers, wrong=self.wrong, start=self.start, continued=self.continued, scored=scored
        )


@dataclass(frozen=True)
class ScoredLogits:
    """Logits [batch, n, vocab] at the places of a task's batch, what is right and wrong there, and which count."""

    logits: Tensor
    right: Sequence[Sets]
    wrong: Sequence[Sets]
    counts: Tensor

    def total(self, values: Tensor) -> Tensor:
        """[batch]: the sum of values [batch, n] over the places that count."""
        return values.masked_fill(~self.counts, 0.0).sum(-1) if self.counts.shape[1] > 1 else values[:, 0]

    def mean(self, values: Tensor) -> Tensor:
        """[batch]: the mean of values [batch, n] over the places that count."""
        return self.total(values) / self.counts.sum(-1)


def scored_logits(output: Any, batch: TaskBatch) -> ScoredLogits:
    """Where a task's batch is measured: at its scored places, or at each prompt's last token.

    Args:
        output: what the model returned, or its logits [batch, position, vocab].

    Raises:
        TaskError: as `last_logits`.
    """
    if batch.scored is None:
        logits = last_logits(output, batch)[:, None]
        always = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        return ScoredLogits(logits, [[one] for one in batch.answers], [[one] for one in batch.wrong], always)
    _check_continues(output, batch)
    scored, logits = batch.scored, logits_of(output)
    places = scored.places.to(logits.device)
    rows = torch.arange(len(places), device=logits.device)[:, None]
    return ScoredLogits(logits[rows, places], scored.right, scored.wrong, scored.counts.to(logits.device))


def check_whole(batch: TaskBatch) -> None:
    """Refuse a batch in which some right answer is not there as a whole, so that it has no probability.

    Raises:
        TaskError: the example is named.
    """
    for i, whole in enumerate(() if batch.scored is None else batch.scored.whole):
        if not whole:
            raise TaskError(
                f"the right answers of example {batch.start + i} part before their last token, and only one of them "
                "can be tried in a forward: together they have no probability here",
                hint='"logit_diff" compares what right and wrong answers begin with; or give one right answer',
            )


def last_logits(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """Logits at each prompt's last token: [batch, vocab].

    Args:
        output: what the model returned, or its logits [batch, position, vocab].
        batch: the inputs; without an attention mask every row is taken to be full.

    Raises:
        TaskError: a model that predicts tokens in their place, and a task whose answers come after the prompt.
    """
    logits = logits_of(output)
    _check_continues(output, batch)
    if batch.get(_names(batch)[1]) is None:
        return logits[:, -1]
    last = last_places(batch).to(logits.device)
    return logits[torch.arange(len(last), device=logits.device), last]


def _check_continues(output: Any, batch: Mapping[str, Any]) -> None:
    if reads_in_place(output) and getattr(batch, "continued", False):
        raise TaskError(
            f"{type(output).__name__}: this model predicts the tokens it is given, not the one after a prompt",
            hint="give batches with [MASK] in input_ids, and labels that hold the answer there and -100 elsewhere",
        )


def last_places(batch: Mapping[str, Any]) -> Tensor:
    """Position of each prompt's last token, [batch]; of a batch without a mask one number for all, [1].

    Of an encoder-decoder it is the last token that the decoder is given.

    >>> last_places({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])})
    tensor([1, 2])
    """
    ids, mask_name = _names(batch)
    mask = batch.get(mask_name)
    if mask is None:
        return torch.tensor([batch[ids].shape[1] - 1])
    places = torch.arange(mask.shape[1], device=mask.device)
    return (mask.to(places.dtype) * places).argmax(dim=1)


def answer_places(batch: Any) -> Tensor | None:
    """Where a task's batch is measured; None for other batches, of which all places count."""
    if not isinstance(batch, TaskBatch):
        return None
    return last_places(batch) if batch.scored is None else batch.scored.places


def _names(batch: Mapping[str, Any]) -> tuple[str, str]:
    """What the ids whose logits the model gives, and their mask, are called."""
    prefix = "decoder_" if batch.get("decoder_input_ids") is not None else ""
    return f"{prefix}input_ids", f"{prefix}attention_mask"
