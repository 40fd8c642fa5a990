"""Tiles of a softmax, from queries and keys: masked scores, their exponentials, and log weights."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from workbench.kernels.masks import Mask, hidden_below
from workbench.kernels.softmax_problem import SoftmaxProblem
from workbench.kernels.source import RawTileMaker, TileMaker
from workbench.kernels.tile import BITS, LOG_FLOOR, Buffers, Space

HIDDEN = -1e30
"""Score of a hidden key: finite, so that differences of scores are never NaN."""
_LARGE = 64.0  # an lse from which on its product with log₂ e would be rounded too much


class SoftmaxTiles:
    """A `TileSource` over a problem; normalised tiles need its lse."""

    tile_scale = 2
    has_scores = True

    def __init__(self, problem: SoftmaxProblem) -> None:
        self.problem = problem

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, head, query, key)."""
        return self.problem.shape

    @property
    def mask(self) -> Mask:
        """Which keys each query may see."""
        return self.problem.mask

    @property
    def dtype(self) -> torch.dtype:
        """Of the tiles."""
        return self.problem.dtype

    @property
    def device(self) -> torch.device:
        """Of the tiles."""
        return self.problem.device

    @property
    def head_group(self) -> int:
        """How many neighbouring heads share keys and layout."""
        return self.problem.head_group

    @property
    def sinks(self) -> Tensor | None:
        """[head] logits that join the denominator only."""
        return self.problem.sinks

    def space(self) -> Space:
        """Sizes and mask counts, for the accumulators."""
        return self.problem.space()

    @property
    def _lse(self) -> Tensor:
        assert self.problem.lse is not None
        return self.problem.lse

    def tile(self, queries: slice, keys: slice, heads: list[int]) -> Tensor:
        """[batch, head, q, k] of the weights of some heads, in a fresh tensor."""
        problem = self.problem
        group = problem.shape[1] // problem.n_kv_heads
        index = self._index(heads)
        q = problem.q[:, index][:, :, queries].to(self.dtype)
        k = problem.k[:, self._index([head // group for head in heads])][:, :, keys].to(self.dtype)
        scores = (q @ k.transpose(-1, -2)).mul_(problem.scale)
        everything = slice(0, problem.shape[0])
        self._shape_scores(scores, queries, keys, everything, index)
        return scores.sub_(self._lse[:, index][:, :, queries, None]).exp_()

    def _index(self, heads: list[int]) -> slice | Tensor:
        """Heads as a slice where they are evenly spaced, which makes a view; a layout is asked for by numbers."""
        step = heads[1] - heads[0] if len(heads) > 1 else 1
        if self.mask.layout is None and step > 0 and heads == list(range(heads[0], heads[-1] + 1, step)):
            return slice(heads[0], heads[-1] + 1, step)
        return torch.tensor(heads, dtype=torch.long, device=self.device)

    def _shape_scores(self, scores: Tensor, queries: slice, keys: slice, batch: slice, heads: slice | Tensor) -> None:
        """Softcap, biases and mask on scaled products [b, h, q, k], in place; hidden keys become very negative."""
        if self.problem.softcap is not None:
            scores.div_(self.problem.softcap).tanh_().mul_(self.problem.softcap)
        if self.problem.key_bias is not None:
            scores.add_(self.problem.key_bias[batch][:, heads][:, :, None, keys])
        part = self.mask.cut(queries, keys, batch, heads)
        if part is not None and self.mask.additive:
            scores.add_(torch.where(part <= hidden_below(part.dtype), HIDDEN, part))
        elif part is not None:
            scores.add_(_hidden_unless(part))
        self._hide_by_rule(scores, queries, keys)
        laid_out = self.mask.laid_out(queries, keys, heads)
        if laid_out is not None and not bool(laid_out.all()):
            scores.add_(_hidden_unless(laid_out.to(scores.device)))

    def _hide_by_rule(self, scores: Tensor, queries: slice, keys: slice) -> None:
        """Hide by the positional rules. Tiles at the same distance from the diagonal share their rule."""
        at = (queries.start - keys.start, queries.stop - queries.start, keys.stop - keys.start)
        if at not in self._rules:
            rule = self.mask.rule(queries, keys, scores.device)
            if rule is None or bool(rule.all()):
                self._rules[at] = None
            else:
                columns = (~rule).any(0).nonzero()
                part = slice(int(columns[0]), int(columns[-1]) + 1)
                self._rules[at] = part, _hidden_unless(rule[:, part]).to(scores.dtype)
        found = self._rules[at]
        if found is not None:
            scores[..., found[0]].add_(found[1])

    @cached_property
    def _rules(self) -> dict[tuple[int, int, int], tuple[slice, Tensor] | None]:
        return {}

    def raw_maker(self, batch: slice, heads: slice) -> RawTileMaker:
        """A function that makes tiles [b, h, q, k] of masked scores in one reused buffer."""
        return self._score_maker(batch, heads, None, Buffers(1, self.dtype, self.device))

    def _score_maker(self, batch: slice, heads: slice, lse: Tensor | None, buffers: Buffers) -> RawTileMaker:
        """Tiles of masked scores, in the first buffer; of log₂ p where `lse` [batch, head, query] is given."""
        group = self.shape[1] // self.problem.n_kv_heads
        kv = slice(heads.start // group, -(-heads.stop // group))
        keys_t = self.problem.k[batch, kv].to(self.dtype).transpose(-1, -2).flatten(0, 1)
        plain = self.problem.softcap is None and self.problem.key_bias is None and not self.mask.additive
        less_lse = None if lse is None else lse[batch, heads, :, None].neg()
        factor = float(torch.tensor(self.problem.scale * BITS, dtype=self.dtype, device="cpu"))
        in_one_pass = plain and factor != 0 and less_lse is not None and bool((less_lse.abs() < _LARGE).all())
        if in_one_pass and less_lse is not None:  # times log₂ e, rounded as it is in the factor
            less_lse = (less_lse.double() * (factor / self.problem.scale)).to(self.dtype)
        rows_of: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}

        def grouped(part: Tensor) -> Tensor:
            """[b, h, q, d] -> [b · kv head, group · q, d]: the heads of a group share one product with their keys."""
            return part.unflatten(1, (-1, group)).flatten(0, 1).flatten(1, 2)

        def make(queries: slice, keys: slice) -> Tensor:
            at = (queries.start, queries.stop)
            if at not in rows_of:
                rows_of.clear()
                less = None if less_lse is None else grouped(less_lse[:, :, queries])
                rows_of[at] = grouped(self.problem.q[batch, heads, queries].to(self.dtype)), less
            q, less = rows_of[at]
            out = buffers.views((*q.shape[:2], keys.stop - keys.start))[0]
            scores = out.view(batch.stop - batch.start, heads.stop - heads.start, queries.stop - queries.start, -1)
            # Scaled after the product, as kernels do: scaling q first rounds differently, and their lse would not fit.
            if less is not None and in_one_pass:
                torch.add(less, torch.bmm(q, keys_t[:, :, keys], out=out), alpha=factor, out=out)
                self._shape_scores(scores, queries, keys, batch, heads)
                return scores
            torch.bmm(q, keys_t[:, :, keys], out=out).mul_(self.problem.scale)
            self._shape_scores(scores, queries, keys, batch, heads)
            return scores if less is None else scores.add_(less.view(*scores.shape[:3], 1)).mul_(BITS)

        return make

    def maker(self, batch: slice, heads: slice, wants_log: bool) -> TileMaker:
        """Tiles of weights from tiles of scores, in two reused buffers."""
        buffers = Buffers(2 if wants_log else 1, self.dtype, self.device)
        log_weights = self._score_maker(batch, heads, self._lse, buffers)

        def make(queries: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
            log_p = log_weights(queries, keys).clamp_(min=LOG_FLOOR[self.dtype])
            if not wants_log:
                return log_p.exp2_(), None
            return torch.exp2(log_p, out=buffers.views(log_p.shape)[1]), log_p

        return make


def _hidden_unless(visible: Tensor) -> Tensor:
    """What to add to scores; filling them in under a mask takes 30 times as long."""
    return torch.where(visible, 0.0, HIDDEN)
