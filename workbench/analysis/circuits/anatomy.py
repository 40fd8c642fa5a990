"""Finds, in any decoder, where heads and MLPs read the residual stream and where they write to it.

Everything is found by value in one small forward: which columns of which linear module are the queries of a head (those
with a gradient from its call), which module joins the heads, which one is added to the stream beside them, and which
norm lies between the stream and each reader. Then the sum of what all senders write is compared with the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.analysis.circuits.graph import Graph, Layer
from workbench.analysis.circuits.recording import Recording, equal, record
from workbench.errors import AttachError, CaptureError
from workbench.heads import block_of
from workbench.hooks.projections import is_conv1d, projection_slices
from workbench.hooks.sites import Site
from workbench.hooks.tap import AttentionCall
from workbench.session import Workbench

_TOLERANCE = 1e-4  # of the largest number in the stream


@dataclass(frozen=True)
class Part:
    """The queries, keys or values of the heads of a layer: columns of a linear module's output.

    Attributes:
        name: of the module. columns: [head or kv group, width].
        norm: name of the module between the residual stream and it; None: it reads the stream itself.
    """

    name: str
    module: nn.Module
    columns: Tensor
    norm: str | None

    @property
    def weight(self) -> Tensor:
        """[head, width, d_model]."""
        weight: Any = self.module.weight
        chosen: Tensor = (weight.T if is_conv1d(self.module) else weight).detach()[self.columns]
        return chosen

    @property
    def bias(self) -> Tensor | None:
        """[head, width]."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()[self.columns]


@dataclass(frozen=True)
class LayerParts:
    """The modules of one layer.

    Attributes:
        block: name of the block. site: its attention.
        parts: "q", "k" and "v".
        out: name of the module that joins the heads. width: of a head's output.
        mlp: name of the MLP, or None. mlp_norm: as in `Part`.
    """

    block: str
    site: Site
    parts: Mapping[str, Part]
    out: str
    out_module: nn.Module
    width: int
    n_heads: int
    mlp: str | None
    mlp_norm: str | None

    @property
    def w_o(self) -> Tensor:
        """[head, width, d_model]."""
        return projection_slices(self.out_module, self.n_heads, self.width)


@dataclass(frozen=True)
class Anatomy:
    """The layers of a model, its graph, and its head.

    Attributes:
        head: name of the module that gives the logits from the last position's vector, if one does so alone.
        error: largest difference between the stream and the sum of the senders, of the largest number in the stream.
    """

    graph: Graph
    layers: tuple[LayerParts, ...]
    head: str | None
    error: float
    modules: Mapping[str, nn.Module] = field(repr=False)

    def function(self, name: str | None) -> Callable[..., Any]:
        """What the module of that name computes, without its hooks; `unchanged` for None."""
        return unchanged if name is None else self.modules[name].forward


def unchanged(tensor: Tensor) -> Tensor:
    """The tensor itself: what stands for a norm where there is none."""
    return tensor


def find_anatomy(wb: Workbench, inputs: Mapping[str, Any]) -> Anatomy:
    """The parts of an attached decoder, found with one small input.

    Args:
        inputs: model inputs; their first example is enough.

    Raises:
        AttachError: the residual stream of the model is not the sum of what heads and MLPs write, or something else
            stands in the way; the module is named.
    """
    sites = _sites(wb)
    blocks = [block_of(wb.model, wb.sites, site.name) for site in sites]
    _check_blocks(sites, blocks)
    small = {
        name: value[:1] if isinstance(value, Tensor) and value.dim() > 0 else value for name, value in inputs.items()
    }
    seen = record(wb.model, small, blocks[0])
    layers, shapes = [], []
    for number, (site, block) in enumerate(zip(sites, blocks, strict=True)):
        after = seen.given[blocks[number + 1]] if number + 1 < len(blocks) else seen.gave[block]
        parts, shape = _layer(wb.model, seen, site, block, after)
        layers.append(parts)
        shapes.append(shape)
    modules = dict(wb.model.named_modules())
    graph = Graph(tuple(shapes), d_model=seen.gave[blocks[-1]].shape[-1])
    return Anatomy(graph, tuple(layers), _head(seen), _check_sums(seen, layers, shapes), modules)


def _sites(wb: Workbench) -> list[Site]:
    towers = {site.tower for site in wb.sites}
    if len(towers) > 1 or any(site.kind == "cross" for site in wb.sites):
        raise AttachError(
            f"circuits are found in decoders; this model has several towers or cross-attention: "
            f"{', '.join(sorted(tower or 'blocks' for tower in towers))}",
            hint="attach to the decoder alone",
        )
    for site in wb.sites:
        if site.kind not in ("self", "window"):
            raise AttachError(
                f'circuits need attention, this site is of kind "{site.kind}"', site=site.name,
                hint="a state-space or channel mixer has no queries and keys that read the stream",
            )  # fmt: skip
    return list(wb.sites)


def _check_blocks(sites: Sequence[Site], blocks: Sequence[str]) -> None:
    for i, (site, block) in enumerate(zip(sites, blocks, strict=True)):
        if not block:
            raise AttachError("the attention is in no block of a list of blocks", site=site.name)
        if block in blocks[:i]:
            raise AttachError(f"the block {block} has two attention modules", site=site.name)


def _layer(model: nn.Module, seen: Recording, site: Site, block: str, after: Tensor) -> tuple[LayerParts, Layer]:
    call = _call(seen, site)
    if seen.times.get(block, 0) != 1:
        raise AttachError(f"the block {block} ran {seen.times.get(block, 0)} times in one forward", site=site.name)
    projection = seen.finder.of(site.name)
    if projection is None:
        raise AttachError(
            "the module that joins the heads was not found: something (a gate, a norm) lies between",
            site=site.name,
            hint="heads of this model have no linear part in the residual stream",
        )
    n_heads, width = call.sizes[0], call.z().shape[-1]
    try:
        projection_slices(projection.module, n_heads, width)
    except CaptureError as error:
        raise AttachError(error.message, site=site.name, hint=error.hint) from None
    parts = {part: _part(model, seen, site, block, call, part) for part in "qkv"}
    before, attention = seen.given[block], seen.gave[projection.name]
    mlp = _mlp(seen, site, block, after - before - attention, projection.name)
    parallel, mlp_norm = False, None
    if mlp is not None:
        read, mlp_norm = _stream_of(seen, block, mlp)
        middle = before + attention
        parallel = _far(read, middle) > _TOLERANCE
        if parallel and _far(read, before) > _TOLERANCE:
            raise AttachError(
                f"{mlp} reads neither the block's input nor that plus the heads' output",
                site=site.name,
                hint="is there a norm after the attention (Gemma 2), or does the MLP add the stream itself (BLOOM)?",
            )
    n_kv = parts["k"].columns.shape[0]
    found = LayerParts(block, site, parts, projection.name, projection.module, width, n_heads, mlp, mlp_norm)
    return found, Layer(n_heads, n_kv, mlp is not None, parallel)


def _call(seen: Recording, site: Site) -> AttentionCall:
    calls = seen.calls.get(site.name, [])
    if len(calls) != 1:
        raise AttachError(f"the site was called {len(calls)} times in one forward, once is needed", site=site.name)
    call = calls[0]
    if call.weights is None and (call.q is None or call.k is None or call.q.dim() != 4):
        raise AttachError("queries and keys are not seen at this site", site=site.name)
    return call


def _part(model: nn.Module, seen: Recording, site: Site, block: str, call: AttentionCall, part: str) -> Part:
    """Which columns of which linear module the heads' queries, keys or values are, from their gradients."""
    modules = {name: model.get_submodule(name) for name in seen.gave if name.startswith(f"{site.name}.")}
    linear = [n for n, module in modules.items() if isinstance(module, nn.Linear) or is_conv1d(module)]
    linear = [name for name in linear if seen.live[name].requires_grad]
    shown = call.v if part == "v" else call.weights if call.weights is not None else call.q if part == "q" else call.k
    if not linear or shown is None or not shown.requires_grad:
        raise AttachError(
            f"no linear module inside the attention gives its {_SPELLED[part]}", site=site.name,
            hint="PyTorch's own attention modules join their projections; there are no parts to be found",
        )  # fmt: skip
    rows_only = call.weights is not None and part != "v"
    generator = torch.Generator().manual_seed(0)
    chosen, name = [], ""
    for head in range(shown.shape[1]):
        with torch.enable_grad():
            values = shown[:, head, -1] if rows_only else shown[:, head]
            noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
            loss = (values * noise.to(values)).sum()
        gradients = torch.autograd.grad(loss, [seen.live[n] for n in linear], retain_graph=True, allow_unused=True)
        touched = {}
        for n, gradient in zip(linear, gradients, strict=True):
            columns = torch.zeros(0) if gradient is None else _touched(gradient, part if rows_only else "")
            if len(columns):
                touched[n] = columns
        if len(touched) != 1 or (name and name not in touched):
            raise AttachError(
                f"the {_SPELLED[part]} of head {head} come from {len(touched)} linear modules"
                f" ({', '.join(touched) or 'none'}), one is needed",
                site=site.name,
                hint="low-rank projections are not supported",
            )
        name = next(iter(touched))
        chosen.append(touched[name])
    distinct: list[Tensor] = []
    for columns in chosen:  # keys that were repeated for their heads before the call
        if not any(torch.equal(columns, other) for other in distinct):
            distinct.append(columns)
    if part == "q" and len(distinct) != len(chosen):
        raise AttachError("two heads share their queries", site=site.name)
    if len({len(columns) for columns in distinct}) != 1 or len(torch.cat(distinct).unique()) != sum(map(len, distinct)):
        raise AttachError(f"the {_SPELLED[part]} of {name} cannot be cut into heads", site=site.name)
    _, norm = _stream_of(seen, block, name, expected=seen.given[block], what=_SPELLED[part])
    return Part(name, model.get_submodule(name), torch.stack(distinct), norm)


def _touched(gradient: Tensor, part: str) -> Tensor:
    """Columns with a gradient [batch, position, column]; for a row of written-out weights, those of its q or k.

    The query of the last row is that position's alone, its keys are those of all positions.
    """
    alive = gradient.flatten(0, -3) != 0 if gradient.dim() > 3 else gradient != 0
    anywhere, before = alive.flatten(0, -2).any(0), alive[:, :-1].flatten(0, 1).any(0)
    chosen = anywhere & ~before if part == "q" else before if part == "k" else anywhere
    return chosen.nonzero()[:, 0]


_SPELLED = {"q": "queries", "k": "keys", "v": "values"}


def _stream_of(
    seen: Recording, block: str, reader: str, expected: Tensor | None = None, what: str = ""
) -> tuple[Tensor, str | None]:
    """The residual stream that a module reads, and the norm on the way to it."""
    given = seen.given.get(reader)
    if given is None:
        raise AttachError(f"{reader} was given no tensor [batch, position, d_model]")
    if expected is not None and equal(given, expected):
        return given, None
    for name in seen.order:
        inside = name.startswith(f"{block}.") and not reader.startswith(f"{name}.") and name != reader
        if not inside or not equal(seen.gave.get(name), given) or equal(seen.given.get(name), given):
            continue
        source = seen.given.get(name)
        if source is None or source.shape != given.shape:
            continue
        if expected is not None and not equal(source, expected):
            continue
        return source, name
    if expected is not None:
        raise AttachError(
            f"{reader} does not read the block's input, as it is or through one norm, for the {what}",
            site=block,
            hint="a norm after the attention (BERT, OLMo 2), or a low-rank projection, stands in the way",
        )
    return given, None


def _mlp(seen: Recording, site: Site, block: str, rest: Tensor, out: str) -> str | None:
    """The outermost module of a block whose output is what the heads do not add to the stream."""
    scale = float(rest.abs().max())
    size = max(float(seen.given[block].abs().max()), 1e-12)
    if scale <= _TOLERANCE * size:
        return None
    fitting = []
    for name in dict.fromkeys(seen.order):
        holds_attention = site.name.startswith(f"{name}.") or name == site.name or name.startswith(f"{site.name}.")
        if not name.startswith(f"{block}.") or holds_attention or name == out:
            continue
        gave = seen.gave.get(name)
        if gave is not None and gave.shape == rest.shape and _far(gave, rest, size) <= _TOLERANCE:
            fitting.append(name)
    if not fitting:
        raise AttachError(
            f"the block {block} adds something to the residual stream that is neither its heads' output nor that of "
            "one module",
            site=site.name,
            hint="a norm after the attention or MLP (Gemma 2, OLMo 2), a scale, or two MLPs: the stream is no sum",
        )
    return min(fitting, key=lambda name: name.count("."))


def _head(seen: Recording) -> str | None:
    """The last module whose output is the logits."""
    for name in reversed(seen.order):
        if equal(seen.gave.get(name), seen.logits) and seen.given[name].shape[:2] == seen.gave[name].shape[:2]:
            return name
    last = [n for n in seen.order if n in seen.gave and seen.gave[n].shape == getattr(seen.logits, "shape", None)]
    return last[-1] if last else None


def _check_sums(seen: Recording, layers: Sequence[LayerParts], shapes: Sequence[Layer]) -> float:
    """Compare the residual stream at each block with the sum of what was written to it."""
    stream = seen.given[layers[0].block].double()
    worst = 0.0
    for i, (layer, shape) in enumerate(zip(layers, shapes, strict=True)):
        given = seen.given[layer.block]
        worst = max(worst, _complain(stream, given, f"the input of {layer.block}"))
        z = _call(seen, layer.site).z().detach().transpose(1, 2).double()
        w_o = layer.w_o.double()
        written = torch.einsum("bqhw,hwd->bqd", z, w_o)
        bias = getattr(layer.out_module, "bias", None)
        written = written if bias is None else written + bias.detach().double()
        worst = max(worst, _complain(written, seen.gave[layer.out], f"the output of {layer.out}"))
        stream = stream + written
        if shape.mlp and layer.mlp is not None:
            stream = stream + seen.gave[layer.mlp].double()
        if i == len(layers) - 1:
            worst = max(worst, _complain(stream, seen.gave[layer.block], f"the output of {layer.block}"))
    return worst


def _complain(total: Tensor, given: Tensor, where: str) -> float:
    far = _far(given, total)
    if far > _TOLERANCE:
        raise AttachError(
            f"{where} is not the sum of what was written to the residual stream: {far:.1e} of its largest number off",
            hint="a scale, a norm on the stream, or a module outside of the blocks changes it",
        )
    return far


def _far(a: Tensor, b: Tensor, size: float | None = None) -> float:
    """Largest difference, relative to the largest number."""
    if a.shape != b.shape:
        return float("inf")
    size = max(float(b.abs().max()), 1e-12) if size is None else size
    return float((a.double() - b.double()).abs().max()) / size
