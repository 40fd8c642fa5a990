"""Join the statistics of shards of the keys, as when several devices hold a part each, into those of the whole row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.statistics import STATISTICS, known
from workbench.kernels.statistics.shards import Shards


def merge_rows(shards: Sequence[dict[str, Tensor]], starts: Sequence[int]) -> dict[str, Tensor]:
    """Row statistics over all keys from those over shards of them; exact, whatever the split.

    A shard that holds keys from position s on is streamed as a pattern of its own with `Mask(offset=offset - s)`.
    Column statistics need no merging: stream each shard with `lse=` the merged one, and join them along the keys.

    Args:
        shards: per shard, the same row statistics, `lse` among them. `sink` is that of the first visible key.
        starts: the position of each shard's first key, ascending.

    Raises:
        CaptureError: no lse, different statistics, one that is no row statistic, or starts that do not fit.

    >>> import torch
    >>> a, b = {"lse": torch.zeros(1, 1, 1)}, {"lse": torch.zeros(1, 1, 1)}
    >>> merge_rows([a, b], [0, 4])["lse"].exp().item()
    2.0
    """
    _check(shards, starts)
    joined, merged = Shards(shards, starts), {}
    for name in _statistics(shards[0]):
        for out, value in known(name).merged(joined).items():
            merged[out] = value.to(shards[0][out].dtype)
    return {name: merged[name] for name in shards[0]}


def _statistics(shard: Iterable[str]) -> list[str]:
    """Names of the statistics whose outputs these are; those that are no statistic's stay as they are."""
    of = {out: name for name, each in STATISTICS.items() for out in each.outputs}
    return list(dict.fromkeys(of.get(out, out) for out in shard))


def _check(shards: Sequence[dict[str, Tensor]], starts: Sequence[int]) -> None:
    if not shards or len(shards) != len(starts):
        raise CaptureError(f"{len(shards)} shards and {len(starts)} starts")
    if list(starts) != sorted(set(starts)):
        raise CaptureError(f"the shards' starts {list(starts)} do not ascend")
    names = _statistics(shards[0])
    wrong = sorted(name for name in names if name not in STATISTICS or STATISTICS[name].merge is None)
    needs = {"lse"}.union(*(STATISTICS[name].merges_with for name in names if name in STATISTICS))
    for shard in shards:
        if set(shard) != set(shards[0]) or not needs <= set(names):
            raise CaptureError(
                f"a shard has {', '.join(sorted(shard))}",
                hint=f"all need the same, {', '.join(sorted(needs))} among them",
            )
    if wrong:
        raise CaptureError(
            f"{', '.join(wrong)} cannot be merged", hint="stream each shard's columns with lse= the merged one"
        )
