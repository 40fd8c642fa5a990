"""Indirect object identification: of two names one is repeated, and the other is the answer.

"Then, Mary and John went to the store. John gave a drink to" -> " Mary". The twin repeats the other name.
"""

from __future__ import annotations

import random

from workbench.tasks.base import (
    Example,
    Split,
    Task,
    check_choice,
    check_common,
    in_split,
    make_rng,
    seed_setting,
    swap_words,
)
from workbench.tasks.pieces import pieces

NAMES = (
    "Mary", "John", "Alice", "Tom", "Laura", "Paul", "Anna", "David", "Emma", "James", "Sarah", "Peter",
    "Kate", "Mark", "Julia", "Henry", "Rose", "Frank", "Linda", "George", "Helen", "Simon", "Claire", "Adam",
)  # fmt: skip
PLACES = ("store", "park", "school", "office", "garden", "station", "market", "beach", "museum", "library")
GIFTS = ("drink", "book", "ring", "kiss", "flower", "letter", "basket", "key", "coin", "hat")
ORDERS = ("ABBA", "BABA")

# {first} and {second} are the two names in the order they come, {again} is the repeated one.
TEMPLATES = {
    "went": "Then, {first} and {second} went to the {place}. {again} gave a {object} to",
    "fun": "Then, {first} and {second} had a lot of fun at the {place}. {again} gave a {object} to",
    "working": "Then, {first} and {second} were working at the {place}. {again} decided to give a {object} to",
    "thinking": "Then, {first} and {second} were thinking about going to the {place}. "
    "{again} wanted to give a {object} to",
    "argument": "Then, {first} and {second} had a long argument, and afterwards {again} said to",
    "after": "After {first} and {second} went to the {place}, {again} gave a {object} to",
    "when": "When {first} and {second} got a {object} at the {place}, {again} decided to give it to",
    "while": "While {first} and {second} were working at the {place}, {again} gave a {object} to",
    "friends": "The friends {first} and {second} found a {object} at the {place}. {again} gave it to",
}
SOURCE = "Wang et al., Interpretability in the Wild (arXiv 2211.00593); twin as in Merullo et al. (arXiv 2310.08744)"


def ioi(
    n: int,
    seed: int | random.Random,
    *,
    order: str = "mixed",
    template: str = "mixed",
    split: Split = "all",
) -> Task:
    """Indirect object identification prompts.

    The twin is the prompt with S2 replaced by IO, so that the answer flips from IO to S. Named positions: IO, S1 (the
    first mention of the repeated name), S2 (the second) and end.

    Args:
        n: number of examples.
        seed: a number, or a `random.Random` to draw from.
        order: "ABBA" (IO comes first), "BABA" (S comes first) or "mixed".
        template: a key of `TEMPLATES`, or "mixed".
        split: "train" and "held_out" share no (IO, S) pair of names; every eighth pair is held out.

    Raises:
        TaskError: n below 1, or an unknown order, template or split.

    >>> task = ioi(1, seed=0, order="ABBA", template="went")
    >>> task[0].prompt
    'Then, John and Emma went to the museum. Emma gave a key to'
    >>> task[0].answer, task[0].wrong, dict(task[0].positions)
    (' John', (' Emma',), {'IO': 2, 'S1': 4, 'S2': 10, 'end': 14})
    """
    check_common(n, split)
    check_choice("order", order, (*ORDERS, "mixed"))
    check_choice("template", template, (*TEMPLATES, "mixed"))
    rng = make_rng(seed)
    orders = ORDERS if order == "mixed" else (order,)
    templates = tuple(TEMPLATES.values()) if template == "mixed" else (TEMPLATES[template],)
    examples = tuple(_example(rng, rng.choice(orders), rng.choice(templates), split) for _ in range(n))
    settings = {"seed": seed_setting(seed), "order": order, "template": template, "split": split}
    return Task("ioi", examples, SOURCE, settings)


def _example(rng: random.Random, order: str, template: str, split: Split) -> Example:
    while True:
        i, j = rng.sample(range(len(NAMES)), 2)
        if in_split(i + 3 * j, split):
            break
    io, subject = NAMES[i], NAMES[j]
    first, second = (io, subject) if order == "ABBA" else (subject, io)
    prompt = template.format(
        first=first, second=second, again=subject, place=rng.choice(PLACES), object=rng.choice(GIFTS)
    )
    words = pieces(prompt)
    s1 = words.index(subject)
    s2 = words.index(subject, s1 + 1)
    positions = {"IO": words.index(io), "S1": s1, "S2": s2, "end": len(words) - 1}
    return Example(prompt, swap_words(prompt, {s2: io}), (f" {io}",), (f" {subject}",), positions, (s2,))
