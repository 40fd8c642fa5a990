"""Metrics that a task's batches are measured with: one number per example, as the analyses expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from workbench.errors import TaskError


class TaskBatch(dict[str, torch.Tensor]):
    """Model inputs as a dict, so that `model(**batch)` works, with the answers' token ids beside them.

    Attributes:
        answers: token ids of the right answers, one list per example.
        wrong: token ids of the wrong answers, one list per example.
        start: index in the task of the first example.
    """

    def __init__(
        self,
        inputs: Mapping[str, torch.Tensor],
        *,
        answers: Sequence[Sequence[int]],
        wrong: Sequence[Sequence[int]],
        start: int = 0,
    ) -> None:
        super().__init__(inputs)
        self.answers, self.wrong, self.start = answers, wrong, start

    def to(self, device: str | torch.device) -> TaskBatch:
        """The same batch with its tensors on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.items()}
        return TaskBatch(moved, answers=self.answers, wrong=self.wrong, start=self.start)


def last_logits(output: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits at each prompt's last token: [batch, vocab].

    Args:
        output: what the model returned, or its logits [batch, position, vocab].
        batch: the inputs; without an attention mask every row is taken to be full.
    """
    logits = output if isinstance(output, torch.Tensor) else output.logits
    if batch.get(_names(batch)[1]) is None:
        return logits[:, -1]
    last = last_places(batch).to(logits.device)
    return logits[torch.arange(len(last), device=logits.device), last]


def last_places(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
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


def _names(batch: Mapping[str, torch.Tensor]) -> tuple[str, str]:
    """What the ids whose logits the model gives, and their mask, are called."""
    prefix = "decoder_" if batch.get("decoder_input_ids") is not None else ""
    return f"{prefix}input_ids", f"{prefix}attention_mask"


def logit_diff(output: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logit of the right answer minus logit of the wrong one at the last token: [batch], natural-log units.

    For sets of answers the log-sum-exp of each set's logits is compared, which is the log of the ratio of their
    probabilities and the plain difference where both sets have one member.

    Raises:
        TaskError: the batch does not come from `Task.batches`, so it does not know its answers.

    >>> batch = TaskBatch({}, answers=[[2]], wrong=[[0]])
    >>> logit_diff(torch.tensor([[[1.0, 0.0, 4.0]]]), batch)
    tensor([3.])
    """
    known, logits = _with_answers(batch), last_logits(output, batch)
    return _log_sum(logits, known.answers) - _log_sum(logits, known.wrong)


def probability(output: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Probability of the right answer at the last token, of all of them where there are several: [batch].

    Raises:
        TaskError: the batch does not come from `Task.batches`, so it does not know its answers.

    >>> batch = TaskBatch({}, answers=[[1]], wrong=[[0]])
    >>> probability(torch.zeros(1, 1, 4), batch)
    tensor([0.2500])
    """
    known, logits = _with_answers(batch), last_logits(output, batch)
    return (_log_sum(logits, known.answers) - logits.logsumexp(-1)).exp()


def kl_divergence(output: Any, batch: Mapping[str, torch.Tensor], clean: Any) -> torch.Tensor:
    """KL(clean ‖ edited) of the next-token distributions at the last token, in nats: [batch].

    Args:
        clean: what the unedited model gave for the batch.

    >>> a = torch.tensor([[[0.0, 1.0]]])
    >>> kl_divergence(a, {}, a)
    tensor([0.])
    """
    edited, plain = (last_logits(one, batch).log_softmax(-1) for one in (output, clean))
    return (plain.exp() * (plain - edited)).sum(-1)


kl_divergence.against_clean = True  # type: ignore[attr-defined]


def normalised(value: Any, clean: Any, corrupted: Any) -> Any:
    """A metric on the scale where 0 is the corrupted and 1 the clean run.

    >>> normalised(3.0, clean=4.0, corrupted=0.0)
    0.75
    """
    return (value - corrupted) / (clean - corrupted)


def correct(output: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """1 where the most likely next token, over the full vocabulary, is a right answer, else 0: [batch].

    Raises:
        TaskError: the batch does not come from `Task.batches`, so it does not know its answers.
    """
    known, best = _with_answers(batch), last_logits(output, batch).argmax(-1).tolist()
    hits = [float(token in answers) for token, answers in zip(best, known.answers, strict=True)]
    return torch.tensor(hits)


def _log_sum(logits: torch.Tensor, sets: Sequence[Sequence[int]]) -> torch.Tensor:
    """[batch] log-sum-exp of the logits [batch, vocab] of a set of tokens for each example."""
    widest = max(map(len, sets))
    index = torch.tensor([[*one, *[one[0]] * (widest - len(one))] for one in sets], device=logits.device)
    real = torch.tensor([[i < len(one) for i in range(widest)] for one in sets], device=logits.device)
    chosen = logits.gather(1, index)
    return chosen[:, 0] if widest == 1 else chosen.masked_fill(~real, -torch.inf).logsumexp(1)


def _with_answers(batch: Mapping[str, torch.Tensor]) -> TaskBatch:
    if not isinstance(batch, TaskBatch):
        raise TaskError(
            f"the metric needs a batch that knows its answers, not a {type(batch).__name__}",
            hint="use the batches of task.batches(tokenizer), and batch.to(device) to move them",
        )
    return batch


for _metric in (logit_diff, probability, kl_divergence, correct):
    setattr(_metric, "reads", last_places)  # noqa: B010
