"""What each statistic of a pattern means: its name, its shape, and the dense float64 definition that is the truth.

p is one row A[b, h, i, :] over the keys that query i may see. A query that sees no key has no distribution: its row
statistics are NaN, its `lse` is -inf, its keys are -1, and it adds nothing to column statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from workbench.errors import CaptureError, nearest
from workbench.kernels.masks import Mask

Axes = Literal["query", "key", "query top", "block"]
VALUE_WEIGHTED = "value_weighted_"
_UNWEIGHTED = {VALUE_WEIGHTED + "lse", VALUE_WEIGHTED + "signed_mass"}


@dataclass(frozen=True)
class Statistic:
    """One named reduction of a pattern.

    Attributes:
        axes: what follows [batch, head]: "query", "key", "query top" or "block" (query blocks x key blocks).
        positional: whether it compares query and key positions, so that it exists for self-attention only.
        unit: unit of the value, for axes and legends.
    """

    name: str
    axes: Axes
    unit: str
    meaning: str
    positional: bool = False


STATISTICS: dict[str, Statistic] = {
    s.name: s
    for s in (
        Statistic("lse", "query", "nats", "log of the softmax denominator"),
        Statistic("entropy", "query", "nats", "−Σ p ln p"),
        Statistic("peak", "query", "mass", "largest weight"),
        Statistic("peak_key", "query", "position", "key of the largest weight"),
        Statistic("effective_keys", "query", "keys", "1 / Σ p²"),
        Statistic("distance", "query", "tokens", "mean of |i−j|", positional=True),
        Statistic("distance_var", "query", "tokens²", "variance of |i−j|", positional=True),
        Statistic("sink", "query", "mass", "weight on the first visible key, or on a given set of keys"),
        Statistic("current", "query", "mass", "weight on the query's own position", positional=True),
        Statistic("previous", "query", "mass", "weight on the position before", positional=True),
        Statistic("induction", "query", "mass", "weight on keys that follow an earlier copy of the token", True),
        Statistic("signed_mass", "query", "share", "Σ A / Σ |A|: 1 where no weight is negative"),
        Statistic("received", "key", "mass", "Σ over queries of the weight on a key"),
        Statistic("received_mean", "key", "mass", "received, divided by the number of queries that see the key"),
        Statistic("top_keys", "query top", "mass", "the n largest weights of a row and their keys"),
        Statistic("pooled_mean", "block", "mass", "mass on a block of keys, averaged over a block of queries"),
        Statistic("pooled_max", "block", "mass", "largest weight in a block"),
    )
}
"""Every statistic by name. Each but `lse` also exists as `value_weighted_<name>`: p·‖v‖ renormalised per row."""


@dataclass(frozen=True)
class Options:
    """What some statistics need besides the pattern.

    Attributes:
        tokens: [batch, key] integer ids, for `induction`.
        token_before: [batch] ids of the token that the first key follows, where a cache has forgotten its key; None if
            the first key begins the sequence.
        sink_keys: keys whose joint mass is the `sink`; None for the first visible key of each row.
        n_top: how many keys `top_keys` keeps.
        block: edge of a `pooled_*` block, in tokens.
    """

    tokens: Tensor | None = None
    sink_keys: tuple[int, ...] | None = None
    n_top: int = 8
    block: int = 16
    token_before: Tensor | None = None

    def __post_init__(self) -> None:
        if self.n_top < 1 or self.block < 1:
            raise CaptureError(f"n_top and block are at least 1, not {self.n_top} and {self.block}")

    def ids(self, n_batch: int, n_queries: int, n_keys: int, offset: int) -> Tensor:
        """The ids [batch, 1 + key] of the token before each key and of the last key, for queries from `offset` on.

        Raises:
            CaptureError: some query is none of the keys, or the ids are missing or too few.
        """
        if offset < 0 or offset + n_queries > n_keys:
            raise CaptureError(
                f"induction needs its queries among the keys, not {n_queries} queries from {offset} on of {n_keys} keys"
            )
        if self.tokens is None:
            raise CaptureError('"induction" compares tokens and needs their ids', hint="pass tokens=input_ids")
        if tuple(self.tokens.shape) != (n_batch, n_keys):
            raise CaptureError(
                f"the token ids are not [batch, key] = [{n_batch}, {n_keys}]",
                shape=self.tokens.shape,
                hint="pass one row of ids per batch entry, as long as the keys",
            )
        no_token = (self.tokens.min() - 1).expand(n_batch)
        before = no_token if self.token_before is None else self.token_before.to(self.tokens)
        return torch.cat((before[:, None], self.tokens), dim=1)

    def sinks(self, n_keys: int) -> list[int]:
        """The `sink_keys`, or the error that names those that are no keys."""
        keys = list(self.sink_keys or ())
        if not keys or any(not -n_keys <= key < n_keys for key in keys):
            raise CaptureError(f"sink_keys {keys} are not keys of a map with {n_keys} keys")
        return keys


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple without repeats; an unknown one is an error that suggests the nearest.

    >>> check_names(["entropy", "value_weighted_peak"])
    ('entropy', 'value_weighted_peak')
    """
    if isinstance(names, str):
        raise CaptureError("statistics are a list of names, not one string", hint=f'write statistics=["{names}"]')
    unique = tuple(dict.fromkeys(names))
    for name in unique:
        base = name.removeprefix(VALUE_WEIGHTED)
        if base not in STATISTICS or name in _UNWEIGHTED:
            raise CaptureError(f'there is no statistic "{name}"', hint=nearest(base, list(STATISTICS)))
    return unique


def output_names(name: str) -> tuple[str, ...]:
    """Names of the tensors that a statistic produces: `top_keys` gives an index and a weight."""
    return (f"{name}_index", f"{name}_weight") if name.endswith("top_keys") else (name,)


def previous_copies(ids: Tensor, queries: slice, keys: slice, offset: int = 0) -> Tensor:
    """[batch, q, k] bool: key j follows an earlier copy of query i's token (token[j−1] = token[i], j−1 < i).

    Args:
        ids: [batch, 1 + key], as `Options.ids` gives them.
        offset: absolute position of query row 0.

    >>> previous_copies(torch.tensor([[-1, 7, 8, 7]]), slice(2, 3), slice(0, 3)).tolist()
    [[[False, True, False]]]
    """
    i = torch.arange(queries.start, queries.stop, device=ids.device)[:, None] + offset
    j = torch.arange(keys.start, keys.stop, device=ids.device)[None, :]
    return (ids[:, 1 + i] == ids[:, None, keys]) & (j <= i)


def dense(
    pattern: Tensor,
    names: Sequence[str],
    mask: Mask,
    *,
    lse: Tensor | None = None,
    options: Options | None = None,
    by_magnitude: bool = False,
) -> dict[str, Tensor]:
    """The definitions, on a whole pattern in float64. This is the truth that streaming is compared with.

    Args:
        pattern: [batch, head, query, key]; zero where a key is hidden.
        names: statistics; `value_weighted_` names are the caller's business (pass the weighted pattern).
        mask: which keys each query sees.
        lse: [batch, head, query], passed through for `lse`.
        by_magnitude: speak of |A| normalised per row; a row without weight counts as one that sees no key.

    >>> A = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    >>> dense(A, ["entropy", "received"], Mask(2, 2, causal=True))["received"].tolist()
    [[[1.5, 0.5]]]
    """
    options = options or Options()
    p = pattern.double()
    n_batch, n_heads, n_q, n_k = p.shape
    whole = slice(0, n_q), slice(0, n_k), slice(0, n_batch), slice(0, n_heads)
    seen = mask.visible(*whole)
    seen = torch.ones(n_q, n_k, dtype=torch.bool) if seen is None else seen
    seen = seen.to(p.device).expand_as(p)
    alive = seen.any(-1)
    i = torch.arange(n_q, device=p.device)[:, None] + mask.offset
    j = torch.arange(n_k, device=p.device)[None, :]
    out: dict[str, Tensor] = {}
    signed, size = p.sum(-1), p.abs().sum(-1)
    if by_magnitude:
        p, alive = torch.where(size[..., None] > 0, p.abs() / size[..., None], 0.0), alive & (size > 0)

    def rows(value: Tensor, dead: float = torch.nan) -> Tensor:
        return torch.where(alive, value, torch.full_like(value, dead))

    for name in names:
        if name == "lse":
            if lse is None:
                raise CaptureError("a pattern without scores has no lse")
            out[name] = rows(lse.double(), -torch.inf)
        elif name == "entropy":
            out[name] = rows(-torch.xlogy(p, p).sum(-1))
        elif name == "peak":
            out[name] = rows(p.amax(-1))
        elif name == "peak_key":
            out[name] = torch.where(alive, p.argmax(-1), -1)
        elif name == "effective_keys":
            out[name] = rows(1 / p.square().sum(-1))
        elif name in ("distance", "distance_var"):
            away = (i - j).abs().double()
            mass = p.sum(-1)
            mean = (p * away).sum(-1) / mass
            spread = (p * (away - mean[..., None]).square()).sum(-1) / mass
            out[name] = rows(mean if name == "distance" else spread)
        elif name == "sink" and options.sink_keys is not None:
            out[name] = rows(p[..., list(options.sink_keys)].sum(-1))
        elif name == "sink":
            out[name] = rows(p.gather(-1, seen.to(torch.uint8).argmax(-1, keepdim=True)).squeeze(-1))
        elif name == "current":
            out[name] = rows((p * (i == j)).sum(-1))
        elif name == "previous":
            out[name] = rows((p * (i - 1 == j)).sum(-1))
        elif name == "induction":
            ids = options.ids(n_batch, n_q, n_k, mask.offset)
            copies = previous_copies(ids, slice(0, n_q), slice(0, n_k), mask.offset)
            out[name] = rows((p * copies[:, None]).sum(-1))
        elif name == "signed_mass":
            out[name] = rows(signed / size)
        elif name == "received":
            out[name] = p.sum(-2)
        elif name == "received_mean":
            out[name] = p.sum(-2) / seen.sum(-2)
        elif name == "top_keys":
            weight, index = p.topk(min(options.n_top, n_k), dim=-1)
            out["top_keys_index"] = torch.where(weight > 0, index, -1)
            out["top_keys_weight"] = weight
        elif name == "pooled_mean":
            sums = _blocks(p, options.block).sum((-1, -3))
            sizes = torch.full((sums.shape[-2],), options.block)
            sizes[-1] = n_q - options.block * (len(sizes) - 1)
            out[name] = sums / sizes[:, None]
        elif name == "pooled_max":
            out[name] = _blocks(p, options.block).amax((-1, -3))
        else:
            raise CaptureError(f'there is no statistic "{name}"', hint=nearest(name, list(STATISTICS)))
    return out


def _blocks(p: Tensor, size: int) -> Tensor:
    """[b, h, Q, size, K, size] with zero padding at the far edges."""
    n_q, n_k = p.shape[-2:]
    padded = torch.nn.functional.pad(p, (0, -n_k % size, 0, -n_q % size))
    return padded.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
