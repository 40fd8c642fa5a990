"""Word-level pieces of a text, and where each piece falls among the tokens of a given tokenizer.

The generators know positions as indices of pieces ("red", ",", a newline). A word-level tokenizer has one token per
piece, so there the indices are token indices; for any other tokenizer `token_positions` translates them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from workbench.errors import TaskError

PIECE_PATTERN = r"\n|\w+|[^\w\s]"
_PIECE = re.compile(PIECE_PATTERN)


def pieces(text: str) -> list[str]:
    r"""Split a text into words, single punctuation marks and newlines; other white space only separates.

    >>> pieces("the cup?\nA:")
    ['the', 'cup', '?', '\n', 'A', ':']
    """
    return _PIECE.findall(text)


def piece_spans(text: str) -> list[tuple[int, int]]:
    """First character and end (exclusive) of each piece.

    >>> piece_spans("a cup?")
    [(0, 1), (2, 5), (5, 6)]
    """
    return [match.span() for match in _PIECE.finditer(text)]


def token_positions(tokenizer: Any, text: str, indices: Sequence[int]) -> list[int]:
    """Token index of each piece index: the last token that touches the piece.

    Args:
        tokenizer: a Hugging Face tokenizer; unless it has one token per piece it must be a fast one (with offsets).
        text: the prompt.
        indices: piece indices, 0-based.

    Raises:
        TaskError: an index outside the text, or a slow tokenizer that splits or merges pieces.
    """
    spans = piece_spans(text)
    for index in indices:
        if not 0 <= index < len(spans):
            raise TaskError(f"piece {index} is outside the prompt, which has {len(spans)} pieces: {text!r}")
    if not getattr(tokenizer, "is_fast", False):
        first, last = _own_tokens(tokenizer, text, tokenizer(text)["input_ids"])
        if last - first == len(spans):
            return [first + index for index in indices]
        raise TaskError(
            "this tokenizer does not say which characters a token covers, so positions cannot be found",
            hint="load the fast version of the tokenizer (use_fast=True)",
        )
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    found = []
    for index in indices:
        start, end = spans[index]
        touching = [token for token, (left, right) in enumerate(offsets) if left < end and right > start]
        if not touching:
            raise TaskError(f"no token covers {text[start:end]!r} in {text!r}")
        found.append(touching[-1])
    return found


def prompt_ids(tokenizer: Any, text: str, *, continued: bool, prepend_bos: bool | None = None) -> list[int]:
    """Token ids of a prompt, with what the tokenizer puts before it.

    Args:
        continued: leave out what it puts behind, such as an end token: the model is to go on from the text.
        prepend_bos: whether the beginning-of-sequence token stands before the text; None: as the tokenizer has it.

    Raises:
        TaskError: where the text ends cannot be told, or the tokenizer has no token for its beginning.
    """
    ids: list[int] = list(tokenizer(text)["input_ids"])
    ids = ids[: _own_tokens(tokenizer, text, ids)[1]] if continued else ids
    if prepend_bos is None:
        return ids
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        if prepend_bos:
            raise TaskError("this tokenizer has no token for the beginning of a text", hint="prepend_bos=None")
        return ids
    there = ids[:1] == [bos]
    return [bos, *ids] if prepend_bos and not there else ids[1:] if there and not prepend_bos else ids


def _own_tokens(tokenizer: Any, text: str, ids: list[int]) -> tuple[int, int]:
    """Where, among the ids of a text, those of the text itself begin and end; the rest the tokenizer has put there."""
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    for start in range(len(ids) - len(plain) + 1):
        if ids[start : start + len(plain)] == plain:
            return start, start + len(plain)
    raise TaskError(
        f"the tokens of {text!r} are others with special tokens than without, so that its end cannot be told",
        hint="make a task of token ids with workbench.tasks.from_inputs",
    )


def answer_tokens(tokenizer: Any, answer: str) -> tuple[int, ...]:
    """Token ids of an answer such as " New York".

    Raises:
        TaskError: the tokenizer makes nothing of it, or does not know a part.
    """
    ids = tuple(map(int, tokenizer(answer, add_special_tokens=False)["input_ids"]))
    if not ids:
        raise TaskError(f"the answer {answer!r} has no token for this tokenizer")
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in ids:
        raise TaskError(
            f"the answer {answer!r} is unknown to this tokenizer", hint="use a tokenizer that knows the word"
        )
    return ids


def single_token(tokenizer: Any, answer: str) -> int:
    """Token id of an answer such as " Orange".

    Raises:
        TaskError: the tokenizer makes several tokens of the answer, or does not know it.
    """
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise TaskError(
            f"{answer!r} is {len(ids)} tokens for this tokenizer, and one is needed here",
            hint="choose a text that is a single token for this tokenizer",
        )
    if ids[0] == getattr(tokenizer, "unk_token_id", None):
        raise TaskError(
            f"the answer {answer!r} is unknown to this tokenizer", hint="use a tokenizer that knows the word"
        )
    return int(ids[0])
