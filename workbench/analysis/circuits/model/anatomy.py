"""The layers of a decoder or encoder-decoder: where heads and MLPs read the residual stream, and where they write.

Everything is found by value in one small forward (see `layers`), and the sum of what all senders write is compared with
the stream.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.model.layers import LayerFinder
from workbench.analysis.circuits.model.modules import Branches, LayerModules, beside, unchanged
from workbench.analysis.circuits.model.nodes import Layer
from workbench.analysis.circuits.model.recording import Recording, equal, record
from workbench.errors import AttachError
from workbench.hooks.compiled.regions import check_not_compiled
from workbench.hooks.heads import block_of
from workbench.hooks.sites import Site
from workbench.session.workbench import Workbench
from workbench.sweep.variants import about

_MOST = 4
"""Anatomies that are kept of a Workbench: one for each input and way of finding them, the latest."""


@dataclass(frozen=True)
class Anatomy:
    """The layers of a model, its graph, and its head.

    Attributes:
        head: name of the module that gives the logits from the last position's vector, if one does so alone.
        error: largest difference between the stream and the sum of the senders, of the largest number in the stream.
        precision: dtypes of what modules gave.
        lengths: positions of each stream in the input that they were found with.
        branches: what each layer adds to the stream: `layers`, or where these could not be found, and are empty, less.
        missing: why the stream cannot be changed there: ("attn" | "mlp" | "mid" | "resid", layer).
        answer: a digest of the logits, device included, that the input gave.
    """

    graph: Graph
    layers: tuple[LayerModules, ...]
    head: str | None
    error: float
    lengths: tuple[int, ...]
    precision: str
    modules: Mapping[str, nn.Module] = field(repr=False)
    branches: tuple[Branches, ...]
    answer: str = field(repr=False)
    missing: Mapping[tuple[str, int], AttachError] = field(default_factory=dict)

    def blocks(self, stream: int) -> tuple[str, ...]:
        """Names of the blocks of a stream, in the order in which they run."""
        layers = enumerate(self.branches)
        return tuple(dict.fromkeys(layer.block for i, layer in layers if self.graph.stream_of(i) == stream))

    def read_at(self, i: int, part: str) -> tuple[str, int]:
        """Where the stream that the queries, keys or values of layer i are made of is seen; see `stream`."""
        if part != "q" and self.graph.layers[i].kind == "cross":
            return "final", self.graph.stream_of(i) - 1
        return "read", i

    def function(self, name: str | None) -> Callable[..., Any]:
        """What the module of that name computes, without its hooks; `unchanged` for None."""
        return unchanged if name is None else self.modules[name].forward

    def mlp(self, i: int, given: Tensor) -> Tensor:
        """What the MLP of layer i makes of what it is given behind its norm, without hooks."""
        for name in self.layers[i].mlp or ():
            output = self.modules[name].forward(given)
            given = output if isinstance(output, Tensor) else output[0]
        return given


@dataclass(frozen=True)
class _Known:
    """An anatomy with what it was found by and from; `inputs` is a digest."""

    find: Callable[[Workbench, Mapping[str, Any]], Anatomy]
    inputs: str
    sites: tuple[Site, ...]
    anatomy: Anatomy


_known: weakref.WeakKeyDictionary[Workbench, list[_Known]] = weakref.WeakKeyDictionary()


def find_anatomy(wb: Workbench, inputs: Mapping[str, Any]) -> Anatomy:
    """The layers of an attached model, found with one small input; what was found before, while it holds (`still`).

    Args:
        inputs: model inputs; their first example is enough.

    Raises:
        AttachError: the residual stream of the model is not the sum of what heads and MLPs write, or something else
            stands in the way; the module is named.
    """
    return still(_find, wb, one_example(inputs))


def still(
    find: Callable[[Workbench, Mapping[str, Any]], Anatomy], wb: Workbench, example: Mapping[str, Any]
) -> Anatomy:
    """What `find` has found on this Workbench with this example, if it holds still, else what it finds now.

    It holds while the sites and the modules are the same ones and one forward gives the same logits to the bit: other
    weights, hooks, functions, casts or devices show there. It is kept no longer than the Workbench.
    """
    check_not_compiled(wb.model)
    kept, inputs, sites = _known.setdefault(wb, []), about(example), tuple(wb.sites)
    for one in kept:
        if (
            (one.find, one.inputs, one.sites) == (find, inputs, sites)
            and one.anatomy.modules == dict(wb.model.named_modules())
            and one.anatomy.answer == _answer(wb.model, example)
        ):
            return one.anatomy
    anatomy = find(wb, example)
    others = [one for one in kept if (one.find, one.inputs) != (find, inputs)]
    _known[wb] = [*others, _Known(find, inputs, sites, anatomy)][-_MOST:]
    return anatomy


def _answer(model: nn.Module, example: Mapping[str, Any]) -> str:
    """As `Anatomy.answer`, of a plain forward, with gradients as `record` has them."""
    with torch.enable_grad():
        output = model(**example)
    return answer_of(output if isinstance(output, Tensor) else getattr(output, "logits", None))


def answer_of(logits: Tensor | None) -> str:
    """A digest of logits and of where they are."""
    return f"{getattr(logits, 'device', None)} {about(logits)}"


def _find(wb: Workbench, example: Mapping[str, Any]) -> Anatomy:
    streams, of_site = streams_of(wb)
    blocks = list(of_site.values())
    first = {name: of_site[several[0].name] for name, several in streams.items()}
    seen = record(wb.model, example, set(first.values()))
    layers: list[LayerModules] = []
    shapes: list[Layer] = []
    error, end = 0.0, None
    for name, several in streams.items():
        at = slice(len(layers), len(layers) + len(several))
        chain = LayerFinder(wb.model, seen, name, several, blocks[at], end)
        chain.find()
        layers += chain.layers
        shapes += chain.shapes
        error, end = max(error, chain.error), seen.gave[blocks[at][-1]]
    modules = dict(wb.model.named_modules())
    lengths = tuple(seen.given[block].shape[1] for block in first.values())
    graph = Graph(tuple(shapes), d_model=seen.gave[blocks[-1]].shape[-1])
    return Anatomy(
        graph, tuple(layers), find_head(seen), error, lengths, seen.precision, modules, tuple(layers),
        answer_of(seen.logits),
    )  # fmt: skip


def one_example(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The first example of model inputs."""
    return {name: value[:1] if isinstance(value, Tensor) and value.dim() else value for name, value in inputs.items()}


def streams_of(wb: Workbench) -> tuple[dict[str, list[Site]], dict[str, str]]:
    """The attention sites of each residual stream, and the block of each site by its name.

    Raises:
        AttachError: there is no such stream, or an attention in no block.
    """
    streams = _streams(wb)
    blocks: dict[str, str] = {}
    for site in (site for several in streams.values() for site in several):
        block = block_of(wb.model, wb.sites, site.name)
        if not block:
            raise AttachError("the site is in no block of a list of blocks", site=site.name)
        blocks[site.name] = block
    only = streams.get("")
    if only is not None and any(beside(only, [blocks[site.name] for site in only])):
        streams = {"blocks": only}  # a layer's number alone does not say which of its sites a head is of
    return streams, blocks


def _streams(wb: Workbench) -> dict[str, list[Site]]:
    """The attention sites of each residual stream: one, or those of an encoder and of a decoder."""
    for site in wb.sites:
        if site.kind not in ("self", "window", "cross", "state"):
            raise AttachError(
                f'circuits need heads that move positions of the stream, this site is of kind "{site.kind}"',
                site=site.name,
                hint="what mixes channels, learned memories or pooled keys is no such head",
            )
    towers: dict[str, list[Site]] = {}
    for site in wb.sites:
        towers.setdefault(site.tower, []).append(site)
    crossing = [name for name, sites in towers.items() if any(site.kind == "cross" for site in sites)]
    if len(towers) == 1 and not crossing:
        return {"": list(wb.sites)}
    if len(towers) == 2 and len(crossing) == 1:
        decoder = crossing[0]
        return {name: towers[name] for name in sorted(towers, key=lambda name: name == decoder)}
    raise AttachError(
        f"circuits are found in decoders, and in encoder-decoders that are joined by cross-attention; this model has "
        f"the towers {', '.join(sorted(tower or 'blocks' for tower in towers))}, with cross-attention in "
        f"{', '.join(crossing) or 'none'}",
        hint="attach to one of them alone",
    )


def find_head(seen: Recording) -> str | None:
    """The last module whose output is the logits."""
    for name in reversed(seen.order):
        given = seen.given.get(name)  # none of a model inside a wrapper, such as one of adapters, that passes names
        if (
            given is not None
            and equal(seen.gave.get(name), seen.logits)
            and given.shape[:2] == seen.gave[name].shape[:2]
        ):
            return name
    last = [n for n in seen.order if n in seen.gave and seen.gave[n].shape == getattr(seen.logits, "shape", None)]
    if not last:
        return None
    behind = seen.order[len(seen.order) - seen.order[::-1].index(last[-1]) :]
    # What the logits are made of by more than a scale or a cap is no head, though an MLP may be as wide.
    return last[-1] if all(last[-1].startswith(f"{name}.") for name in behind) else None
