"""Resample ablation: which other examples give an example their activations, and at which of their positions.

An example's donors are the other examples of the nearest length, in an order that a seeded hash of both contents makes
random; so they depend on what the examples are, and not on how they are batched, ordered or padded. Positions
correspond by their rank among the real ones, stretched to the donor's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from workbench.errors import InterventionError

FEW, DRAWS, DRAWS_OF_FEW = 32, 4, 8
"""By default an example gets `DRAWS` donors; `DRAWS_OF_FEW` where there are fewer than `FEW` examples."""


@dataclass(frozen=True)
class Content:
    """What an example is.

    Attributes:
        digest: a hash of its real tokens, or of a spectrogram or image. lengths: real positions in each stream.
    """

    digest: bytes
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, streams: Sequence[Tensor], others: Sequence[Tensor] = ()) -> Content:
        """From an example's real positions [position, ...] in each stream, and its other inputs."""
        held = [one.detach().cpu().contiguous() for one in (*streams, *others)]
        digest = blake2b(digest_size=16)
        for one in held:
            digest.update(f"{one.dtype}{list(one.shape)}".encode() + one.view(torch.uint8).numpy().tobytes())
        return cls(digest.digest(), tuple(len(stream) for stream in streams))


def choose_donors(
    examples: Sequence[Content], pool: Sequence[Content], seed: int, draws: int | None = None
) -> list[list[int]]:
    """For each example the places in the pool of its donors, nearest length first; as many for each.

    Args:
        examples: that are ablated. pool: that activations come from; those of an example's own content are left out.
        seed: of the hashes. draws: how many donors; see `DRAWS` for the default. Fewer where the pool has no more.

    Raises:
        InterventionError: the pool has no example that differs.
    """
    wanted = (DRAWS_OF_FEW if len(pool) < FEW else DRAWS) if draws is None else draws
    if wanted < 1:
        raise InterventionError(f"an example is resampled at least once, not {wanted} times")
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
    return [chosen[: min(map(len, found))] for chosen in found]


def _gap(own: tuple[int, ...], other: tuple[int, ...]) -> int:
    return sum(abs(a - b) for a, b in zip(own, other, strict=True))


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
    rank = real.cumsum(1) - 1
    stretched = ((2 * rank * (other - 1) + (own - 1)) // (2 * (own - 1)).clamp_min(1)).clamp(0)
    wanted = torch.where(own > 1, stretched, other - 1)
    places = donors_real.long().argsort(dim=1, descending=True, stable=True)  # real positions first, in their order
    return places.gather(1, wanted.clamp(max=donors_real.shape[1] - 1)) * real
