"""What the language models read: Python's standard library as bytes, streams to recall from, and strings to copy.

Two works are of one thing alone: pairs to recall (`mqar_batch`), and strings that come again (`induction_batch`).
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.kernels.checks import check_range
from workbench.tasks.mqar import mqar_tokens

BOS, VOCABULARY, IGNORE = 0, 128, -100
HELD_OUT = ("calendar", "configparser", "difflib", "fractions", "heapq", "shlex", "statistics", "textwrap")
"""Modules that no model is trained on; figures are of these."""
TUNING = ("bisect", "cmd", "gettext", "queue", "sched", "tarfile")
"""Modules on which rates are chosen, and nothing else."""
_LETTERS = tuple(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")


@dataclass(frozen=True, eq=False)
class Corpus:
    """Bytes of modules, those above 126 as 127, and where their lines begin.

    Attributes:
        ids: [byte]. starts: [line], where each begins. digest: SHA-256 of the bytes: another Python is another corpus.
    """

    ids: Tensor
    starts: Tensor
    digest: str


@cache
def corpus(split: str = "training") -> Corpus:
    """The top-level modules of the standard library of the Python that runs: "training", "tuning" or "held out".

    Raises:
        WorkbenchError: no such split, or a library without sources.

    >>> len(corpus("held out").digest)
    64
    """
    named = {"training": (), "tuning": TUNING, "held out": HELD_OUT}
    if split not in named:
        raise WorkbenchError(f'there is no split "{split}"', hint='"training", "tuning" or "held out"')
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    paths = [path for path in paths if not path.stem.startswith("_sysconfigdata")]  # it differs between machines
    kept = named[split]
    texts = [path.read_bytes() for path in paths if (path.stem in kept if kept else path.stem not in HELD_OUT + TUNING)]
    if not texts:
        raise WorkbenchError("this Python's standard library has no sources to read")
    whole = b"\n".join(texts)
    ids = _plain(torch.frombuffer(bytearray(whole), dtype=torch.uint8).long())
    return Corpus(ids, (ids == 10).nonzero().flatten() + 1, hashlib.sha256(whole).hexdigest())


def text_ids(text: str) -> Tensor:
    """[1, byte]: a text as the language models read it, behind BOS.

    >>> text_ids("ab é").tolist()
    [[0, 97, 98, 32, 127, 127]]
    """
    return F.pad(_plain(torch.tensor(list(text.encode()), dtype=torch.long)), (1, 0), value=BOS)[None]


def _plain(ids: Tensor) -> Tensor:
    return ids.where((ids > 0) & (ids < 127), 127)


def text_batch(
    source: Corpus, n: int, length: int, random: torch.Generator, made: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Inputs and labels, both [n, length]: code from the beginning of a line on, behind BOS.

    Args:
        made: the share of the rows that is `recall` and `copying`, half each.
    """
    n_made = round(n * made)
    starts = source.starts[source.starts < len(source.ids) - length]
    at = starts[torch.randint(len(starts), (n - n_made,), generator=random)]
    rows = torch.cat([torch.full((len(at), 1), BOS), source.ids[at[:, None] + torch.arange(length)]], dim=1)
    parts = [(rows[:, :-1], rows[:, 1:])]
    if n_made:
        parts += [recall(n_made - n_made // 2, length, random), copying(n_made // 2, length, random)]
    inputs, labels = zip(*parts, strict=True)
    return torch.cat(inputs), torch.cat(labels)


def recall(n: int, length: int, random: torch.Generator, n_keys: int | None = None) -> tuple[Tensor, Tensor]:
    """A stream of letters, each with its digit; the digit of a letter that came before counts (MQAR as a stream).

    Args:
        n_keys: letters of a row, 1 to 52; from 2 to 26, few as often as many, if None.

    Raises:
        WorkbenchError: fewer letters than one, or more than there are.

    >>> inputs, labels = recall(1, 6, torch.Generator().manual_seed(0), n_keys=1)
    >>> letter, digit = inputs[0, 1:3].tolist()
    >>> inputs[0].tolist() == [BOS, letter, digit, letter, digit, letter]
    True
    >>> labels[0].tolist() == [IGNORE, IGNORE, IGNORE, digit, IGNORE, digit]
    True
    """
    if n_keys is not None:
        check_range("n_keys", n_keys, 1, len(_LETTERS))
    if n_keys is None:
        keys = (2 * 13 ** torch.rand(n, 1, generator=random)).round()
    else:
        keys = torch.full((n, 1), float(n_keys))
    order = torch.rand(n, len(_LETTERS), generator=random).argsort(1)
    letters, digits = torch.tensor(_LETTERS)[order], torch.randint(48, 58, order.shape, generator=random)
    which = (torch.rand(n, length // 2 + 1, generator=random) * keys).long()
    known = (which[:, :, None] == which[:, None, :]).tril(-1).any(2)
    counts = torch.stack([torch.zeros_like(known), known], dim=2).flatten(1)[:, :length]
    pairs = torch.stack([letters.gather(1, which), digits.gather(1, which)], dim=2).flatten(1)
    rows = F.pad(pairs, (1, 0), value=BOS)[:, : length + 1]
    return rows[:, :-1], rows[:, 1:].where(counts, IGNORE)


def needle(n: int, length: int, random: torch.Generator, depth: float) -> tuple[Tensor, Tensor]:
    """Such a stream in which one letter comes twice, somewhere and at the end; its digit at the end alone counts.

    Args:
        depth: where it comes first, as a share of the way to the end, from 0 up to 1.

    Raises:
        WorkbenchError: another depth.

    >>> inputs, labels = needle(1, 20, torch.Generator().manual_seed(0), depth=0.0)
    >>> letter, digit = inputs[0, 1:3].tolist()
    >>> inputs[0].tolist().count(letter), inputs[0, -1] == letter, labels[0, -1] == digit
    (2, tensor(True), tensor(True))
    """
    if not 0 <= depth < 1:
        raise WorkbenchError(f"depth={depth} is no share of the way to the end", hint="from 0 up to 1, without 1")
    n_pairs = length // 2
    order = torch.rand(n, len(_LETTERS), generator=random).argsort(1)
    letters, digits = torch.tensor(_LETTERS)[order], torch.randint(48, 58, order.shape, generator=random)
    which = torch.randint(1, 26, (n, n_pairs), generator=random)  # others, of as many as `recall` has at most
    which[:, int(depth * (n_pairs - 1))] = which[:, -1] = 0
    pairs = torch.stack([letters.gather(1, which), digits.gather(1, which)], dim=2).flatten(1)
    rows = F.pad(pairs, (1, 0), value=BOS)
    labels = torch.full((n, 2 * n_pairs), IGNORE)
    labels[:, -1] = rows[:, -1]
    return rows[:, :-1], labels


def mqar_batch(
    n: int, length: int, random: torch.Generator, pairs: tuple[int, ...] = (4, 8, 16), power: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall (arXiv 2312.04927): pairs, and later each key again, whose value counts.

    Args:
        pairs: of a row; as many rows of each, and n is rounded up. power: see `tasks.mqar.mqar_tokens`; with 1 keys
            come again anywhere, with less soon as a rule.
    """
    if not pairs:
        raise WorkbenchError("pairs=() names no number of pairs", hint="(4, 8, 16): as many rows of each")
    each = -(-n // len(pairs))
    seeds = torch.randint(2**31, (len(pairs),), generator=random).tolist()
    made = [
        mqar_tokens(each, seed, length=length, pairs=many, vocab=VOCABULARY, power=power)
        for many, seed in zip(pairs, seeds, strict=True)
    ]
    inputs, labels = zip(*made, strict=True)
    return torch.cat(inputs), torch.cat(labels)


def induction_batch(n: int, length: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Strings of 4 to 24 different letters, at most 3/8 of the length, again and again, short as often as long.

    What came before counts. As no letter comes twice in a string, the one before the next says all: an induction head
    is enough.

    Raises:
        WorkbenchError: a length in which a string of four letters cannot come again.

    >>> inputs, labels = induction_batch(1, 11, torch.Generator().manual_seed(0))
    >>> inputs[0, 4:].tolist() == inputs[0, :7].tolist(), labels[0, :4].tolist()
    (True, [-100, -100, -100, -100])
    >>> labels[0, 4:10].tolist() == inputs[0, 5:].tolist()
    True
    """
    check_range("length", length, 11, None, hint="four letters that come again")
    longest = min(24, 3 * length // 8)
    period = (4 * ((longest + 1) / 4) ** torch.rand(n, 1, generator=random)).long().clamp(4, longest)
    letters = torch.tensor(_LETTERS[:26])[torch.rand(n, 26, generator=random).argsort(1)]
    at = torch.arange(length + 1)
    rows = letters.gather(1, at % period)
    return rows[:, :-1], rows[:, 1:].where(at[1:] > period, IGNORE)


def copying(n: int, length: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random string of 4 to length / 2 bytes again and again, short as often as long; what came before counts."""
    period = (4 * (length / 8) ** torch.rand(n, 1, generator=random)).long().clamp(min=1)
    at = torch.arange(length)
    rows = torch.randint(33, 127, (n, length), generator=random).gather(1, at % period)
    return torch.cat([torch.full((n, 1), BOS), rows[:, :-1]], dim=1), rows.where(at > period, IGNORE)


def repeated(inputs: Tensor, n: int = 4) -> Tensor:
    """[row, position] bool: whether the last n bytes came before in the row, so that the next one could be known."""
    length = inputs.shape[1]
    joined = torch.zeros_like(inputs)
    for back in range(n):
        joined = joined + F.pad(inputs, (back, 0))[:, :length] * VOCABULARY**back
    return (joined[:, :, None] == joined[:, None, :]).tril(-1).any(2)
