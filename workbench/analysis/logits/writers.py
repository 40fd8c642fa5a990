"""What writes to the residual stream whose end the logits are read from: the input, heads, MLPs; found by value.

Wider than the graph of circuits: nothing that reads the stream is needed, so that projections of queries and keys may
be anything, and what heads write may go through a norm of its own (Gemma 2, OLMo 2), which is then frozen too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn

from workbench.analysis.circuits.model.layers import check_written, find_mlp
from workbench.analysis.circuits.model.recording import Recording, record, same_sum
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
    """The heads of a site: `out` joins them, and `norm` lies between it and the stream, if one does."""

    site: Site
    block: str
    out: str
    out_module: nn.Module
    n_heads: int
    norm: Norm | None

    @property
    def w_o(self) -> Tensor:
        """[head, width, d_model] in float64.

        Raises:
            CaptureError: the weights are quantized or offloaded to where they cannot be read.
        """
        return slices(self.site, self.out, self.out_module, self.n_heads).double()


@dataclass(frozen=True)
class Writers:
    """The parts of one residual stream, in the order in which they write.

    Attributes:
        blocks: names, in order. heads: by site. mlps: for each block the module that writes beside its heads, or None.
        tables: modules whose outputs make the input of the first block; () where it is not known to be a sum.
    """

    blocks: tuple[str, ...]
    heads: tuple[Heads, ...]
    mlps: Mapping[str, str | None]
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
    """A recorded forward, and the tower whose last block the logits are read from.

    Args:
        with_gradients: from the input of each tower's first block on, also where the weights have none.

    Raises:
        AttachError: the final norm or the output projection cannot be found.
    """
    several = towers(wb)
    seen = record(wb.model, inputs, {blocks[0] for _, blocks in several} if with_gradients else ())
    errors = []
    for sites, blocks in several:
        if blocks[-1] not in seen.gave or any(seen.times.get(block, 0) != 1 for block in blocks):
            errors.append(AttachError(f"the block {blocks[-1]} did not run once in a forward", site=sites[-1].name))
            continue
        try:
            return seen, sites, blocks, find_readout(wb.model, seen, blocks[-1])
        except AttachError as error:
            errors.append(error)
    raise errors[0]


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
    names = tuple(dict.fromkeys(blocks))
    heads: list[Heads] = []
    mlps: dict[str, str | None] = {}
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


def joins_of(seen: Recording, sites: Sequence[Site]) -> list[tuple[str, nn.Module, int]]:
    """For each site the name of the module that joins its heads, the module, and how many heads there are.

    Raises:
        AttachError: it was not found, does not give what its heads write, or cannot be read.
    """
    joins: list[tuple[str, nn.Module, int]] = []
    for site in sites:
        projection, calls = seen.finder.of(site.name), seen.calls.get(site.name, [])
        if len(calls) != 1:
            raise AttachError(f"the site was called {len(calls)} times in one forward, once is needed", site=site.name)
        if projection is None or projection.name not in seen.gave:
            raise AttachError(
                "the module that joins the heads was not found"
                if projection is None
                else f"{projection.name} joins the heads without being called, so that what it gives is not seen",
                site=site.name,
                hint="PyTorch's own attention modules apply their projection themselves"
                if projection is not None
                else "something (a gate, a norm) lies between; its heads have no linear part in the stream",
            )
        if calls[0].shard is not None:
            raise AttachError("parts of the stream need all heads in one process", site=site.name,
                              hint="load the model without tensor parallelism")  # fmt: skip
        n_heads = calls[0].sizes[0]
        check_written(seen, site, projection.name, slices(site, projection.name, projection.module, n_heads),
                      projection.module)  # fmt: skip
        joins.append((projection.name, projection.module, n_heads))
    return joins


def writers_of_block(
    model: nn.Module, seen: Recording, sites: Sequence[Site], block: str
) -> tuple[list[Heads], str | None]:
    """The heads of a block by site, and the module that writes beside them, or None.

    Raises:
        AttachError: what the block gives is not its input plus what these write.
    """
    joins = joins_of(seen, sites)
    before, after = seen.given[block], seen.gave[block]
    first: AttachError | None = None
    for behind in product(*(_norms_behind(seen, block, name) for name, _, _ in joins)):
        written = sum((seen.gave[name] for name in behind), start=torch.zeros_like(before))
        try:
            mlp = find_mlp(seen, sites[-1], block, before, written, after, behind[-1])
        except AttachError as error:
            first = first or error
            continue
        found = []
        for site, (name, module, n_heads), last in zip(sites, joins, behind, strict=True):
            norm = None
            if last != name:
                norm = find_norm(last, model.get_submodule(last), seen.gave[name], seen.gave[last], seen.eps)
            found.append(Heads(site, block, name, module, n_heads, norm))
        return found, mlp
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
