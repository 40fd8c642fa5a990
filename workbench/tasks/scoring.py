"""Answers of one or several tokens: what stands before each of them, and where right and wrong ones part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from workbench.errors import TaskError
from workbench.metrics import Scored

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """The answers of one example, token by token.

    Attributes:
        before: what stands in the input behind the prompt: all tokens but the last.
        steps: for each token the ids of which any is right, and those that they are compared with; none but where right
            and wrong answers part.
        parts: the number of the token at which they do.
        whole: whether the steps are all tokens of the right answers. Several that differ earlier than in their last
            token cannot all stand in one input; then the steps end where they part.
    """

    before: Ids
    steps: tuple[tuple[Ids, Ids], ...]
    parts: int
    whole: bool = True

    @property
    def apart(self) -> tuple[Ids, Ids]:
        """Ids where right and wrong answers part."""
        return self.steps[self.parts]


def answer_of(number: int, example: Any, right: Sequence[Ids], wrong: Sequence[Ids]) -> Answer:
    """The answers of an example, given by their token ids.

    Args:
        number: of the example, for errors. example: has `answers` and `wrong`, their texts.

    Raises:
        TaskError: wrong answers that are the beginning of a right one, or go on from it, or part from it at different
            tokens; right answers that differ in more than the last token, and part from the wrong ones elsewhere.

    >>> from types import SimpleNamespace
    >>> texts = SimpleNamespace(answers=(" New York",), wrong=(" New Orleans",))
    >>> answer_of(0, texts, [(5, 6)], [(5, 8, 9)])
    Answer(before=(5,), steps=(((5,), ()), ((6,), (8,))), parts=1, whole=True)
    """
    before = right[0][:-1]
    if any(ids[:-1] != before for ids in right):
        return _beginnings(number, example, right, wrong)
    last = tuple(dict.fromkeys(ids[-1] for ids in right))  # an answer that is given twice is one
    sets = [*[(one,) for one in before], last]
    parts = [_parting(number, example, text, ids, sets) for text, ids in zip(example.wrong, wrong, strict=True)]
    if len(set(parts)) > 1:
        raise TaskError(
            f"the wrong answers of example {number} part from {example.answers[0]!r} at different tokens",
            hint="give wrong answers that begin alike for this tokenizer",
        )
    place = parts[0]
    apart = tuple(dict.fromkeys(ids[place] for ids in wrong))
    return Answer(before, tuple((one, apart if i == place else ()) for i, one in enumerate(sets)), place)


def _beginnings(number: int, example: Any, right: Sequence[Ids], wrong: Sequence[Ids]) -> Answer:
    """Right answers that differ early, by the token behind what all answers begin with.

    Raises:
        TaskError: there right and wrong ones do not part.
    """
    place = next(i for i, several in enumerate(zip_longest(*right, *wrong)) if len(set(several)) > 1)
    sets = [tuple(dict.fromkeys(ids[place] for ids in each if place < len(ids))) for each in (right, wrong)]
    ended = any(len(ids) <= place for ids in (*right, *wrong))
    if ended or set(sets[0]) & set(sets[1]):
        several = next(text for text, ids in zip(example.answers, right, strict=True) if ids[:-1] != right[0][:-1])
        raise TaskError(
            f"the answers {example.answers[0]!r} and {several!r} of example {number} differ in more than the last "
            f"token for this tokenizer, and part from {', '.join(map(repr, example.wrong))} at different ones",
            hint="of such answers only one can be tried in a forward: give one of them",
        )
    before = right[0][:place]
    return Answer(before, (*(((one,), ()) for one in before), (sets[0], sets[1])), place, whole=False)


def _parting(number: int, example: Any, text: str, ids: Ids, sets: Sequence[Ids]) -> int:
    """The first token at which a wrong answer is none of the right ones."""
    for i, (token, one) in enumerate(zip(ids, sets, strict=False)):
        if token not in one:
            return i
    raise TaskError(
        f"the answers {example.answers[0]!r} and {text!r} of example {number} do not part for this tokenizer: one is "
        "the beginning of the other",
        hint="choose a wrong answer that differs in a token",
    )


def scored_of(answers: Sequence[Answer], ends: Sequence[int], first: Sequence[int]) -> Scored | None:
    """Where a batch is measured; None where that is the last token of each prompt.

    Args:
        ends: column of each prompt's last token. first: that from which the first token of the answer is predicted.
    """
    if all(len(answer.steps) == 1 and answer.whole for answer in answers) and list(first) == list(ends):
        return None
    longest = max(len(answer.steps) for answer in answers)
    places = [
        [begin + min(i, len(answer.steps) - 1) for i in range(longest)]
        for begin, answer in zip(first, answers, strict=True)
    ]
    return Scored(
        torch.tensor(places), torch.tensor(ends), [[right for right, _ in answer.steps] for answer in answers],
        [[wrong for _, wrong in answer.steps] for answer in answers], [answer.whole for answer in answers],
    )  # fmt: skip
