"""Running sums of a masking estimator, and the map with its standard error that they give at any time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.saliency.masks import Draw


@dataclass
class Sums:
    """Σ Z, Σ Z·s and Σ Z·s² per segment, where Z says whether a mask hides it and s is the mask's score.

    Memory grows with segments and output tokens, never with masks.

    Attributes:
        counts: per granularity [segment]. scores, squares: per granularity [output token, segment].
        token_counts: [output token], token_scores, token_squares: [output token, output token], of previous tokens.
        done: masks so far.
    """

    counts: list[Tensor]
    scores: list[Tensor]
    squares: list[Tensor]
    token_counts: Tensor
    token_scores: Tensor
    token_squares: Tensor
    done: int = 0

    @classmethod
    def empty(cls, n_tokens: int, sizes: Sequence[int]) -> Sums:
        """No mask yet."""
        return cls(
            [torch.zeros(n, dtype=torch.float64) for n in sizes],
            [torch.zeros(n_tokens, n, dtype=torch.float64) for n in sizes],
            [torch.zeros(n_tokens, n, dtype=torch.float64) for n in sizes],
            torch.zeros(n_tokens, dtype=torch.float64),
            torch.zeros(n_tokens, n_tokens, dtype=torch.float64),
            torch.zeros(n_tokens, n_tokens, dtype=torch.float64),
        )

    @classmethod
    def of(cls, state: dict[str, Any]) -> Sums:
        """The sums that `state` took apart, as copies."""
        counts, scores, squares = ([t.clone() for t in state[name]] for name in ("counts", "scores", "squares"))
        a, b, c = (state[name].clone() for name in ("token_counts", "token_scores", "token_squares"))
        return cls(counts, scores, squares, a, b, c, int(state["done"]))

    def state(self) -> dict[str, Any]:
        """The sums as tensors and numbers."""
        return {
            "counts": tuple(self.counts),
            "scores": tuple(self.scores),
            "squares": tuple(self.squares),
            "token_counts": self.token_counts,
            "token_scores": self.token_scores,
            "token_squares": self.token_squares,
            "done": self.done,
        }

    def add(self, draw: Draw, scores: Tensor) -> None:
        """Take the scores [mask, output token] of some masks of one granularity."""
        g, z, s = draw.granularity, draw.hidden.double(), scores.double().cpu()
        weighted = s * draw.weights[:, None]
        self.counts[g] += draw.weights @ z
        self.scores[g] += weighted.T @ z
        self.squares[g] += (weighted * s).T @ z
        if draw.tokens is not None:
            y = draw.tokens.double()
            self.token_counts += draw.weights @ y
            self.token_scores += weighted.T @ y
            self.token_squares += (weighted * s).T @ y
        self.done += len(scores)

    def maps(self, segments: Sequence[Tensor], *, exact: bool, visible: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """The map and its standard error, both [output token, position...] in float64.

        S = Σ_m Z_m s_m / Σ_m Z_m, over the masks of all granularities that hide the cell (SPES); 0 where none does. The
        error is that of a mean of independent scores, √(Σ Z (s − S)² / (N (N − 1))) with N = Σ Z; inf where fewer than
        two masks hide the cell, 0 for an enumeration. Where output k sees the first visible[k] positions alone, both
        are 0 at the others.
        """
        counts = _over(self.counts, segments)
        scores, squares = _over(self.scores, segments), _over(self.squares, segments)
        mean, error = _mean_and_error(counts, scores, squares, exact=exact)
        hidden = ~seen(visible, mean)
        return mean.masked_fill(hidden, 0.0), error.masked_fill(hidden, 0.0)

    def token_maps(self) -> tuple[Tensor, Tensor]:
        """The same for previous output tokens, [output token, output token], zero on and above the diagonal."""
        mean, error = _mean_and_error(self.token_counts, self.token_scores, self.token_squares, exact=False)
        return mean.tril(-1), error.tril(-1)


def seen(visible: Sequence[int], maps: Tensor) -> Tensor:
    """[output token, position...] of a map's cells, whether the output can depend on them; all if `visible` is empty.

    >>> seen((1, 2), torch.zeros(2, 2)).tolist()
    [[True, False], [True, True]]
    """
    if not len(visible):
        return torch.ones_like(maps, dtype=torch.bool)
    limits = torch.tensor(visible, device=maps.device)
    below = torch.arange(maps.shape[1], device=maps.device) < limits[:, None]
    return below.view(*below.shape, *[1] * (maps.dim() - 2)).expand_as(maps)


def _over(sums: Sequence[Tensor], segments: Sequence[Tensor]) -> Tensor:
    """Sums of segments at each cell, all granularities together."""
    parts = [one[..., cells] for one, cells in zip(sums, segments, strict=True)]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _mean_and_error(counts: Tensor, scores: Tensor, squares: Tensor, *, exact: bool) -> tuple[Tensor, Tensor]:
    some = counts > 0
    mean = torch.where(some, scores / counts.where(some, 1.0), 0.0)
    if exact:
        return mean, torch.zeros_like(mean)
    several = counts > 1
    spread = (squares - counts * mean.square()).clamp(min=0)
    error = (spread / (counts * (counts - 1)).where(several, 1.0)).sqrt()
    return mean, torch.where(several, error, torch.inf)
