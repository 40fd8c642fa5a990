"""Statistics of |A| on a GPU, for recurrences whose heads fade as a whole: by the kernels of softmaxes.

|A[i, j]| = |q_i·k_j| exp(G_i − G_j), with G the sums of log decays, is in each row the softmax of ln |q_i·k_j| − G_j.
Some rows at a time, so that G counts from the first of them and stays small where weights are not nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from workbench.kernels.engines import unknown
from workbench.kernels.masks import Mask
from workbench.kernels.plan import Pass
from workbench.kernels.softmax_problem import SoftmaxProblem
from workbench.kernels.statistics import Options
from workbench.kernels.streaming import Denominators
from workbench.kernels.triton import engine
from workbench.kernels.triton.call import AT, ROWS

_FORGOTTEN = -100.0  # a log decay of which nothing is left in float32, small enough for sums of it to be exact
_NAMES = {*ROWS, *AT, "peak_key", "received", "received_mean"}


@dataclass(frozen=True)
class Magnitudes:
    """|A| of one recurrence.

    Args:
        q, k: [batch, group, position, d]; the heads are split evenly among the groups of each.
        log_decay: [batch, head, position]; None for no decay. n_heads: of all.
        rows: how many are taken at a time: where G grows to 2ⁿ within them, weights are exact to 2ⁿ⁻²⁴.
    """

    q: Tensor
    k: Tensor
    log_decay: Tensor | None
    n_heads: int
    rows: int = 128

    def refusal(self, names: Sequence[str], options: Options) -> str | None:
        """Why the kernels cannot make these here; None if they can."""
        if self.log_decay is not None and self.log_decay.dim() == 4:
            return "the kernels take decays of whole heads, not of channels"
        why = unknown(names, options, _NAMES, ("tokens", "token_before", "sink_keys", "n_top", "block"))
        return why or engine.refusal(self._rows(slice(0, 1), None), names, options)

    def collect(
        self, each: Pass, options: Options, total: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Denominators | None]:
        """The raw sums of one pass, and the denominators where it finds them.

        Args:
            total: [batch, head, query] Σ |A| of each row, from an earlier pass.
        """
        n = self.q.shape[2]
        received = self.q.new_zeros(self.q.shape[0], self.n_heads, n, dtype=torch.float64)
        several: dict[str, list[Tensor]] = {}
        for start in range(0, n, self.rows):
            rows = slice(start, min(start + self.rows, n))
            for name, part in engine.raw(self._rows(rows, total), each.statistics, options).items():
                if name == "received":
                    received[..., : rows.stop] += part
                else:
                    several.setdefault(name, []).append(part)
        raw = {name: torch.cat(parts, -1) for name, parts in several.items()}
        if {"received", "received_mean"} & set(each.statistics):
            raw["received"] = received
        lse = raw.pop("lse", None)
        if not each.finds_denominators or lse is None:
            return raw, None
        return raw, Denominators((lse.double() + self._fades).exp(), self._signed)

    def _rows(self, rows: slice, total: Tensor | None) -> SoftmaxProblem:
        """Some rows as a softmax over the keys up to the last of them."""
        each = self.n_heads // self.q.shape[1]
        q = self.q[:, :, rows].repeat_interleave(each, dim=1)
        mask = Mask(q.shape[2], rows.stop, causal=True, offset=rows.start)
        bias = (self._sums[:, :, rows.start, None] - self._sums[:, :, : rows.stop]).float()
        lse = None if total is None else total[:, :, rows].log().sub(self._fades[:, :, rows]).float().clamp(min=-1e20)
        return SoftmaxProblem(q, self.k[:, :, : rows.stop], mask, 1.0, key_bias=bias, lse=lse, of_magnitudes=True)

    @cached_property
    def _sums(self) -> Tensor:
        """G, [batch, head, position] float64."""
        if self.log_decay is None:
            return self.q.new_zeros(self.q.shape[0], self.n_heads, self.q.shape[2], dtype=torch.float64)
        return self.log_decay.double().clamp(min=_FORGOTTEN).cumsum(-1)

    @cached_property
    def _fades(self) -> Tensor:
        """G of each row from the first of those that are taken with it."""
        sums = self._sums
        first = torch.arange(sums.shape[2], device=sums.device) // self.rows * self.rows
        return sums - sums[:, :, first]

    @property
    def _signed(self) -> Tensor:
        """[batch, head, query] Σ A of each row, in linear time."""
        from workbench.kernels.recurrent.triton.by_head import Sums

        q, k = (t.repeat_interleave(self.n_heads // t.shape[1], dim=1) for t in (self.q, self.k))
        ones = torch.ones_like(q[..., :1])
        return Sums(self.log_decay, q.dtype)(q, k, ones)[0].squeeze(-1)
