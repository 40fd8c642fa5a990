"""Resample ablation: which other examples give an example their activations, and at which of their positions.

An example's donors are the other examples of the nearest length, in an order that a seeded hash of both contents makes
random; so they depend on what the examples are, and not on how they are batched, ordered or padded. Positions
correspond by their rank among the real ones, stretched to the donor's length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from workbench.errors import InterventionError

FEW, DRAWS, DRAWS_OF_FEW = 32, 4, 8
"""An example gets `DRAWS` donors; `DRAWS_OF_FEW` where there are fewer than `FEW` examples to draw from."""
_NO_CONTENT = ("attention_mask", "decoder_attention_mask", "position_ids", "decoder_position_ids", "labels")


@dataclass(frozen=True)
class Content:
    """What an example is.

    Attributes:
        digest: a hash of its real tokens, or of a spectrogram or image. lengths: real positions in each stream.
    """

    digest: bytes
    lengths: tuple[int, ...]

    @classmethod
    def of(
        cls, streams: Sequence[Tensor], others: Sequence[Tensor] = (), lengths: tuple[int, ...] | None = None
    ) -> Content:
        """From an example's real positions [position, ...] in each stream, and its other inputs."""
        held = [one.detach().cpu().contiguous() for one in (*streams, *others)]
        digest = blake2b(digest_size=16)
        for one in held:
            digest.update(f"{one.dtype}{list(one.shape)}".encode() + one.view(torch.uint8).numpy().tobytes())
        return cls(digest.digest(), tuple(map(len, streams)) if lengths is None else lengths)


def contents_of(batch: Mapping[str, Any]) -> list[Content]:
    """What each example of a batch of model inputs is: its inputs without padding, masks, positions and labels."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim() > 0}
    size = max((value.shape[0] for value in tensors.values() if value.dim() > 1), default=0)
    own = [name for name in sorted(tensors) if name not in _NO_CONTENT and len(tensors[name]) == size]
    found = []
    for i in range(size):
        rows, lengths = [], {}
        for name in own:
            row, prefix = tensors[name][i], "decoder_" if name.startswith("decoder_") else ""
            mask = tensors.get(f"{prefix}attention_mask")
            if mask is not None and mask.shape == tensors[name].shape[:2]:
                row = row[mask[i].bool()]
            if name == f"{prefix}input_ids" or (prefix not in lengths and row.dim() > 0):
                lengths[prefix] = len(row)
            rows.append(row)
        found.append(Content.of([], rows, tuple(lengths[prefix] for prefix in sorted(lengths))))
    return found


def n_draws(pool: Sequence[Content]) -> int:
    """How often each example is resampled from a pool: as often as every one finds others in it."""
    different = len({one.digest for one in pool})
    return max(1, min(DRAWS_OF_FEW if len(pool) < FEW else DRAWS, different - 1))


def choose_donors(
    examples: Sequence[Content], pool: Sequence[Content], seed: int, draws: int | None = None
) -> list[list[int]]:
    """For each example the places in the pool of its donors, nearest length first; as many for each.

    Args:
        examples: that are ablated. pool: that activations come from; those of an example's own content are left out.
        seed: of the hashes. draws: how many donors; `n_draws` by default.

    Raises:
        InterventionError: the pool has no example that differs.
    """
    wanted = n_draws(pool) if draws is None else draws
    by_length: dict[tuple[int, ...], list[int]] = {}
    for j, one in enumerate(pool):
        by_length.setdefault(one.lengths, []).append(j)
    found = []
    for number, own in enumerate(examples):
        chosen: list[int] = []
        gaps = sorted({_gap(own.lengths, lengths) for lengths in by_length})
        for gap in gaps:
            some = [j for lengths, js in by_length.items() if _gap(own.lengths, lengths) == gap for j in js]
            others = [j for j in some if pool[j].digest != own.digest]
            chosen += sorted(others, key=lambda j, own=own: _hash(seed, own, pool[j]))  # type: ignore[misc]
            if len(chosen) >= wanted:
                break
        if not chosen:
            raise InterventionError(
                f"example {number} cannot be resampled: among {len(pool)} there is no other that differs from it",
                hint="give more examples, or a reference of others",
            )
        found.append(chosen[:wanted])
    return found


def _gap(own: tuple[int, ...], other: tuple[int, ...]) -> int:
    return sum(abs(a - b) for a, b in zip_longest(own, other, fillvalue=0))


def _hash(seed: int, own: Content, other: Content) -> bytes:
    return blake2b(str(seed).encode() + b":" + own.digest + other.digest, digest_size=16).digest()


def aligned(real: Tensor, donors_real: Tensor) -> Tensor:
    """[example, position] the donor's position that corresponds to each.

    The first real position takes the donor's first, the last its last, those between the nearest rank. With one real
    position it takes the donor's last. Padding takes position 0, which nothing may depend on.

    Args:
        real: [example, position] bool. donors_real: [example, position of the donor] bool.

    >>> aligned(torch.tensor([[False, True, True, True]]), torch.tensor([[True, True, True, True, True]])).tolist()
    [[0, 0, 2, 4]]
    """
    own, other = real.sum(1, keepdim=True), donors_real.sum(1, keepdim=True)
    wanted = stretched(real.cumsum(1) - 1, own, other)
    places = donors_real.long().argsort(dim=1, descending=True, stable=True)  # real positions first, in their order
    return places.gather(1, wanted.clamp(max=donors_real.shape[1] - 1)) * real


def stretched(rank: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Ranks in a sequence of `other` real positions that correspond to ranks in one of `own`."""
    nearest = ((2 * rank * (other - 1) + (own - 1)) // (2 * (own - 1)).clamp_min(1)).clamp_min(0)
    return torch.where(own > 1, nearest, other - 1)
