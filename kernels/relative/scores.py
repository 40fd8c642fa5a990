"""Scores before the softmax as a map of their own: signed, of one part of what a row's scores are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_number, check_tensor
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern


class ScorePattern(Pattern):
    """S[i, j] = scale · (q_i·k_j + q_i·R_δ + β_δ), δ = i − j, of those parts that are given; zero after the query.

    Args:
        shape: [batch, head, query, key]; the queries are the last of the keys.
        q: [batch, head, query, d], or [1, head, 1, d] where all queries are one vector.
        k: [batch, kv head, key, d]; None for no product with keys.
        table: R, [head, distance, d]; None for none. bias: β, [head, distance]; None for none.
        scale: of all parts.

    Raises:
        CaptureError: sizes that do not fit, no part, or fewer distances than keys.
    """

    signed = True
    normalised = False

    def __init__(
        self,
        shape: Sequence[int],
        *,
        q: Tensor | None = None,
        k: Tensor | None = None,
        table: Tensor | None = None,
        bias: Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        n_queries, n_keys = shape[2:]
        held = {"q": q, "k": k, "table": table, "bias": bias}
        first = next((t for t in held.values() if t is not None), None)
        if first is None or (q is None) != (k is None and table is None):
            raise CaptureError("scores are of queries with keys or a table, of a bias, or of both")
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        mask = Mask(n_queries, n_keys, causal=True, offset=n_keys - n_queries)
        super().__init__(shape, mask, dtype, first.device)
        check_tables(table, bias, self.n_heads, n_keys, first.device)
        self.n_kv_heads = self.n_heads if k is None else k.shape[1]
        self.scale = check_number("scale", scale)
        self.held = {name: t.detach() for name, t in held.items() if t is not None}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Shape and scale; the parts that there are, and the values where they are kept."""
        values = {} if self.values is None else {"values": self.values}
        return {"shape": list(self.shape), "scale": self.scale}, self.held | values

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> ScorePattern:
        """The pattern from its `state`."""
        parts = {name: tensors.get(name) for name in ("q", "k", "table", "bias")}
        made = cls(facts["shape"], scale=facts["scale"], **parts)
        made.values = tensors.get("values")
        return made

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of S, in a fresh tensor."""
        which = list(range(self.n_heads)) if heads is None else self._checked(heads)
        i = torch.arange(self.n_queries, device=self.device)[queries] + self.mask.offset
        back = i[:, None] - torch.arange(self.n_keys, device=self.device)[keys]
        held = {name: t.to(self.dtype) for name, t in self.held.items()}
        scores = torch.zeros(self.n_batch, len(which), *back.shape, dtype=self.dtype, device=self.device)
        if (q := held.get("q")) is not None:
            q = q.expand(self.n_batch, -1, self.n_queries, -1)[:, which][:, :, queries]
            if (k := held.get("k")) is not None:
                group = self.n_heads // self.n_kv_heads
                scores += q @ k[:, [head // group for head in which]][:, :, keys].mT
            if (table := held.get("table")) is not None:
                scores += by_distance(q @ table[which].mT, back)
        if (bias := held.get("bias")) is not None:
            scores += by_distance(bias[which][None, :, None].expand(-1, -1, len(i), -1), back)
        return (scores * self.scale).masked_fill_(back < 0, 0.0)


def by_distance(found: Tensor, back: Tensor) -> Tensor:
    """[batch, head, query, key] of what was found for each distance, [batch, head, query, distance].

    Args:
        back: [query, key], how far a key lies back; keys after the query are given the distance 0.
    """
    return found.gather(-1, back.clamp(min=0).expand(*found.shape[:2], -1, -1))


def check_tables(
    table: Tensor | None, bias: Tensor | None, n_heads: int, n_keys: int, device: torch.device, d: int | None = None
) -> None:
    """Raise a CaptureError unless the tables are of these heads, and of at least as many distances as keys."""
    for name, t, axes in (("table", table, 3), ("bias", bias, 2)):
        if t is None:
            continue
        if t.dim() != axes or t.shape[0] != n_heads or t.shape[1] < n_keys:
            wanted = "head, distance, d" if axes == 3 else "head, distance"
            raise CaptureError(
                f"the {name} must be [{wanted}] for {n_heads} heads and {n_keys} distances or more", shape=t.shape
            )
        check_tensor(name, t, tuple(t.shape) if d is None or axes == 2 else (*t.shape[:2], d), "", device)
