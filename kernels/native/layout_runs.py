"""A block-sparse layout as the C++ library wants it: per strip of queries, runs of keys with a word of bits per key.

Layouts that are not exact to the block take one word per strip and key while the runs are made: N²/8 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kernels.layouts import Layout
from workbench.kernels.masks import Mask


@dataclass(frozen=True)
class LayoutRuns:
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
    def of(cls, mask: Mask, strip: int) -> LayoutRuns:
        """The runs of a mask's layout, for strips of this many queries."""
        layout = mask.layout
        assert layout is not None
        if layout.exact:
            words, width = _words_of_blocks(layout, mask.n_queries, strip), layout.block
        else:
            words, width = _words_of_keys(layout, mask, strip), 1
        everybody = torch.full((words.shape[1],), -1, dtype=torch.int64, device="cpu")
        last = mask.n_queries - strip * (words.shape[1] - 1)
        if last < 64:
            everybody[-1] = (1 << last) - 1
        if strip < 64:
            everybody[:-1] = (1 << strip) - 1
        kind = torch.where(words == 0, 0, torch.where(words == everybody[:, None], 2, 1))  # 0 hidden, 2 all see it
        before = torch.nn.functional.pad(kind[..., :-1], (1, 0))
        after = torch.nn.functional.pad(kind[..., 1:], (0, 1))
        at = ((kind > 0) & (kind != before)).nonzero()
        stop = ((kind > 0) & (kind != after)).nonzero()[:, 2] + 1
        start, stop = at[:, 2] * width, (stop * width).clamp(max=mask.n_keys)
        full = kind[tuple(at.T)] == 2
        lengths = torch.where(full, 0, stop - start)
        word = torch.where(full, -1, lengths.cumsum(0) - lengths)
        per_key = words.repeat_interleave(width, dim=2)[..., : mask.n_keys]
        needed = (kind == 1).repeat_interleave(width, dim=2)[..., : mask.n_keys]
        counts = torch.zeros(words.shape[:2], dtype=torch.int64, device="cpu").index_put_(
            (at[:, 0], at[:, 1]), torch.ones(len(at), dtype=torch.int64, device="cpu"), accumulate=True
        )
        ends = counts.flatten().cumsum(0).view_as(counts)
        first = torch.cat(((ends[:, :1] - counts[:, :1]), ends), dim=1)
        return cls(first.contiguous(), start.int(), stop.int(), word, per_key[needed].contiguous())


def _words_of_blocks(layout: Layout, n_queries: int, strip: int) -> Tensor:
    """[layout, strip, key block] words, where blocks are visible as a whole."""
    rows = torch.arange(n_queries, device="cpu") // layout.block
    seen = layout.blocks()[:, rows]
    return _packed(seen, strip)


def _words_of_keys(layout: Layout, mask: Mask, strip: int) -> Tensor:
    """[layout, strip, key] words, strip by strip."""
    every = torch.arange(layout.n_layouts, device="cpu")
    found = []
    for first in range(0, mask.n_queries, strip):
        queries = slice(first, min(first + strip, mask.n_queries))
        found.append(_packed(layout.visible(queries, slice(0, mask.n_keys), every), strip))
    return torch.cat(found, dim=1)


def _packed(seen: Tensor, strip: int) -> Tensor:
    """[layout, query, n] bool to words [layout, strip, n]: bit l for the l-th query of a strip."""
    rows = torch.nn.functional.pad(seen, (0, 0, 0, -seen.shape[1] % strip)).unflatten(1, (-1, strip))
    words = torch.zeros(rows.shape[0], rows.shape[1], rows.shape[3], dtype=torch.int64, device="cpu")
    for lane in range(strip):
        words |= rows[:, :, lane].long() << lane
    return words
