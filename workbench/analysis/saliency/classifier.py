"""An input of a model with a classification head: a text or an image, and a class that it is put into."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.analysis.saliency.explained_input import (
    ExplainedInput,
    check_embeddings,
    check_finite,
    embedded,
    normalised_logits,
)
from workbench.analysis.saliency.main_input import extent_of, main_input
from workbench.errors import WorkbenchError
from workbench.inputs import device_for_inputs


@dataclass
class ClassifiedInput(ExplainedInput):
    """An input and the class that is explained: outputs are one, the vocabulary is that of the classes."""

    def log_probs(self, main: Tensor, decoder: Tensor | None = None) -> Tensor:
        """[batch, 1, class] from inputs like `main`."""
        return normalised_logits(self.model(**self.given(main)).logits)[:, None]

    def own_texts(self, ids: Tensor, tokenizer: Any) -> tuple[str, ...]:
        """Names of the classes."""
        names = getattr(getattr(self.model, "config", None), "id2label", None) or {}
        return tuple(str(names.get(int(i), f"class {int(i)}")) for i in ids)

    def special(self, tokenizer: Any) -> tuple[bool, ...]:
        """A class is no token."""
        return (False,)


def read_classifier(
    model: nn.Module, given: Mapping[str, Any], hypothesis: Tensor | None, decoding: Mapping[str, Any]
) -> ClassifiedInput | None:
    """An input with the class to explain, the likeliest if none is given; None for a model without classes.

    Raises:
        WorkbenchError: a head that gives numbers instead of classes, a class that there is not, or several.
    """
    name, kind, main = main_input(given)
    device, dtype = device_for_inputs(model), next(model.parameters()).dtype
    rest: dict[str, Tensor] = {}
    takes = inspect.signature(model.forward).parameters
    for other in ("attention_mask", "token_type_ids"):
        if kind == "tokens" and given.get(other) is not None and other in takes:
            rest[other] = torch.as_tensor(given[other]).to(device).view(1, -1)
    main = main.to(device) if kind == "tokens" else main.to(device, dtype)
    with torch.no_grad():
        logits = getattr(model(**{name: main}, **rest), "logits", None) if _classifies(model) else None
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        return None
    if decoding:
        raise WorkbenchError("a model that classifies writes nothing", hint="leave out decoding=")
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if logits.shape[1] < 2 or problem in ("regression", "multi_label_classification"):
        raise WorkbenchError(
            f"{type(model).__name__} gives {problem or 'one number'}, not probabilities of classes that exclude each "
            "other",
            shape=logits.shape,
        )
    targets = logits.argmax(1) if hypothesis is None else hypothesis.to(logits.device)
    if len(targets) != 1 or not 0 <= int(targets[0]) < logits.shape[1]:
        raise WorkbenchError(
            f"the hypothesis of a model that classifies is one class of 0 to {logits.shape[1] - 1}, not "
            f"{targets.tolist()[:5]}"
        )
    extent = extent_of(None, rest.get("attention_mask"), main.shape[1]) if kind == "tokens" else main.shape[2]
    subject = ClassifiedInput(model, name, kind, main, rest, extent=extent, targets=targets)
    with torch.no_grad():
        if kind == "tokens":
            subject.ids = main[0]
            subject.main = embedded(subject.embedding(), main)
        subject.reference = check_finite(subject.log_probs(subject.main)[0])
    if kind == "tokens":
        check_embeddings(normalised_logits(logits), subject.reference, "such a model is not explained")
    return subject


def _classifies(model: nn.Module) -> bool:
    """Whether the model's configuration tells of classes and it does not write: others need not run for this."""
    can_write = getattr(model, "can_generate", None)
    return not (can_write is not None and can_write())
