"""The softmax family: patterns rebuilt exactly from queries, keys, mask and the kernel's own log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels import native, streaming
from workbench.kernels.masks import Mask, hidden_below
from workbench.kernels.patterns import Maker, Pattern, RawMaker
from workbench.kernels.plan import Pass
from workbench.kernels.statistics import Options
from workbench.kernels.tile import BITS, LOG_FLOOR, Buffers
from workbench.kernels.triton import launch as triton

_HIDDEN = -1e30  # finite, so that differences of scores are never NaN
_LARGE = 64.0  # an lse from which on its product with log₂ e would be rounded too much


class SoftmaxPattern(Pattern):
    """A = softmax(softcap(scale · q kᵀ) + bias), over the keys that the mask shows.

    Args:
        q: [batch, head, query, d_head].
        k: [batch, kv head, key, d_head]; heads are a multiple of kv heads (grouped-query attention).
        mask: visibility and additive bias.
        scale: factor on q kᵀ; 1/√d_head if None.
        lse: [batch, head, query], natural log, from the kernel; streamed on first use if None.
        values: [batch, kv head, key, width], kept for `value_weighted`; optional.
        softcap: scores become softcap · tanh(score / softcap).
        sinks: [head] logits that join the denominator only, so that rows sum to less than one.
        key_bias: [batch, head, key] added to the scores.
    """

    tile_scale = 2

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        mask: Mask | None = None,
        *,
        scale: float | None = None,
        lse: Tensor | None = None,
        values: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        key_bias: Tensor | None = None,
    ) -> None:
        if (
            q.dim() != 4
            or k.dim() != 4
            or q.shape[0] != k.shape[0]
            or q.shape[1] % k.shape[1]
            or q.shape[3] != k.shape[3]
        ):
            raise CaptureError(
                f"queries {list(q.shape)} and keys {list(k.shape)} do not fit [batch, head, position, d]"
            )
        mask = mask or Mask(q.shape[2], k.shape[2])
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        super().__init__((*q.shape[:3], k.shape[2]), mask, dtype, q.device)
        self.n_kv_heads = k.shape[1]
        self.q, self.k, self.values = q.detach(), k.detach(), None if values is None else values.detach()
        self.scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        self.softcap, self.sinks, self.key_bias = softcap, sinks, key_bias
        self.normalised = sinks is None
        self._kernel_lse = None if lse is None else lse.detach()

    @property
    def by_magnitude(self) -> bool:
        """False: with sink logits rows sum to less than one, and what is missing means something."""
        return False

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Scale, softcap and the rules of the mask; q, k, what is known of lse, and the optional tensors."""
        facts, mask = self.mask.parts()
        held = {"q": self.q, "k": self.k, "lse": self.__dict__.get("lse", self._kernel_lse), "values": self.values,
                "sinks": self.sinks, "key_bias": self.key_bias}  # fmt: skip
        tensors = {name: tensor for name, tensor in held.items() if tensor is not None}
        return {"scale": self.scale, "softcap": self.softcap, "mask": facts}, tensors | mask

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> SoftmaxPattern:
        """The pattern from its `parts`."""
        held = {name: tensors.get(name) for name in ("lse", "values", "sinks", "key_bias")}
        mask = Mask.rebuild(facts["mask"], tensors)
        return cls(tensors["q"], tensors["k"], mask, scale=facts["scale"], softcap=facts["softcap"], **held)

    @cached_property
    def lse(self) -> Tensor:
        """[batch, head, query] log of the softmax denominator; -inf in rows that see no key."""
        if self._kernel_lse is not None:
            return self._without_dead_rows(self._kernel_lse)
        raw = self.fused_pass(Pass(("lse",), True), Options())
        if raw is None:
            streaming.find_denominators(self)
        known = self._kernel_lse
        assert known is not None
        return self._without_dead_rows(known)

    def _without_dead_rows(self, lse: Tensor) -> Tensor:
        lse = lse.to(self.dtype).contiguous()
        if self._may_have_dead_rows:
            lse = torch.where(self.seen.keys_per_query > 0, lse, torch.full_like(lse, -torch.inf))
        return lse

    @property
    def denominators_known(self) -> bool:
        """Whether the kernel, or an earlier pass, gave the lse."""
        return self._kernel_lse is not None

    def found_denominators(self, denominators: Tensor, signed: Tensor) -> None:
        """Keep the lse."""
        self._kernel_lse = denominators.to(self.dtype)

    @property
    def has_scores(self) -> bool:
        """Yes."""
        return True

    def engine(self, names: Sequence[str], options: Options) -> str:
        """C++ on the CPU and Triton on a GPU, where they can; else torch."""
        if native.unsupported(self) is None:
            return "native"
        if self.device.type != "cpu" and triton.refusal(self, names, options) is None:
            return "triton"
        return "torch"

    def fused_pass(self, each: Pass, options: Options) -> dict[str, Tensor] | None:
        """One pass of the C++ library or of the Triton kernels, where they can."""
        engine = self.engine(each.statistics, options)
        if engine == "torch":
            return None
        kernel = native.statistics if engine == "native" else triton.raw
        raw = kernel(self, each.statistics, options, None if each.finds_denominators else self._finite_lse)
        if each.finds_denominators:
            self._kernel_lse = raw.pop("lse")
        return raw

    @property
    def _may_have_dead_rows(self) -> bool:
        mask = self.mask
        return (
            mask.tensor is not None
            or mask.layout is not None
            or mask.window is not None
            or (mask.causal and mask.offset < 0)
        )

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of the pattern, in a fresh tensor."""
        which = list(range(self.n_heads)) if heads is None else self._checked(heads)
        group = self.n_heads // self.n_kv_heads
        index = torch.tensor(which, dtype=torch.long, device=self.device)
        q = self.q[:, index][:, :, queries].to(self.dtype)
        k = self.k[:, index // group][:, :, keys].to(self.dtype)
        scores = (q @ k.transpose(-1, -2)).mul_(self.scale)
        everything = slice(0, self.n_batch)
        self._shape_scores(scores, queries, keys, everything, index)
        return scores.sub_(self._finite_lse[:, index][:, :, queries, None]).exp_()

    @cached_property
    def _finite_lse(self) -> Tensor:
        return self.lse.clamp(min=-1e20) if self._may_have_dead_rows else self.lse

    def _shape_scores(self, scores: Tensor, queries: slice, keys: slice, batch: slice, heads: slice | Tensor) -> None:
        """Softcap, biases and mask on scaled products [b, h, q, k], in place; hidden keys become very negative."""
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.key_bias is not None:
            scores.add_(self.key_bias[batch][:, heads][:, :, None, keys])
        part = self.mask.cut(queries, keys, batch, heads)
        if part is not None and self.mask.additive:
            scores.add_(torch.where(part <= hidden_below(part.dtype), _HIDDEN, part))
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

    def raw_maker(self, batch: slice, heads: slice) -> RawMaker:
        """A function that makes tiles [b, h, q, k] of masked scores in one reused buffer."""
        return self._score_maker(batch, heads, None, Buffers(1, self.dtype, self.device))

    def _score_maker(self, batch: slice, heads: slice, lse: Tensor | None, buffers: Buffers) -> RawMaker:
        """Tiles of masked scores, in the first buffer; of log₂ p where `lse` [batch, head, query] is given."""
        group = self.n_heads // self.n_kv_heads
        kv = slice(heads.start // group, -(-heads.stop // group))
        keys_t = self.k[batch, kv].to(self.dtype).transpose(-1, -2).flatten(0, 1)
        plain = self.softcap is None and self.key_bias is None and not self.mask.additive
        less_lse = None if lse is None else lse[batch, heads, :, None].neg()
        factor = float(torch.tensor(self.scale * BITS, dtype=self.dtype))
        in_one_pass = plain and factor != 0 and less_lse is not None and bool((less_lse.abs() < _LARGE).all())
        if in_one_pass and less_lse is not None:  # times log₂ e, rounded as it is in the factor
            less_lse = (less_lse.double() * (factor / self.scale)).to(self.dtype)
        rows_of: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}

        def grouped(part: Tensor) -> Tensor:
            """[b, h, q, d] -> [b · kv head, group · q, d]: the heads of a group share one product with their keys."""
            return part.unflatten(1, (-1, group)).flatten(0, 1).flatten(1, 2)

        def make(queries: slice, keys: slice) -> Tensor:
            at = (queries.start, queries.stop)
            if at not in rows_of:
                rows_of.clear()
                less = None if less_lse is None else grouped(less_lse[:, :, queries])
                rows_of[at] = grouped(self.q[batch, heads, queries].to(self.dtype)), less
            q, less = rows_of[at]
            out = buffers.views((*q.shape[:2], keys.stop - keys.start))[0]
            scores = out.view(batch.stop - batch.start, heads.stop - heads.start, queries.stop - queries.start, -1)
            # Scaled after the product, as kernels do: scaling q first rounds differently, and their lse would not fit.
            if less is not None and in_one_pass:
                torch.add(less, torch.bmm(q, keys_t[:, :, keys], out=out), alpha=factor, out=out)
                self._shape_scores(scores, queries, keys, batch, heads)
                return scores
            torch.bmm(q, keys_t[:, :, keys], out=out).mul_(self.scale)
            self._shape_scores(scores, queries, keys, batch, heads)
            return scores if less is None else scores.add_(less.view(*scores.shape[:3], 1)).mul_(BITS)

        return make

    def maker(self, batch: slice, heads: slice, wants_log: bool) -> Maker:
        """Tiles of weights from tiles of scores, in two reused buffers."""
        buffers = Buffers(2 if wants_log else 1, self.dtype, self.device)
        log_weights = self._score_maker(batch, heads, self._finite_lse, buffers)

        def make(queries: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
            log_p = log_weights(queries, keys).clamp_(min=LOG_FLOOR[self.dtype])
            if not wants_log:
                return log_p.exp2_(), None
            return torch.exp2(log_p, out=buffers.views(log_p.shape)[1]), log_p

        return make

    def value_weighted(self) -> SoftmaxPattern:
        """p·‖v‖ renormalised per row: the same softmax with ln ‖v‖ added to each key's score (Kobayashi et al. 2020).

        Raises:
            CaptureError: the pattern was made without values.
        """
        bias = self.value_norms().log().clamp(min=_HIDDEN / 1e3)
        bias = bias if self.key_bias is None else self.key_bias + bias
        return SoftmaxPattern(
            self.q, self.k, self.mask, scale=self.scale, values=self.values, softcap=self.softcap, key_bias=bias
        )


def _hidden_unless(visible: Tensor) -> Tensor:
    """What to add to scores; filling them in under a mask takes 30 times as long."""
    return torch.where(visible, 0.0, _HIDDEN)
