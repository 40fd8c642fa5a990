"""Multi-query associative recall: keys with their values, and later the keys again, in any order."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.errors import TaskError
from workbench.tasks.base import Example, Task, check_common, make_rng, seed_setting, swap_words
from workbench.tasks.induction import WORDS
from workbench.tasks.pieces import pieces

SOURCE = "Arora et al., Zoology (arXiv 2312.04927); settings of Sieber et al. (arXiv 2405.15731)"
IGNORE = -100


def mqar(
    n: int, seed: int | random.Random, *, pairs: int = 4, asked: int = 1, keys: Sequence[str] = WORDS[:36],
    values: Sequence[str] = WORDS[36:],
) -> Task:  # fmt: skip
    """Prompts "k1 v1 k2 v2 … k", answered by the value of the key at the end.

    Before the last question come `asked` − 1 others with their answers. The twin has another value in the place of the
    one that is asked for, which is the wrong answer. Named positions: key and value (of the pair asked for) and end.

    Args:
        n: number of examples.
        seed: a number, or a `random.Random` to draw from.
        pairs: pairs to remember. asked: questions, of different keys.
        keys, values: words to draw from, each a single piece; none in both.

    Raises:
        TaskError: n below 1, too few words, words in both sets or of several pieces, more questions than pairs.

    >>> example = mqar(1, seed=0, pairs=2)[0]
    >>> example.prompt, example.answer
    ('island whistle kettle monkey kettle', ' monkey')
    """
    check_common(n, "all")
    keys, values = list(dict.fromkeys(keys)), list(dict.fromkeys(values))
    _check(pairs, len(keys), len(values) - 1)
    if not 1 <= asked <= pairs:
        raise TaskError(f"{asked} of {pairs} keys cannot be asked for")
    if set(keys) & set(values):
        raise TaskError(f"{sorted(set(keys) & set(values))[0]!r} is both a key and a value")
    for word in (*keys, *values):
        if pieces(word) != [word]:
            raise TaskError(f"{word!r} is not a single word", hint="pass words without spaces or punctuation")
    rng = make_rng(seed)
    examples = []
    for _ in range(n):
        shown, (*given, other) = rng.sample(keys, pairs), rng.sample(values, pairs + 1)
        order = rng.sample(range(pairs), asked)
        words = [word for pair in zip(shown, given, strict=True) for word in pair]
        for i in order[:-1]:
            words += [shown[i], given[i]]
        last = order[-1]
        prompt = " ".join([*words, shown[last]])
        changed = 2 * last + 1
        positions = {"key": 2 * last, "value": changed, "end": len(words)}
        examples.append(
            Example(
                prompt,
                swap_words(prompt, {changed: other}),
                (f" {given[last]}",),
                (f" {other}",),
                positions,
                (changed,),
            )
        )
    settings = {"seed": seed_setting(seed), "pairs": pairs, "asked": asked}
    return Task("mqar", tuple(examples), SOURCE, settings)


def mqar_tokens(
    n: int, seed: int, *, length: int = 64, pairs: int = 4, vocab: int = 8192, power: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Token ids and labels [row, position] of sequences in which every key is asked for once, for training and tests.

    The first 2·pairs tokens are the pairs: keys are ids of the lower half of the vocabulary (from 1 on), values of the
    upper half. Then each key comes again at an even distance: slot g (of two tokens) is chosen with probability
    proportional to (g + 1)^(power − 1). The label there is the key's value, −100 everywhere else; all other tokens
    are 0.

    Raises:
        TaskError: n below 1, 4·pairs above the length, an odd length, a power not above 0, a vocabulary too small.

    >>> ids, labels = mqar_tokens(2, seed=0, length=16, pairs=4, vocab=64)
    >>> ids.shape, (labels != IGNORE).sum(1).tolist()
    (torch.Size([2, 16]), [4, 4])
    """
    check_common(n, "all")
    half = vocab // 2
    _check(pairs, half - 1, vocab - half)
    if 4 * pairs > length or length % 2:
        raise TaskError(f"{pairs} pairs and their questions need an even length of at least {4 * pairs}, not {length}")
    if not power > 0:
        raise TaskError(f"power is {power}; it must be above 0")
    generator = torch.Generator().manual_seed(seed)

    def sample(count: int, k: int, weights: Tensor | None = None) -> Tensor:
        weights = torch.ones(count) if weights is None else weights
        return torch.multinomial(weights.expand(n, -1), k, generator=generator)

    keys, values = 1 + sample(half - 1, pairs), half + sample(vocab - half, pairs)
    slots = (length - 2 * pairs) // 2
    places = 2 * pairs + 2 * sample(slots, pairs, torch.arange(1, slots + 1, dtype=torch.float64) ** (power - 1))
    ids, labels = torch.zeros(n, length, dtype=torch.long), torch.full((n, length), IGNORE)
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
    return ids.scatter(1, places, keys), labels.scatter(1, places, values)


def _check(pairs: int, n_keys: int, n_values: int) -> None:
    if pairs < 1 or pairs > min(n_keys, n_values):
        raise TaskError(
            f"{pairs} pairs cannot be drawn from {max(n_keys, 0)} keys and {max(n_values, 0)} values",
            hint="choose fewer pairs, from 1 on, or pass more words",
        )
