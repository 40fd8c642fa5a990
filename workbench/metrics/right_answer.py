"""Metrics of the right answer: loss, probability, accuracy and the logit difference.

Of a task's batch the answer at each prompt's last token is measured. Of other batches it is the right class or, as a
mean, the right tokens: those that `labels` name, or those that follow in the input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.metrics.answers import TaskBatch, last_logits
from workbench.metrics.logits import readout


def logit_diff(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """Logit of the right answer minus that of the wrong one: [batch], natural-log units.

    For sets of answers the log-sum-exp of each set's logits is compared, which is the log of the ratio of their
    probabilities and the plain difference where both sets have one member. Of other batches than a task's, the logit of
    the right class minus the largest other one.

    Raises:
        TaskError: the right class cannot be told from the batch.

    >>> batch = TaskBatch({}, answers=[[2]], wrong=[[0]])
    >>> logit_diff(torch.tensor([[[1.0, 0.0, 4.0]]]), batch)
    tensor([3.])
    """
    if isinstance(batch, TaskBatch):
        logits = last_logits(output, batch)
        return _log_sum(logits, batch.answers) - _log_sum(logits, batch.wrong)
    read = readout(output, batch)
    right = read.logits.gather(-1, read.target())[..., 0]
    others = read.logits.scatter(-1, read.target(), -torch.inf).amax(-1)
    return read.mean(right - others)


def loss(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of the right answer, of all of them where there are several, in nats: [batch].

    Raises:
        TaskError: the right class cannot be told from the batch.
    """
    if isinstance(batch, TaskBatch):
        return -_log_probability(output, batch)
    read = readout(output, batch)
    return read.mean(-read.logits.log_softmax(-1).gather(-1, read.target())[..., 0])


def probability(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """Probability of the right answer, of all of them where there are several: [batch].

    Raises:
        TaskError: the right class cannot be told from the batch.

    >>> batch = TaskBatch({}, answers=[[1]], wrong=[[0]])
    >>> probability(torch.zeros(1, 1, 4), batch)
    tensor([0.2500])
    """
    if isinstance(batch, TaskBatch):
        return _log_probability(output, batch).exp()
    read = readout(output, batch)
    return read.mean(read.logits.softmax(-1).gather(-1, read.target())[..., 0])


def accuracy(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """1 where the most likely class, over the full vocabulary, is a right one, else 0; of tokens, their mean: [batch].

    Raises:
        TaskError: the right class cannot be told from the batch.
    """
    if isinstance(batch, TaskBatch):
        logits = last_logits(output, batch)
        best = logits.argmax(-1).tolist()
        return torch.tensor([float(one in right) for one, right in zip(best, batch.answers, strict=True)])
    read = readout(output, batch)
    return read.mean((read.logits.argmax(-1, keepdim=True) == read.target())[..., 0].to(read.logits.dtype))


def _log_probability(output: Any, batch: TaskBatch) -> Tensor:
    logits = last_logits(output, batch)
    return _log_sum(logits, batch.answers) - logits.logsumexp(-1)


def _log_sum(logits: Tensor, sets: Sequence[Sequence[int]]) -> Tensor:
    """[batch] log-sum-exp of the logits [batch, vocab] of a set of tokens for each example."""
    widest = max(map(len, sets))
    index = torch.tensor([[*one, *[one[0]] * (widest - len(one))] for one in sets], device=logits.device)
    real = torch.tensor([[i < len(one) for i in range(widest)] for one in sets], device=logits.device)
    chosen = logits.gather(1, index)
    return chosen[:, 0] if widest == 1 else chosen.masked_fill(~real, -torch.inf).logsumexp(1)
