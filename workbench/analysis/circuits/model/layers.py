"""Finds the layers of one residual stream in a recorded forward.

By value: which columns of which linear module are the queries of a head (those with a gradient from its call), which
module joins the heads, which one is added to the stream beside them, and which norm lies between the stream and each
reader. A layer is one attention and the MLP behind it, if there is one: a block of a decoder with cross-attention is
two layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from workbench.analysis.circuits.model.joints import Joint, call_of, factors_of, find_joint
from workbench.analysis.circuits.model.modules import LayerModules, Projection, beside, times
from workbench.analysis.circuits.model.nodes import Layer
from workbench.analysis.circuits.model.reasons import INSTEAD, two_mixers, why_no_sum
from workbench.analysis.circuits.model.recording import (
    Recording,
    equal,
    factors_between,
    same_product,
    same_sum,
)
from workbench.errors import AttachError, CaptureError
from workbench.hooks.projections import is_conv1d, projection_slices
from workbench.hooks.sites import Site
from workbench.hooks.tap import AttentionCall


class LayerFinder:
    """The layers of one stream, found one after another."""

    def __init__(
        self, model: nn.Module, seen: Recording, name: str, sites: Sequence[Site], blocks: Sequence[str],
        source: Tensor | None,
    ) -> None:  # fmt: skip
        """`source` is what the stream before this one is in the end."""
        self.model, self.seen, self.name = model, seen, name
        self.sites, self.blocks, self.source = sites, blocks, source
        self.layers: list[LayerModules] = []
        self.shapes: list[Layer] = []
        self.error = 0.0

    def find(self) -> None:
        """Fill `layers`, `shapes` and `error`."""
        seen, blocks = self.seen, self.blocks
        stream, side = seen.given[blocks[0]], beside(self.sites, blocks)
        reads, factors = stream, [1.0] * len(blocks)
        # What the stream should be, as the model adds it up, and how large what was added is, number by number. Each
        # block is compared for itself, so that roundings do not add up over many.
        total = size = torch.zeros_like(stream)
        whole = stream.double()  # the sum of all senders
        for i, (site, block) in enumerate(zip(self.sites, blocks, strict=True)):
            if i == 0 or block != blocks[i - 1]:
                if block in blocks[:i]:
                    raise AttachError(f"the block {block} ran again after others", site=site.name)
                if i:
                    self._compare_sum(total, seen.given[block], size, f"the input of {block}")
                stream = total = seen.given[block]
                size = stream.abs()
                several = 1 + next((n for n, same in enumerate(side[i + 1 :]) if not same), len(blocks) - i - 1)
                factors[i : i + several] = factors_of(seen, self.sites[i : i + several], block)
            elif not side[i] and (self.layers[-1].mlp or site.kind != "cross" or self.sites[i - 1].kind == "cross"):
                raise AttachError(
                    two_mixers(seen, block, self.sites[i - 1].name, site.name), site=site.name, hint=INSTEAD
                )
            last = i + 1 == len(blocks) or blocks[i + 1] != block
            after = None if not last else seen.given[blocks[i + 1]] if i + 1 < len(blocks) else seen.gave[block]
            joint = find_joint(seen, site)
            reads = reads if side[i] else stream
            modules, shape = self._layer(site, block, joint, reads, (stream, size), after, factors[i])
            self.layers.append(modules)
            self.shapes.append(replace(shape, beside=side[i]))
            w_o = projection_slices(modules.out_module, modules.n_heads, modules.width)
            check_written(seen, site, modules.out, w_o, modules.out_module, joint.heads)
            written = [
                times(seen.gave[modules.out], factors[i]),
                *(modules.added_by_mlp(seen.gave[name]) for name in (modules.mlp or ())[-1:]),
            ]
            stream = stream + written[0]
            for each in written:
                total, size, whole = total + each, size + each.abs(), whole + each.double()
        self._compare_sum(total, seen.gave[blocks[-1]], size, f"the output of {blocks[-1]}")
        self.error = _far(whole, seen.gave[blocks[-1]])

    def _compare_sum(self, total: Tensor, given: Tensor, size: Tensor, where: str) -> None:
        if not same_sum(given, total, size, self.seen.eps):
            raise AttachError(
                f"{where} is not the sum of what was written to the residual stream: {_far(given, total):.1e} of its "
                f"largest number off, in {self.seen.precision}",
                hint="a scale, a norm on the stream, or a module outside of the blocks changes it",
            )

    def _layer(
        self,
        site: Site,
        block: str,
        joint: Joint,
        reads: Tensor,
        to: tuple[Tensor, Tensor],
        after: Tensor | None,
        factor: float,
    ) -> tuple[LayerModules, Layer]:
        """One layer.

        Args:
            reads: the stream that its heads read. to: to which they add, other than `reads` beside others, and its size
                as of `same_sum`.
            after: behind its MLP; None if it has none. factor: of what they add.
        """
        seen = self.seen
        call_of(seen, site)
        if seen.times.get(block, 0) != 1:
            raise AttachError(f"the block {block} ran {seen.times.get(block, 0)} times in one forward", site=site.name)
        n_heads, width = joint.heads.shape[2:]
        try:
            projection_slices(joint.module, n_heads, width)
        except CaptureError as error:
            raise AttachError(f"{joint.name}: {error.message}", site=site.name, hint=error.hint) from None
        projections = {part: self._projection(site, block, part, reads) for part in "qkv" if not joint.mixer}
        mixer_norm = self._mixer_norm(site, block, reads) if joint.mixer else None
        attention, (before, size) = times(seen.gave[joint.name], factor), to
        mlp, mlp_norm, mlp_factor, parallel = None, None, 1.0, False
        last = None
        if after is not None:
            last = find_mlp(seen, site, block, before, attention, after, joint.name, added=size, scaled=True)
        if last is not None:
            behind = (before + attention, size + attention.abs())
            name, mlp_factor = last
            mlp, mlp_norm, read = self._mlp(site, block, name, (behind, (reads, reads.abs())))
            parallel = read == 1
        n_kv = n_heads if joint.mixer else projections["k"].columns.shape[0]
        mixer = site.name if joint.mixer else None
        found = LayerModules(
            block, site, joint.name, mlp, projections, joint.module, width, n_heads, mlp_norm, mixer, mixer_norm,
            mlp_factor, factor=factor,
        )  # fmt: skip
        kind = site.kind if site.kind == "cross" or (site.kind == "state" and self.blocks.count(block) > 1) else "self"
        return found, Layer(n_heads, n_kv, mlp is not None, parallel, kind, self.name, joint.mixer)

    def _mixer_norm(self, site: Site, block: str, before: Tensor) -> str | None:
        """The norm through which a mixer reads the stream; None if it reads it as it is."""
        norms = [norm for given, norm in _streams_of(self.seen, f"{block}.", site.name) if equal(given, before)]
        if not norms or site.kind == "cross":
            what = (
                "has a gate"
                if site.kind == "cross"
                else "does not read the block's input, as it is or through one norm"
            )
            raise AttachError(f"this {site.kind} site {what}", site=site.name, hint=INSTEAD)
        return norms[0]

    def _mlp(
        self, site: Site, block: str, last: str, streams: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[tuple[str, ...], str | None, int]:
        """The modules of an MLP from its last one back, the norm before them, and which of the streams it reads.

        Args:
            streams: with their sizes.
        """
        seen, chain = self.seen, [last]
        while True:
            for given, norm in _streams_of(seen, f"{block}.", chain[0]):
                for which, (stream, size) in enumerate(streams):
                    if same_sum(given, stream, size, seen.eps):
                        self._compare_mlp(chain)
                        return tuple(chain), norm, which
            before = [name for given, name in _streams_of(seen, f"{block}.", chain[0], any_width=True)[1:] if name]
            if not before or min(before, key=_depth) in chain:
                raise AttachError(
                    f"{chain[0]} reads neither the block's input nor that plus the heads' output",
                    site=site.name,
                    hint=f"is there a norm after the attention, or does the MLP add the stream (BLOOM)? {INSTEAD}",
                )
            chain.insert(0, min(before, key=_depth))

    def _compare_mlp(self, chain: Sequence[str]) -> None:
        """Run them on all positions but the first: they have to work on each position alone."""
        made, gave = self.seen.given[chain[0]][:, 1:], self.seen.gave[chain[-1]][:, 1:]
        with torch.no_grad():
            for name in chain:
                output = self.model.get_submodule(name).forward(made)
                made = output if isinstance(output, Tensor) else output[0]
        if not same_product(gave, made, self.seen.eps):
            raise AttachError(
                f"{', '.join(chain)} give something else when the first position is left out",
                hint="circuits need MLPs that work on each position alone",
            )

    def _projection(self, site: Site, block: str, part: str, before: Tensor) -> Projection:
        if site.kind != "cross" or part == "q":
            return find_projection(self.model, self.seen, site, part, before, f"{block}.", "the block's input")
        if self.source is None:
            raise AttachError("there is no encoder whose stream the keys and values could read", site=site.name)
        return find_projection(self.model, self.seen, site, part, self.source, "", "what the encoder's blocks give")


def find_projection(
    model: nn.Module, seen: Recording, site: Site, part: str, stream: Tensor, scope: str, source: str
) -> Projection:
    """Which columns of which linear module a site's queries, keys or values are, and what lies before it.

    Args:
        stream: what it has to read, as it is or through one norm. scope: how the names of modules between them begin.
        source: what the stream is called.

    Raises:
        AttachError: it reads something else, or the columns are not each head's own.
    """
    name, columns = _columns(model, seen, site, call_of(seen, site), part)
    norms = [norm for given, norm in _streams_of(seen, scope, name) if equal(given, stream)]
    if not norms:
        raise AttachError(
            f"{name} does not read {source}, as it is or through one norm, for the {_SPELLED[part]}",
            site=site.name,
            hint=f"a norm after the attention, or another projection, stands in the way; {INSTEAD}",
        )
    return Projection(name, model.get_submodule(name), columns, norms[0])


def check_written(
    seen: Recording, site: Site, out: str, w_o: Tensor, out_module: nn.Module, heads: Tensor | None = None
) -> None:
    """Refuse heads that do not give what their projection `out` gave.

    Args:
        w_o: [head, width, d_model]. heads: [batch, position, head, width], by default z.
    """
    given = call_of(seen, site).z().detach().transpose(1, 2) if heads is None else heads
    written = torch.einsum("bqhw,hwd->bqd", given.double(), w_o.double())
    bias = getattr(out_module, "bias", None)
    written = written if bias is None else written + bias.detach().double()
    if not same_product(seen.gave[out], written, seen.eps):
        raise AttachError(
            f"the output of {out} is not the sum of what its heads write",
            site=site.name,
            hint="does something happen to the heads' output before it is projected?",
        )


def _columns(model: nn.Module, seen: Recording, site: Site, call: AttentionCall, part: str) -> tuple[str, Tensor]:
    """The linear module that gives the heads' queries, keys or values, and [head or group, width] of its columns.

    They are those that have a gradient from what the kernel was given.
    """
    modules = {name: model.get_submodule(name) for name in seen.gave if name.startswith(f"{site.name}.")}
    linear = [n for n, module in modules.items() if isinstance(module, nn.Linear) or is_conv1d(module)]
    linear = [name for name in linear if seen.live[name].requires_grad]
    shown = call.v if part == "v" else call.weights if call.weights is not None else call.q if part == "q" else call.k
    if not linear or shown is None or not shown.requires_grad:
        raise AttachError(
            f"no linear module inside the attention gives its {_SPELLED[part]}", site=site.name,
            hint="PyTorch's own attention modules join their projections; these cannot be told apart",
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
        raise AttachError(
            f"the queries of several heads come from the same columns of {name}: a norm over all heads (OLMo 2), say, "
            "so that no head's queries are its own",
            site=site.name, hint=INSTEAD,
        )  # fmt: skip
    if len({len(columns) for columns in distinct}) != 1 or len(torch.cat(distinct).unique()) != sum(map(len, distinct)):
        raise AttachError(f"the {_SPELLED[part]} of {name} cannot be cut into heads", site=site.name)
    return name, torch.stack(distinct)


def _touched(gradient: Tensor, part: str) -> Tensor:
    """Columns with a gradient [batch, position, column]; for a row of written-out weights, those of its q or k.

    The query of the last row is that position's alone, its keys are those of all positions.
    """
    alive = gradient.flatten(0, -3) != 0 if gradient.dim() > 3 else gradient != 0
    anywhere, before = alive.flatten(0, -2).any(0), alive[:, :-1].flatten(0, 1).any(0)
    chosen = anywhere & ~before if part == "q" else before if part == "k" else anywhere
    return chosen.nonzero()[:, 0]


_SPELLED = {"q": "queries", "k": "keys", "v": "values"}


def _streams_of(seen: Recording, scope: str, reader: str, any_width: bool = False) -> list[tuple[Tensor, str | None]]:
    """What a module may be said to read: its input, and what modules whose names begin with `scope` made this from.

    These leave the shape as it is, as norms do, unless `any_width`.
    """
    given = seen.given.get(reader)
    if given is None:
        raise AttachError(f"{reader} was given no tensor [batch, position, d_model]")
    found: list[tuple[Tensor, str | None]] = [(given, None)]
    for name in seen.order:
        inside = name.startswith(scope) and not reader.startswith(f"{name}.") and name != reader
        inside = inside and seen.times[name] == 1
        if not inside or not equal(seen.gave.get(name), given) or equal(seen.given.get(name), given):
            continue
        source = seen.given.get(name)
        if source is not None and (any_width or source.shape == given.shape):
            found.append((source, name))
    return found


def find_mlp(
    seen: Recording, site: Site | None, block: str, before: Tensor, attention: Tensor, after: Tensor, out: str = "",
    *, added: Tensor | None = None, scaled: bool = False,
) -> tuple[str, float] | None:  # fmt: skip
    """The outermost module of a block whose output, times a factor, is what the heads do not add to the stream.

    Args:
        site: of the heads; None where there are none. before, after: the stream. attention: what they add to it.
        out: what joins them. added: the size of `before`, as of `same_sum`.
        scaled: whether the factor may be another than 1.
    """
    own = "" if site is None else site.name
    stream, size = before + attention, (before.abs() if added is None else added) + attention.abs()
    if same_sum(after, stream, size, seen.eps):
        return None
    fitting: list[tuple[str, float]] = []
    other: list[tuple[str, float]] = []
    for name in dict.fromkeys(seen.order):
        holds_attention = own and (own.startswith(f"{name}.") or name == own or name.startswith(f"{own}."))
        if not name.startswith(f"{block}.") or holds_attention or name == out or seen.times[name] > 1:
            continue
        gave = seen.gave.get(name)
        if gave is None or gave.shape != after.shape:
            continue
        if same_sum(after, stream + gave, size + gave.abs(), seen.eps):
            fitting.append((name, 1.0))
        elif scaled and (factor := factors_between(stream, gave[..., None], after, seen.eps)) is not None:
            other.append((name, float(factor)))
    if not (fitting or other):
        raise AttachError(
            f"the block {block} adds something to the residual stream that is neither its heads' output nor that of "
            f"one module, in {seen.precision}: {why_no_sum(seen, own, block, before, attention, after, out)}",
            site=own or None,
            hint=INSTEAD,
        )
    return min(fitting or other, key=lambda each: _depth(each[0]))


def _depth(name: str) -> int:
    return name.count(".")


def _far(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    if a.shape != b.shape:
        return float("inf")
    return float((a.double() - b.double()).abs().max()) / max(float(b.abs().max()), 1e-12)
