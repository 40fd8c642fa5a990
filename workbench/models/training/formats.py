"""The formats the demonstration model is trained on, each a function that draws rows of words and says what to learn.

A row is a list of words with, for every word, whether the *next* word can be predicted. Only those places carry a loss:
with a loss on every word, the words that nobody could predict drown the signal.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import torch

from workbench.tasks import colored_objects, greater_than, induction, ioi
from workbench.tasks.base import Task
from workbench.tasks.colored_objects import COLOURS, OBJECTS, SHOT_ANSWER, STARTS, SURFACES, article, scene
from workbench.tasks.pieces import pieces

Row = tuple[list[str], list[int]]
IGNORE = -100


def lookups(n: int, rng: random.Random, words: Sequence[str]) -> list[Row]:
    """Bare lookups: "a red pencil, a blue cup, ... : pencil Red cup Blue ...".

    Four to eight things, colours drawn with replacement, eight questions drawn with replacement. So many things make
    the uninformed answer (some colour of this scene) a poor one, and with replacement nothing can be eliminated.
    """
    rows: list[Row] = []
    for _ in range(n):
        things, colours = _things(rng, rng.randint(4, 8))
        row: list[str] = []
        for thing, colour in zip(things, colours, strict=True):
            row += [article(colour), colour, thing, ","]
        row[-1] = ":"
        learn = []
        for _ in range(8):
            asked = rng.randrange(len(things))
            learn.append(len(row))
            row += [things[asked], colours[asked].capitalize()]
        rows.append((row, learn))
    return rows


def scenes(n: int, rng: random.Random, words: Sequence[str]) -> list[Row]:
    """One scene of four to six things in the words of Colored Objects, with four questions about it."""
    rows = []
    for _ in range(n):
        things, colours = _things(rng, rng.randint(4, 6))
        row = ["Q", ":", *pieces(scene(things, colours, rng.choice(SURFACES), rng.choice(STARTS)))]
        learn = []
        for question in range(4):
            asked = rng.randrange(len(things))
            row += ["\n", "Q", ":"] if question else []
            row += ["What", "color", "is", "the", things[asked], "?", "\n", "A", ":"]
            learn.append(len(row) - 1)
            row.append(colours[asked].capitalize())
        rows.append((row, learn))
    return rows


def full_prompts(n: int, rng: random.Random, words: Sequence[str]) -> list[Row]:
    """The one-shot prompts of the task itself, training split; both answers are learnt."""
    rows = _task_rows(colored_objects(n, rng, split="train"), rng)
    return [(row, [SHOT_ANSWER - 1, *learn]) for row, learn in rows]


def repeats(n: int, rng: random.Random, words: Sequence[str], shortest: int = 4, longest: int = 64) -> list[Row]:
    """Random words of the whole vocabulary, twice; all of the second copy but its first word is learnt."""
    length = rng.randint(shortest, longest)
    rows = []
    for _ in range(n):
        copy = rng.sample(words, length)
        rows.append((copy + copy, list(range(length, 2 * length - 1))))
    return rows


def short_repeats(n: int, rng: random.Random, words: Sequence[str]) -> list[Row]:
    """Repeats of at most 24 words, for the first stage: cheap."""
    return repeats(n, rng, words, 8, 24)


def ioi_prompts(n: int, rng: random.Random, words: Sequence[str]) -> list[Row]:
    """Indirect object identification, training split."""
    return _task_rows(ioi(n, rng, split="train"), rng)


def year_prompts(n: int, rng: random.Random, words: Sequence[str]) -> list[Row]:
    """Greater-than, training split; the answer to learn is drawn evenly from the years above."""
    return _task_rows(greater_than(n, rng, split="train"), rng)


FORMATS: Mapping[str, Callable[[int, random.Random, Sequence[str]], list[Row]]] = {
    "lookups": lookups,
    "scenes": scenes,
    "full_prompts": full_prompts,
    "short_repeats": short_repeats,
    "repeats": repeats,
    "ioi": ioi_prompts,
    "years": year_prompts,
}


def held_out(n: int, seed: int) -> dict[str, Task]:
    """The four tasks on combinations that the formats above never show.

    Args:
        n: examples of each task.
        seed: of the examples; training draws from other generators.
    """
    return {
        "ioi": ioi(n, seed, split="held_out"),
        "colored_objects": colored_objects(n, seed, split="held_out"),
        "induction": induction(n, seed),
        "greater_than": greater_than(n, seed, split="held_out"),
    }


def to_tensors(rows: Sequence[Row], ids: Mapping[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of rows, both [row, position]; the label of a place is the next word, or -100 for no loss.

    >>> to_tensors([(["a", "b"], [0])], {"a": 5, "b": 6})
    (tensor([[5, 6]]), tensor([[   6, -100]]))
    """
    longest = max(len(row) for row, _ in rows)
    inputs = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(inputs, IGNORE)
    for i, (row, learn) in enumerate(rows):
        encoded = [ids[word] for word in row]
        inputs[i, : len(row)] = torch.tensor(encoded)
        labels[i, learn] = torch.tensor([encoded[place + 1] for place in learn], dtype=torch.long)
    return inputs, labels


def _things(rng: random.Random, n: int) -> tuple[list[str], list[str]]:
    return rng.sample(OBJECTS, n), rng.choices(COLOURS, k=n)


def _task_rows(task: Task, rng: random.Random) -> list[Row]:
    rows = []
    for example in task:
        row = [*pieces(example.prompt), rng.choice(example.answers).strip()]
        rows.append((row, [len(row) - 2]))
    return rows
