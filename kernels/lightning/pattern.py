"""The map that lightning attention applies: decayed products of queries and keys, signed and not normalised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_attention, state_dtype
from workbench.kernels.history import own
from workbench.kernels.lightning import chunked
from workbench.kernels.lightning.decay import check_decay, log_decays, powers
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern
from workbench.kernels.recurrent import RecurrentPattern
from workbench.kernels.recurrent.magnitudes import FORGOTTEN, Magnitudes
from workbench.kernels.source import FusedMagnitudes


class LightningPattern(Pattern):
    """A[i, j] = λ^(i−j) q_i·k_j for j ≤ i (Lightning Attention-2, arXiv 2401.04658).

    Entries have either sign and rows do not sum to one: statistics are those of |A| normalised per row.

    Args:
        q: [batch, head, position, d].
        k: [batch, kv head, position, d]; heads are a multiple of kv heads.
        decay: [head], λ in (0, 1]; `decays(n_heads)` if None.
        values: [batch, kv head, position, width], kept for `value_weighted`; optional.

    Raises:
        CaptureError: sizes that do not fit, inputs that are not finite, a decay outside (0, 1].

    >>> one = torch.ones(1, 1, 3, 1)
    >>> LightningPattern(one, one, torch.tensor([0.5])).dense()[0, 0].tolist()
    [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.5, 1.0]]
    """

    signed = True
    normalised = False
    position_axes: ClassVar[Mapping[str, int]] = {"q": 2, "k": 2, "values": 2}

    def __init__(self, q: Tensor, k: Tensor, decay: Tensor | None = None, *, values: Tensor | None = None) -> None:
        check_attention(q, k)
        if q.shape[2] != k.shape[2]:
            raise CaptureError(
                f"lightning attention reads q and k at the same positions, not {q.shape[2]} and {k.shape[2]}",
                hint="hand an earlier segment over as initial_state=, not as more keys",
            )
        n = q.shape[2]
        super().__init__((*q.shape[:3], n), Mask(n, n, causal=True), state_dtype(q), q.device)
        self.n_kv_heads = k.shape[1]
        self.q, self.k, self.values = own(q), own(k), None if values is None else own(values)
        self.decay = check_decay(decay, q.shape[1])

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """No facts; q, k and decay, and the values where they are kept."""
        tensors = {"q": self.q, "k": self.k, "decay": self.decay}
        return {}, tensors if self.values is None else tensors | {"values": self.values}

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> LightningPattern:
        """The pattern from its `state`."""
        return cls(tensors["q"], tensors["k"], tensors["decay"], values=tensors.get("values"))

    @property
    def horizon(self) -> Tensor:
        """[head] float64: 1 / (1 − λ), the positions a head looks back on average weights; inf where λ = 1.

        >>> one = torch.ones(1, 2, 1, 1)
        >>> LightningPattern(one, one, torch.tensor([0.75, 1.0])).horizon.tolist()
        [4.0, inf]
        """
        return 1 / (1 - self.decay)

    def as_recurrence(self) -> RecurrentPattern:
        """With the constant decay at every position."""
        decay = log_decays(self.decay, self.device)[None, :, None].expand(self.n_batch, -1, self.n_keys)
        k = self.k.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)
        values = (
            None if self.values is None else self.values.repeat_interleave(self.n_heads // self.values.shape[1], dim=1)
        )
        made = RecurrentPattern(self.q, k, decay, values=values)
        made.before = self.before
        return made

    def fused_magnitudes(self) -> FusedMagnitudes | None:
        """On a GPU the kernels of softmaxes."""
        return None if self.device.type == "cpu" else self.magnitudes()

    def magnitudes(self) -> Magnitudes:
        """|A| for the kernels, wherever its tensors are."""
        return Magnitudes(self.q, self.k, self.n_heads, self._fades, self._row_sums)

    def _fades(self) -> Tensor:
        """[1, head, position] float64: i · ln λ."""
        rates = log_decays(self.decay, self.device, FORGOTTEN)
        return (torch.arange(self.n_keys, device=self.device) * rates[:, None])[None]

    def _row_sums(self) -> Tensor:
        """[batch, head, query] Σ A, in linear time."""
        return self.as_recurrence().apply(self.q.new_ones(*self.shape[:2], self.n_keys, 1)).squeeze(-1)

    def check(self) -> None:
        """As the base does; on a device the sums of rows tell of queries and keys, without reading them."""
        if self.device.type == "cpu":
            super().check()

    def from_state(self, state: Tensor) -> Tensor:
        """[batch, head, query, width] that the rows read of a state [batch, head, d, width] from before the first."""
        after = torch.arange(1, self.n_queries + 1, device=self.decay.device)
        faded = powers(self.decay, after, self.q.new_empty(0, dtype=self.dtype))
        return self.q.to(self.dtype) @ state.to(self.dtype) * faded[..., None]

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of A, in a fresh tensor."""
        which = list(range(self.n_heads)) if heads is None else self._checked(heads)
        index = torch.tensor(which, dtype=torch.long, device=self.device)
        q = self.q[:, :, queries][:, index].to(self.dtype)
        k = self.k[:, :, keys][:, index // (self.n_heads // self.n_kv_heads)].to(self.dtype)
        tile = q @ k.transpose(-1, -2)
        if tile.numel() == 0:
            return tile
        # One power for every i − j in the tile, smallest first. Windows of them, read backwards, are its rows.
        away = torch.arange(queries.start - keys.stop + 1, queries.stop - keys.start)
        faded = powers(self.decay[index.cpu()], away.clamp(min=0), tile) * (away >= 0).to(tile)
        return tile.mul_(faded.unfold(-1, k.shape[2], 1).flip(-1))

    def column_mass(self, chunk: int = 64) -> Tensor:
        """[batch, head, key] Σ_i A[i, j], signed, in O(N·d).

        It is k_j · Σ_{i≥j} λ^(i−j) q_i: lightning attention backwards in time, with k asking, q answering and ones for
        values.

        >>> one = torch.ones(1, 1, 3, 1)
        >>> LightningPattern(one, one, torch.tensor([0.5])).column_mass().flatten().tolist()
        [1.75, 1.5, 1.0]
        """
        keys = self.k.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1).flip(2)
        ones = torch.ones(*self.shape[:3], 1, dtype=self.dtype, device=self.device)
        return chunked.forward(keys, self.q.flip(2), ones, self.decay, None, chunk)[0].squeeze(-1).flip(2)
