"""Induction: a random sequence of words that starts again, and the word that comes next."""

from __future__ import annotations

import random
from collections.abc import Sequence

from workbench.errors import TaskError
from workbench.tasks.base import Example, Task, check_common, make_rng, seed_setting, swap_words
from workbench.tasks.pieces import pieces

WORDS = (
    "river", "stone", "cloud", "window", "train", "apple", "candle", "forest", "mirror", "pocket", "silver",
    "thunder", "village", "winter", "yellowish", "zebra", "anchor", "bridge", "castle", "dragon", "engine", "feather",
    "glass", "hammer", "island", "jacket", "kettle", "ladder", "magnet", "needle", "ocean", "paper", "quilt",
    "rabbit", "saddle", "tiger", "umbrella", "violin", "whistle", "yard", "acorn", "barrel", "cactus", "donkey",
    "elbow", "falcon", "guitar", "helmet", "insect", "jungle", "kitten", "lemon", "monkey", "napkin", "onion",
    "pepper", "queen", "rocket", "spider", "turtle", "uncle", "valley", "wagon", "yogurt", "arrow", "butter",
    "cherry", "desert", "eagle", "finger", "goose",
)  # fmt: skip
SOURCE = "Olsson et al., In-context Learning and Induction Heads (arXiv 2209.11895): repeated random tokens"


def induction(n: int, seed: int | random.Random, *, length: int = 24, words: Sequence[str] = WORDS) -> Task:
    """Random words without repetition, followed by the start of the same sequence.

    The prompt breaks off at a random place of the second copy, after at least one word. The twin has another word in
    the first copy where the answer stood, so it differs in that token only and that word is the wrong answer. Named
    positions: copy (the earlier copy of the last word), next (the word after it, which is the answer) and end.

    Args:
        n: number of examples.
        seed: a number, or a `random.Random` to draw from.
        length: words in one copy, from 2 up to one less than there are words.
        words: the words to draw from, each a single piece.

    Raises:
        TaskError: n below 1, a length that the words cannot fill, or a word that is more than one piece.

    >>> task = induction(1, seed=0, length=4)
    >>> task[0].prompt, task[0].answer
    ('jungle napkin apple rabbit jungle napkin', ' apple')
    >>> task[0].twin, task[0].wrong
    ('jungle napkin butter rabbit jungle napkin', (' butter',))
    """
    check_common(n, "all")
    if not 2 <= length < len(set(words)):
        raise TaskError(
            f"a copy of {length} words cannot be drawn from {len(set(words))} different words",
            hint=f"choose a length from 2 to {len(set(words)) - 1}, or pass more words",
        )
    for word in words:
        if pieces(word) != [word]:
            raise TaskError(f"{word!r} is not a single word", hint="pass words without spaces or punctuation")
    rng = make_rng(seed)
    known = list(dict.fromkeys(words))
    examples = []
    for _ in range(n):
        *copy, replacement = rng.sample(known, length + 1)
        shown = rng.randrange(1, length)
        prompt = " ".join(copy + copy[:shown])
        positions = {"copy": shown - 1, "next": shown, "end": length + shown - 1}
        examples.append(
            Example(
                prompt, swap_words(prompt, {shown: replacement}), (f" {copy[shown]}",), (f" {replacement}",),
                positions, (shown,),
            )
        )  # fmt: skip
    return Task("induction", tuple(examples), SOURCE, {"seed": seed_setting(seed), "length": length})
