"""The residual stream around each attention: what it is added to, and the norm that follows; found by value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workbench.analysis.circuits.model.recording import Recording, check_batch_first, same_sum
from workbench.analysis.logits.norms import Norm, find_norm
from workbench.analysis.logits.writers import plain_joins_of, slices, writers_of_block
from workbench.errors import AttachError
from workbench.hooks.sites import Site


@dataclass(frozen=True)
class Sublayer:
    """One attention and the sum that it is part of: stream + heads, or norm(stream + heads).

    Attributes:
        out: name of the module that joins the heads.
        behind: the norm between it and the stream (Gemma 2). after: that of stream + heads (BERT); None without.
        factor: by which the model multiplies what is written before it adds it to the stream.
    """

    site: Site
    block: str
    out: str
    out_module: nn.Module
    n_heads: int
    behind: Norm | None
    after: Norm | None
    factor: float = 1.0

    @property
    def written(self) -> str:
        """Name of the module whose output, times the factor, is added to the stream."""
        return self.out if self.behind is None else self.behind.name

    @property
    def norm(self) -> Norm | None:
        """The norm that what heads write goes through, if it does."""
        return self.after or self.behind

    @property
    def w_o(self) -> Tensor:
        """[head, width, d_model] in float64.

        Raises:
            AttachError: the weights are quantized or offloaded to where they cannot be read.
        """
        return slices(self.site, self.out, self.out_module, self.n_heads).double()


def find_sublayers(model: nn.Module, seen: Recording, sites: Sequence[Site], blocks: Sequence[str]) -> list[Sublayer]:
    """The sublayers of one stack of blocks; `blocks` has the name of each site's.

    Raises:
        AttachError: a block adds its heads to the stream in neither of the two ways.
    """
    found: list[Sublayer] = []
    for block in dict.fromkeys(blocks):
        if seen.times.get(block, 0) != 1:
            raise AttachError(f"the block {block} ran {seen.times.get(block, 0)} times in one forward",
                              hint='only method="attention" needs no blocks')  # fmt: skip
        check_batch_first(seen, block)
        own = [site for site, at in zip(sites, blocks, strict=True) if at == block]
        normed = _normed_sums(model, seen, own, block)
        if normed is not None:
            found += normed
            continue
        heads, _ = writers_of_block(model, seen, own, block)
        found += [Sublayer(h.site, block, h.out, h.out_module, h.n_heads, h.norm, None, h.factor) for h in heads]
    return found


def _normed_sums(model: nn.Module, seen: Recording, sites: Sequence[Site], block: str) -> list[Sublayer] | None:
    """The sublayers of a block whose norms are on the stream itself; None if it has none such."""
    stream, found = seen.given[block], []
    for site, joint in zip(sites, plain_joins_of(seen, sites), strict=True):
        norm = _norm_of(model, seen, block, stream, seen.gave[joint.name])
        if norm is None:
            return None
        stream = seen.gave[norm.name]
        found.append(Sublayer(site, block, joint.name, joint.module, joint.n_heads, None, norm))
    after = seen.gave[block]
    if torch.equal(after, stream):
        return found
    inside = [name for name in seen.order if name.startswith(f"{block}.")]
    ends = any(
        norm is not None and torch.equal(seen.gave[norm.name], after)
        for norm in (_norm_of(model, seen, block, stream, seen.gave[name]) for name in inside if name in seen.gave)
    )
    return found if ends else None


def _norm_of(model: nn.Module, seen: Recording, block: str, stream: Tensor, written: Tensor) -> Norm | None:
    """The norm of a block that reads the stream plus what was written."""
    if written.shape != stream.shape:
        return None
    total, size = stream + written, stream.abs() + written.abs()
    for name in seen.order:
        given, gave = seen.given.get(name), seen.gave.get(name)
        if not name.startswith(f"{block}.") or given is None or gave is None or gave.shape != total.shape:
            continue
        if torch.equal(given, gave) or not same_sum(given, total, size, seen.eps):
            continue
        try:
            return find_norm(name, model.get_submodule(name), given, gave, seen.eps)
        except AttachError:
            continue
    return None
