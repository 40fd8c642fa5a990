"""An input of a decoder without an encoder: a prompt and its continuation, every token of which sees all before it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.analysis.saliency.decoding import continuation
from workbench.analysis.saliency.explained_input import (
    ExplainedInput,
    check_embeddings,
    check_finite,
    embedded,
    embedding_of,
    normalised_logits,
)
from workbench.analysis.saliency.main_input import main_input
from workbench.analysis.saliency.token_names import check_vocabulary
from workbench.errors import WorkbenchError
from workbench.inputs import context_length, device_for_inputs

_LOOKED_AT = 8  # positions at least that are looked at for what a later token changes
_ROUNDINGS = 16  # of the largest logit, by which logits may move when a later token changes


@dataclass
class DecoderInput(ExplainedInput):
    """A prompt and the tokens behind it, which are explained.

    `main` holds the embeddings of the prompt and of all these tokens but the last: output k, which position
    len(prompt) + k − 1 predicts, depends on the len(prompt) + k positions up to that one.
    """

    @property
    def visible(self) -> tuple[int, ...]:
        """[output token] how many positions stand before it."""
        return tuple(len(self.prompt) + k for k in range(len(self.targets)))

    def log_probs(self, main: Tensor, decoder: Tensor | None = None) -> Tensor:
        """[batch, output token, vocabulary] from embeddings like `main`."""
        logits = self.model(**self.given(main), **_extra(self.model, len(self.targets))).logits
        return normalised_logits(logits[:, -len(self.targets) :])


def read_decoder(
    model: nn.Module, given: Mapping[str, Any], hypothesis: Tensor | None, decoding: Mapping[str, Any]
) -> DecoderInput:
    """A prompt with its continuation, which the model writes unless it is given.

    Padding on either side is left out, so that it changes nothing. Whether the prompt begins with a special token is
    its own affair: none is put before it.

    Raises:
        WorkbenchError: no tokens, a mask with holes, inputs that are not understood, ids outside the vocabulary, more
            tokens than the context holds, or a model whose tokens see later ones.
    """
    name, kind, ids = main_input(given)
    if kind != "tokens":
        raise WorkbenchError(f"{type(model).__name__} gives neither classes nor tokens that follow from {name}")
    odd = [other for other in given if other not in (name, "attention_mask", "token_type_ids")]
    if odd:
        raise WorkbenchError(
            f"{', '.join(odd)} cannot be explained along with a prompt",
            hint="pass input_ids and attention_mask; the continuation is hypothesis=",
        )
    device = device_for_inputs(model)
    prompt = _unpadded(ids[0], given.get("attention_mask")).to(device)
    vocabulary = _vocabulary(model)
    check_vocabulary("the prompt", prompt, vocabulary)
    subject = DecoderInput(model, name, kind, prompt[None], {}, prompt=prompt)
    with torch.no_grad():
        targets = continuation(model, prompt, **decoding) if hypothesis is None else hypothesis
        subject.targets = targets.to(device)
        if not len(subject.targets):
            raise WorkbenchError("there is no continuation to explain", hint="pass hypothesis= of one token at least")
        check_vocabulary("the hypothesis", subject.targets, vocabulary)
        subject.ids = torch.cat([prompt, subject.targets[:-1]])
        subject.extent = len(subject.ids)
        limit = context_length(model)
        if limit is not None and subject.extent > limit:
            raise WorkbenchError(
                f"prompt and hypothesis need {subject.extent} positions, the model's context has {limit}",
                hint="shorten one of them",
            )
        subject.main = embedded(subject.embedding(), subject.ids[None])
        subject.rest = {"attention_mask": torch.ones_like(subject.ids[None])}
        subject.reference = _said_causally(subject)
        direct = model(input_ids=subject.ids[None], **subject.rest, **_extra(model, len(subject.targets))).logits
        direct = normalised_logits(direct[:, -len(subject.targets) :])
        check_embeddings(direct[0], subject.reference, "such a model is not explained")
    return subject


def _vocabulary(model: nn.Module) -> int:
    size = getattr(embedding_of(model), "num_embeddings", None)
    if not isinstance(size, int):
        raise WorkbenchError(f"no table of token embeddings was found in {type(model).__name__}")
    return size


def _unpadded(ids: Tensor, mask: Any) -> Tensor:
    """Ids that are no padding; they must stand together."""
    if mask is None:
        return ids
    kept = torch.as_tensor(mask).flatten().bool().to(ids.device)
    if len(kept) != len(ids):
        raise WorkbenchError(f"the attention_mask has {len(kept)} positions, the prompt {len(ids)}")
    found = kept.nonzero()[:, 0]
    if not len(found):
        raise WorkbenchError("the prompt is empty: its attention_mask hides every token")
    if len(found) != int(found[-1] - found[0]) + 1:
        raise WorkbenchError(
            "the attention_mask hides tokens between others", hint="padding stands before or behind a prompt"
        )
    return ids[kept]


def _extra(model: nn.Module, last: int | None) -> dict[str, Any]:
    """Arguments that keep a model from collecting keys and values, and from giving logits that nobody wants."""
    takes = inspect.signature(model.forward).parameters
    found: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    return found | ({"logits_to_keep": last} if last is not None and "logits_to_keep" in takes else {})


def _said_causally(subject: DecoderInput) -> Tensor:
    """[output token, vocabulary] of the unperturbed model.

    Raises:
        WorkbenchError: it gives no logits, or what it says at a position changes with a later one.
    """
    other = subject.main.clone()
    other[:, -1] = 0
    last = min(max(len(subject.targets), _LOOKED_AT), subject.extent)
    own, changed = (
        subject.model(**subject.given(main), **_extra(subject.model, last)) for main in (subject.main, other)
    )
    logits = getattr(own, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise WorkbenchError(
            f"{type(subject.model).__name__} gives no logits [batch, position, vocabulary] of tokens that follow",
            hint="saliency explains decoders, encoder-decoders, and models with a classification head",
        )
    check_finite(logits)
    before, after = (output.logits[:, :-1].double() for output in (own, changed))
    rounding = _ROUNDINGS * torch.finfo(logits.dtype).eps * float(before.abs().max()) if before.numel() else 0.0
    if before.numel() and not float((before - after).abs().max()) <= rounding:
        raise WorkbenchError(
            f"{type(subject.model).__name__} is no decoder: what it says at a token changes with later ones",
            hint="of encoders, saliency explains those with a classification head",
        )
    return normalised_logits(logits[:, -len(subject.targets) :])[0]
