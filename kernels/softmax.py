"""The softmax family: patterns rebuilt exactly from queries, keys, mask and the kernel's own log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels import engines
from workbench.kernels.checks import ask_later, check_finite, check_heads, check_number, check_tensor
from workbench.kernels.masks import Mask
from workbench.kernels.native import NativeEngine
from workbench.kernels.patterns import Pattern
from workbench.kernels.plan import Pass
from workbench.kernels.softmax_problem import SoftmaxProblem
from workbench.kernels.softmax_tiles import HIDDEN, SoftmaxTiles
from workbench.kernels.source import RawTileMaker, TileMaker
from workbench.kernels.statistics import Options
from workbench.kernels.streaming import find_denominators
from workbench.kernels.tile import Space
from workbench.kernels.torch_engine import TorchEngine
from workbench.kernels.triton import TritonEngine

_WEIGHTLESS = HIDDEN / 1e3  # the logarithm of nothing
_FAR = 1e20  # beyond all denominators that scores add up to
_COARSE = 1024.0  # from which on float32 rounds the logarithm of a denominator, and so weights, by 6e-5 or more

for _engine in (TorchEngine(), TritonEngine(), NativeEngine()):  # the last is asked first
    engines.register(_engine)


class SoftmaxPattern(Pattern):
    """A = softmax(softcap(scale · q kᵀ) + bias), over the keys that the mask shows.

    Args:
        q: [batch, head, query, d_head].
        k: [batch, kv head, key, d_head]; heads are a multiple of kv heads (grouped-query attention).
        mask: visibility and additive bias.
        scale: factor on q kᵀ; 1/√d_head if None.
        lse: [batch, head, query], natural log, from the kernel; streamed on first use if None.
        values: [batch, kv head, key, width], kept for `value_weighted`; optional.
        softcap: scores become softcap · tanh(score / softcap); None, or 0, for none.
        sinks: [head] logits that join the denominator only, so that rows sum to less than one.
        key_bias: [batch, head, key] added to the scores.

    Raises:
        CaptureError: sizes, types or devices that do not fit, or a scale, softcap, sink or bias that is not finite.
    """

    tile_scale = SoftmaxTiles.tile_scale

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
        _check_queries_and_keys(q, k)
        b, h, n_queries, n_keys = shape = (*q.shape[:3], k.shape[2])
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        super().__init__(shape, mask or Mask(n_queries, n_keys), dtype, q.device)
        if lse is not None:
            check_tensor("lse", lse, (b, h, n_queries), "batch, head, query", q.device)
        if sinks is not None:
            check_tensor("sinks", sinks, (h,), "head", q.device)
            check_finite("sinks", sinks)
        if key_bias is not None:
            check_tensor("key_bias", key_bias, (b, h, n_keys), "batch, head, key", q.device)
            check_finite("key_bias", key_bias)
        self.n_kv_heads = k.shape[1]
        self.q, self.k, self.values = q.detach(), k.detach(), None if values is None else values.detach()
        self.scale = q.shape[-1] ** -0.5 if scale is None else check_number("scale", scale)
        self.softcap = check_number("softcap", softcap, above_zero=True) if softcap else None
        self.sinks, self.key_bias = sinks, key_bias
        self.normalised = sinks is None
        self._kernel_lse = None if lse is None else lse.detach()

    @property
    def by_magnitude(self) -> bool:
        """False: with sink logits rows sum to less than one, and what is missing means something."""
        return False

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Scale, softcap and the rules of the mask; q, k, what is known of lse, and the optional tensors."""
        facts, mask = self.mask.state()
        held = {"q": self.q, "k": self.k, "lse": self.__dict__.get("lse", self._kernel_lse), "values": self.values,
                "sinks": self.sinks, "key_bias": self.key_bias}  # fmt: skip
        tensors = {name: tensor for name, tensor in held.items() if tensor is not None}
        return {"scale": self.scale, "softcap": self.softcap, "mask": facts}, tensors | mask

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> SoftmaxPattern:
        """The pattern from its `state`."""
        held = {name: tensors.get(name) for name in ("lse", "values", "sinks", "key_bias")}
        mask = Mask.rebuild(facts["mask"], tensors)
        return cls(tensors["q"], tensors["k"], mask, scale=facts["scale"], softcap=facts["softcap"], **held)

    @property
    def problem(self) -> SoftmaxProblem:
        """What engines are given; with its lse where that is known."""
        lse = self._finite_lse if self.denominators_known else None
        return SoftmaxProblem(self.q, self.k, self.mask, self.scale, self.softcap, self.sinks, self.key_bias, lse)

    @cached_property
    def lse(self) -> Tensor:
        """[batch, head, query] log of the softmax denominator; -inf in rows that see no key."""
        if self._kernel_lse is None:
            self.collect(Pass((), finds_denominators=True), Options())
        known = self._kernel_lse
        assert known is not None
        known = known.to(self.dtype).contiguous()
        if known.device.type == "cpu":
            self._check_denominators(known)
        return self.space().alive(known, -torch.inf) if self.mask.may_hide_all else known

    def _check_denominators(self, lse: Tensor) -> None:
        """Raise a CaptureError where a row that sees keys has a denominator that is no number."""
        if bool(lse.sum().isfinite()):
            return
        bad = ~lse.isfinite() & (self.seen.keys_per_query > 0)
        if bool(bad.any()):
            where = bad.nonzero()[0].tolist()
            raise CaptureError(
                f"the log-sum-exp of a row is {lse[tuple(where)].item()} at [batch, head, query] {where}",
                shape=lse.shape,
                hint=f"its scores overflow {self.dtype}: is the scale right, or does an earlier layer overflow?",
            )

    @cached_property
    def _finite_lse(self) -> Tensor:
        if self._kernel_lse is not None and self.device.type != "cpu":
            return self._asked(self._within(self._kernel_lse.to(self.dtype).contiguous()))
        lse = self.lse.clamp(min=-_FAR) if self.mask.may_hide_all else self.lse
        return self._in_double() if lse.dtype == torch.float32 and bool(_is_coarse(lse).any()) else lse

    def _in_double(self) -> Tensor:
        """The denominators in float64, of rows whose scores are large, as where −1e9 is added to all of them."""
        source = SoftmaxTiles(SoftmaxProblem(self.q, self.k, self.mask, self.scale, self.softcap, self.sinks,
                                             self.key_bias))  # fmt: skip
        return find_denominators(source).total.clamp(min=-_FAR)

    def _within(self, lse: Tensor) -> Tensor:
        """Kernels give rows without keys either infinity."""
        return lse.clamp(-_FAR, _FAR) if self.mask.may_hide_all else lse

    @staticmethod
    def _asked(lse: Tensor) -> Tensor:
        """On a device: a denominator that is NaN, as it is where a query or a key is, is told at the capture's end."""
        ask_later("the log-sum-exp of a row, hence its query or a key,", lse.sum)
        return lse

    def check(self) -> None:
        """As the base does; on a device the denominators tell of queries and keys, without reading them."""
        if self.device.type == "cpu":
            super().check()
        else:
            self.mask.check_numbers()

    def space(self) -> Space:
        """As the base does; a row sees a key wherever the mask's rules leave it one."""
        return replace(super().space(), all_see=not self.mask.may_hide_all)

    @property
    def denominators_known(self) -> bool:
        """Whether the kernel, or an earlier pass, gave the lse."""
        return self._kernel_lse is not None

    @property
    def has_scores(self) -> bool:
        """Yes."""
        return True

    def engines(self, names: Sequence[str], options: Options) -> set[str]:
        """Who streams these statistics: C++ on the CPU and Triton on a GPU, where they can; else torch."""
        return {engine.name for engine, _ in engines.assign(self.problem, names, options)}

    def unfused(self, names: Sequence[str], options: Options) -> str | None:
        """Why plain torch streams some of these: what the other engines say."""
        problem = self.problem
        for engine, some in engines.assign(problem, names, options):
            if engine.name == "torch":
                others = (each for each in engines.registered() if each.name != "torch")
                return "; ".join(f"{each.name}: {each.refusal(problem, some, options)}" for each in others)
        return None

    def collect(self, each: Pass, options: Options) -> dict[str, Tensor]:
        """The raw sums of one pass, by the engines that can."""
        problem = self.problem
        if each.finds_denominators:
            problem = replace(problem, lse=None)
        raw = engines.collect(problem, each.statistics, options)
        if each.finds_denominators:
            self._kernel_lse = raw.pop("lse").to(self.dtype)
            if self.device.type != "cpu":
                self.__dict__["_finite_lse"] = self._asked(self._within(self._kernel_lse))
        return raw

    @cached_property
    def _tiles(self) -> SoftmaxTiles:
        return SoftmaxTiles(replace(self.problem, lse=self._finite_lse))

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of the pattern, in a fresh tensor."""
        return self._tiles.tile(queries, keys, list(range(self.n_heads)) if heads is None else self._checked(heads))

    def maker(self, batch: slice, heads: slice, wants_log: bool) -> TileMaker:
        """A function that makes tiles of weights, in two reused buffers."""
        return self._tiles.maker(batch, heads, wants_log)

    def raw_maker(self, batch: slice, heads: slice) -> RawTileMaker:
        """A function that makes tiles [b, h, q, k] of masked scores in one reused buffer."""
        return SoftmaxTiles(self.problem).raw_maker(batch, heads)

    def score_parts(self, query: int, key: int, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, d]: scale · q[s] · k[s], what each of the d numbers of a query and a key adds to their score.

        They sum to the score before softcap, bias and mask. Where a softmax runs over channels, queries and keys are
        as wide as there are positions, and it is what each position adds.

        Raises:
            CaptureError: there is no such query, key or head.
        """
        for name, at, n in (("query", query, self.n_queries), ("key", key, self.n_keys)):
            if not -n <= at < n:
                raise CaptureError(f"there are {n} of them, and no {name} {at}", hint=f"{name} from 0 to {n - 1}")
        which = torch.tensor(list(range(self.n_heads)) if heads is None else self._checked(heads), device=self.device)
        q = self.q[:, which, query].to(self.dtype)
        return self.scale * q * self.k[:, which // (self.n_heads // self.n_kv_heads), key].to(self.dtype)

    def value_weighted(self) -> SoftmaxPattern:
        """p·‖v‖ renormalised per row: the same softmax with ln ‖v‖ added to each key's score (Kobayashi et al. 2020).

        A row all of whose values are zero has nothing to share out: it is as one that sees no key.

        Raises:
            CaptureError: the pattern was made without values.
        """
        norms = self.value_norms()
        bias = norms.log().clamp(min=_WEIGHTLESS)
        bias = bias if self.key_bias is None else self.key_bias + bias
        how: dict[str, Any] = {"scale": self.scale, "values": self.values, "softcap": self.softcap, "key_bias": bias}
        made = SoftmaxPattern(self.q, self.k, self.mask, **how)
        if bool(norms.all()):
            return made
        made.collect(Pass((), finds_denominators=True), Options())
        assert made._kernel_lse is not None
        empty = made._kernel_lse < -1e19  # where an engine begins, below all that scores add up to
        return SoftmaxPattern(self.q, self.k, self.mask.without_rows(empty), **how) if bool(empty.any()) else made


def _is_coarse(lse: Tensor) -> Tensor:
    """Which denominators are so large that float32 rounds them visibly; those of rows without keys are not."""
    size = lse.abs()
    return (size > _COARSE) & (size < _FAR / 2)


def _check_queries_and_keys(q: Tensor, k: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dim() != 4:
            raise CaptureError(f"{name} must be [batch, head, position, d]", shape=tensor.shape)
        if not tensor.is_floating_point():
            raise CaptureError(f"{name} must be floating point, not {tensor.dtype}", shape=tensor.shape)
    check_heads(q, k)
    if k.shape[2] == 0:
        raise CaptureError("there are no keys", shape=k.shape, hint="attention needs a key for every query")
    if q.device != k.device:
        raise CaptureError(f"q is on {q.device} and k on {k.device}", hint="move them to one device")
