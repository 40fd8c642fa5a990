"""Metrics of the right answer: loss, probability, accuracy and the logit difference.

Of a task's batch the answer is measured where it is predicted: at each prompt's last token and, where it has several
tokens, at those before each of them (`workbench.metrics.Scored`). Of other batches it is the right class or, as a
mean, the right tokens: those that `labels` name, or those that follow in the input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.metrics.answers import Sets, TaskBatch, check_whole, scored_logits
from workbench.metrics.logits import readout


def logit_diff(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """Logit of the right answer minus that of the wrong one: [batch], natural-log units.

    For sets of answers the log-sum-exp of each set's logits is compared, which is the log of the ratio of their
    probabilities and the plain difference where both sets have one member. Answers of several tokens are compared where
    they part from the wrong ones, behind what both begin with. Of other batches than a task's, the logit of
    the right class minus the largest other one.

    Several right answers of several tokens that differ early count by what they begin with, where all of them part from
    the wrong ones.

    Raises:
        TaskError: the right class cannot be told from the batch.

    >>> batch = TaskBatch({}, answers=[[2]], wrong=[[0]])
    >>> logit_diff(torch.tensor([[[1.0, 0.0, 4.0]]]), batch)
    tensor([3.])
    """
    if isinstance(batch, TaskBatch):
        found = scored_logits(output, batch)
        difference = _log_sum(found.logits, found.right) - _log_sum(found.logits, found.wrong)
        return found.total(difference.masked_fill(~_some(found.wrong, difference), 0.0))
    read = readout(output, batch)
    right = read.logits.gather(-1, read.target())[..., 0]
    others = read.logits.scatter(-1, read.target(), -torch.inf).amax(-1)
    return read.mean(right - others)


def loss(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of the right answer, of all of them where there are several, in nats: [batch].

    Of an answer of several tokens the sum over them, each behind those before it.

    Raises:
        TaskError: the right class cannot be told from the batch, or right answers part before their last token.
    """
    if isinstance(batch, TaskBatch):
        return -_log_probability(output, batch)
    read = readout(output, batch)
    return read.mean(-read.logits.log_softmax(-1).gather(-1, read.target())[..., 0])


def probability(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """Probability of the right answer, of all of them where there are several: [batch].

    Of an answer of several tokens the product.

    Raises:
        TaskError: the right class cannot be told from the batch, or right answers part before their last token.

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

    Of an answer of several tokens 1 where each of them is the most likely one behind those before it.

    Raises:
        TaskError: the right class cannot be told from the batch.
    """
    if isinstance(batch, TaskBatch):
        check_whole(batch)
        found = scored_logits(output, batch)
        best = found.logits.argmax(-1).tolist()
        right = [
            all(a in b for a, b in zip(row, sets, strict=False)) for row, sets in zip(best, found.right, strict=True)
        ]
        return torch.tensor([float(one) for one in right])
    read = readout(output, batch)
    return read.mean((read.logits.argmax(-1, keepdim=True) == read.target())[..., 0].to(read.logits.dtype))


def _log_probability(output: Any, batch: TaskBatch) -> Tensor:
    check_whole(batch)
    found = scored_logits(output, batch)
    return found.total(_log_sum(found.logits, found.right) - found.logits.logsumexp(-1))


def _some(sets: Sequence[Sets], like: Tensor) -> Tensor:
    """[batch, n] bool: where there is a token."""
    n = like.shape[1]
    return torch.tensor([[i < len(one) and len(one[i]) > 0 for i in range(n)] for one in sets], device=like.device)


def _log_sum(logits: Tensor, sets: Sequence[Sets]) -> Tensor:
    """[batch, n] log-sum-exp of the logits [batch, n, vocab] of a set of tokens for each place; 0 where it is empty."""
    n = logits.shape[1]
    flat = [list(one[i]) if i < len(one) else [] for one in sets for i in range(n)]
    widest = max(1, *map(len, flat))
    filled = [one or [0] for one in flat]
    index = torch.tensor([[*one, *[one[0]] * (widest - len(one))] for one in filled], device=logits.device)
    real = torch.tensor([[i < len(one) for i in range(widest)] for one in filled], device=logits.device)
    chosen = logits.flatten(0, 1).gather(1, index)
    found = chosen[:, 0] if widest == 1 else chosen.masked_fill(~real, -torch.inf).logsumexp(1)
    found = found.view(logits.shape[:2])
    return found.masked_fill(~_some(sets, found), 0.0)
