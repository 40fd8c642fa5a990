"""What an encoder-decoder writes for encoder outputs, and the texts of its tokens."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from workbench.analysis.saliency.explained_input import ExplainedInput, encoded
from workbench.tokens import piece

_MARKER = re.compile(r"<\|[^|\s]+\|>")


def decode(
    subject: ExplainedInput,
    states: Tensor,
    *,
    max_new_tokens: int | None = None,
    num_beams: int = 1,
    no_repeat_ngram_size: int = 0,
) -> list[Tensor]:
    """Hypotheses (ids behind the prompt, the end token with them) for encoder outputs [batch, position, d_model].

    Greedy by default; SPES decodes with 5 beams and no repeated 5-grams.
    """
    from transformers import GenerationConfig, GenerationMixin

    model = subject.model
    ends = _ends(model)
    config = getattr(model, "config", None)
    room = min(max_new_tokens or 128, _decoder_limit(config) - len(subject.prompt))
    generation = GenerationConfig(
        max_length=len(subject.prompt) + room,  # max_new_tokens would warn of the model's own max_length
        num_beams=num_beams,
        no_repeat_ngram_size=no_repeat_ngram_size,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=_pad(model, ends),
        decoder_start_token_id=int(subject.prompt[0]),
        use_cache=True,
    )
    rest = {name: value.expand(len(states), *value.shape[1:]) for name, value in subject.rest.items()}
    ids = subject.prompt[None].expand(len(states), -1)
    # Models with a generate of their own (Whisper's cuts audio into windows) want the input; here there is none.
    generate: Any = GenerationMixin.generate
    given = {"decoder_input_ids": ids, "generation_config": generation, **rest}
    found: Tensor = generate(model, encoder_outputs=encoded(states), **given)
    rows = []
    for row in found[:, len(subject.prompt) :]:
        stop = next((i + 1 for i, token in enumerate(row.tolist()) if token in ends), len(row))
        rows.append(row[:stop])
    return rows


def special_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """Ids of tokens that are no text: special ones and, of speech models, markers such as time stamps.

    They come from the tokenizer (or the processor's), the configurations, and the shape of added tokens: Whisper's
    time stamps "<|1.40|>" are not called special, and some of its tokenizers lack them.
    """
    own = getattr(tokenizer, "tokenizer", None) or tokenizer
    known = set(getattr(own, "all_special_ids", ()) or ())
    for index, token in (getattr(own, "added_tokens_decoder", None) or {}).items():
        if getattr(token, "special", False) or _MARKER.fullmatch(str(token)):
            known.add(int(index))
    for owner in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        for name in ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id"):
            value = getattr(owner, name, None)
            known |= {int(v) for v in (value if isinstance(value, (list, tuple)) else [value]) if v is not None}
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    times = getattr(getattr(model, "generation_config", None), "no_timestamps_token_id", None)
    beyond = len(own) if hasattr(own, "__len__") else None  # ids that the tokenizer has no text for
    for first in (times, beyond):  # Whisper's time stamps are its last ids
        if isinstance(size, int) and isinstance(first, int) and first > 0:
            known |= set(range(first, size))
    return known


def texts_of(tokenizer: Any, ids: Tensor) -> tuple[str, ...]:
    """Text of each id; the id itself without a tokenizer."""
    decoder = tokenizer if hasattr(tokenizer, "decode") else getattr(tokenizer, "tokenizer", None)
    decoder = getattr(decoder, "tokenizer", decoder)
    return tuple(str(i) if decoder is None else piece(decoder, i) for i in ids.tolist())


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
