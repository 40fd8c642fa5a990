"""A model's logits, and which of them are compared with what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.errors import TaskError, WorkbenchError

_IGNORED = -100  # a label that does not count, as in PyTorch's cross-entropy
_IN_PLACE = ("MaskedLM", "TokenClassifier")  # outputs of transformers whose logits are of the token at their own place
_MASKED = "this model predicts tokens in their place: put the masked tokens into labels, and -100 elsewhere"


def logits_of(output: Any) -> Tensor:
    """A model's logits, in float32 at least.

    Raises:
        WorkbenchError: it gives none.
    """
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if not isinstance(found, Tensor) or found.dim() not in (2, 3):
        raise WorkbenchError(
            f"{type(output).__name__} has no logits [batch, class] or [batch, position, class]",
            shape=getattr(found, "shape", None),
            hint="give a metric of your own: metric(output, batch) -> [batch]",
        )
    return found if found.dtype == torch.float64 else found.float()


@dataclass
class Readout:
    """Logits [batch, place, class], and which places count [batch or 1, place or 1], with their targets where known."""

    logits: Tensor
    counts: Tensor
    targets: Tensor | None = None
    hint: str = "put labels into the batches, use those of task.batches(tokenizer), or give a metric of your own"

    def mean(self, values: Tensor) -> Tensor:
        """[batch]: the mean over the places that count.

        Raises:
            TaskError: of an example none counts.
        """
        counts = self.counts.expand(values.shape)
        number = counts.sum(-1)
        if not bool(number.all()):
            example = int((number == 0).nonzero()[0])
            raise TaskError(
                f"example {example} has no place to measure at: no token follows another, or no label counts",
                hint=self.hint,
            )
        return values.masked_fill(~counts, 0.0).sum(-1) / number

    def target(self) -> Tensor:
        """Targets [batch, place, 1], with 0 where none counts.

        Raises:
            TaskError: they are not known.
        """
        if self.targets is None:
            raise TaskError("what the right class is cannot be told from the batch", hint=self.hint)
        return self.targets.clamp_min(0)[..., None]


def reads_in_place(output: Any) -> bool:
    """Whether logits are of the token at their own place, as masked language models give them, and not of the next."""
    return any(word in type(output).__name__ for word in _IN_PLACE)


def readout(output: Any, batch: Mapping[str, Any]) -> Readout:
    """Where the model says its classes, as the losses of transformers' models have it.

    Labels [batch] are classes. Labels [batch, position] are tokens: of masked language models, token classifiers and
    encoder-decoders at their own place, of other outputs of the next position where they repeat the input. Without
    labels the next tokens of the input are the targets; masked language models, which see these, then have none.
    """
    logits = logits_of(output)
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if logits.dim() == 2:
        targets = labels[:, None] if isinstance(labels, Tensor) and labels.dim() == 1 else None
        always = torch.ones(1, 1, dtype=torch.bool, device=logits.device)
        return Readout(logits[:, None], always if targets is None else targets != _IGNORED, targets)
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    if "decoder_input_ids" in batch:
        mask = batch.get("decoder_attention_mask")
    decodes = getattr(output, "encoder_last_hidden_state", None) is not None
    in_place = reads_in_place(output)
    if isinstance(labels, Tensor) and labels.shape == logits.shape[:2]:
        counted = labels != _IGNORED
        repeats = isinstance(ids, Tensor) and ids.shape == labels.shape and bool(((ids == labels) | ~counted).all())
        if in_place or decodes or not repeats:
            return Readout(logits, counted, labels)
        return Readout(logits[:, :-1], counted[:, 1:], labels[:, 1:])
    if isinstance(ids, Tensor) and ids.shape == logits.shape[:2]:
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if in_place:
            return Readout(logits, real, hint=_MASKED)
        return Readout(logits[:, :-1], real[:, 1:] & real[:, :-1], ids[:, 1:])
    return Readout(logits, torch.ones(1, 1, dtype=torch.bool, device=logits.device))
