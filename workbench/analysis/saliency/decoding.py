"""What a model writes: an encoder-decoder for encoder outputs, a decoder behind its prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from workbench.analysis.saliency.encoder_decoder import EncoderDecoderInput, encoded
from workbench.errors import WorkbenchError
from workbench.inputs import context_length

_CONTINUED = 20
"""Tokens that a decoder without an encoder writes if nothing else is said."""


def decode(
    subject: EncoderDecoderInput,
    states: Tensor,
    *,
    max_new_tokens: int | None = None,
    num_beams: int = 1,
    no_repeat_ngram_size: int = 0,
) -> list[Tensor]:
    """Hypotheses (ids behind the prompt, the end token with them) for encoder outputs [batch, position, d_model].

    Greedy by default; SPES decodes with 5 beams and no repeated 5-grams.
    """
    from transformers import GenerationMixin

    model = subject.model
    ends = _ends(model)
    config = getattr(model, "config", None)
    room = min(max_new_tokens or 128, _decoder_limit(config) - len(subject.prompt))
    generation = _generation(
        model, ends, len(subject.prompt) + room, num_beams=num_beams, no_repeat_ngram_size=no_repeat_ngram_size,
        decoder_start_token_id=int(subject.prompt[0]),
    )  # fmt: skip
    rest = {name: value.expand(len(states), *value.shape[1:]) for name, value in subject.rest.items()}
    ids = subject.prompt[None].expand(len(states), -1)
    # Models with a generate of their own (Whisper's cuts audio into windows) want the input; here there is none.
    generate: Any = GenerationMixin.generate
    given = {"decoder_input_ids": ids, "generation_config": generation, **rest}
    found: Tensor = generate(model, encoder_outputs=encoded(states), **given)
    return [_ended(row, ends) for row in found[:, len(subject.prompt) :]]


def continuation(
    model: nn.Module,
    prompt: Tensor,
    *,
    max_new_tokens: int | None = None,
    num_beams: int = 1,
    no_repeat_ngram_size: int = 0,
) -> Tensor:
    """What a decoder writes behind its prompt [n], the end token with it: greedily, 20 tokens, unless told otherwise.

    Raises:
        WorkbenchError: the model cannot generate, or the prompt fills its context.
    """
    generate: Any = getattr(model, "generate", None)
    if generate is None:
        raise WorkbenchError(f"{type(model).__name__} cannot generate", hint="pass the continuation as hypothesis=")
    limit, room = context_length(model), max_new_tokens or _CONTINUED
    if limit is not None:
        room = min(room, limit - len(prompt))
    if room < 1:
        raise WorkbenchError(
            f"the prompt of {len(prompt)} tokens fills the model's context: nothing can be written behind it",
            hint="shorten it, or explain a part of it as hypothesis=",
        )
    ends = _ends(model)
    generation = _generation(
        model, ends, len(prompt) + room, num_beams=num_beams, no_repeat_ngram_size=no_repeat_ngram_size
    )
    ids = prompt[None]
    found: Tensor = generate(ids, attention_mask=torch.ones_like(ids), generation_config=generation)
    return _ended(found[0, len(prompt) :], ends)


def _generation(model: nn.Module, ends: list[int], longest: int, **options: Any) -> Any:
    """How to write, up to `longest` tokens with the prompt; max_new_tokens would warn of the model's own max_length."""
    from transformers import GenerationConfig

    pad = _pad(model, ends)
    return GenerationConfig(
        max_length=longest, do_sample=False, eos_token_id=ends or None, pad_token_id=pad, use_cache=True, **options
    )


def _ended(row: Tensor, ends: list[int]) -> Tensor:
    """Ids up to the first end token."""
    stop = next((i + 1 for i, token in enumerate(row.tolist()) if token in ends), len(row))
    return row[:stop]


def _ends(model: nn.Module) -> list[int]:
    for owner in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        value = getattr(owner, "eos_token_id", None)
        if value is not None:
            return [int(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    return []


def _pad(model: nn.Module, ends: list[int]) -> int:
    for owner in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        value = getattr(owner, "pad_token_id", None)
        if value is not None:
            return int(value)
    return ends[0] if ends else 0


def _decoder_limit(config: Any) -> int:
    owners = (config, getattr(config, "decoder", None))
    names = ("max_target_positions", "max_position_embeddings", "n_positions")
    found = [getattr(o, n) for o in owners for n in names if isinstance(getattr(o, n, None), int)]
    return min(found) if found else 512
