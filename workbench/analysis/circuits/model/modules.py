"""The modules that a layer of a model is made of: where its heads and its MLP read the stream, and where they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from workbench.errors import AttachError, CaptureError
from workbench.hooks.projections import is_conv1d, projection_slices
from workbench.hooks.sites import Site
from workbench.hooks.weights import matrix


@dataclass(frozen=True)
class Projection:
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
        """[head, width, d_model].

        Raises:
            AttachError: it is quantized or offloaded to where it cannot be read.
        """
        try:
            weight = matrix(self.module)
        except CaptureError as error:
            raise AttachError(f"{self.name}: {error.message}", hint=error.hint) from None
        chosen: Tensor = (weight.T if is_conv1d(self.module) else weight)[self.columns.to(weight.device)]
        return chosen

    @property
    def bias(self) -> Tensor | None:
        """[head, width]; None for a module without one."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()[self.columns]


@dataclass(frozen=True)
class Branches:
    """What one attention, and the MLP behind it, add to the stream.

    Attributes:
        block: name of the block; two layers may share one. site: the attention.
        out: name of the module that gives what the attention adds; "" where there is none.
        mlp: name of the MLP, or those of the modules in a row that make it; None if there is none.
        factor: what the output of `out` is multiplied by before it is added to the stream.
    """

    block: str
    site: Site
    out: str
    mlp: tuple[str, ...] | None
    factor: float = field(default=1.0, kw_only=True)


@dataclass(frozen=True)
class LayerModules(Branches):
    """The modules of one layer, whose heads and MLP read and write the stream by themselves.

    Attributes:
        out: joins the heads. width: of a head's output.
        projections: of the queries "q", keys "k" and values "v"; none where all heads read the stream through one door.
        mlp_norm: as in `Projection`.
        mixer: name of the module that reads the stream for all heads, if one does. mixer_norm: as in `Projection`.
        mlp_factor: as `factor`, of what the MLP gives.
    """

    projections: Mapping[str, Projection]
    out_module: nn.Module
    width: int
    n_heads: int
    mlp_norm: str | None
    mixer: str | None = None
    mixer_norm: str | None = None
    mlp_factor: float = 1.0

    @property
    def reader(self) -> str:
        """Name of the module that the heads read the stream by: a norm, or what their queries are made by."""
        if self.mixer is not None:
            return self.mixer_norm or self.mixer
        return self.projections["q"].norm or self.projections["q"].name

    @property
    def w_o(self) -> Tensor:
        """[head, width, d_model] of what is added to the stream."""
        slices = projection_slices(self.out_module, self.n_heads, self.width)
        return times(slices, self.factor)

    def added_by_mlp(self, gave: Tensor) -> Tensor:
        """What is added to the stream where the MLP gives this."""
        return times(gave, self.mlp_factor)


def times(tensor: Tensor, factor: float) -> Tensor:
    """The product; the tensor itself for 1."""
    return tensor if factor == 1.0 else tensor * factor


def unchanged(tensor: Tensor) -> Tensor:
    """The tensor itself: what stands for a norm where there is none."""
    return tensor


def beside(sites: Sequence[Site], blocks: Sequence[str]) -> list[bool]:
    """For each site of a stream whether it mixes positions beside the one before it, in the same block.

    Args:
        blocks: name of the block of each site.
    """
    return [
        i > 0 and blocks[i] == blocks[i - 1] and "cross" not in (site.kind, sites[i - 1].kind)
        for i, site in enumerate(sites)
    ]
