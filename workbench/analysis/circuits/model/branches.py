"""What attentions and MLPs add to a residual stream, also where it is no sum over heads: all that patching it needs.

The stream before and behind any block can be changed. What a block's attention and MLP add is found by value: the
outputs of two modules with which the block's input makes its output. A norm may lie behind them (Gemma 2, OLMo 2), or
on the stream itself (BART), heads may have no linear part, and projections may be anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from workbench.analysis.circuits.model.anatomy import (
    Anatomy,
    answer_of,
    find_anatomy,
    find_head,
    one_example,
    still,
    streams_of,
)
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.model.modules import Branches
from workbench.analysis.circuits.model.nodes import Layer
from workbench.analysis.circuits.model.recording import Recording, check_batch_first, equal, record, same_sum
from workbench.errors import AttachError
from workbench.hooks.sites import Site
from workbench.session.workbench import Workbench

_INSTEAD = '"resid_pre" and "resid_post" are there'


def find_branches(wb: Workbench, inputs: Mapping[str, Any]) -> Anatomy:
    """The anatomy of a model, or, where it cannot be taken apart into heads, its blocks and what they add.

    Args:
        inputs: as of `find_anatomy`.

    Raises:
        AttachError: not even the blocks of a stream can be found.
    """
    return still(_find, wb, one_example(inputs))


def _find(wb: Workbench, example: Mapping[str, Any]) -> Anatomy:
    try:
        return find_anatomy(wb, example)
    except AttachError:
        pass
    streams, blocks = streams_of(wb)
    seen = record(wb.model, example, ())
    branches: list[Branches] = []
    shapes: list[Layer] = []
    missing: dict[tuple[str, int], AttachError] = {}
    for name, sites in streams.items():
        own = [blocks[site.name] for site in sites]
        _check_blocks(seen, sites, own)
        for block in dict.fromkeys(own):
            first, inside = len(branches), [site for site in sites if blocks[site.name] == block]
            found, lost = _of_block(seen, block, inside)
            branches += found
            missing |= {(what, first + i): error for (what, i), error in lost.items()}
            shapes += [_shape(seen, site, each, name, ("mid", i) not in lost)
                       for i, (site, each) in enumerate(zip(inside, found, strict=True))]  # fmt: skip
            after = next((other for other in own[own.index(block) :] if other != block), None)
            if after is not None and not equal(seen.given[after], seen.gave[block]):
                missing["resid", len(branches) - 1] = AttachError(
                    f"what {after} reads is not what {block} gives", hint='"resid_pre" is what a block reads'
                )
    firsts = [blocks[sites[0].name] for sites in streams.values()]
    graph = Graph(tuple(shapes), d_model=seen.gave[branches[-1].block].shape[-1])
    return Anatomy(
        graph, (), find_head(seen), 0.0, tuple(seen.given[block].shape[1] for block in firsts), seen.precision,
        dict(wb.model.named_modules()), tuple(branches), answer_of(seen.logits), missing,
    )  # fmt: skip


def _shape(seen: Recording, site: Site, found: Branches, stream: str, middle: bool) -> Layer:
    calls = seen.calls.get(site.name, [])
    n = calls[0].sizes[0] if calls else 1
    return Layer(n, n, found.mlp is not None, not middle, "cross" if site.kind == "cross" else "self", stream)


def _check_blocks(seen: Recording, sites: Sequence[Site], blocks: Sequence[str]) -> None:
    """Blocks that run once, one after the other, on a stream [batch, position, d_model].

    Raises:
        AttachError: they do not.
    """
    for i, (site, block) in enumerate(zip(sites, blocks, strict=True)):
        given, gave = seen.given.get(block), seen.gave.get(block)
        if seen.times.get(block, 0) != 1 or given is None or gave is None:
            raise AttachError(f"the block {block} ran {seen.times.get(block, 0)} times in one forward", site=site.name)
        if given.dim() != 3 or given.shape != gave.shape:
            raise AttachError(
                f"the block {block} reads {list(given.shape)} and gives {list(gave.shape)}, and no one residual stream",
                site=site.name,
            )
        check_batch_first(seen, block)
        if block in blocks[:i] and (block != blocks[i - 1] or site.kind != "cross" or sites[i - 1].kind == "cross"):
            raise AttachError(f"the block {block} has two attention modules", site=site.name)


@dataclass(frozen=True)
class _Way:
    """One way in which a stream may have gone through a block's attentions.

    Attributes:
        attention: the modules whose outputs were added. streams: behind each of them.
        size: of what was added up, without its sign. plain: whether nothing but sums lies on the way.
    """

    attention: tuple[str, ...]
    streams: tuple[Tensor, ...]
    size: Tensor
    plain: bool = True


def _of_block(
    seen: Recording, block: str, sites: Sequence[Site]
) -> tuple[list[Branches], dict[tuple[str, int], AttachError]]:
    """What each attention of a block, and its MLP, add; and what of it there is not."""
    before, after = seen.given[block], seen.gave[block]
    names = [name for name in dict.fromkeys(seen.order)
             if name.startswith(f"{block}.") and seen.times[name] == 1
             and name in seen.given and name in seen.gave and seen.gave[name].shape == before.shape]  # fmt: skip
    ways = [_Way((), (), before.abs())]
    for site in sites:
        ways = [longer for way in ways for longer in _longer(seen, names, way, before, _candidates(seen, names, site))]
    ends = [after, *(seen.given[name] for name in names if equal(seen.gave[name], after) and _moves(seen, name))]
    holding = {name for name in names for site in sites if f"{site.name}.".startswith(f"{name}.")}
    for way in sorted(ways, key=lambda way: not way.plain):
        for end in ends:
            stream = way.streams[-1]
            fits = [
                name
                for name in names
                if name not in (*way.attention, *holding)
                and same_sum(end, stream + seen.gave[name], way.size + seen.gave[name].abs(), seen.eps)
            ]
            alone = same_sum(end, stream, way.size, seen.eps)
            if fits or alone:
                mlp = None if alone else min(fits, key=lambda name: name.count("."))
                return _found(seen, block, sites, names, way, mlp)
    lost = AttachError(
        f"the block {block} adds something to the residual stream that is not the output of its attention and one "
        f"module, in {seen.precision}",
        site=sites[-1].name, hint=_INSTEAD,
    )  # fmt: skip
    missing = {(what, i): lost for i in range(len(sites)) for what in ("attn", "mlp", "mid")}
    return [Branches(block, site, "", None) for site in sites], missing


def _found(
    seen: Recording, block: str, sites: Sequence[Site], names: Sequence[str], way: _Way, mlp: str | None
) -> tuple[list[Branches], dict[tuple[str, int], AttachError]]:
    branches, missing = [], {}
    for i, site in enumerate(sites):
        last = i + 1 == len(sites)
        branches.append(Branches(block, site, way.attention[i], (mlp,) if last and mlp is not None else None))
        stream = way.streams[i]
        if last and mlp is None:
            continue
        if not way.plain:
            says = f"the stream behind the attention goes through a norm in {block}, before anything is added to it"
        elif any(same_sum(seen.given[name], stream, stream.abs(), seen.eps) for name in names):
            continue
        else:
            says = f"attention and MLP of {block} read the same stream, side by side"
        missing["mid", i] = AttachError(says, site=site.name, hint=f'{_INSTEAD}, and "attn_out" and "mlp_out"')
    return branches, missing


def _candidates(seen: Recording, names: Sequence[str], site: Site) -> list[str]:
    """Modules that may give what an attention adds: what joins its heads, itself, and those that read exactly these."""
    joins = seen.finder.of(site.name)
    found = [name for name in (joins.name if joins is not None else "", site.name) if name in names]
    for name in found:  # which grows
        reading = [other for other in names if equal(seen.given[other], seen.gave[name]) and _moves(seen, other)]
        found += [other for other in reading if other not in found]
    return found


def _longer(seen: Recording, names: Sequence[str], way: _Way, before: Tensor, candidates: Sequence[str]) -> list[_Way]:
    """A way with one attention more: its output added, and then perhaps the stream put through a norm."""
    start, found = way.streams[-1] if way.streams else before, []
    for name in candidates:
        stream, size = start + seen.gave[name], way.size + seen.gave[name].abs()
        longer = (*way.attention, name)
        found.append(_Way(longer, (*way.streams, stream), size, way.plain))
        found += [
            _Way(longer, (*way.streams, seen.gave[norm]), seen.gave[norm].abs(), plain=False)
            for norm in names if _moves(seen, norm) and same_sum(seen.given[norm], stream, size, seen.eps)
        ]  # fmt: skip
    return found


def _moves(seen: Recording, name: str) -> bool:
    """Whether a module gives something else than it is given, in the same shape."""
    given, gave = seen.given[name], seen.gave[name]
    return given.shape == gave.shape and not equal(given, gave)
