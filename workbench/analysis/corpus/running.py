"""What an atlas adds up while it reads a corpus."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.corpus.measuring import SCORES, TOTALS, Rows, Seen
from workbench.analysis.corpus.result import CorpusAtlas

BINS = 512


@dataclass
class Sums:
    """Of all heads: every window's scores, histograms, totals, and the strongest looks so far.

    Attributes:
        windows: [window, score, head] of each batch. entropies, distances: [head, bin].
        totals: [quantity, head] as `Seen` has them.
        weights: [head, example]. places: [head, example, 3]. texts: by head, the words of each example.
        ids: [head, example, position] the window of each.
        done: how many windows. unknown: how many tokens stand for words that the tokenizer does not know.
        corpus: hash of the ids that were added.
    """

    heads: int
    length: int
    examples: int
    windows: list[Tensor] = field(default_factory=list)
    done: int = 0
    corpus: Any = field(default_factory=hashlib.sha256)
    unknown: int = 0

    def __post_init__(self) -> None:
        self.entropies = torch.zeros(self.heads, BINS, dtype=torch.int64)
        self.distances = torch.zeros(self.heads, BINS, dtype=torch.int64)
        self.totals = torch.zeros(len(TOTALS), self.heads, dtype=torch.float64)
        self.weights = torch.full((self.heads, self.examples), -1.0)
        self.places = torch.full((self.heads, self.examples, 3), -1)
        self.ids = torch.full((self.heads, self.examples, self.length), -1)
        self.texts: list[list[str]] = [[""] * self.examples for _ in range(self.heads)]

    @classmethod
    def of(cls, held: CorpusAtlas, corpus: Any) -> Sums:
        """Those that an atlas was made of, of a corpus with this hash."""
        made = cls(
            len(held.layers),
            held.length,
            held.weights.shape[1],
            [held.windows],
            len(held.windows),
            corpus,
            held.n_unknown,
        )
        made.entropies, made.distances, made.totals = (
            held.entropies.clone(),
            held.distances.clone(),
            held.totals.clone(),
        )
        made.weights, made.places, made.ids = held.weights.clone(), held.places.clone(), held.example_ids.clone()
        made.texts = [list(row) for row in held.texts]
        return made

    @property
    def entropy_range(self) -> float:
        """The entropy of a row that looks at all keys alike, in nats."""
        return math.log(self.length)

    def after(self, rows: Rows, several: Sequence[Seen], words: Words) -> Sums:
        """Those with a batch of windows added: what each site's heads did there.

        These stay as they are, so that an interrupt leaves whole batches.
        """
        made = replace(self, windows=[*self.windows], corpus=self.corpus.copy())
        made.entropies, made.distances, made.totals = (
            self.entropies.clone(),
            self.distances.clone(),
            self.totals.clone(),
        )
        made.weights, made.places, made.ids = self.weights.clone(), self.places.clone(), self.ids.clone()
        made.texts = [[*row] for row in self.texts]
        made.corpus.update(rows.ids.numpy().tobytes())
        made.unknown += int((~rows.known[:, rows.text]).sum())
        made._add(rows.ids, several, words)
        return made

    def _add(self, ids: Tensor, several: Sequence[Seen], words: Words) -> None:
        self.windows.append(torch.cat([seen.scores for seen in several], -1).float())
        self.totals += torch.cat([seen.totals for seen in several], -1)
        for counts, name, most in (
            (self.entropies, "entropy", self.entropy_range), (self.distances, "distance", float(self.length)),
        ):  # fmt: skip
            each = torch.cat([getattr(seen, name).transpose(0, 1).flatten(1) for seen in several])  # [head, value]
            bins = (each * (BINS / most)).long().clamp(0, BINS - 1)
            known = ~each.isnan()
            counts.scatter_add_(1, bins.where(known, 0), known.long())
        weight, query, key = (
            torch.cat([getattr(seen, name) for seen in several], 1).T for name in ("weight", "query", "key")
        )
        least = self.weights.min(1).values
        for head, at in (weight > least[:, None]).nonzero().tolist():  # few, once strong ones are found
            lowest = self.weights[head] == self.weights[head].min()
            slot = int(self.places[head, :, 0].where(lowest, -2).argmax())  # of equal looks the first stay
            if weight[head, at] <= self.weights[head, slot]:
                continue
            self.weights[head, slot] = weight[head, at]
            place = (at, int(query[head, at]), int(key[head, at]))
            self.places[head, slot] = torch.tensor((self.done + at, *place[1:]))
            self.texts[head][slot] = words.around(*place)
            self.ids[head, slot] = ids[at]
        self.done += weight.shape[1]

    def whole(self) -> Tensor:
        """[window, score, head]."""
        return torch.cat(self.windows) if self.windows else torch.zeros(0, len(SCORES), self.heads)

    def in_order(self, atlas: CorpusAtlas) -> CorpusAtlas:
        """The atlas with the strongest looks first, and of equal ones the first."""
        by_window = atlas.places[..., 0].argsort(dim=1, stable=True)
        order = by_window.gather(1, atlas.weights.gather(1, by_window).argsort(dim=1, descending=True, stable=True))
        texts = tuple(tuple(row[i] for i in each) for row, each in zip(atlas.texts, order.tolist(), strict=True))
        places, ids = (
            each.gather(1, order[..., None].expand(-1, -1, each.shape[2])) for each in (atlas.places, atlas.example_ids)
        )
        return replace(atlas, weights=atlas.weights.gather(1, order), places=places, texts=texts, example_ids=ids)


@dataclass(frozen=True)
class Words:
    """The tokens of a batch of windows, as text.

    Attributes:
        pieces: [batch][position].
    """

    pieces: Sequence[Sequence[str]]

    def around(self, window: int, query: int, key: int, near: int = 6) -> str:
        """The words around a query and its key, each marked; in one piece where they are close."""
        row = [f"⟦{text}⟧" if at in (query, key) else text for at, text in enumerate(self.pieces[window])]
        low, high = sorted((query, key))
        if high - low <= 2 * near:
            return " ".join(row[max(0, low - near) : high + near + 1])
        first, second = (" ".join(row[max(0, at - near) : at + near + 1]) for at in (low, high))
        return f"{first} … {second}"
