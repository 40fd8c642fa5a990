"""The map of a delta rule whose erasing looks for something else than the key that is written: RWKV-7."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_finite
from workbench.kernels.history import own
from workbench.kernels.recurrent.chunk_maps import Chunks
from workbench.kernels.recurrent.fades import SMALLEST_LOG
from workbench.kernels.recurrent.pattern import RecurrentPattern

_CHUNK = 16


class GeneralDeltaPattern(RecurrentPattern):
    """A of h_t = (diag(exp g_t) + b_t a_tᵀ) h_{t−1} + k_t v_tᵀ, read by y_t = q_t·h_t (RWKV-7, arXiv 2503.14456).

    a says what of the old state is looked for, b what takes its place; the delta rule of `RecurrentPattern` is
    a = −β exp(g) k and b = k with β k written. Else as there.

    Args:
        q, k, a, b: [batch, head, position, d]. log_decay: g, at most zero, like them.
        values: [batch, head, position, width], kept for `value_weighted`; optional.

    Raises:
        CaptureError: sizes that do not fit, inputs that are not finite, a log_decay above zero.

    >>> one = torch.ones(1, 1, 3, 1)
    >>> GeneralDeltaPattern(one, one, one * 0, a=-one, b=one).dense()[0, 0].tolist()  # each write erases the last
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """

    position_axes: ClassVar[Mapping[str, int]] = {"q": 2, "k": 2, "log_decay": 2, "a": 2, "b": 2, "values": 2}

    def __init__(
        self, q: Tensor, k: Tensor, log_decay: Tensor, *, a: Tensor, b: Tensor, values: Tensor | None = None
    ) -> None:
        for name, tensor in {"log_decay": log_decay, "a": a, "b": b}.items():
            if tensor.shape != k.shape:
                raise CaptureError(f"{name} must be {list(k.shape)}, as k is", shape=tensor.shape)
            check_finite(name, tensor)
        super().__init__(q, k, log_decay, values=values)
        self.a, self.b = own(a), own(b)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """No facts; q, k, log_decay, a and b, and values where there are any."""
        tensors = super().state()[1]
        return {}, tensors | {"a": self.a, "b": self.b}

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> GeneralDeltaPattern:
        """The pattern from its `state`."""
        q, k, log_decay, a, b = (tensors[name] for name in ("q", "k", "log_decay", "a", "b"))
        return cls(q, k, log_decay, a=a, b=b, values=tensors.get("values"))

    @cached_property
    def _chunks(self) -> Chunks:
        with torch.autocast(self.device.type, enabled=False):
            return self._cut(slice(0, self.n_keys), min(_CHUNK, self.n_keys))

    def _run(self, v: Tensor, state: Tensor | None, at: slice) -> tuple[Tensor, Tensor]:
        length = at.stop - at.start
        chunks = self._chunks if length == self.n_keys else self._cut(at, min(_CHUNK, length))
        first = v.new_zeros(*v.shape[:2], self.q.shape[-1], v.shape[-1]) if state is None else state
        return chunks.run(v[:, :, at], first)

    def _cut(self, at: slice, length: int) -> Chunks:
        assert self.log_decay is not None
        parts = (self.q, self.k, self.log_decay, self.a, self.b)
        q, k, g, a, b = (t[:, :, at].to(self.dtype if t is not self.log_decay else torch.float64) for t in parts)
        return chunked(q, k, g, a, b, length)

    def content(self) -> RecurrentPattern:
        """The map without decay: what queries, keys and erasing alone would make of it."""
        none = torch.zeros_like(self.k)
        return GeneralDeltaPattern(self.q, self.k, none, a=self.a, b=self.b, values=self.values)


def chunked(q: Tensor, k: Tensor, log_decay: Tensor, a: Tensor, b: Tensor, length: int) -> Chunks:
    """The chunks of the recurrence, [batch, head, position, d] each; as those of a delta rule.

    With u_t = a_t·h_{t−1}, what is found of the old state: u = T (â h + M_k v) where T = (I − M_b)⁻¹, and
    M_x[i, j] = a_i·x_j for j < i, decayed from j to i − 1.
    """
    short = -q.shape[2] % length

    def cut(t: Tensor) -> Tensor:
        filled = torch.cat((t, t.new_zeros(*t.shape[:2], short, t.shape[3])), dim=2) if short else t
        return filled.unflatten(2, (-1, length))

    q, k, a, b = (cut(t) for t in (q, k, a, b))
    total = cut(log_decay.double().clamp(min=SMALLEST_LOG)).cumsum(3)
    before = torch.cat((torch.zeros_like(total[..., :1, :]), total[..., :-1, :]), dim=-2)
    whole = total[..., -1:, :]
    until = (whole - total).to(q.dtype).exp()
    carry = whole.squeeze(-2).to(q.dtype).exp()
    found = torch.cat((_between(a, before, k, total).tril(-1), a * before.to(q.dtype).exp()), dim=-1)
    system = -_between(a, before, b, total).tril(-1)
    solved = torch.linalg.solve_triangular(system, found, upper=False, unitriangular=True)
    of_values, of_state = solved[..., :length], solved[..., length:]  # u as of the chunk's values, and of the old state
    through = _between(q, total, b, total).tril()
    within = _between(q, total, k, total).tril() + through @ of_values
    reads = q * total.to(q.dtype).exp() + through @ of_state
    writes = k * until + of_values.mT @ (b * until)
    return Chunks(reads, writes, within, torch.diag_embed(carry) + (b * until).mT @ of_state)


def _between(x: Tensor, at_x: Tensor, y: Tensor, at_y: Tensor) -> Tensor:
    """[..., i, j] Σ_s x_i[s] exp(G_x,i[s] − G_y,j[s]) y_j[s]; where the exponent is positive, nothing of use."""
    left = (at_x[..., :, None, :] - at_y[..., None, :, :]).clamp(max=0).to(x.dtype).exp()
    return torch.einsum("...is,...ijs,...js->...ij", x, left, y)
