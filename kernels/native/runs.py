"""A block-sparse layout as the C++ library wants it: per strip of queries, runs of keys with a word of bits per key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kernels.masks import Mask


@dataclass(frozen=True)
class Runs:
    """The runs of all strips.

    Attributes:
        run_of: [layout, strip + 1] int64: where the runs of a strip begin.
        run_start, run_stop: [run] int32 keys.
        run_word: [run] int64: where its words begin; -1 if every query of the strip sees all of it.
        words: [...] int64: bit l of a key's word says whether query l of the strip sees it.
    """

    run_of: Tensor
    run_start: Tensor
    run_stop: Tensor
    run_word: Tensor
    words: Tensor

    @classmethod
    def of(cls, mask: Mask, strip: int) -> Runs:
        """The runs of a mask's layout, for strips of this many queries."""
        layout = mask.layout
        assert layout is not None
        bits = torch.ones(strip, dtype=torch.int64) << torch.arange(strip)
        of: list[list[int]] = []
        starts: list[int] = []
        stops: list[int] = []
        at: list[int] = []
        words: list[Tensor] = []
        n_words = 0
        for which in range(layout.n_layouts):
            blocks = layout.blocks()[which]
            row = [len(starts)]
            for first in range(0, mask.n_queries, strip):
                queries = slice(first, min(first + strip, mask.n_queries))
                visited = blocks[queries.start // layout.block : -(-queries.stop // layout.block)].any(0)
                for start, stop in _stretches(visited, layout.block, mask.n_keys):
                    seen = layout.visible(queries, slice(start, stop), torch.tensor([which]))[0]
                    starts.append(start)
                    stops.append(stop)
                    if bool(seen.all()):
                        at.append(-1)
                        continue
                    at.append(n_words)
                    words.append((seen.long() * bits[: seen.shape[0], None]).sum(0))
                    n_words += stop - start
                row.append(len(starts))
            of.append(row)
        return cls(
            torch.tensor(of, dtype=torch.int64),
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(stops, dtype=torch.int32),
            torch.tensor(at, dtype=torch.int64),
            torch.cat(words) if words else torch.zeros(1, dtype=torch.int64),
        )


def _stretches(visited: Tensor, block: int, n_keys: int) -> list[tuple[int, int]]:
    """Stretches of keys that neighbouring visited blocks make: [(start, stop)]."""
    edges = torch.diff(
        visited.int(), prepend=torch.zeros(1, dtype=torch.int32), append=torch.zeros(1, dtype=torch.int32)
    )
    starts, stops = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    return [(a * block, min(z * block, n_keys)) for a, z in zip(starts.tolist(), stops.tolist(), strict=True)]
