"""Ids that a user gives as text, the texts of ids, and which of them are no text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.tokens import piece

_MARKER = re.compile(r"<\|[^|\s]+\|>")


def ids_of(tokenizer: Any, given: str | int | Sequence[int] | Tensor, what: str) -> Tensor:
    """Ids [n] from ids, or from a text as the tokenizer cuts it, without special tokens.

    Raises:
        WorkbenchError: a text without a tokenizer, or numbers that are no ids.
    """
    if isinstance(given, str):
        decoder = decoder_of(tokenizer)
        if decoder is None:
            raise WorkbenchError(f"{what} is a text, and there is no tokenizer", hint="attach with one, or pass ids")
        given = decoder(given, add_special_tokens=False)["input_ids"]
    found = torch.as_tensor(given)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise WorkbenchError(f"{what} is of token ids, not of {str(found.dtype).removeprefix('torch.')}")
    return found.long().flatten()


def check_vocabulary(what: str, ids: Tensor, size: int) -> None:
    """Raise a WorkbenchError that names the first id that is none of the `size` that there are."""
    bad = [i for i in ids.tolist() if not 0 <= i < size]
    if bad:
        raise WorkbenchError(f"{what} has the id {bad[0]}, the vocabulary {size:,}", hint=f"ids are 0 to {size - 1:,}")


def decoder_of(tokenizer: Any) -> Any:
    """The tokenizer in what was attached as one, which may be a processor; None without any."""
    decoder = tokenizer if hasattr(tokenizer, "decode") else getattr(tokenizer, "tokenizer", None)
    return getattr(decoder, "tokenizer", decoder)


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
    decoder = decoder_of(tokenizer)
    return tuple(str(i) if decoder is None else piece(decoder, i) for i in ids.tolist())
