"""What writes to the residual stream whose end the logits are read from: the input, heads, MLPs; found by value.

Wider than the graph of circuits: nothing that reads the stream is needed, so that projections of queries and keys may
be anything, and what heads write may go through a norm of its own (Gemma 2, OLMo 2), which is then frozen too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn

from workbench.analysis.circuits.model.joints import Joint, find_joint, only_call
from workbench.analysis.circuits.model.layers import check_written, find_mlp
from workbench.analysis.circuits.model.recording import Recording, check_batch_first, record, same_sum
from workbench.analysis.logits.factors import find_factors
from workbench.analysis.logits.norms import Norm, find_norm
from workbench.analysis.logits.readout import Readout, find_readout
from workbench.errors import AttachError, CaptureError
from workbench.hooks.heads import block_of
from workbench.hooks.projections import projection_slices
from workbench.hooks.sites import Site
from workbench.session.workbench import Workbench

_TABLES = 6  # modules before the blocks among which the parts of the input are looked for


@dataclass(frozen=True)
class Heads:
    """The heads of a site.

    Attributes:
        out: name of the module that joins them. norm: that lies between it and the stream, if one does.
        factor: by which the model multiplies what they write before it adds it to the stream.
        plain: whether their outputs enter it as they are, and not behind a gate, or norm and skip of a recurrence.
    """

    site: Site
    block: str
    out: str
    out_module: nn.Module
    n_heads: int
    norm: Norm | None
    plain: bool
    factor: float = 1.0

    @property
    def written(self) -> str:
        """Name of the module whose output, times the factor, is added to the stream."""
        return self.out if self.norm is None else self.norm.name

    @property
    def w_o(self) -> Tensor:
        """[head, width, d_model] in float64.

        Raises:
            CaptureError: the weights are quantized or offloaded to where they cannot be read.
        """
        return slices(self.site, self.out, self.out_module, self.n_heads).double()


@dataclass(frozen=True)
class Beside:
    """The module of a block that writes beside its heads, and by what the model multiplies its output."""

    name: str
    factor: float = 1.0


@dataclass(frozen=True)
class Writers:
    """The parts of one residual stream, in the order in which they write.

    Attributes:
        blocks: names, in order. heads: by site. mlps: for each block the module that writes beside its heads, or None.
        tables: modules whose outputs make the input of the first block; () where it is not known to be a sum.
    """

    blocks: tuple[str, ...]
    heads: tuple[Heads, ...]
    mlps: Mapping[str, Beside | None]
    tables: tuple[str, ...]
    readout: Readout
    precision: str


def slices(site: Site, name: str, module: nn.Module, n_heads: int) -> Tensor:
    """[head, width, d_model] of the module that joins the heads of a site.

    Raises:
        AttachError: it cannot be cut into heads, or read.
    """
    weight: Any = module.weight
    inputs = int(getattr(module, "in_features", 0) or getattr(module, "nx", 0) or weight.shape[0])
    try:
        return projection_slices(module, n_heads, inputs // n_heads)
    except CaptureError as error:
        raise AttachError(f"{name}: {error.message}", site=site.name, hint=error.hint) from None


def towers(wb: Workbench) -> list[tuple[list[Site], list[str]]]:
    """Sites and blocks of each tower, the last one first.

    Raises:
        AttachError: attention outside of a list of blocks.
    """
    found: dict[str, list[Site]] = {}
    for site in wb.sites:
        found.setdefault(site.tower, []).append(site)
    if not found:
        raise AttachError("no attention of the model is read, so that no blocks are known",
                          hint="wb.sites tells what mixes tokens unread, and why")  # fmt: skip
    crossing = [name for name, sites in found.items() if any(site.kind == "cross" for site in sites)]
    order = sorted(found, key=lambda name: (name in crossing, list(found).index(name)), reverse=True)
    result = []
    for name in order:
        blocks = [block_of(wb.model, wb.sites, site.name) for site in found[name]]
        for site, block in zip(found[name], blocks, strict=True):
            if not block:
                raise AttachError("the attention is in no block of a list of blocks", site=site.name)
        result.append((found[name], blocks))
    return result


def find_readout_of(
    wb: Workbench, inputs: Mapping[str, Any], *, with_gradients: bool = False
) -> tuple[Recording, list[Site], list[str], Readout]:
    """A recorded forward, and the tower whose last block the logits are read from: sites, and for each its block.

    Args:
        with_gradients: from the input of each tower's first block on, also where the weights have none.

    Raises:
        AttachError: the final norm or the output projection cannot be found.
    """
    several = towers(wb)
    seen = record(wb.model, inputs, {blocks[0] for _, blocks in several} if with_gradients else ())
    errors = []
    for sites, blocks in several:
        own = all_blocks(wb.model, seen, blocks)
        if own[-1] not in seen.gave or any(seen.times.get(block, 0) != 1 for block in own):
            errors.append(AttachError(f"the block {own[-1]} did not run once in a forward", site=sites[-1].name))
            continue
        check_batch_first(seen, own[0])
        try:
            return seen, sites, blocks, find_readout(wb.model, seen, own[-1])
        except AttachError as error:
            errors.append(error)
    raise errors[0]


def all_blocks(model: nn.Module, seen: Recording, blocks: Sequence[str]) -> tuple[str, ...]:
    """The blocks of the list that these are in, in the order in which they ran: those without attention too."""
    lists = {block.rpartition(".")[0] for block in blocks}
    if len(lists) > 1 or not isinstance(model.get_submodule(next(iter(lists))), nn.ModuleList):
        return tuple(dict.fromkeys(blocks))
    return tuple(name for name in dict.fromkeys(seen.order) if name.rpartition(".")[0] in lists)


def find_writers(wb: Workbench, inputs: Mapping[str, Any]) -> Writers:
    """All that writes to the stream that the logits are read from.

    Args:
        inputs: model inputs, short ones.

    Raises:
        AttachError: the stream is not the sum of what heads and MLPs write, in a way that is named.
    """
    return writers_in(wb, *find_readout_of(wb, inputs))


def writers_in(
    wb: Workbench, seen: Recording, sites: Sequence[Site], blocks: Sequence[str], readout: Readout
) -> Writers:
    """All that writes to a stream, from what `find_readout_of` gives."""
    names = all_blocks(wb.model, seen, blocks)
    heads: list[Heads] = []
    mlps: dict[str, Beside | None] = {}
    before = seen.given[names[0]]
    for block in names:
        if not same_sum(seen.given[block], before, before.abs(), seen.eps):
            raise AttachError(f"what {block} reads is not what the block before it gave", hint="a module between them?")
        own = [site for site, at in zip(sites, blocks, strict=True) if at == block]
        found, mlp = writers_of_block(wb.model, seen, own, block)
        heads += found
        mlps[block] = mlp
        before = seen.gave[block]
    return Writers(names, tuple(heads), mlps, _tables(seen, names[0]), readout, seen.precision)


def joins_of(seen: Recording, sites: Sequence[Site]) -> list[Joint]:
    """For each site the module that joins its heads, and what they give to it.

    Raises:
        AttachError: it was not found, does not give what its heads write, or cannot be read.
    """
    joints: list[Joint] = []
    for site in sites:
        joint = find_joint(seen, site)
        if joint.name not in seen.gave:
            raise AttachError(
                f"{joint.name} joins the heads without being called, so that what it gives is not seen",
                site=site.name,
                hint="PyTorch's own attention modules apply their projection themselves",
            )
        w_o = slices(site, joint.name, joint.module, joint.n_heads)
        check_written(seen, site, joint.name, w_o, joint.module, joint.heads)
        joints.append(joint)
    return joints


def plain_joins_of(seen: Recording, sites: Sequence[Site]) -> list[Joint]:
    """As `joins_of`, of heads whose outputs enter their projection as they are.

    Raises:
        AttachError: as `joins_of` does; or something that depends on the query lies between.
    """
    joints = joins_of(seen, sites)
    for site, joint in zip(sites, joints, strict=True):
        if joint.mixer:
            recurrent = only_call(seen, site).finish is not None
            raise AttachError(
                f"{'the norm, gate or skip of the module' if recurrent else 'a gate'} lies between what the heads mix "
                f"and {joint.name}, other numbers for each query: what a key writes is not one vector for all queries",
                site=site.name,
                hint="logit_attribution, and a capture's result(), have what heads write; their patterns are there too",
            )
    return joints


def writers_of_block(
    model: nn.Module, seen: Recording, sites: Sequence[Site], block: str
) -> tuple[list[Heads], Beside | None]:
    """The heads of a block by site, and the module that writes beside them, or None.

    Raises:
        AttachError: what the block gives is not its input plus what these write, nor plus that times numbers.
    """
    joins = joins_of(seen, sites)
    behind, factors, beside = _sum_of_block(seen, sites, block, joins)
    found = []
    for site, joint, last, factor in zip(sites, joins, behind, factors, strict=True):
        norm = None
        if last != joint.name:
            norm = find_norm(last, model.get_submodule(last), seen.gave[joint.name], seen.gave[last], seen.eps)
        found.append(Heads(site, block, joint.name, joint.module, joint.n_heads, norm, not joint.mixer, factor))
    return found, beside


def _sum_of_block(
    seen: Recording, sites: Sequence[Site], block: str, joins: Sequence[Joint]
) -> tuple[Sequence[str], list[float], Beside | None]:
    """The modules whose outputs a block adds to the stream for each attention, their factors, and what is beside them.

    Raises:
        AttachError: there are none such.
    """
    seen = replace(seen, gave={**seen.flat, **seen.gave})
    before, after = seen.given[block], seen.gave[block]
    first: AttachError | None = None
    ways = list(product(*(_norms_behind(seen, block, joint.name) for joint in joins)))
    for behind in ways:
        written = sum((seen.gave[name] for name in behind), start=torch.zeros_like(before))
        try:
            mlp = find_mlp(seen, sites[-1] if sites else None, block, before, written, after, *behind[-1:])
        except AttachError as error:
            first = first or error
            continue
        return behind, [1.0] * len(behind), None if mlp is None else Beside(*mlp)
    for behind in ways:
        if (found := find_factors(seen, sites, block, behind)) is not None:
            factors, mlp_and_factor = found
            return behind, factors, None if mlp_and_factor is None else Beside(*mlp_and_factor)
    assert first is not None
    raise first


def _norms_behind(seen: Recording, block: str, out: str) -> list[str]:
    """The module that joins the heads, and those of the block that read exactly what it gives."""
    gave = seen.gave[out]
    found = [out]
    for name in seen.order:
        given = seen.given.get(name)
        if not name.startswith(f"{block}.") or name == out or given is None or seen.times[name] != 1:
            continue
        made = seen.gave.get(name)
        if made is not None and made.shape == gave.shape and torch.equal(given, gave) and not torch.equal(made, gave):
            found.append(name)
    return found


def _tables(seen: Recording, block: str) -> tuple[str, ...]:
    """The modules before the blocks whose outputs are the input of the first, or add up to it."""
    given, inside = seen.given[block], block.rpartition(".")[0]
    found: list[str] = []
    for name in seen.order:
        gave = seen.gave.get(name)
        if name.startswith(f"{inside}.") or f"{block}.".startswith(f"{name}.") or gave is None or seen.times[name] > 1:
            continue
        given_it = seen.given.get(name)
        if given_it is not None and torch.equal(given_it, gave):  # dropout, which is no table
            continue
        fits = gave.shape[1:] == given.shape[1:] and gave.shape[0] in (1, given.shape[0])
        if fits and not any(torch.equal(gave, seen.gave[other]) for other in found):
            found.append(name)
    found = found[:_TABLES]
    for size in (1, 2, 3):
        for several in combinations(found, size):
            parts = [seen.gave[name].expand_as(given) for name in several]
            total, large = sum(parts[1:], parts[0]), sum((part.abs() for part in parts[1:]), parts[0].abs())
            if same_sum(given, total, large, seen.eps):
                return several
    return ()
