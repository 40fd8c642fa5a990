"""A user's own task, from a list of prompts and a list of their twins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from workbench.errors import CaptureError, TaskError
from workbench.inputs import check_text
from workbench.tasks.base import Example, Task
from workbench.tasks.pieces import pieces


def from_prompts(
    prompts: Sequence[str],
    twins: Sequence[str],
    answers: Sequence[str | Sequence[str]],
    wrong: Sequence[str | Sequence[str]],
    *,
    name: str = "custom",
    positions: Mapping[str, int | Sequence[int]] | None = None,
    written: Sequence[str] | None = None,
    source: str = "given by the user",
) -> Task:
    """A task from prompts and counterfactual twins.

    Args:
        prompts: texts that end just before the answer.
        twins: one for each, with as many words and other answers, such as the prompt with one name replaced.
        answers: what is right after each prompt, with its leading space; several where any of them is right.
        wrong: what the logit difference compares with, mostly the twin's answer.
        name: of the task.
        positions: word indices by name (0-based, punctuation and newlines count, see `pieces`), for all prompts or one
            for each. "end" is known.
        written: for encoder-decoders, what the decoder has written after each prompt when the answer comes; nothing by
            default.
        source: where the prompts come from.

    Raises:
        TaskError: lists of different lengths, a twin that is its prompt or has another number of words, an answer that
            is wrong too, a position outside of a prompt. Whether tokens fit is checked when a tokenizer is known.

    >>> task = from_prompts(["Paris is in"], ["Rome is in"], [" France"], [" Italy"], positions={"city": 0})
    >>> task[0].changed, task.positions("city"), task.positions("end")
    ((0,), [0], [2])
    """
    lists: dict[str, Sequence[Any]] = {"prompts": prompts, "twins": twins, "answers": answers, "wrong": wrong}
    lists |= {} if written is None else {"written": written}
    for what, given in lists.items():
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise TaskError(f"{what} is {type(given).__name__}, expected a list with one entry per prompt")
        if len(given) != len(prompts):
            raise TaskError(f"there are {len(prompts)} prompts and {len(given)} {what}")
    if not len(prompts):
        raise TaskError("there is no prompt")
    places = dict(positions or {})
    for key, where in places.items():
        if not isinstance(where, int) and len(where) != len(prompts):
            raise TaskError(f"the position {key!r} is given for {len(where)} of {len(prompts)} prompts")
    made = []
    for i, (prompt, twin) in enumerate(zip(prompts, twins, strict=True)):
        own = {key: where if isinstance(where, int) else where[i] for key, where in places.items()}
        example = _example(i, prompt, twin, _several(answers[i]), _several(wrong[i]), own)
        made.append(example if written is None else replace(example, written=written[i]))
    return Task(name, tuple(made), source, {"prompts": len(prompts)})


def _several(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _example(
    i: int, prompt: str, twin: str, answers: tuple[str, ...], wrong: tuple[str, ...], positions: dict[str, int]
) -> Example:
    if not isinstance(prompt, str) or not isinstance(twin, str):
        raise TaskError(f"prompt and twin {i} are texts, not {type(prompt).__name__} and {type(twin).__name__}")
    if not answers or not wrong:
        raise TaskError(f"example {i} has no {'answer' if not answers else 'wrong answer'}")
    for text in (prompt, twin, *answers, *wrong):
        try:
            check_text(text)
        except CaptureError as error:
            raise TaskError(f"in example {i}, {error.message}", hint=error.hint) from None
    both = set(answers) & set(wrong)
    if both:
        raise TaskError(f"example {i} calls {sorted(both)[0]!r} right and wrong")
    if prompt == twin:
        raise TaskError(f"the twin of example {i} does not differ from its prompt {prompt!r}")
    words, others = pieces(prompt), pieces(twin)
    if len(words) != len(others):
        raise TaskError(
            f"example {i} has {len(words)} words, its twin {len(others)}: {prompt!r} and {twin!r}",
            hint="a twin must be as long as its prompt, so that positions correspond",
        )
    for key, place in positions.items():
        if not -len(words) <= place < len(words):
            raise TaskError(f"the position {key!r} is {place}, example {i} has {len(words)} words")
    changed = tuple(j for j, (a, b) in enumerate(zip(words, others, strict=True)) if a != b)
    known = {key: place % len(words) for key, place in positions.items()}
    return Example(prompt, twin, answers, wrong, {**known, "end": len(words) - 1}, changed)
