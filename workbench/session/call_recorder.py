"""Turns one attention call into what is kept of its site, within a byte limit."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from workbench.capture.arena import Arena
from workbench.capture.settings import Settings
from workbench.capture.site_capture import Forward, SiteCapture
from workbench.capture.store.writing import StoreWriter
from workbench.errors import CaptureError
from workbench.hooks.sites import Site
from workbench.hooks.tap import AttentionCall
from workbench.hooks.truth import check_last_row
from workbench.kernels import streaming
from workbench.kernels.checks import Pending, check_finite
from workbench.kernels.patterns import PartOfHeads, Pattern
from workbench.kernels.statistics import Options
from workbench.session.cached_tokens import CachedTokens
from workbench.session.gradient_watch import Deliver, GradientWatch
from workbench.session.head_outputs import HeadOutputs
from workbench.session.keeping import Keeper, Landing, Masks, UnderWay, is_away


@dataclass(kw_only=True)
class CallRecorder:
    """Streams the statistics of attention calls, and keeps what was asked for.

    `engines` names what streamed the statistics: "torch", "native" (C++), "triton"; `compiled` says what became of the
    graphs of compiled code (`AttentionCall.compiled`).
    """

    settings: Settings
    gradients: GradientWatch = field(default_factory=GradientWatch)
    arena: Arena = field(default_factory=Arena)
    masks: Masks = field(default_factory=Masks)
    pending: Pending = field(default_factory=Pending)
    forwards: list[Forward] = field(default_factory=list)
    nbytes: int = 0
    engines: set[str] = field(default_factory=set)
    costs: dict[str, None] = field(default_factory=dict)  # of what no fused kernel streamed on a device, in order
    compiled: set[str] = field(default_factory=set)
    store: StoreWriter | None = None
    outputs: HeadOutputs = field(init=False)
    _cached: CachedTokens = field(default_factory=CachedTokens)
    _streamed: set[tuple[object, ...]] = field(default_factory=set)  # kinds of calls of which the engines are known
    _landing: Landing = field(default_factory=Landing)
    _under_way: list[UnderWay] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def record(
        self, call: AttentionCall, site: Site, forward: Forward, edited: Tensor | None, grad_is_on: bool, check: bool
    ) -> tuple[SiteCapture, int]:
        """What is kept of a call, and its bytes.

        Args:
            edited: [batch, head, query, width] that an intervention has made of the heads' output. check: compare the
                last row with what the kernel gave.
        """
        settings, cross = self.settings, not site.positional
        pattern = call.pattern(cross=cross)
        others = {**pattern.factors, **call.build_others()} if settings.queries_keys else {}
        self._check_limit(self._planned(call, pattern, others), site)
        keeper = Keeper(self.arena, self.masks, compiled=bool(call.compiled), mask_key=call.mask_key)
        if settings.queries_keys:
            pattern = pattern.kept(keeper.keep)
            others = {name: other.kept(keeper.keep) for name, other in others.items()}
        names = settings.names_at(site)
        try:
            check_finite("v", call.v, site.name)
            if call.compiled:
                self.compiled.add(call.compiled)
            options = self._options(forward, site, pattern, names)
            with self.pending.at(site.name):
                statistics = streaming.statistics(pattern, names, options)
            if check:
                check_last_row(call, pattern)
            kind = _kind(pattern, names)
            if kind not in self._streamed:
                self.engines |= streaming.engines(pattern, names, options)
                self.costs.update(dict.fromkeys(streaming.costs(pattern, names, options)))
                self._streamed.add(kind)
        except CaptureError as error:
            raise CaptureError(error.message, site=site.name, shape=error.shape, hint=error.hint) from None
        widen = _itself if call.shard is None else call.shard.widened  # heads that are elsewhere are NaN
        z = dense = entered = None
        if settings.z:
            z, entered = self.outputs.of_call(call, edited, check=check)
            z = widen(z, 2)
        if settings.gradients:
            self.gradients.watch(
                call, edited, site, pattern, self._deliver(forward, site, widen), grad_is_on=grad_is_on
            )
        if settings.pattern:
            dense = self.arena.copy(widen(pattern.dense(limit=None), 1))
        for kept in (pattern, *others.values()):
            kept.values = keeper(kept.values) if settings.values and kept.values is not None else None
        if call.shard is not None:
            pattern = PartOfHeads(pattern, call.shard.first, call.shard.n_heads)
            others = {name: PartOfHeads(one, call.shard.first, call.shard.n_heads) for name, one in others.items()}
        goes = settings.queries_keys and settings.keep_on == "host" and is_away(pattern.device)
        there = UnderWay.begun(self._landing, forward, site.name, pattern, others) if goes else None
        capture = SiteCapture(
            site=site,
            shape=pattern.shape,
            statistics={name: self.arena.copy(widen(value, 1)) for name, value in statistics.items()},
            kernel=call.kernel,
            z=z,
            entering=entered,
            weights=dense,
            lazy=pattern if settings.queries_keys and there is None else None,
            others=others if there is None else {},
            held=keeper.held if there is None else [],
            signed=pattern.signed,
            normalised=pattern.normalised,
            shard=call.shard,
            before=None if pattern.before is None else self.arena.copy(pattern.before.transpose(1, 2)),
            state=call.state,
        )
        size = capture.nbytes + (0 if there is None else there.nbytes)
        with self._lock:
            self._under_way.extend([] if there is None else [there])
            self.nbytes += size + settings.gradient_bytes(pattern.shape, call.sizes[2], call.v.element_size())
        return capture, size

    def _planned(self, call: AttentionCall, pattern: Pattern, others: Mapping[str, Pattern]) -> int:
        """Bytes that a call will keep."""
        if call.shard is not None:  # of heads that are elsewhere, rows of NaN
            b, h, q, k = pattern.shape
            empty = replace(self.settings, queries_keys=False, values=False)
            more = empty.bytes_for((b, call.shard.n_heads - h, q, k), 0, call.sizes[2], call.v.element_size())
            return more + self._planned(replace(call, shard=None), pattern, others)
        sizes = (pattern.shape, pattern.n_kv_heads, call.sizes[2], call.v.element_size())
        more = math.prod(sizes[0][:3]) * call.v.shape[-1] * call.v.element_size() if self._keeps_entering(call) else 0
        if not self.settings.queries_keys or (call.build is None and call.weights is None):
            return self.settings.bytes_for(*sizes) + more
        # What is kept of other patterns than softmax differs from one to the next.
        held = [item for one in (pattern, *others.values()) for item in one.state()[1].items()]
        kept = sum(tensor.numel() * tensor.element_size() for name, tensor in held if name != "values")
        return replace(self.settings, queries_keys=False).bytes_for(*sizes) + kept + more

    def _keeps_entering(self, call: AttentionCall) -> bool:
        """Whether what enters the projection of a site is kept beside its heads' outputs."""
        past = call.finish is not None or (call.part is None and self.outputs.projections.gated(call.site))
        return past and self.settings.z

    def _options(self, forward: Forward, site: Site, pattern: Pattern, names: Sequence[str]) -> Options:
        ids, before = forward.ids_of(site, "query"), None
        if site.kind == "state":  # its rows are of its own positions
            return self.settings.options(ids if ids is None or ids.shape[1] == pattern.n_keys else None)
        keys = getattr(pattern, "k", pattern.values)  # of weights that a model wrote out, only the values are known
        if keys is not None and self.settings.tokens is None and any(name.endswith("induction") for name in names):
            stream = forward.stream(site, "query")
            ids, before = self._cached.key_ids(forward, site.name, stream, pattern.n_queries, keys)
        return self.settings.options(ids, before)

    def _deliver(self, forward: Forward, site: Site, widen: Callable[[Tensor, int], Tensor]) -> Deliver:
        def deliver(z_gradient: Tensor, sums: dict[str, Tensor]) -> None:
            if self.store is not None and all(one is not forward for one in self.forwards):
                raise CaptureError(
                    "gradients came for a forward that is in the store already",
                    site=site.name,
                    hint="call backward() before the next forward",
                )
            capture = forward.sites.get(site.name)
            if capture is None:  # it was taken back
                return
            statistics = capture.statistics | {name: widen(each, 1) for name, each in sums.items()}
            forward.sites[site.name] = replace(capture, statistics=statistics, z_gradient=widen(z_gradient, 2))

        return deliver

    def _check_limit(self, planned: int, site: Site) -> None:
        limit = self.settings.limit
        if limit is not None and self.nbytes + planned > limit:
            raise CaptureError(
                f"the capture would keep {self.nbytes + planned:,} bytes or more, the limit is {limit:,}",
                site=site.name,
                hint="capture fewer sites, leave out pattern=True, z=True, values=True or gradients=True, pass "
                "queries_keys=False, or raise limit=",
            )


def _kind(pattern: Pattern, names: Sequence[str]) -> tuple[object, ...]:
    """What may decide who can stream a pattern's statistics."""
    mask = pattern.mask
    of_mask = mask.offset, mask.window, None if mask.tensor is None else mask.tensor.dtype, type(mask.layout)
    sizes = (*pattern.shape, pattern.n_kv_heads, None if pattern.values is None else pattern.values.shape[-1])
    return type(pattern), type(getattr(pattern, "here", None)), sizes, pattern.dtype, pattern.device, *of_mask, *names


def _itself(tensor: Tensor, axis: int) -> Tensor:
    return tensor
