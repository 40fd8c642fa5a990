"""Docstring-like prompts: a function's arguments, a docstring that lists the first two, and the third comes next."""

from __future__ import annotations

import random

from workbench.errors import TaskError
from workbench.tasks.base import Example, Task, check_common, make_rng, seed_setting, swap_words
from workbench.tasks.pieces import pieces

ARGUMENTS = (
    "load", "size", "file", "last", "user", "page", "node", "time", "name", "path", "key", "data", "line", "mode",
    "port", "host", "text", "code", "rate", "date", "list", "item", "type", "form", "view", "test", "part", "lock",
)  # fmt: skip
FUNCTIONS = ("run", "send", "open", "read", "make", "call", "find", "parse", "save", "split")
NOUNS = (
    "oil", "column", "piece", "crime", "unit", "song", "blood", "sound", "race", "book", "death", "income", "doctor",
    "summer", "street", "heart", "water", "letter", "farm", "metal", "window", "paper", "stone", "garden",
)  # fmt: skip
SOURCE = "after Heimersheim & Janiak, A circuit for Python docstrings (2023), with a shorter prompt"


def docstring(n: int, seed: int | random.Random) -> Task:
    """Prompts in which the next word is the third argument of a function.

    The twin has another name for that argument in the definition, which is the wrong answer, and differs in that token
    only. Named positions: A_def to D_def (the arguments where they are defined), A_doc and B_doc (where they are
    described) and end (the last "param").

    Args:
        n: number of examples.
        seed: a number, or a `random.Random` to draw from.

    Raises:
        TaskError: n below 1.

    >>> example = docstring(1, seed=0)[0]
    >>> print(example.prompt)
    def split(self, lock, line, view, mode):
        '''race water heart
    <BLANKLINE>
        :param lock: doctor book
        :param line: paper income
        :param
    >>> example.answer, example.wrong
    (' view', (' size',))
    """
    check_common(n, "all")
    rng = make_rng(seed)
    return Task("docstring", tuple(_example(rng) for _ in range(n)), SOURCE, {"seed": seed_setting(seed)})


def _example(rng: random.Random) -> Example:
    a, b, c, d, other = rng.sample(ARGUMENTS, 5)
    words = rng.sample(NOUNS, 7)
    prompt = (
        f"def {rng.choice(FUNCTIONS)}(self, {a}, {b}, {c}, {d}):\n    '''{' '.join(words[:3])}\n\n"
        f"    :param {a}: {words[3]} {words[4]}\n    :param {b}: {words[5]} {words[6]}\n    :param"
    )
    found = pieces(prompt)
    first = {name: found.index(word, 3) for name, word in (("A", a), ("B", b), ("C", c), ("D", d))}
    positions = {f"{name}_def": place for name, place in first.items()}
    positions |= {f"{name}_doc": found.index(word, first["D"] + 1) for name, word in (("A", a), ("B", b))}
    positions["end"] = len(found) - 1
    if found[-1] != "param":
        raise TaskError(f"the prompt does not end where it should: {prompt!r}")
    twin = swap_words(prompt, {first["C"]: other})
    return Example(prompt, twin, (f" {c}",), (f" {other}",), positions, (first["C"],))
