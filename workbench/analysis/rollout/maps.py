"""Maps of one attention and its residual stream, from patterns and values: each row says where a position is from.

A map's row is made when it is asked for, a few queries at a time: memory grows with the length alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from workbench.analysis.logits.norms import Norm
from workbench.kernels.patterns import Pattern

_KEYS = 512  # at a time
_NUMBERS = 1 << 22  # of vectors of one tile


class Map(Protocol):
    """Shares of keys, and of the stream itself, in what queries are behind an attention; rows sum to 1."""

    def rows(self, queries: slice) -> tuple[Tensor, Tensor]:
        """[query, key] and what stays at the query [query], in float64."""


def tiles(pattern: Pattern, queries: slice, width: int = _KEYS) -> Iterator[tuple[slice, Tensor]]:
    """Keys and the weights [head, query, key] of the first example, for all keys that these queries may see."""
    heads = slice(0, pattern.n_heads)
    make = pattern.maker(slice(0, 1), heads, False)
    for keys in pattern.mask.key_tiles(queries, width, heads):
        yield keys, make(queries, keys)[0][0].nan_to_num(0.0)


@dataclass(frozen=True)
class WeightsMap:
    """The mean of the heads' weights, and a fixed share for the stream: Abnar & Zuidema 2020, section 3."""

    pattern: Pattern
    residual: float

    def rows(self, queries: slice) -> tuple[Tensor, Tensor]:
        """[query, key] and what stays at the query [query]."""
        found = _zeros(self.pattern, queries)
        for keys, p in tiles(self.pattern, queries):
            found[:, keys] = p.double().mean(0)
        return shares((1 - self.residual) * found, torch.full_like(found[:, 0], self.residual))


@dataclass(frozen=True)
class Vectors:
    """An attention as a sum of vectors: query i is y_i = scale_i Σ_j Σ_h α_ij^h u_j^h + own_i + what no token gave.

    Attributes:
        values: [kv head, key, width]. w_o: [head, width, d_model]. norm: on what heads write; see `Sublayer.norm`.
        scale: [query] of that norm, frozen; ones without. own: [query, d_model] the stream's own part, behind the norm
            where that is on the stream. whole: [query, d_model] y.
        joined: whether queries and keys are the same positions, so that the two parts of a position add up first.
    """

    pattern: Pattern
    values: Tensor
    w_o: Tensor
    norm: Norm | None
    scale: Tensor
    own: Tensor
    whole: Tensor
    joined: bool

    def written(self, keys: slice, dtype: torch.dtype) -> Tensor:
        """u [key, head, d_model]: what each head would write from each key, with the weight 1."""
        group = self.w_o.shape[0] // self.values.shape[0]
        values = self.values[:, keys].to(dtype).repeat_interleave(group, 0)
        return linear(self.norm, torch.einsum("hkw,hwd->khd", values, self.w_o.to(dtype)))


def linear(norm: Norm | None, vectors: Tensor) -> Tensor:
    """What a norm with a frozen scale makes of a part of what it is given, up to that scale."""
    return vectors if norm is None else norm.centre(vectors) * norm.gain.to(vectors)


class NormsMap:
    """Lengths of the vectors that a query is a sum of: Kobayashi et al. 2021 (arXiv 2109.07152).

    ‖Σ_h α^h u_j^h‖² = αᵀ G_j α with the Gram matrix G_j [head, head] of a key, so that no vector is made for a pair.
    """

    def __init__(self, vectors: Vectors) -> None:
        self.of = vectors
        n_heads, n_keys = vectors.pattern.n_heads, vectors.pattern.n_keys
        self.gram = torch.zeros(n_keys, n_heads, n_heads, dtype=torch.float64, device=vectors.own.device)
        self.across = torch.zeros(n_keys, n_heads, dtype=torch.float64, device=vectors.own.device)
        step = max(1, _NUMBERS // vectors.w_o[:, 0].numel())
        for start in range(0, n_keys, step):
            keys = slice(start, min(start + step, n_keys))
            u = vectors.written(keys, torch.float64)
            self.gram[keys] = u @ u.mT
            if vectors.joined:
                self.across[keys] = (u @ vectors.own[keys].double()[..., None])[..., 0]

    def rows(self, queries: slice) -> tuple[Tensor, Tensor]:
        """[query, key] and what stays at the query [query]."""
        of, found = self.of, _zeros(self.of.pattern, queries)
        for keys, p in tiles(of.pattern, queries):
            alpha = (p.double() * of.scale[queries, None]).permute(2, 1, 0)  # [key, query, head]
            squared = ((alpha @ self.gram[keys]) * alpha).sum(-1)
            if of.joined:
                at, key = _diagonal(queries, keys)
                own = of.own[queries].double()[at].square().sum(-1)
                squared[key, at] += 2 * (alpha[key, at] * self.across[keys][key]).sum(-1) + own
            found[:, keys] = squared.clamp_min(0).sqrt().T
        stays = torch.zeros_like(found[:, 0]) if of.joined else of.own[queries].double().norm(dim=-1)
        return shares(found, stays)


@dataclass(frozen=True)
class ProximityMap:
    """By how much nearer y is to a vector than to nothing, ‖y‖₁ − ‖y − T‖₁ if positive: Ferrando et al. 2022 (ALTI)."""

    of: Vectors

    def rows(self, queries: slice) -> tuple[Tensor, Tensor]:
        """[query, key] and what stays at the query [query]."""
        of, found = self.of, _zeros(self.of.pattern, queries)
        whole, own = of.whole[queries].to(of.pattern.dtype), of.own[queries].to(of.pattern.dtype)
        length = whole.double().abs().sum(-1)
        width = max(1, _NUMBERS // whole.numel())
        for keys, p in tiles(of.pattern, queries, width):
            u = of.written(keys, of.pattern.dtype)
            vectors = (p * of.scale[queries, None].to(p)).permute(2, 1, 0) @ u  # [key, query, d_model]
            if of.joined:
                at, key = _diagonal(queries, keys)
                vectors[key, at] += own[at]
            found[:, keys] = _nearer(length[:, None], vectors.sub_(whole).abs_().sum(-1).double().T)
        far = (whole - own).abs().sum(-1).double()
        return shares(found, torch.zeros_like(length) if of.joined else _nearer(length, far))


def shares(keys: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """Parts as shares of their sum; where all are zero, the stream keeps all."""
    total = keys.sum(-1) + stays
    none = total <= 0
    total = torch.where(none, 1.0, total)
    return keys / total[:, None], torch.where(none, 1.0, stays / total)


def _nearer(length: Tensor, left: Tensor) -> Tensor:
    return (length - left).clamp_min(0)


def _zeros(pattern: Pattern, queries: slice) -> Tensor:
    return torch.zeros(queries.stop - queries.start, pattern.n_keys, dtype=torch.float64, device=pattern.device)


def _diagonal(queries: slice, keys: slice) -> tuple[Tensor, Tensor]:
    """Rows and columns of a tile in which query and key are the same position."""
    start = max(queries.start, keys.start)
    both = torch.arange(start, max(start, min(queries.stop, keys.stop)))
    return both - queries.start, both - keys.start
