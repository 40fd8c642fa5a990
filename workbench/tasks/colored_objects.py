"""Colored Objects: a scene of three coloured things, and the question which colour one of them has.

One solved example comes first, then the query. With a word-level tokenizer a prompt has 62 tokens, and the places of
the colours and objects never move.
"""

from __future__ import annotations

import random

from workbench.tasks.base import Example, Split, Task, check_common, in_split, make_rng, seed_setting, swap_words
from workbench.tasks.pieces import pieces

OBJECTS = (
    "pencil", "notebook", "pen", "cup", "plate", "jug", "mug", "puzzle", "textbook", "leash", "necklace", "bracelet",
    "bottle", "ball", "envelope", "lighter", "bowl",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
SURFACES = ("table", "desk", "floor")
STARTS = ("there is", "you see", "I see")
SOURCE = "Merullo et al., Circuit Component Reuse (arXiv 2310.08744), after BIG-bench"

# Piece indices in the 62-piece prompt.
SHOT_ANSWER, COLOUR_PLACES, OBJECT_PLACES, QUERIED, END = 30, (41, 45, 50), (42, 46, 51), 57, 61


def colored_objects(n: int, seed: int | random.Random, *, split: Split = "all") -> Task:
    """One-shot Colored Objects prompts, whose answer is a capitalised colour.

    The shot and the query share no object and no colour. The twin asks for another of the three objects of the query
    scene and differs in that token only; its colour is the wrong answer. Named positions: shot_answer; colour1 to
    colour3 and object1 to object3 of the query scene; colour and object (those of the thing asked for); wrong_colour
    (that of the twin's); queried (the object in the question); end.

    Args:
        n: number of examples.
        seed: a number, or a `random.Random` to draw from.
        split: "train" and "held_out" share no set of three objects in one scene; about an eighth of the sets, those
            whose indices in `OBJECTS` add up to a multiple of 8, are held out. The split concerns the query scene in
            "held_out" and both scenes in "train".

    Raises:
        TaskError: n below 1, or an unknown split.

    >>> task = colored_objects(1, seed=0)
    >>> print(task[0].prompt)
    Q: On the desk, there is a brown bottle, a black ball, and a yellow pencil. What color is the bottle?
    A: Brown
    Q: On the table, I see a green plate, a purple textbook, and a blue puzzle. What color is the puzzle?
    A:
    >>> task[0].answer, task[0].word_at("object")
    (' Blue', 'puzzle')
    """
    check_common(n, split)
    rng = make_rng(seed)
    examples = tuple(_example(rng, split) for _ in range(n))
    return Task("colored_objects", examples, SOURCE, {"seed": seed_setting(seed), "split": split})


def article(word: str) -> str:
    """The article that goes before a word.

    >>> article("orange")
    'an'
    """
    return "an" if word[0] in "aeiou" else "a"


def scene(objects: list[str], colours: list[str], surface: str, start: str) -> str:
    """The sentence that describes a scene, for one thing or more.

    >>> scene(["cup", "pen"], ["orange", "red"], "desk", "you see")
    'On the desk, you see an orange cup, and a red pen.'
    """
    things = [f"{article(colour)} {colour} {thing}" for colour, thing in zip(colours, objects, strict=True)]
    if len(things) > 1:
        things[-1] = f"and {things[-1]}"
    return f"On the {surface}, {start} {', '.join(things)}."


def _example(rng: random.Random, split: Split) -> Example:
    while True:
        picked = rng.sample(range(len(OBJECTS)), 6)
        if in_split(sum(picked[3:]), split) and (split != "train" or in_split(sum(picked[:3]), split)):
            break
    objects, colours = [OBJECTS[i] for i in picked], rng.sample(COLOURS, 6)
    shot, asked = rng.randrange(3), rng.randrange(3)
    other = rng.choice([i for i in range(3) if i != asked])
    text = []
    for half, queried in ((slice(0, 3), shot), (slice(3, 6), asked)):
        described = scene(objects[half], colours[half], rng.choice(SURFACES), rng.choice(STARTS))
        text.append(f"Q: {described} What color is the {objects[half][queried]}?\nA:")
    prompt = f"{text[0]} {colours[shot].capitalize()}\n{text[1]}"
    positions = {"shot_answer": SHOT_ANSWER}
    for i in range(3):
        positions |= {f"colour{i + 1}": COLOUR_PLACES[i], f"object{i + 1}": OBJECT_PLACES[i]}
    positions |= {
        "colour": COLOUR_PLACES[asked],
        "object": OBJECT_PLACES[asked],
        "wrong_colour": COLOUR_PLACES[other],
        "queried": QUERIED,
        "end": len(pieces(prompt)) - 1,
    }
    answer, wrong = (f" {colours[3 + i].capitalize()}" for i in (asked, other))
    return Example(
        prompt, swap_words(prompt, {QUERIED: objects[3 + other]}), (answer,), (wrong,), positions, (QUERIED,)
    )
