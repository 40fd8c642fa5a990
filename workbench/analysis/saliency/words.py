"""Words over tokens: which tokens make up each word, by the places that the tokenizer says they have in the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from workbench.analysis.saliency.token_names import decoder_of
from workbench.errors import WorkbenchError
from workbench.tokens import visible

_WORD = re.compile(r"\S+")
Span = tuple[int, int]


def words_of(
    tokenizer: Any, ids: Tensor, special: Sequence[int] | set[int] = (), words: Sequence[str] | None = None
) -> tuple[int, ...]:
    """[token] the number of each token's word, counted from 0 in the order of the text.

    Words are what stands between blanks, unless they are given. Tokens of no word (special ones, blanks, what lies
    between given words) count as words of their own.

    Args:
        ids: [token]. special: ids of special tokens.
        words: texts in the order in which they stand in the text.

    Raises:
        WorkbenchError: no tokenizer, a given word that is not in the text, or one that no boundary between tokens fits.

    >>> class Letters:
    ...     def decode(self, ids, **_):
    ...         return "".join("ab c"[i] for i in ids)
    >>> import torch
    >>> words_of(Letters(), torch.tensor([0, 1, 2, 3]))
    (0, 0, 1, 1)
    """
    decoder = decoder_of(tokenizer)
    if decoder is None:
        raise WorkbenchError("words need a tokenizer", hint="attach with one, or pass the words' numbers yourself")
    every = [int(i) for i in ids]
    wanted = None if words is None else [word.strip() for word in words]
    found: list[int] = []
    start = used = 0
    for stop in [*(i for i, one in enumerate(every) if one in special), len(every)]:  # a special token parts words
        text, places = _places(decoder, every[start:stop])
        if wanted is None:
            spans = [one.span() for one in _WORD.finditer(text)]
        else:
            spans = _found(text, wanted[used:])
            used += len(spans)
        found += _numbered(_owners(text, places, spans, start), 1 + max(found, default=-1))
        if stop < len(every):
            found.append(1 + max(found, default=-1))
        start = stop + 1
    if wanted is not None and used < len(wanted):
        raise WorkbenchError(
            f"the word “{visible(wanted[used])}” is not in the text behind the words before it",
            hint="give words in the order of the text",
        )
    return tuple(found)


def _found(text: str, words: Sequence[str]) -> list[Span]:
    """Where the first of these words stand, one behind the other, up to one that does not."""
    spans: list[Span] = []
    for word in words:
        at = text.find(word, spans[-1][1] if spans else 0) if word else -1
        if at < 0:
            break
        spans.append((at, at + len(word)))
    return spans


def _owners(text: str, places: Sequence[Span], spans: Sequence[Span], first: int) -> list[int | None]:
    """[token] the word that each token is a part of, −1 for blanks, None for text outside the words."""
    owner: list[int | None] = [None] * len(text)
    for k, (begin, end) in enumerate(spans):
        owner[begin:end] = [k] * (end - begin)
    found: list[int | None] = []
    for at, (begin, end) in enumerate(places):
        # A token of no width is a part of the character that begins there.
        own = {owner[i] for i in range(begin, min(max(end, begin + 1), len(text))) if not text[i].isspace()}
        if len(own) > 1:
            names = [f"“{visible(text[slice(*spans[k])])}”" for k in sorted(k for k in own if k is not None)]
            raise WorkbenchError(
                f"no boundary between tokens fits the word {' or '.join(names)}: token {first + at}, "
                f"“{visible(text[begin:end])}”, reaches beyond it",
                hint="pass words that are made of whole tokens",
            )
        found.append(own.pop() if own else -1)
    return found


def _numbered(owners: Sequence[int | None], first: int) -> list[int]:
    """Numbers from `first` on: one for each word, blanks with the word that follows them, all else by itself."""
    found: list[int] = []
    number, before, waiting = first - 1, -1, 0
    for own in owners:
        if own == -1:
            waiting += 1
            continue
        if own is None or own != before:
            number += 1
        before = -1 if own is None else own
        found += [number] * (waiting + 1)
        waiting = 0
    return found + [number + 1] * waiting


def _places(decoder: Any, ids: list[int]) -> tuple[str, list[Span]]:
    """The text of tokens, and where each begins and ends in it: by the tokenizer's own offsets, where it cuts this text
    into these tokens, else by how the text grows with each of them."""
    if not ids:
        return "", []
    text = _decoded(decoder, ids)
    if getattr(decoder, "is_fast", False):
        again = decoder(text, add_special_tokens=False, return_offsets_mapping=True)
        if list(again["input_ids"]) == ids:
            return text, [(int(a), int(b)) for a, b in again["offset_mapping"]]
    ends = [0]
    for n in range(1, len(ids)):
        ends.append(max(ends[-1], _shared(_decoded(decoder, ids[:n]), text)))
    return text, list(zip(ends, [*ends[1:], len(text)], strict=True))


def _shared(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _decoded(decoder: Any, ids: list[int]) -> str:
    text: str = decoder.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
