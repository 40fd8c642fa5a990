"""Metrics against the unedited model: how far an edit moves the distribution over classes, or the hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.metrics.answers import TaskBatch, scored_logits
from workbench.metrics.logits import Readout, readout
from workbench.metrics.metric import Metric


def kl_divergence(output: Any, batch: Mapping[str, Any], clean: Any) -> Tensor:
    """KL(clean ‖ edited) of the distributions over classes, in nats: [batch].

    Of a task's batch where it is measured, of other batches the mean over their tokens.

    Args:
        clean: what the unedited model gave for the batch.

    >>> a = torch.tensor([[[0.0, 1.0]]])
    >>> kl_divergence(a, {}, a)
    tensor([0.])
    """
    return _compared(kullback_leibler, output, batch, clean)


def js_divergence(output: Any, batch: Mapping[str, Any], clean: Any) -> Tensor:
    """Jensen-Shannon divergence from the unedited model's classes, in nats, 0 to ln 2: [batch].

    Of a task's batch where it is measured, of other batches the mean over their tokens.
    """
    return _compared(jensen_shannon, output, batch, clean)


def _compared(divergence: Callable[[Tensor, Tensor], Tensor], output: Any, batch: Any, clean: Any) -> Tensor:
    if isinstance(batch, TaskBatch):
        now, then = scored_logits(output, batch), scored_logits(clean, batch)
        return now.mean(divergence(now.logits, then.logits))
    read, before = readout(output, batch), readout(clean, batch)
    # One example at a time: in double precision, which small divergences need, all would take much memory.
    return read.mean(torch.stack([divergence(a, b) for a, b in zip(read.logits, before.logits, strict=True)]))


def kullback_leibler(edited: Tensor, clean: Tensor) -> Tensor:
    """KL(clean ‖ edited) of the softmax of two tensors of logits [..., class], in nats: [...].

    >>> kullback_leibler(torch.tensor([0.0, 0.0]), torch.tensor([0.0, -1e9]))  # ln 2
    tensor(0.6931)
    """
    log_q, log_p = edited.double().log_softmax(-1), clean.double().log_softmax(-1)
    found = torch.where(log_p.exp() > 0, log_p.exp() * (log_p - log_q), 0.0).sum(-1)
    return found.to(edited.dtype)


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """½ KL(p ‖ m) + ½ KL(q ‖ m) with m = (p + q) / 2 of the softmax of logits [..., class], in nats: [...].

    >>> float(jensen_shannon(torch.tensor([0.0, -1e9]), torch.tensor([-1e9, 0.0])))  # ln 2
    0.693147...
    """
    log_p, log_q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    terms = [torch.where(log.exp() > 0, log.exp() * (log - log_m), 0.0) for log in (log_p, log_q)]
    return (0.5 * (terms[0] + terms[1]).sum(-1)).clamp_min(0.0)


def representation(position: int | None = None) -> Metric:
    """1 − cosine of the last hidden state and that of the unedited model; 0 for no change, 2 for the opposite.

    Args:
        position: at one token, such as 0 for CLS; None for the mean over the tokens that `attention_mask` calls real.
    """

    def change(output: Any, batch: Mapping[str, Any], clean: Any) -> Tensor:
        now, before = (_last_hidden(given).double() for given in (output, clean))
        off = 1 - torch.nn.functional.cosine_similarity(now, before, dim=-1)  # [batch, position], or [batch]
        if off.dim() == 1:
            return off
        if position is not None:
            return off[:, position]
        mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
        fits = isinstance(mask, Tensor) and mask.shape == off.shape
        return Readout(off, mask.bool() if fits and mask is not None else torch.ones_like(off).bool()).mean(off)

    change.__qualname__ = f"representation({position})"
    return Metric("representation", change, higher_is_better=False, against_clean=True, from_logits=False)


def _last_hidden(output: Any) -> Tensor:
    """[batch, position, d_model], or [batch, d_model]."""
    states = None
    for name in ("last_hidden_state", "decoder_hidden_states", "hidden_states"):
        states = getattr(output, name, None)
        if states is not None:
            break
    found = states[-1] if isinstance(states, (tuple, list)) and states else states
    if not isinstance(found, Tensor) or found.dim() not in (2, 3):
        raise WorkbenchError(
            f"{type(output).__name__} holds no last hidden state",
            hint='put "output_hidden_states": True into the batches',
        )
    return found
