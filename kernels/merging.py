"""Join the statistics of shards of the keys, as when several devices hold a part each, into those of the whole row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.statistics import STATISTICS

_AVERAGED = ("distance",)
_SUMMED = ("current", "previous", "induction")


def merge_rows(shards: Sequence[dict[str, Tensor]], starts: Sequence[int]) -> dict[str, Tensor]:
    """Row statistics over all keys from those over shards of them; exact, whatever the split.

    A shard that holds keys from position s on is streamed as a pattern of its own with `Mask(offset=offset - s)`.
    Column statistics need no merging: stream each shard with `lse=` the merged one, and join them along the keys.

    Args:
        shards: per shard, the same row statistics, `lse` among them. `sink` is that of the first visible key.
        starts: the position of each shard's first key, ascending.

    Raises:
        CaptureError: no lse, different statistics, one that is no row statistic, or starts that do not fit.

    >>> a, b = {"lse": torch.zeros(1, 1, 1)}, {"lse": torch.zeros(1, 1, 1)}
    >>> merge_rows([a, b], [0, 4])["lse"].exp().item()
    2.0
    """
    _check(shards, starts)
    lse = torch.stack([shard["lse"].double() for shard in shards])
    whole = torch.logsumexp(lse, dim=0)
    weight = torch.where(whole > -torch.inf, (lse - whole).exp(), 0.0)  # mass of each shard, [shard, b, h, q]
    dead = whole == -torch.inf

    def stacked(name: str) -> Tensor:
        return torch.stack([shard[name].double() for shard in shards]).nan_to_num(0.0)

    def over_shards(values: Tensor) -> Tensor:
        return (weight * values).sum(0)

    def rows(value: Tensor) -> Tensor:
        return torch.where(dead, torch.nan, value)

    merged: dict[str, Tensor] = {}
    for name, first in shards[0].items():
        if name == "lse":
            value = whole
        elif name == "entropy":  # of the parts, and of the choice between them
            value = rows(over_shards(stacked(name)) - torch.xlogy(weight, weight).sum(0))
        elif name == "effective_keys":
            value = rows(1 / (weight.square() / stacked(name).clamp(min=1.0)).sum(0))
        elif name == "distance_var":
            mean = stacked("distance")
            spread = (mean - over_shards(mean)).square()
            value = rows(over_shards(stacked(name) + spread))
        elif name in _AVERAGED or name in _SUMMED:
            value = rows(over_shards(stacked(name)))
        elif name == "sink":
            alive = lse > -torch.inf
            value = rows(over_shards(stacked(name) * (alive & (alive.cumsum(0) == 1))))
        elif name == "peak":
            value = rows((weight * stacked(name)).amax(0))
        elif name == "peak_key":
            best = (weight * stacked("peak")).argmax(0, keepdim=True)
            key = torch.stack([shard[name] + start for shard, start in zip(shards, starts, strict=True)])
            value = torch.where(dead, -1, key.gather(0, best)[0])
        elif name == "top_keys_weight":
            value = _top(shards, starts, weight)[0]
        elif name == "top_keys_index":
            value = _top(shards, starts, weight)[1]
        else:
            raise AssertionError(f"{name} passed the check")
        merged[name] = value.to(first.dtype)
    return merged


def _top(shards: Sequence[dict[str, Tensor]], starts: Sequence[int], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and keys of the largest of all shards."""
    n = max(shard["top_keys_weight"].shape[-1] for shard in shards)
    weights = torch.cat([s["top_keys_weight"].double() * w[..., None] for s, w in zip(shards, weight, strict=True)], -1)
    known = [shard["top_keys_index"] for shard in shards]
    index = torch.cat([torch.where(i < 0, i, i + start) for i, start in zip(known, starts, strict=True)], -1)
    best, order = weights.topk(n, dim=-1)
    return best, torch.where(best > 0, index.gather(-1, order), -1)


def _check(shards: Sequence[dict[str, Tensor]], starts: Sequence[int]) -> None:
    if not shards or len(shards) != len(starts):
        raise CaptureError(f"{len(shards)} shards and {len(starts)} starts")
    if list(starts) != sorted(set(starts)):
        raise CaptureError(f"the shards' starts {list(starts)} do not ascend")
    names = set(shards[0])
    needs = (
        {"lse"} | ({"peak"} if "peak_key" in names else set()) | ({"distance"} if "distance_var" in names else set())
    )
    for shard in shards:
        if set(shard) != names or not needs <= names:
            raise CaptureError(
                f"a shard has {', '.join(sorted(shard))}",
                hint=f"all need the same, {', '.join(sorted(needs))} among them",
            )
    rows = {name for name, s in STATISTICS.items() if s.axes == "query"} | {"top_keys_weight", "top_keys_index"}
    wrong = sorted(names - rows | names & {"signed_mass"})
    if wrong:
        raise CaptureError(
            f"{', '.join(wrong)} cannot be merged", hint="stream each shard's columns with lse= the merged one"
        )
