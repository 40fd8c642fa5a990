"""An additive map: what each position adds to a number, as a gate or an output, that other positions add up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_finite, check_tensor
from workbench.kernels.composed.nested import put_together, taken_apart
from workbench.kernels.history import own
from workbench.kernels.patterns import Pattern


class AdditivePattern(Pattern):
    """C[c, i, j] = g[c, i] Σ_h Σ_w W[c, h, w] A[h, i, j] v[h, j, w]: what position j adds to channel c at i.

    A map times its values, read out into channels and multiplied by a factor, before the sum over positions is taken.
    The rows add up to what A makes of v, W and g, which is `total`; biases are no part of it. It is exact with A, W and
    g as they are, but no derivative where they depend on the input. Its own values are ones.

    Args:
        base: A; it is in `factors` as "read".
        read: v, [batch, kv head, key, width].
        readout: W, [channel, head, width]; None where each head of width one is a channel.
        gates: g, [batch, channel, query]; None for none.

    Raises:
        CaptureError: sizes that do not fit, or numbers that are not finite.

    >>> from workbench.kernels.patterns import DensePattern
    >>> halves = DensePattern(torch.full((1, 1, 2, 2), 0.5))
    >>> AdditivePattern(halves, torch.tensor([[[[2.0], [4.0]]]])).dense()[0, 0].tolist()
    [[1.0, 2.0], [1.0, 2.0]]
    """

    signed = True
    normalised = False
    grade = "frozen"

    def __init__(self, base: Pattern, read: Tensor, readout: Tensor | None = None, gates: Tensor | None = None) -> None:
        b, h, n_queries, n_keys = base.shape
        kv = read.shape[1] if read.dim() == 4 and read.shape[1] and h % read.shape[1] == 0 else h
        width = read.shape[-1] if readout is not None else 1
        check_tensor("read", read, (b, kv, n_keys, width), "batch, kv head, key, width", base.device)
        n_channels = h if readout is None else len(readout)
        if readout is not None:
            check_tensor("readout", readout, (n_channels, h, width), "channel, head, width", base.device)
        if gates is not None:
            check_tensor("gates", gates, (b, n_channels, n_queries), "batch, channel, query", base.device)
        if base.mask.layout is not None or (base.mask.tensor is not None and base.mask.tensor.shape[1] > 1):
            raise CaptureError("an additive map is made of one whose heads see the same keys", shape=base.shape)
        super().__init__((b, n_channels, n_queries, n_keys), base.mask, base.dtype, base.device)
        self.base, self.read = base, own(read)
        self.readout = None if readout is None else own(readout)
        self.factor = None if gates is None else own(gates)
        self.check()

    @property
    def factors(self) -> Mapping[str, Pattern]:
        """The map that is read through."""
        return {"read": self.base}

    def check(self) -> None:
        """As the map that is read through does; and what it is multiplied with is finite."""
        self.base.check()
        for name, tensor in {"read": self.read, "readout": self.readout, "gates": self.factor}.items():
            if tensor is not None:
                check_finite(name, tensor)

    @property
    def total(self) -> Tensor:
        """[batch, channel, query] what the rows add up to, without the map."""
        z = self.base.apply(self.read)
        return self._gated(
            z.squeeze(-1) if self.readout is None else torch.einsum("bhqw,chw->bcq", z, self.readout.to(z)),
            slice(None), slice(0, self.n_queries), range(self.n_heads),
        )  # fmt: skip

    @property
    def row_sum(self) -> Tensor:
        """[batch, channel, query], as `total`."""
        return self.total

    def _gated(self, of_rows: Tensor, batch: slice, queries: slice, heads: Sequence[int]) -> Tensor:
        if self.factor is None:
            return of_rows
        gates = self.factor[batch, :, queries][:, list(heads)].to(of_rows)
        return of_rows * gates.view(*gates.shape, *[1] * (of_rows.dim() - 3))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Family and facts of the map that is read through; its tensors, what it reads, the readout and the gates."""
        facts, tensors = taken_apart(self.factors)
        held = {"read_values": self.read, "readout": self.readout, "gates": self.factor}
        return {"base": facts}, tensors | {name: t for name, t in held.items() if t is not None}

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> AdditivePattern:
        """The pattern from its `state`."""
        base = put_together(facts["base"], tensors)["read"]
        return cls(base, tensors["read_values"], tensors.get("readout"), tensors.get("gates"))

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, channel, q, k] of C; `heads` are channels."""
        which = range(self.n_heads) if heads is None else self._checked(heads)
        return self.tile_of(slice(None), queries, keys, which)

    def tile_of(self, batch: slice, queries: slice, keys: slice, heads: Sequence[int]) -> Tensor:
        """[b, c, q, k] for these batch entries."""
        group = self.base.n_heads // self.read.shape[1]
        read = self.read[batch, :, keys].to(self.dtype).repeat_interleave(group, dim=1)  # [b, h, k, w]
        if self.readout is None:
            weights = self.base.tile_of(batch, queries, keys, heads)
            made = weights * read[:, list(heads), None, :, 0]
        else:
            weights = self.base.tile_of(batch, queries, keys, range(self.base.n_heads))
            of_channel = torch.einsum("bhkw,chw->bchk", read, self.readout[list(heads)].to(self.dtype))
            made = torch.einsum("bhqk,bchk->bcqk", weights, of_channel)
        return self._gated(made, batch, queries, heads)
