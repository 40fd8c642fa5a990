"""One forward of a prompt, as the maps of its attentions in order, each with the streams that it lies between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.analysis.circuits.model.modules import beside
from workbench.analysis.circuits.model.recording import first_float, record
from workbench.analysis.rollout.maps import Map, NormsMap, ProximityMap, Vectors, WeightsMap, linear
from workbench.analysis.rollout.sublayers import Sublayer, find_sublayers
from workbench.analysis.rollout.zeroing import BlockRun, ZeroingMap
from workbench.capture.capture import Capture
from workbench.capture.site_capture import SiteCapture
from workbench.errors import AttachError, CaptureError
from workbench.hooks.changes import Changes
from workbench.hooks.heads import block_of
from workbench.hooks.sites import Site
from workbench.hooks.split_models import check_unsplit
from workbench.inputs import shortened, without_cache
from workbench.session.workbench import Workbench

_KINDS = ("self", "state", "cross")


@dataclass(frozen=True)
class Step:
    """One attention: its site, the streams of its queries and keys, and what makes its map when it is needed."""

    site: str
    queries: str
    keys: str
    map: Callable[[], Map]


@dataclass(frozen=True)
class Run:
    """A recorded forward.

    Attributes:
        of: the stream whose positions are asked for. lengths: positions of each stream. real: bool where they are no
            padding. ids: of their tokens, where they are known. unread: what is to be said of modules that are not
            read.
    """

    of: str
    steps: tuple[Step, ...]
    lengths: dict[str, int]
    real: dict[str, Tensor]
    ids: dict[str, Tensor]
    device: torch.device
    unread: str


@dataclass
class _Seen:
    """What chosen modules were given and gave [1, position, d_model], and the calls of blocks."""

    given: dict[str, Tensor] = field(default_factory=dict)
    gave: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)

    def watch(self, changes: Changes, name: str, module: nn.Module) -> None:
        """Keep what it is given and gives."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = first_float((*args, *kwargs.values()))
            if first is not None:
                self.given[name] = first.detach().clone()
            self.calls[name] = (args, kwargs)

        def after(_: nn.Module, args: Any, output: Any) -> None:
            first = first_float(output)
            if first is not None:
                self.gave[name] = first.detach().clone()

        changes.before(module, before, with_kwargs=True)
        changes.after(module, after)


def run_of(wb: Workbench, batch: Mapping[str, Any], method: str, residual: float, stream: str | None) -> Run:
    """Run the model once, and prepare the maps.

    Raises:
        AttachError, CaptureError: as `attention_rollout` does.
    """
    wb.check_ready()
    check_unsplit()
    towers = _towers(wb)
    of = list(towers)[-1] if stream is None else stream
    if of not in towers:
        raise CaptureError(f"there is no stream {stream!r} here", hint=f"there is {', '.join(towers)}")
    if of == "input":
        towers = {"input": towers["input"]}
    elif method == "value_zeroing":
        raise CaptureError(
            "value zeroing does not say what stays in the decoder's own stream, so that it chains no cross-attention",
            hint='ask for the encoder, stream="input", or use method="alti"',
        )
    for several in towers.values():
        _check_one_after_another(wb, several)
    sites = [site for several in towers.values() for site in several]
    batch = {**without_cache(wb.model), **batch}
    found: dict[str, Sublayer] = {}
    if method in ("norm", "alti"):
        short = record(wb.model, shortened(batch), (), needs_logits=False)
        for several in towers.values():
            blocks = [_block(wb, site) for site in several]
            found |= {one.site.name: one for one in find_sublayers(wb.model, short, several, blocks)}
        del short
    seen, names = _Seen(), _watched(wb, sites, found, method)
    modules = dict(wb.model.named_modules())
    with Changes() as changes:
        for name in names:
            seen.watch(changes, name, modules[name])
        weights = method == "attention"
        with wb.capture(
            (), [s.name for s in sites], values=not weights, z=method == "value_zeroing", limit=None
        ) as cap:
            wb.model(**batch)
    order = [one for one in cap.forwards[0].sites.values() if one.site.path in {site.name for site in sites}]
    lengths = _lengths(cap, towers)
    steps = []
    for one in order:
        queries = next(name for name, several in towers.items() if one.site.path in {site.name for site in several})
        keys = "input" if one.site.kind == "cross" else queries
        _check(one, lengths[queries], lengths[keys])
        steps.append(Step(one.site.name, queries, keys, _maker(wb, method, residual, one, found, seen)))
    return Run(
        of, tuple(steps), lengths, {name: _real(batch, name, n) for name, n in lengths.items()},
        _ids(batch, lengths), order[0].pattern.device, _unread(wb),
    )  # fmt: skip


def _towers(wb: Workbench) -> dict[str, list[Site]]:
    """The sites of each stream: "input" alone, or "input" and "decoder"."""
    found: dict[str, list[Site]] = {}
    for site in wb.sites:
        found.setdefault(site.tower, []).append(site)
        if site.kind not in _KINDS:
            raise AttachError(f"a site of kind {site.kind!r} does not map positions to positions", site=site.name,
                              hint="a rollout chains maps of a sequence onto itself, or of two sequences")  # fmt: skip
    crossing = [name for name, sites in found.items() if any(site.kind == "cross" for site in sites)]
    if len(found) == 1 and not crossing:
        return {"input": next(iter(found.values()))}
    if len(found) == 2 and len(crossing) == 1:
        encoder = next(sites for name, sites in found.items() if name not in crossing)
        return {"input": encoder, "decoder": found[crossing[0]]}
    raise AttachError(
        f"the model has {len(found)} stacks of layers with attention, {len(crossing)} of them with cross-attention",
        hint="a rollout is of one stack, or of an encoder and a decoder",
    )


def _check_one_after_another(wb: Workbench, sites: Sequence[Site]) -> None:
    """Refuse maps that do not follow each other: to chain them would count what reaches one through the other."""
    blocks = [block_of(wb.model, wb.sites, site.name) for site in sites]
    for i, side in enumerate(beside(sites, blocks)):
        if side and blocks[i]:
            raise AttachError(
                f"the block {blocks[i]} mixes positions in {sites[i - 1].name} and {sites[i].name}, which do not read "
                "each other's stream",
                site=sites[i].name,
                hint="a rollout chains maps one after another",
            )


def _block(wb: Workbench, site: Site) -> str:
    block = block_of(wb.model, wb.sites, site.name)
    if not block:
        raise AttachError("the attention is in no block of a list of blocks", site=site.name,
                          hint='only method="attention" needs no blocks')  # fmt: skip
    return block


def _watched(wb: Workbench, sites: Sequence[Site], found: Mapping[str, Sublayer], method: str) -> set[str]:
    if method == "attention":
        return set()
    blocks = [_block(wb, site) for site in sites]
    if method == "value_zeroing":
        double = next((b for b in blocks if blocks.count(b) > 1), None)
        if double is not None:
            raise AttachError(f"the block {double} has several attention modules, value zeroing needs one in each")
        return set(blocks)
    norms = {one.norm.name for one in found.values() if one.norm is not None}
    return {*blocks, *(one.out for one in found.values()), *norms}


def _lengths(cap: Capture, towers: Mapping[str, Sequence[Site]]) -> dict[str, int]:
    return {name: cap[sites[0].name].shape[2] for name, sites in towers.items()}


def _check(one: SiteCapture, n_queries: int, n_keys: int) -> None:
    if one.shape[0] != 1:
        raise CaptureError(f"a rollout is of one prompt, not of {one.shape[0]}", site=one.site.name, shape=one.shape)
    if one.n_calls > 1:
        raise CaptureError(f"the site was called {one.n_calls} times in the forward", site=one.site.name,
                           hint="a rollout needs one map for each site")  # fmt: skip
    if one.shape[2:] != (n_queries, n_keys):
        raise CaptureError("its map does not fit the streams that it lies between", site=one.site.name, shape=one.shape)


def _maker(
    wb: Workbench, method: str, residual: float, one: SiteCapture, found: Mapping[str, Sublayer], seen: _Seen
) -> Callable[[], Map]:
    def make() -> Map:
        pattern = one.pattern
        if method == "attention":
            return WeightsMap(pattern.magnitude() if pattern.by_magnitude else pattern, residual)
        if pattern.values is None:
            raise CaptureError("the values of this site are not known", site=one.site.name, hint='use "attention"')
        if method == "value_zeroing":
            return _zeroing(wb, one, seen)
        vectors = _vectors(found[one.site.path], list(found.values()), one, seen)
        return NormsMap(vectors) if method == "norm" else ProximityMap(vectors)

    return make


def _zeroing(wb: Workbench, one: SiteCapture, seen: _Seen) -> ZeroingMap:
    name = _block(wb, one.site)
    if one.projection is None or one.entering is not None or one.z is None or one.pattern.values is None:
        raise CaptureError("no module joins the heads' outputs as they are", site=one.site.name,
                           hint="a gate or a norm may lie between")  # fmt: skip
    if seen.given[name].dim() != 3 or seen.given[name].shape[0] != 1:
        raise AttachError(f"the block {name} reads {list(seen.given[name].shape)}, and no one residual stream",
                          site=one.site.name, hint='only method="attention" needs no stream')  # fmt: skip
    args, kwargs = seen.calls[name]
    run = BlockRun(name, wb.model.get_submodule(name), args, kwargs, seen.given[name], seen.gave[name])
    return ZeroingMap(one.pattern, one.pattern.values[0], one.z[0].flatten(1), run, one.projection.module)


def _vectors(sub: Sublayer, all_of_them: Sequence[Sublayer], one: SiteCapture, seen: _Seen) -> Vectors:
    """The sum that this attention is part of, in float64."""
    stream = seen.given[sub.block][0].double()
    for other in all_of_them:
        if other.site == sub.site:
            break
        if other.block == sub.block:
            stream = stream + other.factor * seen.gave[other.written][0].double()
            if other.after is not None:
                stream = seen.gave[other.after.name][0].double()
    written = seen.gave[sub.out][0]
    scale, own = stream.new_full((len(stream),), sub.factor), stream
    whole = stream + sub.factor * seen.gave[sub.written][0].double()
    if sub.behind is not None:
        scale = scale * sub.behind.scale(written, seen.gave[sub.behind.name][0])[:, 0]
    if sub.after is not None:
        whole = seen.gave[sub.after.name][0].double()
        scale = sub.after.scale(seen.given[sub.after.name][0], whole)[:, 0]
        own = linear(sub.after, stream) * scale[:, None]
    values = one.pattern.values
    assert values is not None
    return Vectors(one.pattern, values[0], sub.w_o.to(stream), sub.norm, scale, own, whole, one.site.kind != "cross")


def _real(batch: Mapping[str, Any], stream: str, n: int) -> Tensor:
    mask = batch.get("attention_mask" if stream == "input" else "decoder_attention_mask")
    whole = isinstance(mask, Tensor) and mask.shape == (1, n)
    return mask[0].bool().cpu() if whole and mask is not None else torch.ones(n, dtype=torch.bool)


def _ids(batch: Mapping[str, Any], lengths: Mapping[str, int]) -> dict[str, Tensor]:
    given = {name: batch.get("input_ids" if name == "input" else "decoder_input_ids") for name in lengths}
    return {name: ids[0] for name, ids in given.items() if isinstance(ids, Tensor) and ids.dim() == 2 and len(ids) == 1}


def _unread(wb: Workbench) -> str:
    names = [one.name for one in wb.sites.unread if one.proved]
    return f"; modules that mix positions and are not read: {', '.join(names)}" if names else ""
