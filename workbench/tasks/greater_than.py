"""Greater-than: a span of years whose end must lie after its start."""

from __future__ import annotations

import random

from workbench.errors import TaskError
from workbench.tasks.base import Example, Split, Task, check_common, in_split, make_rng, seed_setting, swap_words
from workbench.tasks.pieces import pieces

NOUNS = (
    "war", "siege", "voyage", "reign", "strike", "famine", "drought", "journey", "plague", "revolt", "project",
    "mission", "campaign", "trial", "festival", "dynasty", "crisis", "truce", "contest", "expedition",
)  # fmt: skip
CENTURIES = tuple(str(century) for century in range(11, 18))
SOURCE = "Hanna et al., How does GPT-2 compute greater-than? (arXiv 2305.00586); years as two tokens"


def greater_than(n: int, seed: int | random.Random, *, split: Split = "all") -> Task:
    """Prompts such as "The war lasted from the year 17 32 to 17", answered by any two-digit year above.

    The twin starts in the year 01 and differs in that token only. The wrong answers are the two-digit years up to and
    including the start. Named positions: noun, century, year (the two digits of the start) and end (the century again).

    Args:
        n: number of examples.
        seed: a number, or a `random.Random` to draw from.
        split: "train" and "held_out" share no combination of noun, century and year; every eighth is held out.

    Raises:
        TaskError: n below 1, or an unknown split.

    >>> example = greater_than(1, seed=0)[0]
    >>> example.prompt, example.answers[0], len(example.answers)
    ('The campaign lasted from the year 17 55 to 17', ' 56', 44)
    >>> example.twin
    'The campaign lasted from the year 17 01 to 17'
    """
    check_common(n, split)
    rng = make_rng(seed)
    examples = tuple(_example(rng, split) for _ in range(n))
    return Task("greater_than", examples, SOURCE, {"seed": seed_setting(seed), "split": split})


def _example(rng: random.Random, split: Split) -> Example:
    while True:
        noun, century, year = rng.randrange(len(NOUNS)), rng.randrange(len(CENTURIES)), rng.randrange(2, 99)
        if in_split(noun + 3 * century + 5 * year, split):
            break
    name = CENTURIES[century]
    prompt = f"The {NOUNS[noun]} lasted from the year {name} {year:02d} to {name}"
    words = pieces(prompt)
    place = len(words) - 3
    if words[place] != f"{year:02d}":
        raise TaskError(f"the year is not where it should be in {prompt!r}")
    answers = tuple(f" {later:02d}" for later in range(year + 1, 100))
    wrong = tuple(f" {earlier:02d}" for earlier in range(year + 1))
    positions = {"noun": 1, "century": place - 1, "year": place, "end": len(words) - 1}
    return Example(prompt, swap_words(prompt, {place: "01"}), answers, wrong, positions, (place,))
