"""A task's batches, which know their answers, and the last tokens, where tasks are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.errors import TaskError
from workbench.metrics.logits import logits_of, reads_in_place


class TaskBatch(dict[str, Tensor]):
    """Model inputs as a dict, so that `model(**batch)` works, with the answers' token ids beside them.

    Attributes:
        answers: token ids of the right answers, one list per example.
        wrong: token ids of the wrong answers, one list per example.
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
    ) -> None:
        super().__init__(inputs)
        self.answers, self.wrong, self.start, self.continued = answers, wrong, start, continued

    def to(self, device: str | torch.device) -> TaskBatch:
        """The same batch with its tensors on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.items()}
        return TaskBatch(moved, answers=self.answers, wrong=self.wrong, start=self.start, continued=self.continued)


def last_logits(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """Logits at each prompt's last token: [batch, vocab].

    Args:
        output: what the model returned, or its logits [batch, position, vocab].
        batch: the inputs; without an attention mask every row is taken to be full.

    Raises:
        TaskError: a model that predicts tokens in their place, and a task whose answers come after the prompt.
    """
    logits = logits_of(output)
    if reads_in_place(output) and getattr(batch, "continued", False):
        raise TaskError(
            f"{type(output).__name__}: this model predicts the tokens it is given, not the one after a prompt",
            hint="give batches with [MASK] in input_ids, and labels that hold the answer there and -100 elsewhere",
        )
    if batch.get(_names(batch)[1]) is None:
        return logits[:, -1]
    last = last_places(batch).to(logits.device)
    return logits[torch.arange(len(last), device=logits.device), last]


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
    return last_places(batch) if isinstance(batch, TaskBatch) else None


def _names(batch: Mapping[str, Any]) -> tuple[str, str]:
    """What the ids whose logits the model gives, and their mask, are called."""
    prefix = "decoder_" if batch.get("decoder_input_ids") is not None else ""
    return f"{prefix}input_ids", f"{prefix}attention_mask"
